"""Pictures of several hands with captions and a split that holds in every hand.

What the split of emoji_split.json keeps out (validation emoji, held-out combinations) stays out in every hand. Besides, cells
(emoji, hand) are held out, so that a style can be asked for on an emoji that was never seen in it: emoji_cells.json.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from latentpipe.data.emoji import Emoji, caption_of, read_split, render_all, split_of
from latentpipe.data.emoji_sets import (
    ANY_STYLE,
    HANDS,
    TONE_MARKS,
    Hand,
    HandSet,
    Names,
    base_key,
    check_packages,
    key_of,
    plain_key,
    read_hand,
    read_names,
)
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import atomic_folder
from latentpipe.utils.reading import read_json

CELLS_FILE = Path(__file__).with_name("emoji_cells.json")
FOLDERS = ("train", "validation", "held_out", "cells", "unseen")
NOTO_SIZE = 128  # the font's bitmaps hold no more
HELD_OUT_SHARE = 0.1
OTHERS = 3  # other hands that must have an emoji before its cell may be held out
# How often each kind of caption stands in the metadata, so that training meets them in this proportion
SHARES = {"named": 6, "any": 1, "keywords": 1}
STYLED_SHARES = {"named": 6, "any": 2, "keywords": 1}


@dataclass(frozen=True)
class Drawing:
    """One picture to be written: its hand, plain key, captions, folder, and what kind of emoji it is."""

    hand: Hand
    key: str
    captions: tuple[str, ...]
    folder: str
    kind: str
    group: str


def kind_of(sequence: str) -> str:
    """ "flag", "tone" (a skin tone is chosen) or "object" (all others)."""
    points = [ord(char) for char in sequence]
    if any(0x1F1E6 <= point <= 0x1F1FF or 0xE0020 <= point <= 0xE007F for point in points):
        return "flag"
    return "tone" if any(f"{point:x}" in TONE_MARKS for point in points) else "object"


def captions_in(hand: Hand, names: Sequence[str], keywords: str) -> tuple[str, ...]:
    """Captions of a picture: named (plain for Noto, with the style's name for others), in any style, and by its keywords.

    A caption that stands several times is drawn as many times as often.
    """
    shares = STYLED_SHARES if hand.style else SHARES
    found: list[str] = []
    for name in names:
        found += [_styled(name, hand.style)] * shares["named"] + [_styled(name, ANY_STYLE)] * shares["any"]
    if keywords:
        found += [_styled(keywords, hand.style)] * shares["keywords"] * len(names)
    return tuple(found)


def keywords_of(key: str, caption: str, names: Names, most: int = 4) -> str:
    """Up to four of an emoji's keywords, joined by commas; empty where there are fewer than two that the caption lacks."""
    words = [tag for tag in names.tags.get(key, ()) if re.fullmatch(r"[a-z][a-z ]*", tag) and tag != caption]
    return ", ".join(words[:most]) if len(words) >= 2 else ""


def held_out_cells(sets: dict[str, set[str]], share: float = HELD_OUT_SHARE) -> dict[str, list[str]]:
    """The rule behind emoji_cells.json: hand -> base keys (without skin tones) that it is never trained on.

    A cell (emoji, family of hands) is held out where the sha256 of its name lies in the lowest `share`, and three or more hands
    of other families have the emoji. Noto has none: its plain prompts are the set of seen prompts.
    """
    trained = {hand.name: hand for hand in HANDS if hand.trained and hand.name in sets}
    bases = {name: {base_key(key) for key in sets[name]} for name in trained}
    cells: dict[str, list[str]] = {}
    for name, hand in trained.items():
        if not hand.style:
            continue
        strangers = [bases[other] for other, its in trained.items() if its.family != hand.family]
        counts = Counter(key for keys in strangers for key in keys)
        cells[name] = sorted(key for key in bases[name] if counts[key] >= OTHERS and _low(f"{key}/{hand.family}", share))
    return cells


def _low(text: str, share: float) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) < share * 2**32


def read_cells() -> dict[str, list[str]]:
    """The shipped cells: hand -> base keys that it is never trained on."""
    return read_json(CELLS_FILE)["cells"]


@dataclass(frozen=True)
class Library:
    """Everything that is known before a picture is drawn."""

    emojis: dict[str, Emoji]  # plain key of each sequence -> Noto's entry
    sequences: dict[str, str]  # plain key -> sequence
    captions: dict[str, str]  # plain key -> the name of the emoji package, in plain words
    names: Names
    sets: dict[str, HandSet]

    def kind(self, key: str) -> str:
        """As `kind_of`."""
        return kind_of(self.sequences[key])

    def keys(self, hand: Hand) -> list[str]:
        """The plain keys of a hand that are used, in a fixed order."""
        own = self.emojis if not hand.package else self.sets[hand.name].entries
        kinds = {"object"} | ({"tone"} if hand.tones else set()) | ({"flag"} if hand.flags else set())
        return sorted(key for key in own if self.kind(key) in kinds)


