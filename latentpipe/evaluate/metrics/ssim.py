"""SSIM and MS-SSIM, differentiable: a metric and a loss. Images B 3 H W in any range, given by its width `data_range`."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from latentpipe.utils.errors import UserError

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, finest first; they sum to 1.0001 as published
SMALL = 3  # scales where the sides are too short for all five


def ssim(first: torch.Tensor, second: torch.Tensor, data_range: float) -> torch.Tensor:
    """Structural similarity (B), at most 1, symmetric (Wang, Bovik, Sheikh, Simoncelli, TIP 13, 2004, eq. 13).

    Gaussian window 11 x 11, sigma 1.5, K1 0.01, K2 0.03, population moments, each channel alone, mean over channels and
    over windows that lie inside the picture: scikit-image's value (gaussian_weights, no sample covariance). torchmetrics
    also counts windows over mirrored borders. data_range is 2 for images in [-1, 1]. UserError for sides below 11.
    """
    _check(first, second, 1)
    luminance, contrast = _maps(*_pair(first, second), data_range)
    return (luminance * contrast).mean((1, 2, 3))


def ms_ssim(first: torch.Tensor, second: torch.Tensor, data_range: float, scales: int | None = None) -> torch.Tensor:
    """Multi-scale structural similarity (B), 0 to 1 (Wang, Simoncelli, Bovik, Asilomar 2003, eq. 7).

    Contrast and structure at every scale, luminance at the coarsest, each a mean over channels and windows before it is
    raised to its weight; a negative mean counts as 0. Between scales 2 x 2 means. Left out, `scales` is what `scales_of`
    says; with fewer than five the weights of the first are scaled to sum to 1. UserError for sides below
    11 * 2^(scales - 1).
    """
    scales = scales_of(*first.shape[-2:]) if scales is None else scales
    if not 1 <= scales <= len(WEIGHTS):
        raise UserError(f"MS-SSIM has 1 to {len(WEIGHTS)} scales; given {scales}.")
    _check(first, second, scales)
    weights = WEIGHTS[:scales]
    total = sum(weights) if scales < len(WEIGHTS) else 1.0
    first, second = _pair(first, second)
    result = first.new_ones(len(first))
    for scale, weight in enumerate(weights, 1):
        luminance, contrast = _maps(first, second, data_range)
        term = (luminance * contrast if scale == scales else contrast).mean((1, 2, 3))
        result = result * _power(term, weight / total)
        if scale < scales:
            first, second = F.avg_pool2d(first, 2), F.avg_pool2d(second, 2)
    return result


def scales_of(height: int, width: int) -> int:
    """Five scales where both sides are at least 176, else three; UserError below 44."""
    side = min(height, width)
    if side < _least(SMALL):
        raise UserError(f"MS-SSIM needs sides of {_least(SMALL)} pixels and more; given {height} x {width}. SSIM needs {WINDOW}.")
    return len(WEIGHTS) if side >= _least(len(WEIGHTS)) else SMALL


def ms_ssim_name(height: int, width: int) -> str:
    """What the figure for pictures of this size is called: "MS-SSIM" with five scales, "MS-SSIM-3" with three."""
    scales = scales_of(height, width)
    return "MS-SSIM" if scales == len(WEIGHTS) else f"MS-SSIM-{scales}"


def _least(scales: int) -> int:
    """The shortest side whose coarsest scale still holds one window."""
    return WINDOW * 2 ** (scales - 1)


def _check(first: torch.Tensor, second: torch.Tensor, scales: int) -> None:
    if first.ndim != 4 or first.shape != second.shape:
        raise ValueError(f"Expected two batches B 3 H W of one shape; given {tuple(first.shape)} and {tuple(second.shape)}.")
    if min(first.shape[-2:]) < _least(scales):
        name = "SSIM" if scales == 1 else f"MS-SSIM with {scales} scales"
        raise UserError(f"{name} needs sides of {_least(scales)} pixels and more; given {tuple(first.shape[-2:])}.")


def _pair(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float32 at least: a variance as a difference of moments is lost in half precision."""
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    return first.to(dtype), second.to(dtype)


def _maps(first: torch.Tensor, second: torch.Tensor, data_range: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Luminance (eq. 6) and contrast-structure (eq. 9 and 10 with C3 = C2 / 2) at each window inside: two B 3 H-10 W-10."""
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    with torch.autocast(first.device.type, enabled=False):
        moments = _blur(torch.stack([first, second, first * first, second * second, first * second]))
    mean_a, mean_b, square_a, square_b, product = moments.unbind()
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    contrast = (2 * (product - mean_a * mean_b) + c2) / (square_a - mean_a**2 + square_b - mean_b**2 + c2)
    return luminance, contrast


def _blur(stack: torch.Tensor) -> torch.Tensor:
    """The Gaussian window over the last two axes, valid positions only; two matrix products are faster than convolutions."""
    rows, columns = (_windows(side).to(stack) for side in stack.shape[-2:])
    return rows @ (stack @ columns.T)


@cache
def _windows(side: int) -> torch.Tensor:
    """The window at each of its places along a side: side-10 side."""
    found = torch.zeros(side - WINDOW + 1, side, dtype=torch.float64)
    places = torch.arange(side - WINDOW + 1)[:, None]
    found[places, places + torch.arange(WINDOW)] = _kernel()
    return found


@cache
def _kernel() -> torch.Tensor:
    at = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-(at**2) / (2 * SIGMA**2))
    return weights / weights.sum()


def _power(base: torch.Tensor, exponent: float) -> torch.Tensor:
    """max(base, 0) ** exponent whose gradient is 0, not NaN, where the base is not positive."""
    positive = base > 0
    return torch.where(positive, torch.where(positive, base, 1.0) ** exponent, 0.0)
