"""Which VAE is better? Evaluations of several VAEs on the same pictures, compared in pairs.

For every metric and every pair: the mean of the differences over the pictures with its 95 % bootstrap interval, and the p-value
of the sign-flip test (R. A. Fisher, The Design of Experiments, 1935, section 21), adjusted for all comparisons that are made
(S. Holm, Scandinavian Journal of Statistics 6, 1979). A difference is clear where its interval leaves zero out and the adjusted
p-value is at most 0.05; a winner is named only where its difference to every other VAE is clear and at least the metric's floor
(`floor_of`): with many pictures a difference that nobody would notice is clear too. Distances between sets, which
no single picture has, have paired intervals where they are given, and a p-value from the interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from latentpipe.evaluate.report.text import figure, heading, size_words
from latentpipe.evaluate.results import Evaluation, Score
from latentpipe.evaluate.statistics import holm, least_p, p_of_interval, paired, sign_flip
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.io import HASH_LENGTH

LEVEL = 0.05
# The least difference that names a winner, by how a metric's name begins: 0.5 dB is about the smallest step in PSNR that viewers
# notice in coded pictures; the others are conventions of the same order.
FLOORS = {"PSNR": 0.5, "equivariance PSNR": 0.5, "SSIM": 0.005, "MS-SSIM": 0.005, "L1": 0.5, "LPIPS": 0.01, "DISTS": 0.01}
SHARE = 0.02  # of the smaller value: the floor of every other metric
SetDifferences = Mapping[tuple[str, int, int], tuple[float, float, float]]
EXTREMES = 3

RULE = (
    "A difference is clear where its 95 % paired bootstrap interval leaves zero out and its p-value (sign-flip test over the "
    "pictures; for distances between sets from the interval) is at most 0.05 after Holm's adjustment for the number of "
    "comparisons made here ({count}). A winner is named only where the difference to every other VAE is clear and not too small "
    "to matter: at least 0.5 dB of PSNR, 0.005 of SSIM and MS-SSIM, 0.01 of LPIPS and DISTS, 0.5 of 255 of L1, 2 % of any other "
    "figure."
)


@dataclass(frozen=True)
class Difference:
    """Mean of ``first - second`` over the pictures (n), in the metric's unit, with its 95 % interval.

    first, second  labels of two VAEs
    p, adjusted    sign-flip p-value, alone and adjusted by Holm for all differences of the comparison
    clear          the interval leaves zero out and adjusted <= 0.05
    floor          the least difference that names a winner, in the metric's unit
    better         the label of the better one where the difference is clear, reaches the floor, and the metric has a better end
    """

    metric: str
    unit: str
    first: str
    second: str
    value: float
    low: float
    high: float
    n: int
    p: float
    adjusted: float
    clear: bool
    floor: float
    better: str | None


@dataclass(frozen=True)
class Outcome:
    """Who wins a metric: `winner`, or None and the labels that are `open`: the best mean and all not clearly worse than it."""

    winner: str | None
    open: list[str]

    def __str__(self) -> str:
        if self.winner is not None:
            return self.winner
        return f"no clear winner: {', '.join(self.open[:-1])} or {self.open[-1]}" if self.open else "not tested"


@dataclass(frozen=True)
class Extreme:
    """A picture on which `first` is better than `second` by `value` (> 0) of a metric."""

    metric: str
    picture: str
    first: str
    second: str
    value: float


@dataclass(frozen=True)
class Comparison:
    """Several VAEs on the same pictures: evaluations by label, differences of all pairs, outcomes by metric.

    extremes  the pictures on which the first VAE beats each other one the most, and the other way round
    notes     what a reader must know, as that two VAEs are the same weights
    """

    labels: list[str]
    evaluations: list[Evaluation]
    differences: list[Difference]
    outcomes: dict[str, Outcome]
    extremes: list[Extreme]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; figures of an evaluation that are not finite are None."""
        return asdict(self) | {"evaluations": [evaluation.as_dict() for evaluation in self.evaluations], "rule": self.rule()}

    def rule(self) -> str:
        """When a difference is clear and a winner named, in words."""
        return RULE.format(count=len(self.differences))

    def metrics(self) -> list[str]:
        """Names of the scores, in the order of the evaluations."""
        return list(dict.fromkeys(name for evaluation in self.evaluations for name in evaluation.scores))

    def __str__(self) -> str:
        first = self.evaluations[0]
        size = size_words(first.pictures.get("size_px"))
        head = (
            f"{first.pictures['set']}: {counted(first.pictures['n'], 'picture')}, {size}; protocol "
            f"{first.protocol.get('name', 'unnamed')}"
        )
        rows = [["", *self.labels, "winner"]]
        for metric in self.metrics():
            scores = [evaluation.scores.get(metric) for evaluation in self.evaluations]
            outcome = self.outcomes.get(metric)
            rows.append([heading(metric, scores), *map(figure, scores), str(outcome) if outcome else ""])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        hashes = [f"{label}  {one.hash[:HASH_LENGTH]}" for label, one in zip(self.labels, self.evaluations, strict=True)]
        return "\n".join([head, *hashes, "", *table, "", self.rule(), *(f"Note: {note}" for note in self.notes)])


