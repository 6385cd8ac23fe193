"""The sheet of an X/Y plot: labels along the sides, a legend above, each picture with its own pixels."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from latentpipe.engine.xy_grid.axes import Axis
from latentpipe.utils.images import wrap

SHOWN_PX = 128  # smaller pictures are enlarged by a whole number, pixel by pixel, so that a person sees them
GAP, LINE, MARGIN = 6, 16, 10
LABEL_PX = 140  # widest label; longer ones are wrapped
INK, PALE, EMPTY = (40, 40, 40), (110, 110, 110), (228, 228, 228)
TITLE_LINES, LABEL_LINES = 4, 4


def enlarged(size: tuple[int, int]) -> int:
    """The whole number by which pictures of that width and height are enlarged."""
    return max(1, SHOWN_PX // max(size))


def size_of(size: tuple[int, int], x: Axis, y: Axis | None) -> int:
    """About how many pixels a sheet of pictures of that size has."""
    times = enlarged(size)
    width = len(x.values) * (max(size[0] * times, LABEL_PX) + GAP) + LABEL_PX
    height = (len(y.values) if y else 1) * (size[1] * times + GAP) + LINE * (TITLE_LINES + LABEL_LINES + 4)
    return width * height


def draw_sheet(
    pictures: Sequence[Image.Image | None], size: tuple[int, int], x: Axis, y: Axis | None, legend: Sequence[str]
) -> Image.Image:
    """The sheet as RGB.

    pictures  row by row, all of `size` (width, height); None: an empty place that says 'stopped'
    legend    lines above it all, wrapped
    """
    font, bold = ImageFont.load_default(13), ImageFont.load_default(15)
    times = enlarged(size)
    wide, high = size[0] * times, size[1] * times
    heads = [_lines(label, max(wide, LABEL_PX), font) for label in x.labels]
    sides = [_lines(label, LABEL_PX, font) for label in y.labels] if y else [[]]
    column = max(wide, *(int(font.getlength(line)) + GAP for lines in heads for line in lines))
    title = _lines(y.title, LABEL_PX, font) if y else []
    left = max((int(font.getlength(line)) for lines in [*sides, title] for line in lines), default=0)
    left = MARGIN + (left + 2 * GAP if y else 0)
    width = max(left + len(heads) * (column + GAP) + MARGIN, 320)
    row = max(high, *(LINE * len(lines) for lines in sides))
    top_lines = [(line, bold if index == 0 else font) for index, text in enumerate(legend)
                 for line in _lines(text, width - 2 * MARGIN, bold if index == 0 else font)]  # fmt: skip
    head_top = MARGIN + (LINE + 2) * len(top_lines) + GAP
    top = head_top + LINE * (1 + max(len(lines) for lines in heads)) + GAP
    page = Image.new("RGB", (width, top + len(sides) * (row + GAP) + MARGIN - GAP), "white")
    draw = ImageDraw.Draw(page)
    for index, (line, face) in enumerate(top_lines):
        draw.text((MARGIN, MARGIN + (LINE + 2) * index), line, fill=INK if index == 0 else PALE, font=face)
    grid = len(heads) * (column + GAP) - GAP
    draw.text((left + grid / 2, head_top), x.title[:60], fill=PALE, font=font, anchor="ma")
    for index, line in enumerate(title):
        draw.text((MARGIN, top - GAP - LINE * (len(title) - index)), line, fill=PALE, font=font)
    for place, lines in enumerate(heads):
        for index, line in enumerate(lines):
            middle = left + place * (column + GAP) + column / 2
            draw.text((middle, head_top + LINE * (1 + index)), line, fill=INK, font=font, anchor="ma")
    for place, lines in enumerate(sides):
        middle = top + place * (row + GAP) + row / 2 - LINE * len(lines) / 2
        for index, line in enumerate(lines):
            draw.text((MARGIN, middle + LINE * index), line, fill=INK, font=font)
    for index, picture in enumerate(pictures):
        at = (left + index % len(heads) * (column + GAP) + (column - wide) // 2, top + index // len(heads) * (row + GAP))
        _put(page, draw, picture, (*at, at[0] + wide, at[1] + high), font)
    return page


def _put(page: Image.Image, draw: ImageDraw.ImageDraw, picture: Image.Image | None, box: tuple[int, ...], font) -> None:
    left, top, right, bottom = box
    if picture is None:
        draw.rectangle((left, top, right - 1, bottom - 1), fill=EMPTY)
        draw.text(((left + right) / 2, (top + bottom) / 2), "stopped", fill=PALE, font=font, anchor="mm")
    else:
        page.paste(picture.resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))


def _lines(text: str, width: int, font) -> list[str]:
    """A label in at most LABEL_LINES lines of `width` pixels; what is too long for them ends in '...'."""
    found: list[str] = []
    for line in wrap(text[:2000], width, font):
        while line and len(found) <= LABEL_LINES:
            end = len(line)
            while end > 1 and font.getlength(line[:end]) > width:
                end -= 1
            found.append(line[:end])
            line = line[end:]
    if len(found) > LABEL_LINES:
        found = [*found[: LABEL_LINES - 1], found[LABEL_LINES - 1][:-3] + "..."]
    return found or [""]
