"""Bootstrap intervals over pictures: percentile (Efron, Annals of Statistics 7, 1979), 95 %, with a fixed seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
CHUNK = 2**20  # values that are drawn at once


Values = Sequence[float] | np.ndarray


def interval(values: Values, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of `values` (N); NaN for one value, which says nothing about others."""
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return math.nan, math.nan
    low, high = np.quantile(resampled_means(array, seed), (0.025, 0.975))
    return float(low), float(high)


def paired(first: Values, second: Values, seed: int = 0) -> tuple[float, float, float]:
    """Mean of ``first - second`` over the same pictures and its 95 % interval: (difference, low, high)."""
    if len(first) != len(second):
        raise ValueError(f"Paired values are of the same pictures; given {len(first)} and {len(second)}.")
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    return float(difference.mean()), *interval(difference, seed)


def resampled_means(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means (RESAMPLES) of resamples of `values` (N), drawn with replacement."""
    random, n = np.random.default_rng(seed), len(values)
    rows = max(1, CHUNK // n)
    parts = [values[random.integers(0, n, (min(rows, RESAMPLES - first), n))].mean(1) for first in range(0, RESAMPLES, rows)]
    return np.concatenate(parts)