def compare(evaluations: Sequence[Evaluation], sets: SetDifferences | None = None) -> Comparison:
    """Compare two or more evaluations of the same pictures; UserError where the pictures or the protocol differ.

    sets  for distances between sets, by metric and the places of two VAEs: ``first - second`` and its 95 % interval
    """
    check_same(evaluations)
    labels = labels_of([evaluation.name for evaluation in evaluations])
    differences = differences_of(labels, evaluations, sets or {})
    outcomes: dict[str, Outcome] = {}
    for evaluation in evaluations:
        for metric, score in evaluation.scores.items():
            if metric not in outcomes and score.better != "neither":
                outcomes[metric] = outcome_of(metric, labels, evaluations, differences)
    extremes = [entry for index in range(1, len(labels)) for entry in extremes_of(labels, evaluations, index)]
    return Comparison(labels, list(evaluations), differences, outcomes, extremes, notes_of(labels, evaluations, len(differences)))


def check_same(evaluations: Sequence[Evaluation]) -> None:
    """UserError unless there are two or more evaluations, all of the same pictures at the same size by the same protocol."""
    if len(evaluations) < 2:
        raise UserError(f"A comparison takes two VAEs or more; given {len(evaluations)}. Name another.")
    first = evaluations[0]
    for other in evaluations[1:]:
        for key in ("n", "size_px", "sha256"):
            mine, theirs = first.pictures.get(key), other.pictures.get(key)
            if mine != theirs:
                raise UserError(
                    f"{first.name} was measured on pictures with {key} {mine}, {other.name} with {key} {theirs}; expected the "
                    "same pictures at the same size. Measure both on one folder with one --size."
                )
        if first.names != other.names:
            raise UserError(f"{first.name} and {other.name} were measured on files of different names. Measure both again.")
        if first.protocol != other.protocol:
            raise UserError(f"{first.name} and {other.name} were measured by different protocols. Measure both by one.")


def labels_of(names: Sequence[str]) -> list[str]:
    """Names made unique: a name that comes again gets " (2)", " (3)", ..."""
    labels: list[str] = []
    for name in names:
        label, count = name, 1
        while label in labels:
            count += 1
            label = f"{name} ({count})"
        labels.append(label)
    return labels


def notes_of(labels: Sequence[str], evaluations: Sequence[Evaluation], comparisons: int) -> list[str]:
    """VAEs of equal weights, pictures that were skipped, and sets too small for a winner."""
    notes = [
        f"{labels[a]} and {labels[b]} are the same weights ({evaluations[a].hash[:HASH_LENGTH]})."
        for a, b in combinations(range(len(labels)), 2)
        if evaluations[a].hash == evaluations[b].hash
    ]
    skipped = evaluations[0].pictures.get("skipped")
    if skipped:
        notes.append(f"Skipped pictures: {skipped if isinstance(skipped, int | str) else len(skipped)}.")
    n = len(evaluations[0].names)
    if least_p(n) * comparisons > LEVEL:
        notes.append(
            f"{counted(n, 'picture')} are too few for any winner in {comparisons} comparisons: the smallest "
            f"p-value of a sign-flip test "
            f"over them is {least_p(n):.2g}, and {min(1.0, least_p(n) * comparisons):.2g} when adjusted. Give more pictures."
        )
    return notes


