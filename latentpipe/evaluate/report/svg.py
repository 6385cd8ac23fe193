"""Charts as SVG text: scatter, lines, bars and forest plots, in the colours of the page that holds them.

Series are told apart by colour and by the shape of their marker; colours are those of Okabe and Ito ("Color Universal
Design", 2008), as CSS variables --s0 to --s6 that a page may set for a dark ground. The legend stands above the axes, so it
never covers data. Values that cannot be drawn (None, not finite, or not positive on a logarithmic axis) are left out, and a
line beneath the chart says how many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from latentpipe.evaluate.report.axes import FONT, LETTER, TEXT, Axis, Number, frame_of, text_at

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
DASHED = "stroke:currentColor;stroke-width:1.4;stroke-dasharray:5 3"
HALO = "paint-order:stroke;stroke:var(--page,#fff);stroke-width:5px"  # keeps text legible over lines


@dataclass(frozen=True)
class Series:
    """Named points; `low` and `high`, where given, are the ends of each point's vertical error bar.

    `plain`: what the others are measured against, as a dashed line in the colour of the text; it stands last.
    """

    name: str
    x: Sequence[Number]
    y: Sequence[Number]
    low: Sequence[Number] = ()
    high: Sequence[Number] = ()
    plain: bool = False


@dataclass(frozen=True)
class Interval:
    """One row of a forest plot: a value with its interval; `clear` where the row counts as different from zero."""

    label: str
    value: float
    low: float
    high: float
    clear: bool


def scatter(title: str, series: Sequence[Series], x: Axis, y: Axis, width: int = 440, height: int = 330) -> str:
    """Points with vertical error bars, one marker for each series."""
    return _points(title, series, x, y, width, height, joined=False)


def lines(title: str, series: Sequence[Series], x: Axis, y: Axis, width: int = 440, height: int = 330) -> str:
    """Points joined by a line, with sparse markers where they are many."""
    return _points(title, series, x, y, width, height, joined=True)


def bars(
    title: str, values: Sequence[Number], x: Axis, y: Axis, style: int = 0, top: float | None = None, width: int = 440
) -> str:
    """One bar for each of `values` (numbered from 0), in the colour of series `style`; `top` fixes the end of the axis."""
    height = 220
    shown = [(index, value) for index, value in enumerate(values) if value is not None and drawable(value)]
    high = max([value for _, value in shown] + [0.0]) if top is None else top
    low = min([value for _, value in shown] + [0.0])
    frame = frame_of(width, height, 12, (-0.6, max(len(values), 1) - 0.4), (low, high or 1.0), Axis(x.label), y, whole_x=True)
    floor = frame.y(max(0.0, low))
    half = min(14.0, 0.38 * (frame.x(1) - frame.x(0)))
    for index, value in shown:
        upper, lower = sorted((frame.y(value), floor))
        frame.parts.append(
            f'<rect x="{frame.x(index) - half:.1f}" y="{upper:.1f}" width="{2 * half:.1f}" '
            f'height="{max(lower - upper, 0.5):.1f}" style="fill:{colour(style)}"><title>{index}: {value:.4g}</title></rect>'
        )
    return _svg(title, width, height, frame.parts, len(values) - len(shown))


def forest(title: str, rows: Sequence[Interval], x: Axis, width: int = 320) -> str:
    """Intervals beneath each other about a dashed zero: filled where the row is clear of it, hollow where not."""
    shown = [row for row in rows if all(drawable(value) for value in (row.value, row.low, row.high))]
    labels = [_cut(row.label, 44) for row in shown]
    height = 68 + 40 * max(len(shown), 1)
    ends = [0.0] + [value for row in shown for value in (row.low, row.high)]
    frame = frame_of(width, height, 10, (min(ends), max(ends)), (0, 1), x, Axis(""), rows=True)
    left, top, _, bottom = frame.box
    zero = frame.x(0)
    frame.parts.append(f'<path d="M{zero:.1f} {top}V{bottom}" style="stroke:currentColor;stroke-dasharray:3 3"/>')
    for index, (row, label) in enumerate(zip(shown, labels, strict=True)):
        y = top + 40 * index + 29
        ink = colour(0) if row.clear else "currentColor"
        fill = ink if row.clear else "var(--page,#fff)"
        frame.parts += [
            f'<text x="{left}" y="{y - 13:.1f}" style="{TEXT};{HALO}">{label}</text>',
            f'<path d="M{frame.x(row.low):.1f} {y}H{frame.x(row.high):.1f}" style="stroke:{ink};stroke-width:2"/>',
            f'<circle cx="{frame.x(row.value):.1f}" cy="{y}" r="4.5" style="fill:{fill};stroke:{ink};stroke-width:1.8">'
            f"<title>{row.value:.4g} ({row.low:.4g} to {row.high:.4g})</title></circle>",
        ]
    return _svg(title, width, height, frame.parts, len(rows) - len(shown))


def colour(index: int) -> str:
    """The colour of a series, as CSS."""
    return f"var(--s{index % len(COLOURS)},{COLOURS[index % len(COLOURS)]})"


def marker(index: int, x: float, y: float, size: float = 5) -> str:
    """The marker of a series: eight shapes by seven colours, so that 56 series differ."""
    s = size
    shapes = (
        f"M{x - s:.1f} {y:.1f}a{s} {s} 0 1 0 {2 * s} 0a{s} {s} 0 1 0 {-2 * s} 0Z",
        f"M{x - 0.9 * s:.1f} {y - 0.9 * s:.1f}h{1.8 * s:.1f}v{1.8 * s:.1f}h{-1.8 * s:.1f}Z",
        f"M{x:.1f} {y - 1.2 * s:.1f}l{1.15 * s:.1f} {2.0 * s:.1f}h{-2.3 * s:.1f}Z",
        f"M{x:.1f} {y - 1.3 * s:.1f}l{1.3 * s:.1f} {1.3 * s:.1f}l{-1.3 * s:.1f} {1.3 * s:.1f}l{-1.3 * s:.1f} {-1.3 * s:.1f}Z",
        f"M{x:.1f} {y + 1.2 * s:.1f}l{1.15 * s:.1f} {-2.0 * s:.1f}h{-2.3 * s:.1f}Z",
        f"M{x - 1.2 * s:.1f} {y - 0.4 * s:.1f}h{2.4 * s:.1f}v{0.8 * s:.1f}h{-2.4 * s:.1f}Z",
        f"M{x - 0.4 * s:.1f} {y - 1.2 * s:.1f}h{0.8 * s:.1f}v{2.4 * s:.1f}h{-0.8 * s:.1f}Z",
        f"M{x - 1.2 * s:.1f} {y:.1f}l{0.6 * s:.1f} {-1.05 * s:.1f}h{1.2 * s:.1f}l{0.6 * s:.1f} {1.05 * s:.1f}"
        f"l{-0.6 * s:.1f} {1.05 * s:.1f}h{-1.2 * s:.1f}Z",
    )
    return f'<path d="{shapes[index % len(shapes)]}" style="fill:{colour(index)};stroke:var(--page,#fff);stroke-width:.8"/>'


def drawable(value: Number, log: bool = False) -> bool:
    """True for a finite number, greater than zero on a logarithmic axis."""
    return value is not None and math.isfinite(value) and (value > 0 or not log)


def _points(title: str, series: Sequence[Series], x: Axis, y: Axis, width: int, height: int, joined: bool) -> str:
    kept = [[point for point in _zipped(one) if drawable(point[0], x.log) and drawable(point[1], y.log)] for one in series]
    missing = sum(len(one.x) for one in series) - sum(map(len, kept))
    legend, top = _legend(series, width)
    across = [point[0] for points in kept for point in points]
    up = [value for points in kept for point in points for value in point[1:] if drawable(value, y.log)]
    frame = frame_of(width, height, top, _ends(across, x.log), _ends(up, y.log), x, y)
    for index, (one, points) in enumerate(zip(series, kept, strict=True)):
        # error bars at one place would hide each other
        aside = 3.0 * (index - (len(series) - 1) / 2) if joined and one.low else 0.0
        spots = [(frame.x(point[0]) + aside, frame.y(point[1])) for point in points]
        if joined and spots:
            path = "L".join(f"{a:.1f} {b:.1f}" for a, b in spots)
            ink = DASHED if one.plain else f"stroke:{colour(index)};stroke-width:1.6"
            frame.parts.append(f'<path d="M{path}" style="fill:none;{ink}"/>')
        frame.parts += [
            _whisker(index, spot[0], frame.y(point[2]), frame.y(point[3]))
            for spot, point in zip(spots, points, strict=True)
            if one.low and all(drawable(value, y.log) for value in point[2:])
        ]
        if not one.plain:
            marked = _apart(spots, 8.0 * index) if joined else spots
            frame.parts += [marker(index, a, b, 4 if joined else 5.5) for a, b in marked]
    return _svg(title, width, height, [*legend, *frame.parts], missing)


def _whisker(index: int, x: float, low: float, high: float) -> str:
    path = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"
    return f'<path d="{path}" style="fill:none;stroke:{colour(index)};stroke-width:1.4"/>'


def _apart(spots: Sequence[tuple[float, float]], start: float, least: float = 30.0) -> list[tuple[float, float]]:
    """The spots that a line's markers stand on: at least `least` px apart, the first so many px from its beginning."""
    if len(spots) <= 12:
        return list(spots)
    found: list[tuple[float, float]] = []
    for spot in spots:
        from_last = math.dist(spot, found[-1]) - least if found else math.dist(spot, spots[0]) - start
        if from_last >= 0:
            found.append(spot)
    return found


