"""What an evaluation of a VAE says: every figure with its interval, its N, its set and its protocol."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from latentpipe.evaluate.statistics import interval

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Score:
    """One figure: its mean (or a distance between two sets), 95 % interval, number of pictures and unit ("dB", "bits", "")."""

    value: float
    low: float
    high: float
    n: int
    unit: str = ""
    better: Better = "neither"

    @classmethod
    def of(cls, values: Any, unit: str = "", better: Better = "neither") -> Score:
        """The mean of one value for each picture, with its bootstrap interval."""
        low, high = interval(values)
        return cls(float(sum(values) / len(values)), low, high, len(values), unit, better)


@dataclass(frozen=True)
class Evaluation:
    """One VAE on one set of pictures.

    name, hash     of the VAE; `about`: class, channels, downscale, parameters, dtype, bytes of its weights
    pictures       set (folder name), n, size_px (None: each at its own size), sha256 over the pixels, resize, skipped
    protocol       name, posterior (mode or sample), rounding, range, ... : what a reader needs to repeat the figures
    scores         by the metric's name ("PSNR", "SSIM", "MS-SSIM-3", "Frechet distance on squeezenet10", ...)
    per_picture    the values (N) behind a score, in the order of `names`; NaN where a score is of fewer pictures
    curves         series for plots: "spectrum of pictures", "spectrum of reconstructions", "KL per channel", ...
    cost           encode and decode: milliseconds for one picture, peak memory in MB, size in pixels, threads, device
    not_measured   the reason for each metric that this run could not measure
    """

    name: str
    hash: str
    about: dict[str, Any]
    pictures: dict[str, Any]
    protocol: dict[str, Any]
    scores: dict[str, Score]
    per_picture: dict[str, list[float]]
    names: list[str]
    curves: dict[str, list[float]] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which knows no NaN and no infinity: None stands for both."""
        return _finite(asdict(self))

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Evaluation:
        """The inverse of `as_dict`; None becomes NaN."""
        scores = {name: Score(**{key: _number(value) for key, value in score.items()}) for name, score in raw["scores"].items()}
        series = {key: {name: list(map(_number, row)) for name, row in raw[key].items()} for key in ("per_picture", "curves")}
        return cls(**{**raw, "scores": scores, **series})


def _number(value: Any) -> Any:
    return math.nan if value is None else value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
