"""VAEStage: images -> latents -> images around any diffusers autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentpipe.utils import cancellation
from latentpipe.utils.errors import UserError
from latentpipe.vae import precision
from latentpipe.vae.latent_space import LatentSpace
from latentpipe.vae.memory_policy import MemoryPolicy, Tile
from latentpipe.vae.offload import device_of, dtype_of
from latentpipe.vae.tiling import tiled


class VAEStage(nn.Module):
    """A diffusers autoencoder together with its LatentSpace; callers never see a factor.

    images   B 3 H W, [-1, 1];  latents  B C h w, normalized, h = H / downscale
    digest   content hash of the file that the autoencoder came from; None where it came from none
    tile     whether pictures are computed in bands (`latentpipe.vae.memory_policy.MemoryPolicy`)

    Values that are not finite are computed again in a wider dtype (`latentpipe.vae.precision`), or are an error.
    """

    def __init__(self, vae: nn.Module, space: LatentSpace | None = None, digest: str | None = None, tile: Tile = "auto") -> None:
        super().__init__()
        if not isinstance(vae, nn.Module):
            given = f"'{vae}'" if isinstance(vae, str | Path) else type(vae).__name__
            raise UserError(f"VAEStage was given {given}; expected a diffusers autoencoder (swap.stage_of opens names).")
        reason = reason_against(vae)
        if reason:
            raise UserError(reason)
        self.vae: Any = vae
        self.space = space or space_of(vae)
        self.digest = digest
        self.memory = MemoryPolicy(tile)

    @property
    def decodes(self) -> bool:
        """False for an encoder alone."""
        return getattr(self.vae, "decoder", None) is not None or getattr(self.vae, "decoder_unet", None) is not None

    @property
    def decoding(self) -> VAEStage:
        """Itself; of a stage in two halves (`latentpipe.vae.protocol.Stage`), the half that decodes."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the autoencoder computes in."""
        return dtype_of(self.vae)

    @property
    def device(self) -> torch.device:
        """Where the autoencoder computes."""
        return device_of(self.vae)

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

    def decode(self, latents: torch.Tensor, **options: Any) -> torch.Tensor:
        """Latents (B C h w) to images, about [-1, 1] and not clamped; `options` of the VAE's own decode."""
        if not self.decodes:
            raise UserError("This VAE is an encoder alone; it has no decoder. Give one that has both.")
        return self.call("decode", self.space.denormalize(latents), **options)[0]

    def call(self, direction: precision.Direction, given: torch.Tensor, **options: Any) -> tuple[Any, Any]:
        """What ``vae.encode`` or ``vae.decode`` gives for images or raw latents, finite, in bands where memory is short.

        options  further arguments of that method of the VAE

        Returns the posterior of a KL autoencoder, else the tensor, in raw units; and the object that it came in.
        """
        carriers: list[Any] = []

        def run(vae: Any, given: torch.Tensor) -> Any:
            carriers[:] = [self._run(direction, vae, given, options)]
            return output_of(carriers[0], vae)

        return precision.run_with_dtype_fallback(self.vae, direction, run, given), carriers[0]

    def forward(
        self,
        images: torch.Tensor,
        warp: Callable[[torch.Tensor], torch.Tensor] | None = None,
        noise: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """Training pass: images to (reconstruction of one posterior sample, the posterior; raw latents where there is none).

        noise  standard normal, B C h w: the sample is ``mean + std * noise`` (Kingma and Welling, arXiv:1312.6114,
               section 2.4), so gradients reach the encoder; left out: the posterior's mode
        warp   acts on the sampled raw latents before decoding (an equivariance loss compares the result with the same
               warp of the images)

        One call, so that processes which average gradients see every parameter in it.
        """
        posterior = self.encode_whole(images)
        raw = sample_posterior(posterior, noise)
        return self.decode_whole(raw if warp is None else warp(raw)), posterior

    def encode_whole(self, images: torch.Tensor) -> Any:
        """Images to the posterior, or to raw latents where there is none, as the autoencoder computes them: with gradients, for
        a training pass."""
        return output_of(self.vae.encode(images.to(self.device, self.dtype)), self.vae)

    def decode_whole(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw latents (B C h w) to images; likewise."""
        return self.vae.decode(raw, return_dict=False)[0]

    def check_memory(self, n: int, height: int, width: int) -> None:
        """UserError where decoding `n` pictures of that size in pixels fits into the free memory neither whole nor in bands."""
        self.memory.check(self.vae, self.space.shape(n, height, width), self.space.downscale)

    def _encode(self, images: torch.Tensor) -> Any:
        """The posterior of a KL autoencoder, the raw latents of one without."""
        self.space.shape(len(images), *images.shape[-2:])
        return self.call("encode", images)[0]

    def _run(self, direction: precision.Direction, vae: Any, given: torch.Tensor, options: dict[str, Any]) -> Any:
        down = self.space.downscale
        rows = None if options.keys() - {"generator"} else self.memory.rows(vae, direction, given, down)
        if rows is not None:
            with cancellation.interruptible(vae):
                return (tiled.encode if direction == "encode" else tiled.decode)(vae, given, rows)
        if direction == "decode" and type(vae).__name__ == "ConsistencyDecoderVAE":  # it draws noise: the same for a picture
            options = {"generator": torch.Generator().manual_seed(0)} | options
        with self.memory.as_predicted(self.vae, direction, given, down), cancellation.interruptible(vae):
            return getattr(vae, direction)(given, **{name: _like(value, given) for name, value in options.items()})


NAMES = ("latent_dist", "latents", "latent", "sample")  # of what diffusers' autoencoders return


def output_of(output: Any, vae: Any) -> Any:
    """The posterior of a KL autoencoder, else the tensor, of what ``vae.encode`` or ``vae.decode`` returns."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, tuple):
        return output[0]
    for name in NAMES:
        if hasattr(output, name):
            return getattr(output, name)
    raise TypeError(f"{type(vae).__name__} returns none of {', '.join(NAMES)} from encode() or decode().")


def _like(value: Any, given: torch.Tensor) -> Any:
    """A further tensor beside the input, where and as the autoencoder computes."""
    return value.to(given.device, given.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def space_of(vae: Any) -> LatentSpace:
    """As `LatentSpace.of`; UserError where the config declares no space."""
    try:
        return LatentSpace.of(vae)
    except ValueError as error:
        raise UserError(f"{type(vae).__name__}: {error}") from None


def reason_against(vae: Any) -> str:
    """Empty where this is an autoencoder of pictures with factors in its config, else one sentence that says what it is."""
    name, config = type(vae).__name__, getattr(vae, "config", {})
    kinds = {type(module) for module in vae.modules()}
    takes = "latentpipe takes autoencoders of pictures, with latents B C h w and factors in their config"
    if any(issubclass(kind, nn.Conv3d) for kind in kinds):
        return f"{name} is an autoencoder of videos, with latents B C T h w; {takes}."
    if not any(issubclass(kind, nn.Conv2d) for kind in kinds) and any(issubclass(kind, nn.Conv1d) for kind in kinds):
        return f"{name} is an autoencoder of sound; {takes}."
    if "batch_norm_eps" in config:
        return f"{name} normalizes its latents by running statistics of 2 x 2 patches, which are weights of its own; {takes}."
    return ""


def sample_posterior(posterior: Any, noise: torch.Tensor | None) -> torch.Tensor:
    """Raw latents (B C h w) drawn with standard normal `noise`: ``mean + std * noise``; the mode where there is none."""
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
