"""Bjontegaard's difference of two rate-distortion curves (VCEG-M33, 2001)."""

from __future__ import annotations

import numpy as np

from latentpipe.utils.errors import UserError


def front(rates: np.ndarray, qualities: np.ndarray) -> np.ndarray:
    """Indices of the points that no other beats in both rate and quality, by rising rate."""
    kept: list[int] = []
    for index in np.lexsort((-qualities, rates)):
        if not kept or qualities[index] > qualities[kept[-1]]:
            kept.append(int(index))
    return np.array(kept)


def bd_rate(rates: np.ndarray, qualities: np.ndarray, anchor_rates: np.ndarray, anchor_qualities: np.ndarray) -> float:
    """Mean change of rate at equal quality against the anchor, in per cent: -20 means a fifth fewer bytes.

    Logarithms of rates as functions of quality, integrated where both curves have points; between the points a monotone piecewise
    cubic (Fritsch and Carlson, SIAM J. Numer. Anal. 17, 1980), as JVET does since JVET-P0041, instead of one cubic through all.
    UserError where they share no range, or a curve has fewer than two points.
    """
    from scipy.interpolate import PchipInterpolator

    low, high = common(qualities, anchor_qualities)
    curves = []
    for rate, quality in ((rates, qualities), (anchor_rates, anchor_qualities)):
        chosen = front(rate, quality)
        if len(chosen) < 2:
            raise UserError(f"A curve needs at least two points that no other beats; given {len(chosen)}.")
        curves.append(PchipInterpolator(quality[chosen], np.log(rate[chosen])))
    mean = [float(curve.integrate(low, high)) / (high - low) for curve in curves]
    return 100 * (float(np.exp(mean[0] - mean[1])) - 1)


def common(qualities: np.ndarray, anchor_qualities: np.ndarray) -> tuple[float, float]:
    """The range of quality where both curves have points; UserError where there is none."""
    low = float(max(qualities.min(), anchor_qualities.min()))
    high = float(min(qualities.max(), anchor_qualities.max()))
    if low >= high:
        raise UserError(f"The curves share no range of quality: the one ends at {high:.4g}, the other begins at {low:.4g}.")
    return low, high
