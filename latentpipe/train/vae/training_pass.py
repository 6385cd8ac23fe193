"""A step's way through the autoencoder: images -> raw latents -> images, in one call with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from latentpipe.vae.stage import VAEStage


class TrainingPass(nn.Module):
    """A stage's autoencoder as it is trained; one call, so that processes which average gradients see every parameter in it.

    rounds  a codec is trained: uniform noise stands for the rounding of its latents (Balle et al., arXiv:1611.01704)
    """

    def __init__(self, stage: VAEStage, rounds: bool = False) -> None:
        super().__init__()
        self.stage, self.rounds = stage, rounds

    def forward(
        self,
        images: torch.Tensor,
        warp: Callable[[torch.Tensor], torch.Tensor] | None = None,
        noise: torch.Tensor | None = None,
        given: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """As `VAEStage.forward`, of which it is the plain case.

        noise  of a codec uniform, as wide as its step
        given  raw latents to decode in place of the sample (a decoder that learns from another VAE's latents)
        """
        if given is None and (noise is None or not self.rounds):
            return self.stage(images, warp, noise)
        posterior = self.stage.encode_whole(images)
        if given is None:
            assert noise is not None
            given = rounded(posterior, noise)
        return self.stage.decode_whole(given if warp is None else warp(given)), posterior


def rounded(posterior: Any, noise: torch.Tensor) -> torch.Tensor:
    """Raw latents (B C h w) with uniform noise as wide as a quantizer's step, also where there is no posterior."""
    return (posterior if isinstance(posterior, torch.Tensor) else posterior.mean).float() + noise
