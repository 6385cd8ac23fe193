"""The axes of a chart: round ticks, the map from values to px, and text in its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

FONT = 12  # px
LETTER = 0.58 * FONT  # px, a generous mean width of a letter: nothing is cut off
GREY = "stroke:var(--rule,#c8c8c8);stroke-width:1"
TEXT = "fill:currentColor"
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Number = float | None


@dataclass(frozen=True)
class Axis:
    """What an axis shows, with its unit; `log`: powers of ten at equal distances."""

    label: str
    log: bool = False


@dataclass
class Frame:
    """A chart while it is drawn: the box of the data in px and the two maps from values to px."""

    box: tuple[float, float, float, float]  # left, top, right, bottom
    x: Callable[[float], float]
    y: Callable[[float], float]
    parts: list[str] = field(default_factory=list)


def frame_of(
    width: int,
    height: int,
    top: float,
    across: tuple[float, float],
    up: tuple[float, float],
    x: Axis,
    y: Axis,
    whole_x: bool = False,
    rows: bool = False,
) -> Frame:
    """Grid, ticks and labels; `whole_x`: no grid across and whole numbers; `rows`: no vertical axis."""
    marks_y = [] if rows else log_ticks(*up) if y.log else ticks(*up)
    names_y = _names(marks_y, y.log)
    left = 10.0 if rows else 30 + LETTER * max(map(len, names_y), default=0)
    right, bottom = width - 16.0, height - 54.0
    if rows:
        margin = 0.05 * ((across[1] - across[0]) or 1.0)
        across = (across[0] - margin, across[1] + margin)
    map_x, map_y = _map(across, (left, right), x.log), _map(up, (bottom, top), y.log)
    frame = Frame((left, top, right, bottom), map_x, map_y)
    marks_x = log_ticks(*across) if x.log else ticks(*across, most=9 if whole_x else 5)
    if whole_x:
        marks_x = [mark for mark in marks_x if mark == int(mark) and mark >= 0]
    for mark, name in zip(marks_y, names_y, strict=True):
        frame.parts.append(f'<path d="M{left:.1f} {map_y(mark):.1f}H{right:.1f}" style="{GREY}"/>')
        frame.parts.append(text_at(left - 6, map_y(mark) + 4, name, "end"))
    for mark, name in zip(marks_x, _names(marks_x, x.log), strict=True):
        if not whole_x:
            frame.parts.append(f'<path d="M{map_x(mark):.1f} {top:.1f}V{bottom:.1f}" style="{GREY}"/>')
        frame.parts.append(text_at(map_x(mark), bottom + 16, name, "middle"))
    frame.parts.append(f'<path d="M{left:.1f} {bottom:.1f}H{right:.1f}" style="stroke:currentColor"/>')
    frame.parts.append(text_at((left + right) / 2, bottom + 33, x.label, "middle"))
    if y.label:
        frame.parts.append(f'<g transform="rotate(-90 14 {(top + bottom) / 2:.1f})">')
        frame.parts.append(text_at(14, (top + bottom) / 2, y.label, "middle") + "</g>")
    return frame


def _map(values: tuple[float, float], places: tuple[float, float], log: bool) -> Callable[[float], float]:
    change = math.log10 if log else float
    low, high = change(values[0]), change(values[1])
    return lambda value: places[0] + (change(value) - low) / ((high - low) or 1.0) * (places[1] - places[0])


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, at most `most` of them."""
    span = high - low
    if not span > 0:
        return [low]
    power = math.floor(math.log10(span / most))
    for step in (factor * 10.0**exponent for exponent in (power, power + 1) for factor in (1, 2, 5)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [round(index * step, 12) + 0.0 for index in range(first, last + 1)]
    return [low]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten from `low` to `high`, with their doubles and fivefolds where there is room; round numbers in short spans."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors, stride in [((1, 2, 5), 1)] + [((1,), stride) for stride in range(1, max(last - first, 1) + 1)]:
        exponents = range(first, last + 1, stride)
        found = [factor * 10.0**power for power in exponents for factor in factors]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) <= most:
            return found if len(found) > 1 else ticks(low, high, most - 1)
    return ticks(low, high, most - 1)


def _names(marks: Sequence[float], log: bool) -> list[str]:
    """Tick labels: powers of ten where the numbers are long, else as short as they are."""
    if log and any(mark >= 1e5 or mark < 1e-3 for mark in marks):
        parts = [f"{mark:.0e}".split("e") for mark in marks]
        return [("" if digit == "1" else f"{digit}·") + "10" + str(int(power)).translate(RAISED) for digit, power in parts]
    return [f"{mark:,.10g}".replace("-", "−") for mark in marks]


def text_at(x: float, y: float, text: str, anchor: str, escaped: bool = False) -> str:
    """One line of text; `anchor`: start, middle or end of it at `x`."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{TEXT}">{text if escaped else escape(text)}</text>'
