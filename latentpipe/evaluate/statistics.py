"""Intervals and tests: bootstrap over pictures, sign-flip test of paired differences, Holm's adjustment, Wilson's interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
FLIPS = 9999
EXACT = 13  # pictures up to which all 2^N sign patterns are tried
CHUNK = 2**20  # values that are drawn at once
SIGNS = 2**22  # signs at a time


Values = Sequence[float] | np.ndarray


def interval(values: Values, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval (Efron, Annals of Statistics 7, 1979) of the mean of `values` (N).

    NaN for one value, which says nothing about others.
    """
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


def sign_flip(differences: Sequence[float] | np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of the hypothesis that `differences` (N, finite) are symmetric about 0.

    Share of sign patterns whose mean is as far from 0 as the one observed: all 2^N of them up to 13 pictures, else 9999
    drawn ones and the observed one (B. Phipson and G. Smyth, SAGMB 9, 2010).
    """
    values = np.asarray(differences, np.float64)
    n = len(values)
    seen = abs(values.sum()) * (1 - 1e-9)
    if n <= EXACT:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ values) >= seen).mean())
    random = np.random.default_rng(seed)
    hits, rows = 1, max(SIGNS // n, 1)
    for first in range(0, FLIPS, rows):
        # the sum over a random half less the sum over the rest
        half = random.integers(0, 2, (min(rows, FLIPS - first), n), np.int8) @ values
        hits += int((np.abs(2 * half - values.sum()) >= seen).sum())
    return hits / (FLIPS + 1)


def least_p(n: int) -> float:
    """The smallest p-value that the sign-flip test can give for `n` pictures: both patterns without a change of sign."""
    return 2.0 ** (1 - n) if n <= EXACT else 1 / (FLIPS + 1)


def p_of_interval(value: float, low: float, high: float) -> float:
    """Two-sided p-value of "the value is 0" from its 95 % interval (Altman and Bland, BMJ 343, d2304, 2011).

    As if normal with the spread of the side that faces 0, since bootstrap intervals are skewed: the p-value is below 0.05
    exactly where the interval leaves 0 out.
    """
    error = (value - low if value > 0 else high - value) / 1.959964
    if not error > 0:
        return 1.0 if value == 0 else 0.0
    return math.erfc(abs(value) / error / math.sqrt(2))


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's step-down adjustment of M p-values: the k-th smallest times M - k + 1, never falling, at most 1."""
    array = np.asarray(p, np.float64)
    order = np.argsort(array, kind="stable")
    adjusted = np.empty_like(array)
    adjusted[order] = np.minimum(np.maximum.accumulate(array[order] * np.arange(len(array), 0, -1)), 1.0)
    return adjusted


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson, JASA 22, 1927), 95 % by default."""
    if n == 0:
        return 0.0, 1.0
    share = hits / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
