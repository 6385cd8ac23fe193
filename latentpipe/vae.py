"""VAEStage: images -> latents -> images around any diffusers autoencoder."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from latentpipe import bands, memory, precision, tiles
from latentpipe.errors import Note, UserError
from latentpipe.latents import LatentSpace

Tile = int | Literal["auto"] | None
SMALL = 256 * 256  # pixels of a batch whose memory needs no prediction
ROOM = 0.25  # of the free memory: what takes less may keep its freed blocks, which saves the time for fresh pages


class VAEStage(nn.Module):
    """A diffusers autoencoder together with its LatentSpace; callers never see a factor.

    images   B 3 H W, [-1, 1];  latents  B C h w, normalized, h = H / downscale
    digest   content hash of the file that the autoencoder came from; None where it came from none
    tile     height in pixels of the bands in which pictures are computed, exactly (`latentpipe.tiles`); "auto": bands where
             the prediction of the memory says that the whole picture does not fit; None: never

    Values that are not finite are computed again in a wider dtype (`latentpipe.precision`), or are an error.
    """

    def __init__(self, vae: nn.Module, space: LatentSpace | None = None, digest: str | None = None, tile: Tile = "auto") -> None:
        super().__init__()
        if isinstance(tile, int) and tile < 1:
            raise UserError(f"tile is {tile}; expected a height of at least 1 pixel, auto or None.")
        self.vae: Any = vae
        self.space = space or LatentSpace.of(vae)
        self.digest = digest
        self.tile = tile

    @property
    def decodes(self) -> bool:
        """False for an encoder alone."""
        return getattr(self.vae, "decoder", None) is not None or getattr(self.vae, "decoder_unet", None) is not None

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
        if not self.decodes:
            raise UserError("This VAE is an encoder alone; it has no decoder. Give one that has both.")
        raw = self.space.denormalize(latents)
        return precision.run_finite(self.vae, "decode", self._run_decoder, raw)

    def forward(
        self,
        images: torch.Tensor,
        warp: Callable[[torch.Tensor], torch.Tensor] | None = None,
        noise: torch.Tensor | None = None,
        given: torch.Tensor | None = None,
        rounds: bool = False,
    ) -> tuple[torch.Tensor, Any]:
        """Training pass: images to (reconstruction of one posterior sample, the posterior; raw latents where there is none).

        noise  standard normal, B C h w: the sample is ``mean + std * noise`` (Kingma and Welling, arXiv:1312.6114,
               section 2.4), so gradients reach the encoder; left out: the posterior's mode
        warp   acts on the sampled raw latents before decoding (an equivariance loss compares the result with the same
               warp of the images)
        given  raw latents to decode in place of the sample (a decoder that learns from another VAE's latents)
        rounds the latents decoded are ``mean + noise``: uniform noise stands for rounding (Balle et al., arXiv:1611.01704)

        One call, so that processes which average gradients see every parameter in it.
        """
        posterior = _output(self.vae.encode(images.to(self.device, self.dtype)), self.vae)
        raw = sampled(posterior, noise, rounds) if given is None else given
        if warp is not None:
            raw = warp(raw)
        return self.vae.decode(raw, return_dict=False)[0], posterior

    def check_memory(self, n: int, height: int, width: int) -> None:
        """UserError where decoding `n` pictures of that size in pixels fits into the free memory neither whole nor in bands."""
        area = n * height * width
        if self.tile == "auto" and area > SMALL:
            shape = self.space.shape(n, height, width)
            memory.choose(self.vae, "decode", shape, memory.available(self.device))

    def _encode(self, images: torch.Tensor) -> Any:
        """The posterior of a KL autoencoder, the raw latents of one without."""
        self.space.shape(len(images), *images.shape[-2:])
        return precision.run_finite(self.vae, "encode", self._run_encoder, images)

    def _run_encoder(self, vae: Any, images: torch.Tensor) -> Any:
        rows = self._rows(vae, "encode", images)
        if rows is not None:
            return _output(tiles.encode(vae, images, rows), vae)
        with self._as_predicted("encode", images):
            return _output(vae.encode(images), vae)

    def _as_predicted(self, direction: memory.Direction, given: torch.Tensor) -> AbstractContextManager[None]:
        """Freed blocks go back to the system at once, where a whole picture takes much of the free memory as predicted."""
        if self.tile != "auto" or torch.is_grad_enabled() or self._is_small(direction, given):
            return nullcontext()
        n, channels, height, width = given.shape
        whole = memory.predict(self.vae, direction, (n, channels, height, width))
        return bands.mapped(self.device) if whole > ROOM * memory.available(self.device) else nullcontext()

    def _run_decoder(self, vae: Any, raw: torch.Tensor) -> torch.Tensor:
        rows = self._rows(vae, "decode", raw)
        if rows is not None:
            return tiles.decode(vae, raw, rows)
        # the consistency decoder draws noise: the same for the same picture
        noise = {"generator": torch.Generator().manual_seed(0)} if type(vae).__name__ == "ConsistencyDecoderVAE" else {}
        with self._as_predicted("decode", raw):
            return vae.decode(raw, **noise, return_dict=False)[0]

    def _rows(self, vae: Any, direction: memory.Direction, given: torch.Tensor) -> int | None:
        """The height of the bands for this input, in pixels; None: the whole picture at once."""
        if self.tile is None or torch.is_grad_enabled() or (self.tile == "auto" and self._is_small(direction, given)):
            return None
        if self.tile != "auto":
            return self.tile
        free = memory.available(self.device)
        n, channels, height, width = given.shape
        shape = (n, channels, height, width)
        rows = memory.choose(vae, direction, shape, free)
        if rows is not None:
            whole, part = (memory.predict(vae, direction, shape, high) // 2**20 for high in (None, rows))
            warnings.warn(
                f"to {direction} at once would take {whole:,} MB of the {free // 2**20:,} MB that are free: "
                f"it is done in bands of {rows} rows ({part:,} MB), with the same result",
                Note,
                stacklevel=2,
            )
        return rows

    def _is_small(self, direction: memory.Direction, given: torch.Tensor) -> bool:
        area = given.shape[0] * given.shape[-1] * given.shape[-2]
        return area * (1 if direction == "encode" else self.space.downscale**2) <= SMALL


def _output(encoded: Any, vae: Any) -> Any:
    for name in ("latent_dist", "latents", "latent"):
        if hasattr(encoded, name):
            return getattr(encoded, name)
    raise TypeError(f"{type(vae).__name__} returns neither latent_dist, latents nor latent from encode().")


def sampled(posterior: Any, noise: torch.Tensor | None, rounds: bool = False) -> torch.Tensor:
    """Raw latents (B C h w) drawn with standard normal `noise`: ``mean + std * noise``; the mode where there is none.

    With `rounds` the noise is uniform and as wide as a quantizer's step: ``mean + noise``, also where there is no posterior.
    """
    if rounds and noise is not None:
        return (posterior if isinstance(posterior, torch.Tensor) else posterior.mean).float() + noise
    if isinstance(posterior, torch.Tensor):
        return posterior
    if noise is None:
        return posterior.mode()
    # in fp32: under autocast a narrow posterior would be lost between two bf16 numbers
    return posterior.mean.float() + posterior.std.float() * noise


def declare_normalization(vae: Any, space: LatentSpace) -> None:
    """Make a measured space what the autoencoder declares, in place, so that every host of its class reads it.

    Folded into quant_conv and post_quant_conv where there are both; else one scale and one shift (means over the channels)
    in the config fields that the class has (Stable Diffusion 3, FLUX.1, tiny autoencoders; a scale alone for DC-AE).
    """
    if getattr(vae, "quant_conv", None) is not None and getattr(vae, "post_quant_conv", None) is not None:
        fold_normalization(vae, space)
        return
    c = space.channels
    shift = sum(space.shift) / c
    # the variance of all latents about the common shift: within the channels, and between their means
    spread = sum(scale**-2 + (mean - shift) ** 2 for scale, mean in zip(space.scale, space.shift, strict=True)) / c
    fields: dict[str, Any] = {"scaling_factor": spread**-0.5, "shift_factor": shift}
    fields |= {"latents_mean": None, "latents_std": None}
    vae.register_to_config(**{name: value for name, value in fields.items() if name in vae.config})


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
