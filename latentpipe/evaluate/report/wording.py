"""Figures in words: scores with intervals, metrics with units, sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from latentpipe.evaluate.results import Score
from latentpipe.utils.errors import short


def heading(metric: str, scores: Sequence[Score | None]) -> str:
    """A metric's name with its unit and an arrow to its better end."""
    score = next(score for score in scores if score is not None)
    unit = f" ({score.unit})" if score.unit else ""
    return f"{metric}{unit}{ {'higher': ' ↑', 'lower': ' ↓'}.get(score.better, '') }"


def figure(score: Score | None) -> str:
    """A score with its interval, rounded to two digits of the interval's half-width."""
    if score is None:
        return "not measured"
    value, low, high = rounded(score.value, score.low, score.high)
    return f"{value} ({interval_words(low, high)})"


def interval_words(low: str, high: str) -> str:
    """Two ends in words; of one picture there is no interval."""
    return "no interval for n = 1" if low == high == "nan" else f"{low} to {high}"


def rounded(value: float, low: float, high: float) -> tuple[str, str, str]:
    """Three figures as text, all with the decimals that show two digits of the half-width of low to high."""
    half = (high - low) / 2
    if not (math.isfinite(half) and half > 0):
        return (f"{short(value, 4)}", f"{short(low, 4)}", f"{short(high, 4)}")
    decimals = min(max(1 - math.floor(math.log10(half)), 0), 8)
    value_, low_, high_ = (f"{number:.{decimals}f}".replace("-", "−") for number in (value, low, high))
    return value_, low_, high_


def size_words(size_px: int | Sequence[int] | None) -> str:
    """A side in px, or [height, width], as width × height; None: each picture at its own size."""
    if size_px is None:
        return "each at its own size"
    height, width = (size_px, size_px) if isinstance(size_px, int) else size_px
    return f"{width} × {height} px"
