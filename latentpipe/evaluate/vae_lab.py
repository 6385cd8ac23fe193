"""A laboratory for a few pictures and several VAEs: rebuilt side by side, with differences and figures.

pictures -> images -> each VAE: encode -> latents -> decode -> images -> pictures, differences, scores with intervals
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from latentpipe.checkpoints.registry import find_model, name_of
from latentpipe.compatibility.measure import probe_side
from latentpipe.data.image_set import read_set
from latentpipe.evaluate.comparison import floor_of
from latentpipe.evaluate.metrics.latents import batch_of, cycles, decibels, rebuild_batch
from latentpipe.evaluate.metrics.ssim import ssim
from latentpipe.evaluate.protocol import find_protocol, round_images
from latentpipe.evaluate.reconstruction import about
from latentpipe.evaluate.speed import measure_cost
from latentpipe.evaluate.statistics import interval, paired
from latentpipe.pipelines.swap import stage_of
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.images import fit_square, to_images, to_pixels
from latentpipe.utils.progress import ProgressCallback
from latentpipe.vae.stage import VAEStage

GAIN = 4  # of the difference maps
MOST = 24  # pictures
FEWEST = 6  # pictures that an interval takes: with fewer, differences of one sign alone would leave zero out too often
EXAMPLES = 8
LARGEST_USUAL = 512  # pixels: at 1024 a picture takes minutes on a CPU; whoever wants it gives the side
UNSTATED_PX = 32  # what diffusers' AutoencoderKL says where its config says nothing
VAE = str | Path | VAEStage
Opener = Callable[[Any], VAEStage]


@dataclass(frozen=True)
class Rebuilt:
    """One VAE on the pictures (n): what it is, what it made of them, and its figures for each picture.

    space        latent channels and downscale in words; weights_mb: MB (2^20 bytes) of weights in memory
    differences  grey is no difference; the error of each colour times GAIN about it, clipped
    scores       "PSNR" (dB), "SSIM", "PSNR after k cycles" (dB), "seam": see `seam`; a value for each picture
    cost         encode and decode: {"ms": median, ...} of one picture, see `evaluate.speed.measure_cost`
    """

    name: str
    hash: str
    space: str
    dtype: str
    weights_mb: float
    pictures: list[Image.Image]
    differences: list[Image.Image]
    scores: dict[str, list[float]]
    cost: dict[str, dict[str, float]]

    def mean(self, score: str) -> tuple[float, float | None, float | None]:
        """Mean of a score with its 95 % bootstrap interval; None for its ends below FEWEST pictures."""
        values = self.scores[score]
        low, high = interval(values) if len(values) >= FEWEST else (None, None)
        return sum(values) / len(values), low, high


@dataclass(frozen=True)
class Laboratory:
    """The pictures as the VAEs saw them (squares of `side` pixels), and each VAE's work."""

    originals: list[Image.Image]
    side: int
    vaes: list[Rebuilt]

    def best(self, score: str = "PSNR") -> str | None:
        """The VAE that is better than every other one; None where there is none.

        The paired difference must leave zero out of its 95 % interval and reach the metric's floor (`comparison.floor_of`).
        """
        if len(self.originals) < FEWEST or len(self.vaes) < 2:
            return None
        for mine in self.vaes:
            others = [other for other in self.vaes if other is not mine]
            found = [(paired(mine.scores[score], other.scores[score]), other.mean(score)[0]) for other in others]
            if all(low > 0 and gain >= floor_of(score, mine.mean(score)[0], theirs) for (gain, low, _), theirs in found):
                return mine.name
        return None

    def differences(self, score: str = "PSNR") -> list[tuple[str, str, float, float, float]]:
        """Of every pair of VAEs: names, mean difference and its 95 % interval; none below FEWEST pictures."""
        if len(self.originals) < FEWEST:
            return []
        return [
            (one.name, other.name, *paired(one.scores[score], other.scores[score])) for one, other in combinations(self.vaes, 2)
        ]


