"""How smooth a path between two pictures is, on named features, and whether its middle looks like a real picture.

The baseline is the cross-fade of the same two pictures. Features: `evaluate.features`, (frames, D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from latentpipe.evaluate.metrics.features import Features
from latentpipe.evaluate.metrics.frechet import frechet, paired_frechet
from latentpipe.evaluate.statistics import interval, paired
from latentpipe.utils.errors import UserError


@dataclass(frozen=True)
class Walks:
    """N paths: their lengths, largest steps and the distance of their ends in features (N each), features of the middles N D."""

    length: np.ndarray
    largest: np.ndarray
    ends: np.ndarray
    middles: np.ndarray


def cross_fade(first: torch.Tensor, second: torch.Tensor, n: int) -> torch.Tensor:
    """Images n 3 H W from the first to the second (3 H W): a line in pixels."""
    share = torch.arange(n).view(-1, 1, 1, 1) / (n - 1)
    return torch.lerp(first[None], second[None], share.to(first))


def lengths(features: np.ndarray) -> tuple[float, float, float]:
    """Length of a path in features (frames D), its largest step, and how far its ends lie apart; Euclidean.

    The length is at least the distance of the ends: a path that goes straight in features has just that. (The perceptual path
    length of Karras et al., arXiv:1812.04948, section 4.1, takes squares of small steps instead.)
    """
    if len(features) < 2:
        raise ValueError(f"A path has at least 2 frames; given {len(features)}.")
    steps = np.linalg.norm(np.diff(features, axis=0), axis=1)
    return float(steps.sum()), float(steps.max()), float(np.linalg.norm(features[-1] - features[0]))


def walks(features: Features, paths: list[torch.Tensor]) -> Walks:
    """Measure paths, images n 3 H W each with n odd: the middle frame is the midpoint."""
    rows, middles = [], []
    for path in paths:
        found = features(path)
        rows.append(lengths(found))
        middles.append(found[len(found) // 2])
    length, largest, ends = np.array(rows).T
    return Walks(length, largest, ends, np.array(middles))


def compare(path: Walks, fade: Walks, real: np.ndarray, least: int = 2) -> dict[str, Any]:
    """The path and the cross-fade of the same N pairs, and their difference with its 95 % bootstrap interval over pairs.

    real   features of N real pictures (N D), one of each pair: what the midpoints should look like. Their Frechet distance is
           the idea of iFID (arXiv:2603.05630): are in-betweens like real pictures?
    least  UserError for fewer pairs

    Differences are path less fade: below 0 the path is the shorter, the more even, the more real.
    """
    n = len(path.length)
    if n < least:
        raise UserError(f"Given {n} pairs; expected at least {least} pairs.")
    rows: dict[str, Any] = {"n": n, "distance of the ends": float(path.ends.mean())}
    for name, mine, other in (
        ("path length", path.length, fade.length),
        ("largest step", path.largest, fade.largest),
        ("largest step over length", _uneven(path), _uneven(fade)),
    ):
        rows[name] = {"path": float(mine.mean()), "interval": interval(mine), "cross-fade": float(other.mean())}
        rows[name]["difference"] = _named(paired(mine, other))
    rows["Frechet distance of midpoints"] = {
        "path": frechet(real, path.middles),
        "cross-fade": frechet(real, fade.middles),
        "difference": _named(paired_frechet(real, path.middles, fade.middles)),
    }
    return rows


def _uneven(walk: Walks) -> np.ndarray:
    """Largest step as a share of the length (N)."""
    return walk.largest / np.maximum(walk.length, 1e-12)


def _named(found: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), found, strict=True))