def differences_of(labels: Sequence[str], evaluations: Sequence[Evaluation], sets: SetDifferences) -> list[Difference]:
    """Paired differences of every pair in every metric that has a better end and is in `sets` or has values for each picture."""
    kept: list[tuple[str, int, int]] = []
    found: list[tuple[float, float, float, int, float]] = []  # difference, low, high, pictures, p
    for metric, score in evaluations[0].scores.items():
        columns = [] if score.better == "neither" else list(combinations(range(len(labels)), 2))
        for a, b in columns:
            first, second = evaluations[a], evaluations[b]
            if (metric, a, b) in sets:
                # never surer than a test over so few pictures could be
                found.append((*sets[metric, a, b], score.n, max(p_of_interval(*sets[metric, a, b]), least_p(score.n))))
            elif metric in first.per_picture and metric in second.per_picture:
                values = _paired_values(first, second, metric)
                values = values[np.isfinite(values)]
                if not len(values):
                    continue
                found.append((*paired(values, np.zeros_like(values)), len(values), sign_flip(values)))
            else:
                continue
            kept.append((metric, a, b))
    adjusted = holm([p for *_, p in found])
    return [
        _judged(
            evaluations[0].scores[metric],
            metric,
            (labels[a], labels[b]),
            values,
            float(p),
            floor_of(metric, *(evaluations[index].scores[metric].value for index in (a, b))),
        )
        for (metric, a, b), values, p in zip(kept, found, adjusted, strict=True)
    ]


def _judged(
    score: Score,
    metric: str,
    names: tuple[str, str],
    values: tuple[float, float, float, int, float],
    adjusted: float,
    floor: float,
) -> Difference:
    value, low, high, n, p = values
    clear = (low > 0 or high < 0) and adjusted <= LEVEL
    better = names[0] if (value > 0) == (score.better == "higher") else names[1]
    wins = clear and abs(value) >= floor
    return Difference(metric, score.unit, *names, value, low, high, n, p, adjusted, clear, floor, better if wins else None)


def floor_of(metric: str, *values: float) -> float:
    """The least difference in a metric that names a winner, in its unit; `values`: the two scores."""
    named = [floor for start, floor in FLOORS.items() if metric.startswith(start)]
    return named[0] if named else SHARE * min(map(abs, values))


def outcome_of(
    metric: str, labels: Sequence[str], evaluations: Sequence[Evaluation], differences: Sequence[Difference]
) -> Outcome:
    """The winner of a metric, or the labels between which it is open; neither where no pair was tested."""
    tested = [difference for difference in differences if difference.metric == metric]
    if len(tested) < math.comb(len(labels), 2):
        return Outcome(None, [])
    scores = [evaluation.scores[metric] for evaluation in evaluations]
    sign = 1 if scores[0].better == "higher" else -1
    best = max(range(len(labels)), key=lambda index: sign * scores[index].value)
    beaten = {d.first if d.better == d.second else d.second for d in tested if d.better == labels[best]}
    still = [labels[best], *(label for label in labels if label != labels[best] and label not in beaten)]
    return Outcome(labels[best] if len(still) == 1 else None, [] if len(still) == 1 else still)


def extremes_of(labels: Sequence[str], evaluations: Sequence[Evaluation], index: int) -> list[Extreme]:
    """The pictures on which the first VAE is better than the one at `index` the most, and the other way round, by PSNR.

    Where there is no PSNR: by the first metric with values for each picture and a better end.
    """
    first, other = evaluations[0], evaluations[index]
    judged = [name for name, score in first.scores.items() if score.better != "neither"]
    names = [name for name in judged if name in first.per_picture and name in other.per_picture]
    if not names:
        return []
    metric = "PSNR" if "PSNR" in names else names[0]
    values = _paired_values(first, other, metric) * (1 if first.scores[metric].better == "higher" else -1)
    order = [int(row) for row in np.argsort(-values, kind="stable") if np.isfinite(values[row])]
    ahead = [row for row in order if values[row] > 0][:EXTREMES]
    behind = [row for row in reversed(order) if values[row] < 0][:EXTREMES]
    found = [Extreme(metric, first.names[row], labels[0], labels[index], float(values[row])) for row in ahead]
    return found + [Extreme(metric, first.names[row], labels[index], labels[0], float(-values[row])) for row in behind]


def _paired_values(first: Evaluation, second: Evaluation, metric: str) -> np.ndarray:
    """``first - second`` for each picture (N); not finite where one of the two is not."""
    with np.errstate(invalid="ignore"):
        return np.asarray(first.per_picture[metric], np.float64) - np.asarray(second.per_picture[metric], np.float64)