@torch.no_grad()
def compare_pictures(
    pictures: Sequence[Image.Image],
    vaes: Sequence[VAE],
    side: int | None = None,
    report: ProgressCallback | None = None,
    opened: Opener = stage_of,
) -> Laboratory:
    """Every picture through every VAE, measured by the protocol "latentpipe".

    pictures  1 to MOST, of any size; the centred square of each is used
    vaes      names, folders or files, or stages; one or more
    side      in pixels; None: `usual_side`
    opened    makes the stage of a VAE; it says where it computes
    UserError: no picture or too many, no VAE, a side that a VAE does not take, a VAE without a decoder.
    """
    stages = _stages(vaes, opened)
    squares, side = _squares(pictures, [stage for _, stage in stages], side)
    images = to_images(squares).contiguous()
    found = []
    total = len(stages) * 3
    for index, (name, stage) in enumerate(stages):
        step = index * 3
        _tell(report, step, total, f"{name}: rebuild")
        rebuilt = _rebuilt(stage, images)
        _tell(report, step + 1, total, f"{name}: encode and decode ten times")
        scores = scores_of(stage, images, rebuilt)
        _tell(report, step + 2, total, f"{name}: time")
        facts, cost = about(stage), measure_cost(stage, side, side)
        found.append(
            Rebuilt(
                name=name,
                hash=stage.digest or "",
                space=f"{counted(stage.space.channels, 'channel')} at 1/{stage.space.downscale}",
                dtype=facts["dtype"],
                weights_mb=facts["bytes"] / 2**20,
                pictures=_shown(rebuilt),
                differences=to_pixels((rebuilt.clamp(-1, 1) - images) * GAIN),
                scores=scores,
                cost={direction: cost[direction] for direction in ("encode", "decode")},
            )
        )
    _tell(report, total, total, "done")
    return Laboratory(list(squares), side, found)


def scores_of(stage: VAEStage, images: torch.Tensor, rebuilt: torch.Tensor) -> dict[str, list[float]]:
    """The figures of a reconstruction, a value for each picture; `images` and `rebuilt` N 3 H W."""
    protocol = find_protocol("latentpipe")
    first, second = round_images(images, "nearest"), protocol.to_bytes(rebuilt)
    scores = {"PSNR": decibels(first, second).tolist()}
    if images.shape[-1] >= 11:
        scores["SSIM"] = ssim(first.float(), second.float(), 255.0).tolist()
    scores["seam"] = seam(images, rebuilt, stage.space.downscale).tolist()
    for seeds, part in _batches(images):
        for name, values in cycles(stage, part, protocol, seeds).items():
            scores.setdefault(name, []).extend(values)
    return {name: values for name, values in scores.items() if name != "PSNR after 1 cycle"}


def seam(images: torch.Tensor, rebuilt: torch.Tensor, downscale: int) -> torch.Tensor:
    """Whether the grid of the latents shows in the error (B): 1 where it does not, larger where it does.

    Mean absolute step of ``rebuilt - images`` across the borders of the latents' cells over that within cells, as the
    blockiness of Wang, Sheikh and Bovik (ICIP 2002, eq. 1 and 2) of the error instead of the picture. Sides above `downscale`;
    1 where there is no error, or no border.
    """
    error = rebuilt.double() - images.double()
    border, inside = [], []
    for axis in (2, 3):
        steps = error.diff(dim=axis).abs().transpose(axis, 3).flatten(1, 2)  # B, rest, positions
        last = torch.arange(steps.shape[-1]) % downscale == downscale - 1
        border.append(steps[..., last].flatten(1))
        inside.append(steps[..., ~last].flatten(1))
    across, within = torch.cat(border, 1), torch.cat(inside, 1)
    if not across.shape[1] or not within.shape[1]:
        return error.new_ones(len(error))
    means = across.mean(1), within.mean(1)
    return torch.where(means[1] > 0, means[0] / means[1].clamp_min(1e-12), torch.ones_like(means[0]))


