"""Does this VAE fit this denoiser? Measured on the same pictures through both VAEs, before anything is sampled.

Five outcomes: same space (swap), decoder fits (swap; pictures are encoded by the host's own VAE), same shape but another
space (adapt), other shape (adapt or train), broken.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from latentpipe.utils.errors import UserError, short
from latentpipe.utils.images import psnr, to_bytes
from latentpipe.vae.latent_space import LatentSpace
from latentpipe.vae.probe_images import probe_images
from latentpipe.vae.protocol import Stage

Outcome = Literal["same space", "decoder fits", "same shape, other space", "other shape", "broken"]
PROBES = 12
SAME_ENCODER = 0.98  # R^2 of a per-channel affine map; a copy in bf16 has 0.9999, a distilled encoder about 0.95
SAME_SPACE = 0.85  # R^2 of the identity that an approximate encoder of the same space reaches
DECODE_LOSS_DB = 2.0  # what a decoder of the same space may lose on the host's latents against its own
DAMAGE_DB = 3.0  # what it may lose against the host's own decoder, as a small decoder does
DECODER_DB = 2.0  # the same, where the encoder is another one, so that the decoder alone vouches for the space
FEWEST = 4  # pictures that a verdict takes at least
MOST_ENLARGED = 4  # times that one decoder may enlarge what the other does, from the same latents


@dataclass(frozen=True)
class Linear:
    """How much of one latent is a linear function of the other: R^2 on pictures that were not fitted to.

    gain, offset  of the per-channel fit ``vae = gain * host + offset``
    permutation   host's channel for each of the VAE's, where the map is a reordering (negative R^2 otherwise: None)
    """

    identity: float
    affine: float
    full: float
    gain: list[float]
    offset: list[float]
    permutation: list[int] | None = None


@dataclass(frozen=True)
class SwapMeasurements:
    """What was measured on `n` pictures: PSNR in dB of every road, and the latents' statistics per channel.

    side_px           side of the pictures that were compared: where one decoder makes larger ones, these are made smaller
    host, vae         each VAE's own round trip; None where it has no decoder
    vae_of_host       the VAE decodes the host's latents: what sampling will show
    host_of_vae       the host's VAE decodes the VAE's latents
    decoders          the two decodings of the host's latents, against each other
    flat              one mean colour for each picture: what a decoder that knows nothing gets
    unit_range        the VAE's own round trip with images in [0, 1]
    """

    n: int
    side_px: int
    pictures: str
    host: float | None
    vae: float | None
    flat: float
    unit_range: float | None
    host_mean: list[float]
    host_std: list[float]
    vae_mean: list[float]
    vae_std: list[float]
    vae_of_host: float | None = None
    host_of_vae: float | None = None
    decoders: float | None = None
    linear: Linear | None = None


@dataclass(frozen=True)
class Verdict:
    """The outcome, why, what to do next, and the numbers behind it."""

    outcome: Outcome
    reason: str
    next_step: str
    host_space: LatentSpace
    vae_space: LatentSpace
    evidence: SwapMeasurements | None = field(default=None, repr=False)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Verdict:
        """The inverse of `as_dict`; TypeError or KeyError where `values` is none."""
        spaces = {key: LatentSpace(**_tuples(values[key])) for key in ("host_space", "vae_space")}
        seen = values["evidence"]
        if seen is not None:
            seen = SwapMeasurements(**{**seen, "linear": seen["linear"] and Linear(**seen["linear"])})
        return cls(**{**values, **spaces, "evidence": seen})

    @property
    def fits(self) -> bool:
        """Whether the VAE decodes this denoiser's latents, which is all that a picture from a prompt needs."""
        return self.outcome in ("same space", "decoder fits")

    @property
    def encodes(self) -> bool:
        """Whether its encoder makes this denoiser's latents too, as a picture that begins from a picture needs."""
        return self.outcome == "same space"

    @property
    def status(self) -> Literal["green", "amber", "red"]:
        """For a glance: swap it; an adapter can bring it here; leave it."""
        return "green" if self.fits else "amber" if self.outcome == "same shape, other space" else "red"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.outcome}: {self.reason}", f"next: {self.next_step}"]
        seen = self.evidence
        if seen is not None:
            lines.append(f"measured on {seen.n} {seen.pictures}, {seen.side_px} px:")
            lines += [f"  {name:42}{_db(value)}" for name, value in _roads(seen).items() if value is not None]
            if seen.linear:
                fit = seen.linear
                lines.append(
                    f"  {'share of its latents explained (R^2)':42}as they are {fit.identity:.3f}, per channel {fit.affine:.3f}, "
                    f"linear {fit.full:.3f}"
                )
            spread = f"host {_mean(seen.host_std):.3f}, VAE {_mean(seen.vae_std):.3f}"
            lines.append(f"  {'std of the latents, mean over channels':42}{spread}")
        return "\n".join(lines)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON lists as tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _roads(seen: SwapMeasurements) -> dict[str, float | None]:
    return {
        "host's VAE, round trip": seen.host,
        "this VAE, round trip": seen.vae,
        "this VAE decodes the host's latents": seen.vae_of_host,
        "host's VAE decodes this VAE's latents": seen.host_of_vae,
        "both decode the host's, one against other": seen.decoders,
        "one colour for each picture": seen.flat,
    }


