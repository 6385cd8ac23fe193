"""Draw latents from a prior, decode them, and say how far the pictures are from real ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from latentpipe.data.image_set import PictureSet, decode, encode, first, read_set
from latentpipe.evaluate.metrics.features import Features, metric_names, open_features
from latentpipe.evaluate.metrics.frechet import frechet, frechet_score, resamples
from latentpipe.evaluate.results import Score
from latentpipe.explore.prior import Prior, aggregate, normal
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import bytes_to_images, sheet, to_bytes, to_pixels
from latentpipe.utils.progress import ProgressCallback
from latentpipe.vae.protocol import Stage

REBUILT, OTHERS = "reconstructions", "other real pictures"


@dataclass(frozen=True)
class Samples:
    """Drawn pictures on a sheet, the prior's name in words, and `figures` (empty where nothing was measured)."""

    page: Image.Image
    prior: str
    figures: dict[str, Any]

    def table(self) -> str:
        """The distances in lines; empty where nothing was measured."""
        if not self.figures:
            return ""
        head = "{metric} to {n} pictures of {set}, {size_px} px (lower is nearer; 95 % interval)".format(**self.figures)
        rows = self.figures["distances"].items()
        return "\n".join(
            [head, *("  {0:28}{value:10.2f}  ({low:.2f} to {high:.2f}), n = {n}".format(name, **row) for name, row in rows)]
        )


def sample(
    stage: Stage,
    size_px: int,
    n: int = 16,
    seed: int = 0,
    prior: Literal["normal", "gmm"] = "normal",
    folder: Path | None = None,
    measured: int = 0,
    features: str = "emoji-words",
    report: ProgressCallback | None = None,
) -> Samples:
    """Draw `n` pictures of `size_px` from N(0, I), or from a mixture that is fitted to the latents of real pictures.

    folder    of real pictures; None: the emoji bank
    measured  real pictures, and as many draws, for the Frechet distance; 0: none
    """
    network = open_features(features) if measured else None
    most = None if prior == "gmm" else 2 * measured  # others to compare with, too
    real = read_set(folder, size_px, most) if measured or prior == "gmm" else None
    source = normal(stage.space.shape(1, size_px, size_px)[1:])
    if prior == "gmm" and real is not None:
        latents = encode(stage, real.images, report, torch.Generator().manual_seed(seed))
        source = aggregate(latents, report=report)
    page = sheet(to_pixels(draw(stage, source, n, seed, report)), min(n, 8))
    if network is None or real is None:
        return Samples(page, source.name, {})
    some = first(real, measured)
    scores = distances(stage, {source.name: source}, some, network, real.images[measured : 2 * measured], seed, report)
    return Samples(page, source.name, figures(scores, some, size_px, network))


def draw(stage: Stage, prior: Prior, n: int, seed: int = 0, report: ProgressCallback | None = None) -> torch.Tensor:
    """`n` pictures of a prior's latents: images n 3 H W on the CPU; picture i depends on ``seed + i`` alone."""
    return decode(stage, prior.sample(n, seed), report)


def frechet_between(real: np.ndarray, drawn: np.ndarray, seed: int = 0) -> Score:
    """The Frechet distance of two independent sets of features (N D, M D) with its 95 % bootstrap interval over both.

    `frechet.frechet`; each resample draws from either set, and the resamples' mean is moved onto the value, because a
    resample holds fewer different pictures and a Frechet distance grows as they get fewer.
    """
    value = frechet(real, drawn)
    random = np.random.default_rng(seed)
    values = np.array(
        [
            frechet(*(rows[random.integers(0, len(rows), len(rows))] for rows in (real, drawn)))
            for _ in range(resamples(min(len(real), len(drawn)), real.shape[1]))
        ]
    )
    low, high = np.quantile(values - values.mean() + value, (0.025, 0.975))
    return Score(value, max(float(low), 0.0), float(high), len(drawn), "", "lower")


def distances(
    stage: Stage,
    priors: Mapping[str, Prior],
    real: PictureSet,
    features: Features,
    others: torch.Tensor | None = None,
    seed: int = 0,
    report: ProgressCallback | None = None,
) -> dict[str, Score]:
    """The Frechet distance to `real` of as many draws from each prior, and two rows to read it against.

    "other real pictures"  `others`, images M 3 H W: two sets of real pictures are as far apart at this N
    "reconstructions"      `real` itself through the VAE: what a perfect prior would come near

    All pictures are rounded to bytes first. UserError below 2 pictures.
    """
    if len(real.images) < 2:
        raise UserError(f"A Frechet distance needs 2 pictures and more; {real.name} has {len(real.images)}.")
    truth = features(real.images)
    drawn = {name: draw(stage, prior, len(real.images), seed, report) for name, prior in priors.items()}
    if others is not None and len(others) > 1:
        drawn[OTHERS] = others
    found = {name: frechet_between(truth, features(_rounded(images)), seed) for name, images in drawn.items()}
    rebuilt = features(_rounded(decode(stage, encode(stage, real.images, report), report)))
    return found | {REBUILT: Score(*frechet_score(truth, rebuilt, seed), len(truth), "", "lower")}


def _rounded(images: torch.Tensor) -> torch.Tensor:
    return bytes_to_images(to_bytes(images))


def positions_note(stage: Stage, name: str, size_px: int) -> str | None:
    """Why draws from N(0, I) are no pictures where a picture has several positions of latents; None where it has one."""
    side = size_px // stage.space.downscale
    if side == 1:
        return None
    return (
        f"a picture of {size_px} px has {side} x {side} positions of latents here, and N(0, I) draws each of them alone: expect "
        f"texture, no pictures. What joins them is a denoiser ('latentpipe generate'); --vae emoji-vector has one vector for a "
        f"whole picture ({name} has not)"
    )


def figures(scores: Mapping[str, Score], real: PictureSet, size_px: int, features: Features) -> dict[str, Any]:
    """The distances with their set, size, features and N, for JSON."""
    rows = {name: {"value": score.value, "low": score.low, "high": score.high, "n": score.n} for name, score in scores.items()}
    about = {
        "set": real.name,
        "n": len(real.images),
        "size_px": size_px,
        "features": features.name,
        "features_hash": features.hash,
    }
    return {"metric": metric_names(features.name)[0], **about, "distances": rows}
