"""LatentSpace: what a VAE's latents are, and the affine pair between raw and latents.

raw      a VAE's own units, B C h w
latents  normalized, B C h w:  latents = (raw - shift) * scale, per channel
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


MOST_CHANNELS, MOST_LEVELS = 2**16, 32


@dataclass(frozen=True)
class LatentSpace:
    """A space of latents: how many channels, how much smaller than the picture, and its normalization.

    channels   C of B C h w
    downscale  picture side / latent side
    scale      one factor per channel, > 0
    shift      one offset per channel, in raw units
    factor     the factor and the standard deviations that `scale` is the quotient of, as a config declares them: tensors of 16
    deviation  bits are rounded step by step, and the steps are those of diffusers. No part of what the space is.
    patch      side of the squares of raw values that are one latent's channels (FLUX.2); 1: raw and latents have one shape
    """

    channels: int
    downscale: int
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    factor: float = field(default=1.0, compare=False, repr=False)
    deviation: tuple[float, ...] = field(default=(), compare=False, repr=False)
    patch: int = 1

    def __post_init__(self) -> None:
        for name, values in (("scale", self.scale), ("shift", self.shift)):
            if len(values) != self.channels:
                raise ValueError(f"A space of {self.channels} channels needs {self.channels} {name}s; given {len(values)}.")
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"Every {name} must be a finite number; given {values}.")
        if any(value <= 0 for value in self.scale):
            raise ValueError(f"Every scale must be greater than 0; given {self.scale}.")

    @classmethod
    def of(cls, vae: Any) -> LatentSpace:
        """The space that a diffusers autoencoder's config declares.

        Conventions: Stable Diffusion 3 and FLUX ``latents = (raw - shift_factor) * scaling_factor``;
        SDXL with statistics ``latents = (raw - latents_mean) * scaling_factor / latents_std``.
        """
        if getattr(vae, "bn", None) is not None and "batch_norm_eps" in vae.config:
            return cls._of_patches(vae)
        return cls.from_config(vae.config)

    @classmethod
    def _of_patches(cls, vae: Any) -> LatentSpace:
        """FLUX.2's: patches of 2 x 2 raw values are the channels, normalized by running statistics that are weights."""
        deviation = (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt().tolist()
        scale = tuple(1 / value for value in deviation)
        mean = tuple(vae.bn.running_mean.tolist())
        return cls(len(mean), 2 * downscale_of(vae.config), scale, mean, 1.0, tuple(deviation), 2)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LatentSpace:
        """As `of`, from the content of a VAE's config.json; ValueError where it declares no factor."""
        channels = config.get("latent_channels")
        if type(channels) is not int or not 0 < channels <= MOST_CHANNELS:
            raise ValueError(
                f"This VAE's config names no latent_channels from 1 to {MOST_CHANNELS:,}; latentpipe takes autoencoders of "
                "pictures, with latents B C h w, whose config names them."
            )
        factor = config.get("scaling_factor")
        if factor is None:
            raise ValueError(
                "This VAE's config declares no scaling_factor; measure its latents (LatentSpace.measure) "
                "and write the factor into its config."
            )
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            if any(not value > 0 for value in std):
                raise ValueError(f"Every latents_std must be greater than 0; given {std}.")
            scale = tuple(float(factor) / float(value) for value in std)
            return cls(channels, downscale_of(config), scale, tuple(map(float, mean)), float(factor), tuple(map(float, std)))
        shift = float(config.get("shift_factor") or 0.0)
        return cls(channels, downscale_of(config), (float(factor),) * channels, (shift,) * channels)

    @classmethod
    def measure(cls, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], downscale: int) -> Measured:
        """Stream (mean, std) pairs of raw posteriors, each B C h w; return the space that gives mean 0 and std 1.

        The variance of a latent is the variance of the posterior means plus the mean posterior variance
        (law of total variance), so nothing is sampled. Standard errors take the picture as the unit.
        """
        import torch

        sums: list[torch.Tensor] = []
        squares: list[torch.Tensor] = []
        for mean, std in batches:
            mean, std = mean.double(), std.double()
            sums.append(mean.mean((2, 3)))
            squares.append((mean.square() + std.square()).mean((2, 3)))
        if not sums:
            raise ValueError("No latents to measure: the data holds no readable picture.")
        first, second = torch.cat(sums), torch.cat(squares)  # (N, C) each
        n = len(first)
        centre = first.mean(0)
        spread = (second.mean(0) - centre.square()).clamp_min(1e-12).sqrt()
        error = first.std(0, correction=1) / math.sqrt(n) if n > 1 else torch.full_like(centre, math.inf)
        space = cls(len(centre), downscale, tuple((1 / spread).tolist()), tuple(centre.tolist()))
        return Measured(space, n, tuple((error / spread).tolist()))

    def patched(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw with its patches as channels, where the space has them; else as given."""
        from torch.nn.functional import pixel_unshuffle

        return pixel_unshuffle(raw, self.patch) if self.patch > 1 else raw

    def normalize(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw (B C h w) to latents, rounded to the dtype of `raw` at the steps at which diffusers rounds."""
        raw = self.patched(raw)
        self._check(raw)
        if self.deviation:
            return (raw - _column(raw, self.shift)) * self.factor / _column(raw, self.deviation)
        return (raw - _factor(raw, self.shift)) * _factor(raw, self.scale)

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B C h w) to raw; the inverse of `normalize`."""
        self._check(latents)
        if self.patch > 1:
            from torch.nn.functional import pixel_shuffle

            return pixel_shuffle(replace(self, patch=1).denormalize(latents), self.patch)
        if self.deviation:
            return latents * _column(latents, self.deviation) / self.factor + _column(latents, self.shift)
        return latents / _factor(latents, self.scale) + _factor(latents, self.shift)

    def shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The latents' shape for pictures of `height` x `width` pixels; ValueError if a side does not divide."""
        for name, side in (("height", height), ("width", width)):
            if side <= 0 or side % self.downscale:
                raise ValueError(f"The {name} is {side} pixels; this VAE takes positive multiples of {self.downscale}.")
        return batch, self.channels, height // self.downscale, width // self.downscale

    def raw_shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        """As `shape`, of the VAE's own raw values."""
        n, c, h, w = self.shape(batch, height, width)
        return n, c // self.patch**2, h * self.patch, w * self.patch

    def difference(self, other: LatentSpace) -> str:
        """Empty when the two spaces are interchangeable, else one sentence that says how they differ."""
        if (self.channels, self.downscale) != (other.channels, other.downscale):
            return (
                f"{self.channels}-channel latents at 1/{self.downscale} size are not "
                f"{other.channels}-channel latents at 1/{other.downscale} size."
            )
        for name in ("scale", "shift"):
            for channel, (mine, theirs) in enumerate(zip(getattr(self, name), getattr(other, name), strict=True)):
                if mine != theirs:
                    return f"The {name} of channel {channel} is {mine:.6g} in one space and {theirs:.6g} in the other."
        return ""

    def _check(self, given: torch.Tensor) -> None:
        if given.ndim != 4 or given.shape[1] != self.channels:
            raise ValueError(f"This space has {self.channels} channels (B C h w); given shape {tuple(given.shape)}.")


