"""Pictures whose generative factors are known: one filled shape on white, drawn by code, to measure disentanglement on.

python -m latentpipe.data.factor_shapes FOLDER
"""

from __future__ import annotations

import colorsys
import itertools
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from latentpipe.utils.atomic import atomic_if_new
from latentpipe.utils.errors import counted

FACTORS: dict[str, int] = {"shape": 3, "size": 4, "x": 6, "y": 6, "hue": 8}
"""How many values each factor has; a picture's factors are one index into each, independent and uniform over `grid`."""

SHAPES = ("disc", "square", "triangle")
HUES = ("red", "orange", "lime", "green", "cyan", "blue", "purple", "pink")
SIZES = ("tiny", "small", "medium", "large")
RADII = (0.10, 0.14, 0.18, 0.22)  # of the picture's side
FIRST, LAST = 0.27, 0.73  # where the shape's centre may be, of the picture's side


def grid() -> np.ndarray:
    """Every combination of the factors once, int64 N x 5 (N 3,456), columns in the order of `FACTORS`."""
    return np.array(list(itertools.product(*(range(count) for count in FACTORS.values()))))


def draw_factors(factors: np.ndarray, size_px: int = 64) -> np.ndarray:
    """Pictures of the given factors, edges anti-aliased.

    factors  N x 5 integers, each below its count in `FACTORS`
    Returns uint8 N size size 3.
    """
    counts = np.array(list(FACTORS.values()))
    factors = np.asarray(factors)
    if factors.ndim != 2 or factors.shape[1] != len(counts) or (factors < 0).any() or (factors >= counts).any():
        raise ValueError(f"Expected rows of {len(counts)} factors below {counts.tolist()}; given an array {factors.shape}.")
    shape, size, x, y, hue = factors.T
    place = np.linspace(FIRST, LAST, FACTORS["x"])
    radius = np.asarray(RADII)[size][:, None, None]
    axis = (np.arange(size_px) + 0.5) / size_px
    across = axis[None, None, :] - place[x][:, None, None]
    down = axis[None, :, None] - place[y][:, None, None]
    outside = np.select([shape[:, None, None] == index for index in range(3)], _distances(across, down, radius))
    cover = np.clip(0.5 - outside * size_px, 0, 1)[..., None]
    colour = np.array([colorsys.hsv_to_rgb(step / FACTORS["hue"], 0.85, 0.9) for step in range(FACTORS["hue"])])[hue]
    return np.rint(255 * (1 - cover * (1 - colour[:, None, None, :]))).astype(np.uint8)


def _distances(across: np.ndarray, down: np.ndarray, radius: np.ndarray) -> list[np.ndarray]:
    """How far each pixel lies outside a disc, a square and a triangle of equal area (negative inside)."""
    half = radius * np.sqrt(np.pi) / 2
    inner = radius * np.sqrt(np.pi / 27**0.5)  # the triangle's inscribed circle; it hangs half of that below the centre
    lower = down - inner / 2
    triangle = np.maximum(lower - inner, np.sqrt(0.75) * np.abs(across) - 0.5 * lower - inner)
    return [np.hypot(across, down) - radius, np.maximum(np.abs(across), np.abs(down)) - half, triangle]


def captions(factors: np.ndarray) -> list[str]:
    """What each picture shows, such as 'large red disc'; the place is not told."""
    return [f"{SIZES[size]} {HUES[hue]} {SHAPES[shape]}" for shape, size, _, _, hue in np.asarray(factors)]


def write_factors(folder: Path, size_px: int = 64) -> int:
    """Write every picture of `grid` and metadata.jsonl (file_name, text, factors) into `folder`; returns how many."""
    with atomic_if_new(folder) as at:
        chosen = grid()
        lines = []
        for row, pixels, text in zip(chosen, draw_factors(chosen, size_px), captions(chosen), strict=True):
            name = "-".join(str(value) for value in row) + ".png"
            Image.fromarray(pixels).save(at / name)
            lines.append(json.dumps({"file_name": name, "text": text, "factors": row.tolist()}) + "\n")
        (at / "metadata.jsonl").write_text("".join(lines))
    return len(lines)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "factors")
    print(f"{target}: {counted(write_factors(target), 'picture')}")
