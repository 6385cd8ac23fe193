"""VAEStage: images -> latents -> images around any diffusers autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from latentpipe.latents import LatentSpace


class VAEStage(nn.Module):
    """A diffusers autoencoder together with its LatentSpace; callers never see a factor.

    images   B 3 H W, [-1, 1];  latents  B C h w, normalized, h = H / downscale
    digest   content hash of the file that the autoencoder came from; None where it came from none
    """

    def __init__(self, vae: nn.Module, space: LatentSpace | None = None, digest: str | None = None) -> None:
        super().__init__()
        self.vae: Any = vae
        self.space = space or LatentSpace.of(vae)
        self.digest = digest

    @property
    def decodes(self) -> bool:
        """False for an encoder alone."""
        return getattr(self.vae, "decoder", None) is not None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the autoencoder's weights."""
        return next(self.vae.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the autoencoder's weights are."""
        return next(self.vae.parameters()).device

    def posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images to the mean and standard deviation of their latents, B C h w each (std 0 without a posterior)."""
        mean, std = self.raw_posterior(images)
        scale = mean.new_tensor(self.space.scale).view(1, -1, 1, 1)
        return self.space.normalize(mean), std * scale

    def raw_posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `posterior`, in the VAE's own units."""
        encoded = self._encode(images)
        if isinstance(encoded, torch.Tensor):
            return encoded, torch.zeros_like(encoded)
        return encoded.mean, encoded.std

    def encode(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Images (B 3 H W, [-1, 1]) to latents: the posterior's mode, or a sample where a generator is given."""
        encoded = self._encode(images)
        if not isinstance(encoded, torch.Tensor):
            encoded = encoded.mode() if generator is None else encoded.sample(generator)
        return self.space.normalize(encoded)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B C h w) to images, about [-1, 1] and not clamped."""
        raw = self.space.denormalize(latents)
        return self.vae.decode(raw.to(self.device, self.dtype), return_dict=False)[0]

    def forward(
        self,
        images: torch.Tensor,
        warp: Callable[[torch.Tensor], torch.Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """Training pass: images to (reconstruction of one posterior sample, the posterior).

        `warp` acts on the sampled raw latents before decoding (an equivariance loss compares the result
        with the same warp of the images). The sample is ``mean + std * noise`` (Kingma and Welling,
        arXiv:1312.6114, section 2.4), so gradients reach the encoder.
        """
        posterior = self._encode(images)
        raw = posterior if isinstance(posterior, torch.Tensor) else posterior.sample(generator)
        if warp is not None:
            raw = warp(raw)
        return self.vae.decode(raw, return_dict=False)[0], posterior

    def _encode(self, images: torch.Tensor) -> Any:
        """The posterior of a KL autoencoder, the raw latents of one without."""
        self.space.shape(len(images), *images.shape[-2:])
        encoded = self.vae.encode(images.to(self.device, self.dtype))
        for name in ("latent_dist", "latents", "latent"):
            if hasattr(encoded, name):
                return getattr(encoded, name)
        raise TypeError(f"{type(self.vae).__name__} returns neither latent_dist, latents nor latent from encode().")


@torch.no_grad()
def fold_normalization(vae: Any, space: LatentSpace) -> None:
    """Write a space's normalization into quant_conv and post_quant_conv, in place.

    Afterwards the VAE's raw values are the latents, and its config says scaling_factor 1: a host that
    knows one factor only, or none, is right too. Mean rows times s, their bias s (b - shift);
    log-variance bias plus 2 ln s; post_quant_conv takes the inverse.
    """
    if vae.quant_conv is None or vae.post_quant_conv is None:
        raise ValueError(f"{type(vae).__name__} has no quant_conv and post_quant_conv to fold a normalization into.")
    reference = vae.quant_conv.weight
    scale = reference.new_tensor(space.scale)
    shift = reference.new_tensor(space.shift)
    c = space.channels
    vae.quant_conv.weight[:c] *= scale.view(-1, 1, 1, 1)
    vae.quant_conv.bias[:c] = scale * (vae.quant_conv.bias[:c] - shift)
    vae.quant_conv.bias[c:] += 2 * scale.log()
    after = vae.post_quant_conv
    after.bias += after.weight[:, :, 0, 0] @ shift
    after.weight /= scale.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None)
