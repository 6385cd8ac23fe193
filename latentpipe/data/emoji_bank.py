"""The emoji bank: every rendered emoji at 32 x 32 on white, with its captions and split. It ships; no font is needed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from latentpipe.data.emoji import file_hash, find_font, read_split, render_all, split_of
from latentpipe.data.emoji_hands import kind_of
from latentpipe.utils.images import picture_file
from latentpipe.utils.reading import read_json

SIDE = 32
COLUMNS = 64
SHEET = Path(__file__).with_name("emoji_bank.png")
INDEX = Path(__file__).with_name("emoji_bank.json")


@dataclass(frozen=True)
class Bank:
    """N pictures as rows of float32 pixels (N, 32*32*3; 0..255), their captions, splits and keys."""

    pixels: np.ndarray
    captions: list[tuple[str, ...]]
    splits: list[str]
    keys: list[str]
    font_sha256: str

    def nearest(self, pictures: np.ndarray, k: int = 5) -> np.ndarray:
        """Indices (M, k) of the bank's pictures with the lowest mean squared error to each row of `pictures`."""
        distance = np.square(self.pixels).sum(1)[None] - 2 * pictures @ self.pixels.T
        first = np.argpartition(distance, k - 1, axis=1)[:, :k]
        order = np.take_along_axis(distance, first, axis=1).argsort(axis=1, kind="stable")
        return np.take_along_axis(first, order, axis=1)

    def rows_of(self, split: str) -> list[int]:
        """Indices of a split in the fixed order of evaluation: by sha256 of the key."""
        rows = [index for index, name in enumerate(self.splits) if name == split]
        return sorted(rows, key=lambda index: hashlib.sha256(self.keys[index].encode()).hexdigest())

    def objects(self) -> list[int]:
        """Rows of the training split without skin tones and flags, in the fixed order of evaluation."""
        sequences = {row: "".join(chr(int(point, 16)) for point in self.keys[row].split("-")) for row in self.rows_of("train")}
        return [row for row, sequence in sequences.items() if kind_of(sequence) == "object"]


def small(picture: Image.Image) -> np.ndarray:
    """A picture at 32 x 32 (box filter), as a float32 row."""
    reduced = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(reduced, np.float32).ravel()


@cache
def open_bank() -> Bank:
    """The bank that ships."""
    index = read_json(INDEX)
    with picture_file(SHEET) as sheet:
        array = np.asarray(sheet.convert("RGB"), np.float32)
    tiles = array.reshape(-1, SIDE, COLUMNS, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE * SIDE * 3)
    entries = index["pictures"]
    return Bank(
        tiles[: len(entries)],
        [tuple(entry["captions"]) for entry in entries],
        [entry["split"] for entry in entries],
        [entry["key"] for entry in entries],
        index["font_sha256"],
    )


def write_bank(font: Path | None = None) -> int:
    """Render the bank again from the font; returns the number of pictures. Only for a new font or split."""
    split = read_split()
    emojis = render_all(font)
    rows = -(-len(emojis) // COLUMNS)
    sheet = np.full((rows * SIDE, COLUMNS * SIDE, 3), 255, np.uint8)
    for index, emoji in enumerate(emojis):
        # As the training pictures: 128 px by Lanczos first, then the box filter.
        tile = small(emoji.picture.resize((128, 128), Image.Resampling.LANCZOS)).reshape(SIDE, SIDE, 3)
        top, left = index // COLUMNS * SIDE, index % COLUMNS * SIDE
        sheet[top : top + SIDE, left : left + SIDE] = tile.astype(np.uint8)
    Image.fromarray(sheet).save(SHEET, optimize=True)
    pictures = [{"key": emoji.key, "captions": emoji.captions, "split": split_of(emoji, split)} for emoji in emojis]
    INDEX.write_text(json.dumps({"font_sha256": file_hash(find_font(font)), "pictures": pictures}, indent=0) + "\n")
    return len(emojis)
