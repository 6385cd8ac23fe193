"""Side-by-side crops at 1:1: the original, each reconstruction and its error, as PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from latentpipe.evaluate.comparison import Comparison

SIDE = 256  # px: larger pictures are cropped to this
SMALL = 96  # px: smaller ones are enlarged by a whole number
GAIN = 4  # of the shown error


@dataclass(frozen=True)
class Tile:
    """One small picture: `png` (bytes of the file) and what it shows, in words."""

    png: bytes
    alt: str

    def data_uri(self) -> str:
        """The picture as the src of an img."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Strip:
    """A picture's tiles: the original, and for each VAE the reconstruction, its error and a caption.

    picture  file name;  why  what it was chosen for;  place  which part is shown, in words;  size  W, H in px on the page
    """

    picture: str
    why: str
    place: str
    size: tuple[int, int]
    original: Tile
    rebuilt: list[Tile]
    errors: list[Tile]
    captions: list[str]


def choose(comparison: Comparison) -> dict[str, str]:
    """File name to reason: the best, median and worst picture by PSNR averaged over the VAEs, and where they differ most."""
    values = [evaluation.per_picture.get("PSNR") for evaluation in comparison.evaluations]
    names = comparison.evaluations[0].names
    found: dict[str, list[str]] = {}
    known = [entry for entry in values if entry is not None]
    if known:
        order = np.argsort(-np.asarray(known, np.float64).mean(0), kind="stable")
        for why, place in (("best", 0), ("median", len(order) // 2), ("worst", -1)):
            found.setdefault(names[order[place]], []).append(f"{why} by mean PSNR")
    told: set[tuple[str, str]] = set()
    for extreme in comparison.extremes:
        pair = (extreme.first, extreme.second)
        if pair not in told:  # the first of each pair is the largest
            told.add(pair)
            gap = f"{extreme.value:.2f}" + (" dB" if extreme.metric == "PSNR" else "")
            found.setdefault(extreme.picture, []).append(
                f"{extreme.first} ahead of {extreme.second} by the most ({gap} {extreme.metric})"
            )
    return {name: "; ".join(reasons) for name, reasons in found.items()}


def strip(
    picture: str, why: str, original: np.ndarray, rebuilt: Sequence[np.ndarray], labels: Sequence[str], psnr: Sequence[float]
) -> Strip:
    """Tiles of one picture from uint8 pixels (H W 3): the original, a reconstruction for each label, and their PSNR in dB."""
    errors = [np.abs(original.astype(np.int16) - other.astype(np.int16)) for other in rebuilt]
    top, left = _worst_place(np.sum(errors, axis=(0, 3)))
    height, width = (min(side, SIDE) for side in original.shape[:2])
    cut = np.s_[top : top + height, left : left + width]
    whole = (height, width) == original.shape[:2]
    factor = max(1, -(-SMALL // max(height, width)))
    place = f"the whole picture, {width} × {height} px" if whole else _place(original, top, left, height, width)
    place += f", enlarged {factor} times" if factor > 1 else ", 1:1"
    return Strip(
        picture,
        why,
        place,
        (width * factor, height * factor),
        Tile(png(original[cut]), f"{picture}, original"),
        [
            Tile(png(other[cut]), f"{picture}, reconstruction by {label}, PSNR {value:.2f} dB")
            for label, other, value in zip(labels, rebuilt, psnr, strict=True)
        ],
        [
            Tile(png((error[cut] * GAIN).clip(0, 255).astype(np.uint8)), f"{picture}, error of {label} times {GAIN}")
            for label, error in zip(labels, errors, strict=True)
        ],
        [f"{label}: {value:.2f} dB" for label, value in zip(labels, psnr, strict=True)],
    )


def png(pixels: np.ndarray) -> bytes:
    """uint8 pixels (H W 3) as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _worst_place(error: np.ndarray) -> tuple[int, int]:
    """Top and left of the SIDE x SIDE window with the largest sum of `error` (H W), by an integral image."""
    height, width = (min(side, SIDE) for side in error.shape)
    total = np.pad(error.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]
    top, left = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(top), int(left)


def _place(original: np.ndarray, top: int, left: int, height: int, width: int) -> str:
    full = f"{original.shape[1]} × {original.shape[0]} px"
    return f"{width} × {height} px at x {left}, y {top} of {full}, where the errors are largest"
