"""Loss terms, one function for each equation.

Every term is a mean over pictures of one value for each picture, so that the mean over equal shards of a batch, on several
processes, is the value of the whole batch. Below "mean over" says what that one value is a mean of.

images, rebuilt    B 3 H W, [-1, 1]
mean, latents      B C h w, in the units of the VAE that trains
"""

from __future__ import annotations

import math

import torch

from latentpipe.evaluate.metrics.ssim import ms_ssim


def l1(images: torch.Tensor, rebuilt: torch.Tensor) -> torch.Tensor:
    """Mean absolute error over pixel values."""
    return (rebuilt - images).abs().mean()


def l2(images: torch.Tensor, rebuilt: torch.Tensor) -> torch.Tensor:
    """Mean squared error over pixel values."""
    return (rebuilt - images).square().mean()


def charbonnier(images: torch.Tensor, rebuilt: torch.Tensor, epsilon: float = 1e-3) -> torch.Tensor:
    """Mean over pixel values of ``sqrt(error^2 + epsilon^2)``; `epsilon` where the two are equal.

    L1 far from zero, L2 near it, smooth between (Charbonnier et al., ICIP 1994; with this epsilon Lai et al., arXiv:1710.01992).
    """
    return ((widened(rebuilt) - widened(images)).square() + epsilon**2).sqrt().mean()


def edges(images: torch.Tensor, rebuilt: torch.Tensor) -> torch.Tensor:
    """Mean absolute error over differences along rows and columns, between neighbours and between pixels two apart.

    Sharp edges: a shift of brightness costs nothing, a blurred step costs on both of its sides.
    """
    error = widened(rebuilt) - widened(images)
    apart = [error[..., step:, :] - error[..., :-step, :] for step in (1, 2)]
    apart += [error[..., step:] - error[..., :-step] for step in (1, 2)]
    return torch.stack([difference.abs().mean() for difference in apart]).mean()


def ms_ssim_loss(images: torch.Tensor, rebuilt: torch.Tensor) -> torch.Tensor:
    """``1 - MS-SSIM``, mean over pictures; 0 where equal, at most 1 (Wang, Simoncelli and Bovik, Asilomar 2003, equation 7).

    Five scales for sides of 176 pixels and more, three (MS-SSIM-3) from 44, below as many as fit: two from 22, one (SSIM) from
    11; UserError below. A picture whose structure is opposite at some scale has 1 and no gradient, so give L1 a weight too.
    """
    side = min(images.shape[-2:])
    scales = 5 if side >= 176 else max(1, min(3, (side // 11).bit_length()))
    return (1 - ms_ssim(images, rebuilt, data_range=2.0, scales=scales)).mean()


def outliers(mean: torch.Tensor, limit: float = 3.0) -> torch.Tensor:
    """Mean over latents of ``relu(|mu| - limit)^2``: bounds the latents' scale, and is zero inside the limit.

    Unlike a KL it pulls nothing towards zero: only the values that a normalization by the standard deviation leaves far out
    are drawn back, which half precision, quantization and a denoiser's noise schedule are all sensitive to.
    """
    return (widened(mean).abs() - limit).relu().square().mean()


def spectrum(mean: torch.Tensor) -> torch.Tensor:
    """Share of the latents' energy above half of the Nyquist frequency in either direction; mean over pictures.

    ``sum_{k in high} c_k^2 / sum_{k > 0} c_k^2`` for each picture, over all channels, c the orthonormal DCT-II of each channel;
    high: row or column index at or above half of the side. The constant coefficient counts in neither sum, so an offset of the
    latents does not lower the share. White noise has about 3/4; smooth latents near 0. High frequencies of latents that exceed
    those of pictures hurt the diffusion on them (Skorokhodov et al., "Improving the Diffusability of Autoencoders",
    arXiv:2502.14831; they regularize by scale equivariance, this is the spectrum itself).
    """
    with torch.autocast(mean.device.type, enabled=False):
        values = widened(mean)
        rows, columns = (_dct(side, values) for side in values.shape[-2:])
        energy = (rows @ values @ columns.T).square().sum(1)  # B h w
    h, w = energy.shape[-2:]
    total = energy.sum((1, 2)) - energy[:, 0, 0]
    low = energy[:, : (h + 1) // 2, : (w + 1) // 2].sum((1, 2)) - energy[:, 0, 0]
    floor = 1e-6 * mean[0].numel()  # constant latents have no spectrum: share 0
    return ((total - low) / (total + floor)).mean()


def latent_match(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error over latents: distillation onto the teacher's, which carry no gradient."""
    return (widened(student) - widened(teacher).detach()).square().mean()


def velocity_target(clean: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """``v = sqrt(a) noise - sqrt(1 - a) clean`` (Salimans and Ho, arXiv:2202.00512, appendix D); a: B."""
    a = alpha_bar.view(-1, 1, 1, 1)
    return a.sqrt() * noise - (1 - a).sqrt() * clean


def widened(values: torch.Tensor) -> torch.Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return values if values.dtype == torch.float64 else values.float()


def _dct(n: int, like: torch.Tensor) -> torch.Tensor:
    """The orthonormal DCT-II as a matrix n n (Ahmed, Natarajan and Rao 1974): ``cos(pi (2 j + 1) k / 2n)``, row k, column j."""
    index = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / (2 * n) * (2 * index + 1) * index[:, None]) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix.to(like)