def _zipped(series: Series) -> list[tuple[float, float, float, float]]:
    """Points as (x, y, low, high), with the value itself where there is no error bar; None becomes NaN."""
    low, high = series.low or series.y, series.high or series.y
    return [
        tuple(math.nan if value is None else float(value) for value in point)  # type: ignore[misc]
        for point in zip(series.x, series.y, low, high, strict=True)
    ]


def _ends(values: Sequence[float], log: bool) -> tuple[float, float]:
    """The ends of an axis: the values and a margin of 6 % on either side."""
    if not values:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log:
        margin = max(0.06 * math.log10(high / low), 0.1)
        return low / 10**margin, high * 10**margin
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 0.5
    # what is counted from zero is not drawn below it
    return (max(low - margin, 0.0) if low >= 0 else low - margin), high + margin


def _legend(series: Sequence[Series], width: int) -> tuple[list[str], float]:
    """Markers and names in rows above the axes, and how many px they take."""
    parts: list[str] = []
    x, y = 12.0, 14.0
    for index, one in enumerate(series):
        length = 28 + LETTER * min(len(one.name), 40)
        if x > 12 and x + length > width - 8:
            x, y = 12.0, y + 18
        dash = f'<path d="M{x - 2:.1f} {y - 4:.1f}h14" style="fill:none;{DASHED}"/>'
        parts += [dash if one.plain else marker(index, x + 4, y - 4, 4.5), text_at(x + 15, y, _cut(one.name, 40), "start", True)]
        x += length
    return parts, y + 14


def _cut(text: str, most: int) -> str:
    return escape(text if len(text) <= most else text[: most - 1] + "…")


def _svg(title: str, width: int, height: int, parts: Sequence[str], missing: int) -> str:
    """The chart, with a line at its foot where `missing` values were left out."""
    foot = f"{missing} value{'s' if missing > 1 else ''} left out: cannot be drawn" if missing else ""
    high = height if missing else height - 14
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {high}" width="{width}" height="{high}" role="img"'
    style = f"font-size:{FONT}px;font-family:system-ui,sans-serif;font-variant-numeric:tabular-nums"
    body = "".join([*parts, *([text_at(width - 16, height - 3, foot, "end")] if missing else [])])
    return f'{head} aria-label="{escape(title)}" style="{style}"><title>{escape(title)}</title>{body}</svg>'
