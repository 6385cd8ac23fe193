"""Does the picture show the style that the prompt names, also on emoji that were never seen in it? Do seeds differ?

A held-out cell is an emoji that other hands' drawings of were trained on, and this hand's never. Counted is whether the picture
is nearer (mean squared error at 32 x 32 on white) to this hand's drawing of the emoji than to any other hand's, and whether the
emoji is the nearest, or among the five nearest, of all that this hand drew.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from latentpipe.data.emoji_bank import small
from latentpipe.data.emoji_hands_bank import HandBank, cells_of, open_hands
from latentpipe.data.emoji_sets import ANY_STYLE
from latentpipe.evaluate.statistics import wilson

SEEDS = 4
HANDS_ALIKE = 3  # hands that must have an emoji for its "any style" to count

Draw = Callable[[Sequence[str], Sequence[int]], list[Image.Image]]


def evaluate_styles(draw: Draw, count: int) -> dict[str, Any]:
    """{"cells": of `evaluate_cells`, "variety": of `evaluate_variety`}."""
    return {"cells": evaluate_cells(draw, count), "variety": evaluate_variety(draw)}


def evaluate_cells(draw: Draw, count: int = 300) -> dict[str, Any]:
    """Scores of the first `count` held-out cells (0: all): shares with Wilson intervals, and each hand's own.

    draw(prompts, seeds) gives the pictures; the seed of a cell is its place in the list.
    """
    banks = open_hands()
    cells = cells_of(banks)[: count or None]
    prompts = [prompt_of(banks[name], key) for name, key in cells]
    pictures = np.stack([small(picture) for picture in draw(prompts, range(len(prompts)))])
    return score_cells(banks, cells, pictures)


def prompt_of(bank: HandBank, key: str) -> str:
    """The caption of a hand's drawing: "red apple, flat style"."""
    row = bank.row(key)
    assert row is not None
    return f"{bank.captions[row]}, {bank.style}" if bank.style else bank.captions[row]


def score_cells(banks: dict[str, HandBank], cells: Sequence[tuple[str, str]], pictures: np.ndarray) -> dict[str, Any]:
    """Shares over cells of pictures (M, 32*32*3): nearer to the right hand, right emoji in its bank at first and within five."""
    nearer: list[bool] = []
    found: list[tuple[bool, bool]] = []
    for (name, key), picture in zip(cells, pictures, strict=True):
        nearer.append(nearest_hand(banks, key, picture) == name)
        near = banks[name].nearest(picture[None])[0]
        row = banks[name].row(key)
        found.append((bool(near[0] == row), row in near))
    by_hand = {
        name: {
            "n": len(rows),
            "nearer": sum(nearer[row] for row in rows) / len(rows),
            "top5": sum(found[r][1] for r in rows) / len(rows),
        }
        for name in dict.fromkeys(name for name, _ in cells)
        if (rows := [row for row, cell in enumerate(cells) if cell[0] == name])
    }
    shares = {"nearer": nearer, "top1": [first for first, _ in found], "top5": [within for _, within in found]}
    return {"n": len(cells), **{key: _share(hits) for key, hits in shares.items()}, "hands": by_hand}


def nearest_hand(banks: dict[str, HandBank], key: str, picture: np.ndarray) -> str:
    """The hand whose drawing of an emoji is nearest to a picture."""
    distances = {
        name: float(np.square(bank.pixels[row] - picture).mean()) for name, bank in banks.items() for row in _rows(bank, key)
    }
    return min(distances, key=lambda name: distances[name])


def evaluate_variety(draw: Draw, count: int = 48) -> dict[str, Any]:
    """Four seeds of "..., any style" for `count` objects: share whose seeds show two or more hands, and how far they differ.

    Differences are root mean squares in grey levels over the pairs of a prompt; for scale the same of the hands' own drawings.
    """
    banks = open_hands()
    keys = [key for key in banks["noto"].keys if sum(bank.row(key) is not None for bank in banks.values()) >= HANDS_ALIKE]
    keys = sorted(set(keys) & set(banks["twemoji"].keys))
    chosen = [keys[index * len(keys) // count] for index in range(min(count, len(keys)))]
    captions = [banks["twemoji"].captions[banks["twemoji"].rows[key]] for key in chosen]
    prompts = [f"{caption}, {ANY_STYLE}" for caption in captions for _ in range(SEEDS)]
    drawn = draw(prompts, list(range(SEEDS)) * len(chosen))
    pictures = np.stack([small(picture) for picture in drawn]).reshape(len(chosen), SEEDS, -1)
    return score_variety(banks, chosen, pictures)


def score_variety(banks: dict[str, HandBank], keys: Sequence[str], pictures: np.ndarray) -> dict[str, Any]:
    """As `evaluate_variety`, of pictures (M, seeds, 32*32*3)."""
    shown = [{nearest_hand(banks, key, picture) for picture in group} for key, group in zip(keys, pictures, strict=True)]
    own = [[bank.pixels[row] for bank in banks.values() for row in _rows(bank, key)] for key in keys]
    return {
        "n": len(keys),
        "two_hands": _share([len(names) > 1 for names in shown]),
        "hands_shown": sum(len(names) for names in shown) / len(shown),
        "pairwise_rms": _mean_apart(pictures),
        "pairwise_rms_of_hands": _mean_apart(own),
    }


def _rows(bank: HandBank, key: str) -> list[int]:
    row = bank.row(key)
    return [] if row is None else [row]


def _mean_apart(groups: Iterable[Any]) -> float:
    pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
    return sum(math.sqrt(np.square(a - b).mean()) for a, b in pairs) / max(1, len(pairs))


def _share(hits: Sequence[bool]) -> dict[str, float]:
    low, high = wilson(sum(hits), len(hits))
    return {"share": sum(hits) / max(1, len(hits)), "low": low, "high": high}