def _column(like: torch.Tensor, values: tuple[float, ...]) -> torch.Tensor:
    """One number for each channel, in the dtype of `like`."""
    import torch

    wide = torch.promote_types(like.dtype, torch.float32)  # diffusers rounds twice on the way to 16 bits
    return torch.tensor(values, dtype=wide).view(1, -1, 1, 1).to(like.device, like.dtype)


def _factor(like: torch.Tensor, values: tuple[float, ...]) -> Any:
    """The one number of all channels as a float, which is not rounded to 16 bits before it divides; else one for each."""
    return values[0] if len(set(values)) == 1 else _column(like, values)


@dataclass(frozen=True)
class Measured:
    """A measured space: over how many pictures, and the standard error of each channel's mean (in latents)."""

    space: LatentSpace
    n: int
    standard_error: tuple[float, ...]


# Spaces that published VAEs were trained to, by the denoisers that use them. Sources: the configs of the named models on
# their model pages; for DC-AE the conversion script scripts/convert_dcae_to_diffusers.py of diffusers.
_PUBLISHED: dict[str, tuple[int, int, float, float]] = {  # channels, downscale, scale, shift
    "Stable Diffusion 1.x and 2.x": (4, 8, 0.18215, 0.0),
    "Stable Diffusion XL": (4, 8, 0.13025, 0.0),
    "Stable Diffusion 3": (16, 8, 1.5305, 0.0609),
    "FLUX.1": (16, 8, 0.3611, 0.1159),
    "Sana (DC-AE f32c32)": (32, 32, 0.41407, 0.0),
    "DC-AE f32c32-in": (32, 32, 0.3189, 0.0),
    "DC-AE f32c32-mix": (32, 32, 0.4552, 0.0),
    "DC-AE f64c128-in": (128, 64, 0.2889, 0.0),
    "DC-AE f64c128-mix": (128, 64, 0.4538, 0.0),
    "DC-AE f128c512-in": (512, 128, 0.4883, 0.0),
    "DC-AE f128c512-mix": (512, 128, 0.3620, 0.0),
}
PUBLISHED: dict[str, LatentSpace] = {
    name: LatentSpace(c, down, (scale,) * c, (shift,) * c) for name, (c, down, scale, shift) in _PUBLISHED.items()
}


def downscale_of(config: Mapping[str, Any]) -> int:
    """Picture side / latent side of an autoencoder, from its config: stated as downscale, or counted from its levels."""
    if config.get("downscale"):
        return int(config["downscale"])
    for name in ("encoder_block_out_channels", "down_block_out_channels", "block_out_channels"):
        if config.get(name) and len(config[name]) <= MOST_LEVELS:
            return int(2 ** (len(config[name]) - 1))
    raise ValueError(
        "This VAE's config names none of block_out_channels, encoder_block_out_channels and down_block_out_channels."
    )
