"""Is a paired difference more than chance, also among many? The sign-flip test and Holm's adjustment."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

FLIPS = 9999
EXACT = 13  # pictures up to which all 2^N sign patterns are tried
CHUNK = 2**22  # signs at a time


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
    hits, rows = 1, max(CHUNK // n, 1)
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
