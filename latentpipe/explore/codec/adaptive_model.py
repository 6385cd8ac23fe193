"""The model of any VAE's latents, which learns while it codes: all of it in integers, the same for encoder and decoder.

For every channel: the mean is the best so far of six predictions from the places around, the scale follows from the errors made
around and from what errors came of such surroundings before.
"""

from __future__ import annotations

from functools import cache
from math import isqrt
from typing import Any

import numpy as np

from latentpipe.explore.codec.frequency_tables import CENTRE, FRACTIONS, ONE, SCALES, SYMBOLS, TOTAL, counts
from latentpipe.explore.codec.wavefront import NEAR, REACH

WEST, NORTH, NORTH_WEST, NORTH_EAST = (NEAR.index(place) for place in ((0, -1), (-1, 0), (-1, -1), (-1, 1)))
BUCKETS = 16  # of the errors around
PRIOR = 2  # places' worth of belief in the errors around
FINE = 8  # errors are in eighths of a step
MOST = 2**24


class Adaptive:
    """Nothing is known of the latents before the first: C channels of h x w places."""

    def __init__(self, c: int, h: int, w: int) -> None:
        self.groups = [slice(0, c)]
        self.errors = np.zeros((c, 6), np.int64)  # of each prediction, fading
        self.around = np.full((h + REACH, w + 2 * REACH, c), -1, np.int64)  # errors in eighths; -1: not coded, or outside
        self.sums = np.zeros((c, BUCKETS), np.int64)
        self.seen = np.zeros((c, BUCKETS), np.int64)
        self.total, self.places = np.zeros(c, np.int64), 0

    def look(self, near: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> dict[str, Any]:
        """Predictions (n 6 C) and buckets (n C) of a wave."""
        west, north = near[:, WEST], near[:, NORTH]
        usual = np.zeros_like(west) if not self.places else np.broadcast_to(self.total // self.places, west.shape)
        guesses = np.stack(
            [usual, FRACTIONS * west, FRACTIONS * north, FRACTIONS // 2 * (west + north),
             FRACTIONS // 2 * (west + near[:, NORTH_EAST]), FRACTIONS * (west + north - near[:, NORTH_WEST])], 1,
        )  # fmt: skip
        i, j = rows + REACH, columns + REACH
        errors = np.stack([self.around[i, j - 1], self.around[i - 1, j], self.around[i - 1, j - 1], self.around[i - 1, j + 1]])
        weights = np.array([3, 3, 1, 1])[:, None, None] * (errors >= 0)
        weight = weights.sum(0)
        local = (errors.clip(0) * weights).sum(0) // weight.clip(1)
        bucket = np.where(weight == 0, 0, 1 + _log(local).clip(0, BUCKETS - 2))
        return {"guesses": guesses, "local": local, "bucket": bucket, "known": weight > 0, "at": (i, j)}

    def predict(self, state: Any, here: np.ndarray, group: slice) -> tuple[np.ndarray, np.ndarray]:
        """Means in eighths of a step and scales (n C each)."""
        channels = np.arange(here.shape[1])
        best = self.errors.argmin(1)
        mean = state["guesses"][:, best, channels].clip(-MOST, MOST)
        bucket = state["bucket"]
        sums, seen = self.sums[channels, bucket], self.seen[channels, bucket]
        # where no errors are around and none are known, a step or so
        belief = np.where(state["known"], state["local"], FINE)
        expected = (sums + PRIOR * belief + 1) * 256 // (FINE * (seen + PRIOR))
        state["mean"] = mean
        return mean, scales()[expected.clip(0, len(scales()) - 1)] if expected.max() < len(scales()) else _scale(expected)

    def learn(self, state: Any, here: np.ndarray) -> None:
        """Errors of the wave, by prediction, by place and by bucket."""
        values = FRACTIONS * here.clip(-MOST // FRACTIONS, MOST // FRACTIONS)
        missed = np.abs(values[:, None] - state["guesses"]).clip(0, MOST).sum(0).T
        self.errors = self.errors - (self.errors >> 5) + missed
        error = np.abs(values - state["mean"]).clip(0, MOST)
        self.around[state["at"]] = error
        channels = np.broadcast_to(np.arange(here.shape[1]), here.shape)
        np.add.at(self.sums, (channels, state["bucket"]), error)
        np.add.at(self.seen, (channels, state["bucket"]), 1)
        old = self.seen > 512  # what was long ago counts for less
        self.sums[old] >>= 1
        self.seen[old] >>= 1
        self.total += values.sum(0)
        self.places += len(here)


def _log(values: np.ndarray) -> np.ndarray:
    """Twice the binary logarithm of integers of at least 0, floored; of 0 it is 0."""
    return np.searchsorted(_edges(), values + 1, side="right") - 1


@cache
def _edges() -> np.ndarray:
    return np.array([isqrt(2**k) if k % 2 == 0 else isqrt(2**k) + 1 for k in range(50)], np.int64)


@cache
def scales() -> np.ndarray:
    """The scale for every mean error in 1/256 of a step, below 16 steps."""
    return _scale(np.arange(16 * 256))


def _scale(expected: np.ndarray) -> np.ndarray:
    return np.searchsorted(_thresholds(), expected, side="right")


@cache
def _thresholds() -> np.ndarray:
    """Mean errors (1/256 of a step) from which the next scale is taken: midway between those of neighbours, in integers.

    Of narrow scales the mean errors follow from the counts; a wide logistic
    distribution has 2 ln 2 times its width, 2^((k - 20) / 4).
    """
    away = np.abs(np.arange(SYMBOLS) - CENTRE)
    means = (counts()[0].astype(np.int64) * away).sum(1) * 256 // TOTAL
    means[ONE + 8 :] = [isqrt(isqrt(355**4 * 2 ** (scale - ONE))) for scale in range(ONE + 8, SCALES)]
    return (means[1:] + means[:-1]) // 2
