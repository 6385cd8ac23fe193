"""Banks of the other hands: every object that an artist drew at 32 x 32 on white, with its caption. They ship.

A bank is one sheet for each hand (emoji_bank_NAME.png); emoji_hands_bank.json says which emoji stands where. Credits and
licences of the hands stand in LICENSE.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from latentpipe.data.emoji_bank import COLUMNS, SIDE, open_bank, small
from latentpipe.data.emoji_hands import Library, read_cells
from latentpipe.data.emoji_sets import HANDS, plain_key
from latentpipe.utils.images import picture_file
from latentpipe.utils.reading import read_json

FOLDER = Path(__file__).parent
INDEX = FOLDER / "emoji_hands_bank.json"
RENDERED = 128  # pictures are drawn at this side, then reduced by the box filter, as what a model draws is


@dataclass(frozen=True)
class HandBank:
    """One hand: its style's name ("" for Noto), plain keys, captions, and pixels (N, 32*32*3; 0..255)."""

    style: str
    keys: list[str]
    captions: list[str]
    pixels: np.ndarray

    def row(self, key: str) -> int | None:
        """Where a key stands; None where the hand lacks it."""
        return self.rows.get(key)

    @cached_property
    def rows(self) -> dict[str, int]:
        """Plain key -> row."""
        return {key: index for index, key in enumerate(self.keys)}

    def nearest(self, pictures: np.ndarray, k: int = 5) -> np.ndarray:
        """Rows (M, k) with the lowest mean squared error to each of `pictures`, the nearest first."""
        distance = np.square(self.pixels).sum(1)[None] - 2 * pictures @ self.pixels.T
        return distance.argsort(axis=1, kind="stable")[:, :k]


def sheet_of(hand: str) -> Path:
    """The PNG of a hand's bank."""
    return FOLDER / f"emoji_bank_{hand}.png"


@cache
def open_hands() -> dict[str, HandBank]:
    """The banks that ship, by hand; Noto's objects too."""
    noto = open_bank()
    keys = [plain_key(key) for key in noto.keys]
    found = {"noto": HandBank("", keys, [texts[0] for texts in noto.captions], noto.pixels)}
    for name, entry in read_json(INDEX)["hands"].items():
        with picture_file(sheet_of(name)) as sheet:
            array = np.asarray(sheet.convert("RGB"), np.float32)
        tiles = array.reshape(-1, SIDE, COLUMNS, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE * SIDE * 3)
        found[name] = HandBank(entry["style"], entry["keys"], entry["captions"], tiles[: len(entry["keys"])])
    return found


def cells_of(banks: dict[str, HandBank]) -> list[tuple[str, str]]:
    """Held-out cells (hand, plain key) that are objects and in the banks, in the fixed order of evaluation: by sha256."""
    held = read_cells()
    cells = [(name, key) for name, keys in held.items() if name in banks for key in keys if banks[name].row(key) is not None]
    return sorted(cells, key=lambda cell: hashlib.sha256("/".join(cell).encode()).hexdigest())


def write_hand_banks(library: Library) -> dict[str, int]:
    """Draw the banks of all trained hands but Noto anew; returns their sizes. Only for other versions of the packages."""
    index: dict[str, dict[str, object]] = {}
    for hand in HANDS:
        if not (hand.trained and hand.package):
            continue
        tiles: dict[str, np.ndarray] = {}
        for key in library.keys(hand):
            if library.kind(key) == "object":
                tiles[key] = small(library.sets[hand.name].draw(key, RENDERED)).reshape(SIDE, SIDE, 3).astype(np.uint8)
        sheet = np.full((-(-len(tiles) // COLUMNS) * SIDE, COLUMNS * SIDE, 3), 255, np.uint8)
        for place, tile in enumerate(tiles.values()):
            top, left = place // COLUMNS * SIDE, place % COLUMNS * SIDE
            sheet[top : top + SIDE, left : left + SIDE] = tile
        Image.fromarray(sheet).save(sheet_of(hand.name), optimize=True)
        captions = [library.captions[key] for key in tiles]
        index[hand.name] = {"style": hand.style, "package": hand.package, "keys": list(tiles), "captions": captions}
    INDEX.write_text(json.dumps({"hands": index}, indent=0) + "\n")
    return {name: len(entry["keys"]) for name, entry in index.items()}  # type: ignore[arg-type]
