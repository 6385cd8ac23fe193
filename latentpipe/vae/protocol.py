"""What a pipeline draws through: `VAEStage`, the bridged stage, or anything else that has these members."""

from __future__ import annotations

from typing import Protocol

import torch

from latentpipe.vae.latent_space import LatentSpace
from latentpipe.vae.stage import VAEStage


class Stage(Protocol):
    """images -> latents -> images, in the space of one denoiser.

    images   B 3 H W, [-1, 1];  latents  B C h w, normalized, h = H / downscale

    `VAEStage` is one; `BridgedStage` of `latentpipe.compatibility.latent_adapter` encodes by one VAE and decodes by another.
    """

    space: LatentSpace
    """Channels, downscale and normalization of the latents."""

    @property
    def decodes(self) -> bool:
        """False for an encoder alone."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights that decode."""

    @property
    def device(self) -> torch.device:
        """Where the weights that decode are."""

    @property
    def decoding(self) -> VAEStage:
        """The stage whose VAE makes the pictures; a `VAEStage` is its own."""

    def encode(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Images to latents: the posterior's mode, or a sample where a generator is given."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to images, not clamped."""

    def check_memory(self, n: int, height: int, width: int) -> None:
        """UserError where decoding `n` pictures of that size in pixels does not fit into the free memory."""
