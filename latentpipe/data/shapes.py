"""Fifty captioned pictures made by code, to try the training verbs without pictures of your own.

python -m latentpipe.data.shapes my-pictures
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from latentpipe.utils.atomic import atomic_if_new
from latentpipe.utils.errors import counted

COLOURS = {
    "red": (214, 48, 49),
    "orange": (230, 126, 34),
    "yellow": (241, 196, 15),
    "green": (39, 174, 96),
    "teal": (22, 160, 133),
    "blue": (41, 98, 255),
    "purple": (142, 68, 173),
    "pink": (253, 121, 168),
    "brown": (121, 85, 72),
    "black": (33, 33, 33),
}
SHAPES = {
    "circle": [],
    "square": [(0.2, 0.2), (0.8, 0.2), (0.8, 0.8), (0.2, 0.8)],
    "triangle": [(0.5, 0.15), (0.88, 0.82), (0.12, 0.82)],
    "diamond": [(0.5, 0.08), (0.85, 0.5), (0.5, 0.92), (0.15, 0.5)],
    "arrow": [(0.1, 0.4), (0.55, 0.4), (0.55, 0.2), (0.92, 0.5), (0.55, 0.8), (0.55, 0.6), (0.1, 0.6)],
}


def draw(shape: str, colour: tuple[int, int, int], size: int = 128) -> Image.Image:
    """One filled shape on white, `size` x `size` pixels."""
    large = Image.new("RGB", (size * 4, size * 4), "white")
    pen = ImageDraw.Draw(large)
    if shape == "circle":
        pen.ellipse([size * 4 * 0.15] * 2 + [size * 4 * 0.85] * 2, fill=colour)
    else:
        pen.polygon([(x * size * 4, y * size * 4) for x, y in SHAPES[shape]], fill=colour)
    return large.resize((size, size), Image.Resampling.LANCZOS)


def write(folder: Path) -> int:
    """Write the pictures and metadata.jsonl into `folder`; returns how many."""
    with atomic_if_new(folder) as at:
        lines = []
        for colour, value in COLOURS.items():
            for shape in SHAPES:
                name = f"{colour}-{shape}.png"
                draw(shape, value).save(at / name)
                lines.append(json.dumps({"file_name": name, "text": f"{colour} {shape}"}) + "\n")
        (at / "metadata.jsonl").write_text("".join(lines))
    return len(lines)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "my-pictures")
    print(f"{target}: {counted(write(target), 'picture')}")