@torch.no_grad()
def decode_same(
    pictures: Sequence[Image.Image],
    source: VAE,
    vaes: Sequence[VAE],
    side: int | None = None,
    report: ProgressCallback | None = None,
    opened: Opener = stage_of,
) -> tuple[list[Image.Image], list[tuple[str, list[Image.Image] | str]]]:
    """The latents that one VAE makes of the pictures, decoded by each of `vaes`.

    Returns the originals, and for each VAE its name with its pictures, or with the sentence that says why its latents have
    another shape.
    """
    [(_, encoder)], stages = _stages([source], opened), _stages(vaes, opened)
    squares, side = _squares(pictures, [encoder], side)
    at_once = batch_of(side, side)
    batches = to_images(squares).contiguous().split(at_once)
    latents = torch.cat([encoder.encode(part).float().cpu() for part in batches]).split(at_once)
    found: list[tuple[str, list[Image.Image] | str]] = []
    for index, (name, stage) in enumerate(stages):
        _tell(report, index, len(stages), f"{name}: decode")
        same = (stage.space.channels, stage.space.downscale) == (encoder.space.channels, encoder.space.downscale)
        if not same:
            found.append((name, stage.space.difference(encoder.space)))
            continue
        found.append((name, _shown(torch.cat([stage.decode(part).float().cpu() for part in latents]))))
    return list(squares), found


def example_pictures(n: int = EXAMPLES) -> list[Image.Image]:
    """Pictures of the bundled emoji bank (32 pixels wide, enlarged to 64), of those that no VAE was trained on."""
    return to_pixels(read_set(None, 64, n, "held_out").images)


def _stages(vaes: Sequence[VAE], opened: Opener) -> list[tuple[str, VAEStage]]:
    """Names and stages; UserError where none is given, or where one has no decoder."""
    if not vaes:
        raise UserError("No VAE was chosen; choose one or more ('latentpipe ls vae' lists them).")
    found = []
    for vae in vaes:
        stage = opened(vae)
        name = type(stage.vae).__name__ if isinstance(vae, VAEStage) else name_of(find_model(vae, "vae"), "vae")
        if not stage.decodes:
            raise UserError(f"{name} is an encoder alone; it has no decoder, so nothing can be rebuilt. Choose another one.")
        found.append((name, stage.eval()))
    return found


def _squares(pictures: Sequence[Image.Image], stages: Sequence[VAEStage], side: int | None) -> tuple[list[Image.Image], int]:
    if not 1 <= len(pictures) <= MOST:
        raise UserError(f"{counted(len(pictures), 'picture')} were given; expected 1 to {MOST}.")
    downscales = [stage.space.downscale for stage in stages]
    side = side or usual_side(stages)
    if not 8 <= side <= 1024 or any(side % unit for unit in downscales):
        units = ", ".join(str(unit) for unit in sorted(set(downscales)))
        raise UserError(f"The side is {side} pixels; expected 8 to 1024, a multiple of {units}.")
    return [fit_square(picture, side) for picture in pictures], side


def usual_side(stages: Sequence[VAEStage]) -> int:
    """The side in pixels that VAEs are compared at: the largest that one of them was trained at, at most LARGEST_USUAL.

    It is a multiple that all of them take. Where no config states a size, 16 latents a side (`measure.probe_side`).
    """
    downscales = [stage.space.downscale for stage in stages]
    stated = [stage.vae.config.get("sample_size") for stage in stages]
    sizes = [max(size) if isinstance(size, (list, tuple)) else size for size in stated]
    known = [size for size in sizes if isinstance(size, int) and size != UNSTATED_PX]
    unit = math.lcm(*downscales)
    side = min(max(known, default=0), LARGEST_USUAL)
    return side // unit * unit if side >= unit else probe_side(*downscales)


def _batches(images: torch.Tensor) -> list[tuple[range, torch.Tensor]]:
    """As large as an evaluation's, with the places of their pictures: the size of a batch moves the last bits of a figure."""
    n = batch_of(*images.shape[-2:])
    return [(range(start, min(start + n, len(images))), images[start : start + n]) for start in range(0, len(images), n)]


def _rebuilt(stage: VAEStage, images: torch.Tensor) -> torch.Tensor:
    """What an evaluation makes of the pictures."""
    protocol = find_protocol("latentpipe")
    return torch.cat([rebuild_batch(stage, part, protocol, seeds).images for seeds, part in _batches(images)])


def _shown(images: torch.Tensor) -> list[Image.Image]:
    """The pictures whose bytes are measured."""
    return [Image.fromarray(array) for array in find_protocol("latentpipe").to_bytes(images).permute(0, 2, 3, 1).cpu().numpy()]


def _tell(report: ProgressCallback | None, done: int, total: int, what: str) -> None:
    if report is not None:
        report(done, total, what)
