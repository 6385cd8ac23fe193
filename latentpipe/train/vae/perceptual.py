"""Perceptual distances as loss terms: without weights by default, with the weights of others where a person gives them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from latentpipe.evaluate.metrics.lpips import Net, open_dists, open_lpips
from latentpipe.train.losses import widened
from latentpipe.utils.errors import UserError

Name = Literal["nlpd", "lpips-alex", "lpips-vgg", "lpips-squeeze", "dists"]
NETS: dict[str, Net] = {"lpips-alex": "alex", "lpips-vgg": "vgg", "lpips-squeeze": "squeeze"}
Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Laparra et al. 2016, fitted by them to undistorted photographs (the McGill set), levels 1 to 5 and the low-pass residual:
# the constant, and the weights of the neighbours above, to the left, to the right and below.
CONSTANTS = (0.0248, 0.0185, 0.0179, 0.0191, 0.0220, 0.2782)
NEIGHBOURS = (
    (0.1015, 0.1460, 0.1493, 0.1011),
    (0.0837, 0.1846, 0.1986, 0.0757),
    (0.0467, 0.2243, 0.2138, 0.0477),
    (0.0, 0.2616, 0.2503, 0.0),
    (0.0, 0.2552, 0.2598, 0.0),
    (0.0, 0.0717, 0.2215, 0.0),
)
LOW_PASS = (0.05, 0.25, 0.4, 0.25, 0.05)  # Burt and Adelson 1983, a = 0.4
PLANES = (0.75, 0.125, 0.125)  # luminance and the two chroma planes, 6:1:1 as video coding weighs their errors
SMALLEST_PX = 8
SMOOTH = 1e-4  # makes the square root of a level's error smooth at zero


def perceptual(name: Name, weights: Path | None = None, device: torch.device | str = "cpu") -> Distance:
    """The distance of a name: (images, rebuilt), B 3 H W in [-1, 1] each, to one value for each picture (B), in float32.

    nlpd takes no weights; LPIPS and DISTS take those of the file `weights`, else the installed ones, and do not train. Their
    sides are at least 32 pixels. UserError where the weights are missing, or are given to nlpd.
    """
    if name == "nlpd":
        if weights is not None:
            raise UserError(f"nlpd has no weights; given {weights}. Leave them out, or choose an LPIPS or dists.")
        return nlpd
    opened: nn.Module = open_dists(weights) if name == "dists" else open_lpips(NETS[name], weights)
    network = opened.to(device)

    def distance(images: torch.Tensor, rebuilt: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return network(images.float(), rebuilt.float())

    return distance


def nlpd(images: torch.Tensor, rebuilt: torch.Tensor) -> torch.Tensor:
    """Normalized Laplacian Pyramid Distance between pictures, B 3 H W in [-1, 1]: one value for each (B), 0 where equal.

    Laparra, Ballé, Berardino and Simoncelli, "Perceptual image quality assessment using a normalized Laplacian pyramid", Human
    Vision and Electronic Imaging 2016. Each level z of a Laplacian pyramid is divided by a constant and the local amplitude,
    ``y = z / (sigma + P |z|)``; the distance is the mean over levels of ``sqrt(mean over coefficients of (y1 - y2)^2)``.
    Here on luminance (their measure) and likewise on the chroma planes of BT.601, with weights 6:1:1; a level's root is taken
    as ``sqrt(. + 1e-8) - 1e-4``, finite in its gradient where the two are equal. Symmetric; borders are replicated.

    Why it is the default: it models the early visual system (contrast, masked by the contrast around it), follows human
    judgement better than MS-SSIM does, needs no weights and so fits every domain of pictures. What it cannot
    do: it knows no objects and compares position by position, so a plausible new texture costs as much as a wrong one; DISTS
    and adversarial terms forgive that.

    The number of levels follows the shorter side: 6 from 256 pixels, 5 from 128, 4 from 64, 3 from 32, else 2; the last is the
    low-pass residual. UserError for sides below 8.
    """
    side = min(images.shape[-2:])
    if side < SMALLEST_PX:
        raise UserError(f"The perceptual loss nlpd takes sides of {SMALLEST_PX} pixels and more; given {side}. Use larger crops.")
    levels = min(len(CONSTANTS), max(2, int(math.log2(side)) - 2))
    with torch.autocast(images.device.type, enabled=False):
        first, second = (_normalized_pyramid(_planes(widened(each)), levels) for each in (images, rebuilt))
        errors = torch.stack([(one - two).square().mean((2, 3)) for one, two in zip(first, second, strict=True)])
        distances = ((errors + SMOOTH**2).sqrt() - SMOOTH).mean(0)  # B 3
        return distances @ distances.new_tensor(PLANES)


def _planes(images: torch.Tensor) -> torch.Tensor:
    """Images to luminance in [0, 1] and chroma in [-0.5, 0.5], B 3 H W (ITU-R BT.601, full range)."""
    red, green, blue = images.unbind(1)
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.stack([(luminance + 1) / 2, (blue - luminance) / 3.544, (red - luminance) / 2.804], 1)


def _normalized_pyramid(planes: torch.Tensor, levels: int) -> list[torch.Tensor]:
    """The divided levels of each plane, finest first, each B 3 h w."""
    shape = planes.shape[:2]
    current, found = planes.flatten(0, 1).unsqueeze(1), []  # B3 1 H W
    for level in range(levels - 1):
        low = _reduce(current)
        found.append(_divide(current - _expand(low, current.shape[-2:]), level))
        current = low
    found.append(_divide(current, len(CONSTANTS) - 1))
    return [values.unflatten(0, shape).squeeze(2) for values in found]


def _reduce(values: torch.Tensor) -> torch.Tensor:
    """Low-pass and every second value, N 1 h w to N 1 ceil(h/2) ceil(w/2)."""
    return functional.conv2d(functional.pad(values, (2, 2, 2, 2), "replicate"), _kernel(values), stride=2)


def _expand(low: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """The inverse in size of `_reduce`: zeros between the values, then the low-pass filter times 4."""
    wide = functional.conv_transpose2d(functional.pad(low, (1, 1, 1, 1), "replicate"), 4 * _kernel(low), stride=2)
    return wide[:, :, 4 : 4 + size[0], 4 : 4 + size[1]]


def _kernel(like: torch.Tensor) -> torch.Tensor:
    row = like.new_tensor(LOW_PASS)
    return torch.outer(row, row)[None, None]


def _divide(values: torch.Tensor, level: int) -> torch.Tensor:
    """Values N 1 h w over the constant of the level plus the weighted amplitude of the four neighbours."""
    above, left, right, below = NEIGHBOURS[level]
    kernel = values.new_tensor([[0, above, 0], [left, 0, right], [0, below, 0]])[None, None]
    amplitude = functional.conv2d(functional.pad(values.abs(), (1, 1, 1, 1), "replicate"), kernel)
    return values / (CONSTANTS[level] + amplitude)
