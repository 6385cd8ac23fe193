"""How well scores part two kinds of pictures, and a threshold whose false-alarm rate is stated. Knows no VAE.

Higher scores are more anomalous everywhere.
"""

from __future__ import annotations

import math

import numpy as np

from latentpipe.evaluate.results import Score
from latentpipe.evaluate.statistics import RESAMPLES, Values
from latentpipe.utils.errors import UserError, counted


def auroc(normal: Values, anomalous: Values) -> float:
    """P(an anomaly scores above a normal picture), ties counted half: the area under the ROC curve.

    The Mann-Whitney statistic (Hanley and McNeil, Radiology 143, 1982). UserError where either side is empty.
    """
    ordered, scores = np.sort(_scores(normal, "normal")), _scores(anomalous, "anomalous")
    below = np.searchsorted(ordered, scores, "left").astype(np.float64)
    below += np.searchsorted(ordered, scores, "right")
    return float(below.mean() / 2 / len(ordered))


def auprc(normal: Values, anomalous: Values) -> float:
    """Average precision, ``sum_i (R_i - R_(i-1)) P_i`` over the distinct scores from the highest; anomalies are the positives.

    No interpolation between points (Davis and Goadrich, ICML 2006). Its floor is the share of anomalies, not 0.5.
    """
    normal, anomalous = _scores(normal, "normal"), _scores(anomalous, "anomalous")
    cuts = np.unique(anomalous)[::-1]
    hits = len(anomalous) - np.searchsorted(np.sort(anomalous), cuts, "left")
    alarms = len(normal) - np.searchsorted(np.sort(normal), cuts, "left")
    gained = np.diff(np.concatenate([[0], hits])) / len(anomalous)
    return float((gained * hits / (hits + alarms)).sum())


def with_interval(measure, normal: Values, anomalous: Values, seed: int = 0, resamples: int = RESAMPLES // 2) -> Score:
    """`auroc` or `auprc` with its 95 % percentile bootstrap interval; both sides are resampled, each on its own."""
    normal, anomalous = _scores(normal, "normal"), _scores(anomalous, "anomalous")
    random = np.random.default_rng(seed)
    drawn = [measure(random.choice(normal, len(normal)), random.choice(anomalous, len(anomalous))) for _ in range(resamples)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Score(measure(normal, anomalous), float(low), float(high), len(normal) + len(anomalous), "", "higher")


def threshold(scores: Values, false_alarms: float) -> float:
    """The split-conformal threshold: a new normal picture scores above it with probability `false_alarms` at most.

    The ``ceil((n + 1)(1 - a))``-th smallest of n scores (Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World",
    2005; for outliers Bates et al., Annals of Statistics 51, 2023, arXiv:2104.08279). It holds for any n and any score that
    was fixed before, on average over calibration sets, where the new picture and these are exchangeable.
    UserError where n is too small for the rate, or the rate is not between 0 and 1.
    """
    values = np.sort(_scores(scores, "normal"))
    if not 0 < false_alarms < 1:
        raise UserError(f"The false-alarm rate is {false_alarms:g}; expected a number between 0 and 1, as 0.05.")
    rank = math.ceil((len(values) + 1) * (1 - false_alarms) - 1e-9)
    if rank > len(values):
        least = math.ceil(1 / false_alarms - 1 - 1e-9)
        raise UserError(
            f"{counted(len(values), 'picture')} to calibrate on cannot promise a false-alarm rate of "
            f"{false_alarms:g}: that takes {least}. "
            "Give more normal pictures, or a higher rate."
        )
    return float(values[rank - 1])


def p_values(calibration: Values, scores: Values) -> np.ndarray:
    """Conformal p-values (N): ``(1 + #{calibration >= score}) / (n + 1)``; at most u with probability at most u (as above)."""
    ordered = np.sort(_scores(calibration, "normal"))
    above = len(ordered) - np.searchsorted(ordered, np.asarray(scores, np.float64), "left")
    return (1 + above) / (len(ordered) + 1)


def binomial_interval(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share ``hits / n`` (Clopper and Pearson, Biometrika 26, 1934)."""
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"Expected 0 <= hits <= n and n from 1; given {hits} of {n}.")
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else _solve(lambda p: _at_least(hits, n, p) < tail)
    high = 1.0 if hits == n else _solve(lambda p: 1 - _at_least(hits + 1, n, p) > tail)
    return low, high


def _at_least(hits: int, n: int, p: float) -> float:
    """P(Binomial(n, p) >= hits), for p inside (0, 1)."""
    k = np.arange(hits, n + 1)
    choose = np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in k.tolist()])
    return float(np.exp(choose + k * math.log(p) + (n - k) * math.log1p(-p)).sum())


def _solve(before) -> float:
    """Where `before` of p turns from true to false, by halving."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if before(middle) else (low, middle)
    return (low + high) / 2


def _scores(values: Values, kind: str) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array):
        raise UserError(f"There are no {kind} scores (given shape {array.shape}); expected one for each of 1 picture or more.")
    if not np.isfinite(array).all():
        raise UserError(f"{int((~np.isfinite(array)).sum())} of {len(array)} {kind} scores are not finite.")
    return array