def comparable(host: tuple[int, int], vae: tuple[int, int]) -> bool:
    """Whether one denoiser can draw latents for both: the same channels, and pictures of one size or of 2 or 4 times the other's.

    host, vae  channels and downscale
    """
    few, many = sorted((host[1], vae[1]))
    return host[0] == vae[0] and many in (few, 2 * few, MOST_ENLARGED * few)


@torch.no_grad()
def measure(host: Any, vae: Any, images: torch.Tensor | None = None) -> SwapMeasurements:
    """Encode the same images (B 3 H W; None: bundled probes) with two stages and decode every way.

    Their latent shapes are `comparable`. Where one makes pictures of twice the size from a latent, it takes the images as they
    are and the other a reduced copy, so that both make latents of one size; pictures are compared at the smaller size.
    """
    pictures = "pictures given" if images is not None else "bundled probes"
    if images is None:
        images = probe_images(PROBES, probe_side(host.space.downscale, vae.space.downscale))
    _check(images)
    larger = max(host.space.downscale, vae.space.downscale)
    smaller = min(host.space.downscale, vae.space.downscale)
    theirs, ours = (_each(stage.encode, _reduced(images, larger // stage.space.downscale)) for stage in (host, vae))
    side = images.shape[-1] * smaller // larger
    pictures_of_vae, images = _reduced(images, larger // vae.space.downscale), _reduced(images, larger // smaller)
    truth = to_bytes(images)
    by_host, by_vae = _decoded(host, theirs, side), _decoded(vae, ours, side)
    round_trip = _quality(by_vae, truth)
    flat = psnr(to_bytes(images.mean((2, 3), keepdim=True).expand_as(images)), truth).mean().item()
    unit = None
    if round_trip is not None and round_trip < flat + 6:
        unit = _quality(_decoded(vae, _each(vae.encode, pictures_of_vae / 2 + 0.5), side, unit=True), truth)
    crossed = _decoded(vae, theirs, side)
    return SwapMeasurements(
        n=len(images),
        side_px=side,
        pictures=pictures,
        host=_quality(by_host, truth),
        vae=round_trip,
        flat=flat,
        unit_range=unit,
        host_mean=theirs.mean((0, 2, 3)).tolist(),
        host_std=theirs.std((0, 2, 3)).tolist(),
        vae_mean=ours.mean((0, 2, 3)).tolist(),
        vae_std=ours.std((0, 2, 3)).tolist(),
        vae_of_host=_quality(crossed, truth),
        host_of_vae=_quality(_decoded(host, ours, side), truth),
        decoders=None if by_host is None else _quality(crossed, by_host),
        linear=linear_relation(theirs, ours),
    )


def _check(images: torch.Tensor) -> None:
    """UserError where these are no images to measure on."""
    wrong = ""
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        shape = f"{images.dtype}, shape {tuple(images.shape)}" if isinstance(images, torch.Tensor) else type(images).__name__
        wrong = f"given {shape}; expected a float tensor, B 3 H W"
    elif len(images) < FEWEST:
        wrong = f"{len(images)} are too few to tell two VAEs apart; give at least {FEWEST}"
    elif not -1.01 <= images.min() <= images.max() <= 1.01:
        wrong = f"values reach from {short(float(images.min()))} to {short(float(images.max()))}; expected [-1, 1]"
    if wrong:
        raise UserError(f"Images to measure on: {wrong}.")


def probe_side(*downscales: int) -> int:
    """A side in pixels that all downscales divide: 16 latents a side, 8 where that would be more than 256 pixels."""
    unit, most = math.lcm(*downscales), max(downscales)
    return unit * math.ceil(max(64, min(16 * most, max(256, 8 * most))) / unit)


def linear_relation(host: torch.Tensor, vae: torch.Tensor) -> Linear:
    """Fit the VAE's latents from the host's (B C h w each) on every second picture; R^2 on the others.

    ``R^2 = 1 - |error|^2 / |vae - its mean|^2``, over all channels; least squares in float64 with a small ridge.
    """
    x, y = (latents.double().permute(0, 2, 3, 1) for latents in (host, vae))
    fit_x, fit_y, test_x, test_y = (part.flatten(0, 2) for part in (x[::2], y[::2], x[1::2], y[1::2]))
    spread = (test_y - test_y.mean(0)).square().sum().clamp_min(1e-12)

    def explained(guess: torch.Tensor) -> float:
        return (1 - (test_y - guess).square().sum() / spread).item()

    mean_x, mean_y = fit_x.mean(0), fit_y.mean(0)
    centred_x, centred_y = fit_x - mean_x, fit_y - mean_y
    gain = (centred_x * centred_y).sum(0) / centred_x.square().sum(0).clamp_min(1e-12)
    offset = mean_y - gain * mean_x
    gram = centred_x.T @ centred_x
    ridge = 1e-6 * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram + ridge, centred_x.T @ centred_y)
    return Linear(
        identity=explained(test_x),
        affine=explained(test_x * gain + offset),
        full=explained((test_x - mean_x) @ weight + mean_y),
        gain=gain.tolist(),
        offset=offset.tolist(),
        permutation=_permutation(centred_x, centred_y),
    )


def _permutation(x: torch.Tensor, y: torch.Tensor) -> list[int] | None:
    """For each column of y the column of x that equals it, where that is a reordering and not the identity."""
    unit_x, unit_y = (part / part.norm(dim=0).clamp_min(1e-12) for part in (x, y))
    likeness, order = (unit_y.T @ unit_x).max(1)
    found = order.tolist()
    if likeness.min() < math.sqrt(SAME_ENCODER) or sorted(found) != list(range(len(found))) or found == sorted(found):
        return None
    return found


def _each(function: Any, batch: torch.Tensor, size: int = 4) -> torch.Tensor:
    return torch.cat([function(part).float().cpu() for part in batch.split(size)])


def _reduced(images: torch.Tensor, times: int) -> torch.Tensor:
    return images if times == 1 else torch.nn.functional.avg_pool2d(images, times)


def _decoded(stage: Stage, latents: torch.Tensor, side: int, unit: bool = False) -> torch.Tensor | None:
    """Latents as pixels (uint8, B 3 H W) `side` wide; None where the stage cannot decode. `unit`: it gives images in [0, 1]."""
    if not stage.decodes:
        return None
    images = _each(stage.decode, latents)
    images = _reduced(images, images.shape[-1] // side)
    return to_bytes(images * 2 - 1 if unit else images)


def _quality(pixels: torch.Tensor | None, truth: torch.Tensor) -> float | None:
    """Mean PSNR in dB, equal pictures counting as 99; None where nothing was decoded."""
    return None if pixels is None else psnr(pixels, truth).clamp_max(99.0).mean().item()


def _db(value: float) -> str:
    return f"{value:.1f} dB"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