def open_library(folder: Path, font: Path | None = None) -> Library:
    """Noto's renders and every hand's package; UserError says which packages are missing."""
    check_packages(folder)
    rendered = render_all(font)
    import emoji as package

    entries = {
        sequence: entry["en"]
        for sequence, entry in package.EMOJI_DATA.items()
        if entry["status"] == package.STATUS["fully_qualified"]
    }
    sequences = {key_of(sequence): sequence for sequence in entries}
    captions = {key: caption_of(sequence, entries[sequence]) for key, sequence in sequences.items()}
    names = read_names(folder)
    labels = {key: _labels(key, sequences[key], names, captions[key]) for key in sequences}
    sets: dict[str, HandSet] = {}
    for hand in HANDS:
        if hand.package:
            known = sets.get("fluent") if hand.name == "fluent-3d" else None
            sets[hand.name] = read_hand(folder, hand, labels, known)
    emojis = {key_of(sequence): emoji for emoji in rendered for sequence in emoji.sequences}
    return Library(emojis, sequences, captions, names, sets)


def _labels(key: str, sequence: str, names: Names, caption: str) -> list[str]:
    """Names that a set may know an emoji by, the most exact first: emojibase's, the emoji package's, its character's."""
    single = sequence.replace("\ufe0f", "")
    character = unicodedata.name(single, "") if len(single) == 1 else ""
    return [text for text in (names.labels.get(key, ""), caption, character) if text]


def drawings(library: Library, cells: dict[str, list[str]]) -> Iterator[Drawing]:
    """Every picture to be written, with its folder; Noto's in the order of its render, one for each distinct picture."""
    split = read_split()
    kept = {name: set(keys) for name, keys in cells.items()}
    for hand in HANDS:
        done: set[str] = set()
        for key in library.keys(hand):
            emoji = library.emojis.get(key)
            shipped = split_of(emoji, split) if emoji else "train"
            if library.captions[key] in split["held_out"].values():
                shipped = "held_out"
            own = emoji.captions if emoji and not hand.package else (library.captions[key],)
            if not hand.package:
                assert emoji is not None
                if emoji.key in done:  # one picture for several sequences
                    continue
                done.add(emoji.key)
            folder = shipped if shipped != "train" else "cells" if base_key(key) in kept.get(hand.name, ()) else "train"
            if not hand.trained:
                folder = "unseen"
            kind = library.kind(key)
            keywords = keywords_of(key, own[0], library.names) if kind == "object" else ""
            yield Drawing(hand, key, captions_in(hand, own, keywords), folder, kind, library.names.groups.get(key, ""))


def write_hands(
    out: Path,
    library: Library,
    size: int = 256,
    progress: Callable[[list[Drawing]], Iterable[Drawing]] = list,
    cells: dict[str, list[str]] | None = None,
) -> dict[str, Counter[str]]:
    """Write ``out/{train,validation,held_out,cells,unseen}``: PNG files with metadata.jsonl; returns counts by hand.

    cells   hand -> base keys that are held out of it; left out: those that ship
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder with --out, or delete it first.")
    planned = list(drawings(library, read_cells() if cells is None else cells))
    counts: dict[str, Counter[str]] = {name: Counter() for name in FOLDERS}
    with atomic_folder(out) as folder:
        lines: dict[str, list[str]] = {name: [] for name in FOLDERS}
        for name in FOLDERS:
            (folder / name).mkdir()
        for drawing in progress(planned):
            picture = _draw(library, drawing, size)
            if picture is None:
                continue
            file = f"{drawing.hand.name}-{drawing.key}.png"
            picture.save(folder / drawing.folder / file)
            columns = {"emoji": drawing.key, "hand": drawing.hand.name, "group": drawing.group, "kind": drawing.kind}
            lines[drawing.folder] += [json.dumps({"file_name": file, "text": text, **columns}) for text in drawing.captions]
            counts[drawing.folder][drawing.hand.name] += 1
        for name in FOLDERS:
            (folder / name / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines[name]))
    return counts


def write_cells(library: Library) -> None:
    """Write emoji_cells.json from the rule."""
    split = read_split()
    kept = {plain_key(key) for name in ("validation", "held_out") for key in split[name]}  # out in every hand anyway
    cells = held_out_cells({hand.name: set(library.keys(hand)) - kept for hand in HANDS if hand.trained})
    packages = {hand.name: hand.package for hand in HANDS if hand.package and hand.trained}
    CELLS_FILE.write_text(json.dumps({"packages": packages, "cells": cells}, indent=0) + "\n")


def _draw(library: Library, drawing: Drawing, size: int) -> Image.Image | None:
    """The picture; None where the set's own drawing is broken or empty."""
    if not drawing.hand.package:
        return library.emojis[drawing.key].picture.resize((NOTO_SIZE, NOTO_SIZE), Image.Resampling.LANCZOS)
    try:
        picture = library.sets[drawing.hand.name].draw(drawing.key, size)
    except (ValueError, OSError):
        return None
    return picture if np.asarray(picture).min() < 250 else None


def _styled(name: str, style: str) -> str:
    return f"{name}, {style}" if style else name
