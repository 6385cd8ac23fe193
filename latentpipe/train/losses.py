"""Loss terms, one function for each equation. Every term is a mean over pictures."""

from __future__ import annotations

from typing import Any

import torch


def l1(images: torch.Tensor, rebuilt: torch.Tensor) -> torch.Tensor:
    """Mean absolute error over pixel values."""
    return (rebuilt - images).abs().mean()


def l2(images: torch.Tensor, rebuilt: torch.Tensor) -> torch.Tensor:
    """Mean squared error over pixel values."""
    return (rebuilt - images).square().mean()


def kl(posterior: Any, pixel_values: int) -> torch.Tensor:
    """KL(q(z|x) || N(0, I)), summed over latents, divided by the `pixel_values` (3HW) of a picture.

    ``0.5 (mu^2 + sigma^2 - 1 - ln sigma^2)`` for each latent (Kingma and Welling, arXiv:1312.6114, appendix B).
    """
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    per_picture = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3))
    return per_picture.mean() / pixel_values


def velocity_target(clean: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """``v = sqrt(a) noise - sqrt(1 - a) clean`` (Salimans and Ho, arXiv:2202.00512, appendix D); a: B."""
    a = alpha_bar.view(-1, 1, 1, 1)
    return a.sqrt() * noise - (1 - a).sqrt() * clean
