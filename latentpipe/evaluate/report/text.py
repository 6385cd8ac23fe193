"""An evaluation for people: a table, a CSV file with the values of each picture, a sheet of examples."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from latentpipe.evaluate.results import Evaluation, Score
from latentpipe.utils.errors import counted, short
from latentpipe.utils.images import sheet, to_pixels
from latentpipe.utils.io import HASH_LENGTH, atomic_file


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


ARROWS = {"higher": " ↑", "lower": " ↓", "neither": ""}
GAIN = 4  # of the difference that is shown
SHOWN = 10  # skipped files
STATISTICS = ("mean", "std", "skewness", "excess kurtosis")


def table(evaluation: Evaluation) -> str:
    """Every figure with its interval, n and unit; then latents, cost, what is missing, and what it was measured on."""
    about = evaluation.about
    lines = [
        f"{evaluation.name}  {evaluation.hash[:HASH_LENGTH]}  {about['class']}, {counted(about['channels'], 'channel')} at "
        f"1/{about['downscale']}, {about['parameters'] / 1e6:.2f} M parameters, {about['dtype']}",
        "",
    ]
    rows = [["metric", "value", "95 % interval", "n", "unit"]]
    for name, score in evaluation.scores.items():
        value, low, high = rounded(score.value, score.low, score.high)
        rows.append([name + ARROWS[score.better], value, interval_words(low, high), str(score.n), score.unit])
    lines += [*_columns(rows), "", *_latents(evaluation), *_cost(evaluation)]
    if evaluation.not_measured:
        lines += ["", "Not measured", *(f"  {name}: {reason}" for name, reason in evaluation.not_measured.items())]
    return "\n".join([*lines, "", *_provenance(evaluation)])


def _latents(evaluation: Evaluation) -> list[str]:
    """Moments of the latents for each channel, with standard errors."""
    rows = [["channel of the latents", *STATISTICS]]
    columns = [(evaluation.curves[f"{name} per channel"], _error_of(evaluation, name)) for name in STATISTICS]
    for channel in range(len(columns[0][0])):
        cells = [f"{values[channel]:.3f} ± {errors[channel]:.3f}" for values, errors in columns]
        rows.append([str(channel), *cells])
    return _columns(rows)


def _error_of(evaluation: Evaluation, name: str) -> list[float]:
    return evaluation.curves[f"standard error of {name} per channel"]


def _cost(evaluation: Evaluation) -> list[str]:
    """Time and memory of one picture."""
    cost = evaluation.cost
    lines = []
    for direction in ("encode", "decode"):
        if direction in cost:
            one = cost[direction]
            memory = "memory not measured" if one["peak_mb"] is None else f"{one['peak_mb']:.0f} MB above the weights"
            spread = f"{one['least']:.1f} to {one['most']:.1f}"
            lines.append(f"{direction} one picture: {one['ms']:.1f} ms ({spread}), {memory}")
    if lines:
        where = f"{cost['device']}, {cost['dtype']}, {cost['threads']} threads, median of {cost['repeats']}; {cost['memory']}"
        lines = ["", *lines, f"  at {_size(cost['size_px'])}; {where}"]
    return lines


def _provenance(evaluation: Evaluation) -> list[str]:
    """The set, the protocol and the hashes: what a reader needs to repeat the figures."""
    pictures, protocol = evaluation.pictures, dict(evaluation.protocol)
    open_points = protocol.pop("open", [])
    name = protocol.pop("name")
    lines = [
        f"Pictures: {pictures['set']}, n {pictures['n']}, {pictures['chosen']}",
        f"  sha256 of their pixels {pictures['sha256']}",
        *(f"  note: {note}" for note in pictures["notes"]),
        *_skipped(pictures["skipped"]),
        f"Protocol: {name}",
        *(f"  {key} {value}" for key, value in protocol.items() if value is not None),
        *(f"  not repeated here: {point}" for point in open_points),
        f"VAE: sha256 {evaluation.hash}",
    ]
    return lines


def _skipped(skipped: dict[str, str]) -> list[str]:
    lines = [f"  skipped {name}: {reason}" for name, reason in skipped.items()]
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"  and {len(lines) - SHOWN} more skipped; --json names all"]


def _size(size: int | list[int]) -> str:
    height, width = (size, size) if isinstance(size, int) else size
    return f"{width} x {height} pixels"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def write_csv(evaluation: Evaluation, path: Path) -> None:
    """One row for each picture: its name and its values; empty where a metric was measured on fewer pictures."""
    with atomic_file(path) as part, part.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", *evaluation.per_picture])
        for row in zip(evaluation.names, *evaluation.per_picture.values(), strict=True):
            writer.writerow([row[0], *("" if math.isnan(value) else repr(value) for value in row[1:])])


def examples(values: Sequence[float]) -> dict[str, int]:
    """Best, median and worst of values where higher is better: what, and its index."""
    order = sorted(range(len(values)), key=lambda index: -values[index])
    return {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}


def example_sheet(images: torch.Tensor, rebuilt: torch.Tensor, labels: Sequence[str]) -> Image.Image:
    """Rows of original, rebuilt and the difference (absolute, times GAIN); images B 3 H W each, a label for each row."""
    difference = ((rebuilt.clamp(-1, 1) - images).abs() * GAIN - 1).clamp(-1, 1)
    cells, captions = [], []
    for label, *row in zip(labels, *(to_pixels(part) for part in (images, rebuilt, difference)), strict=True):
        cells += row
        captions += [label, "rebuilt", f"difference x {GAIN}"]
    return sheet(cells, 3, captions)
