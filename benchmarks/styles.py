"""The folders that the shipped LoRA adapters are trained and judged on: three hands that draw the same emoji, and rules.

python benchmarks/styles.py data/styles

Needs data/emoji ('latentpipe emoji'), and the folders twemoji72 and fluent3d in $LATENTPIPE_ASSETS/data.

Every style has the same split by emoji: `unseen` (drawn by all three hands, one in eight by sha256 of its key) and `train`.
What the emoji set holds out is in neither: its combinations of role, gender and skin tone are a part of their own, `held_out`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from latentpipe.data.emoji import caption_of
from latentpipe.data.emoji_bank import open_bank
from latentpipe.utils.images import flatten

SIDE = 128
HANDS = {"flat": ("twemoji72", 8), "solid": ("fluent3d", 0)}  # folder, and the margin in pixels that gives glyphs Noto's size


def by_key(folder: Path) -> dict[str, Path]:
    """The bank's keys and the other hand's files, matched by the emoji itself, else by its caption."""
    bank = open_bank()
    plain = {key.replace("-fe0f", ""): key for key in bank.keys}
    named = {caption: key for key, captions in zip(bank.keys, bank.captions, strict=True) for caption in captions}
    found: dict[str, Path] = {}
    for line in (folder / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        points = "-".join(f"{ord(char):x}" for char in row.get("emoji", "")).replace("-fe0f", "")
        key = plain.get(points) or named.get(caption_of("x", row["text"]))
        if key is not None:
            found.setdefault(key, folder / row["file_name"])
    return found


def pixel(picture: Image.Image) -> Image.Image:
    """Pixel art: 16 x 16 squares, each channel in nine levels, no blending."""
    small = picture.resize((16, 16), Image.Resampling.BOX)
    levels = (np.round(np.asarray(small, np.float32) / 31.875) * 31.875).astype(np.uint8)
    return Image.fromarray(levels).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def pencil(picture: Image.Image) -> Image.Image:
    """A pencil drawing: outlines where brightness or colour steps, and the surfaces as light grey."""
    channels = [np.asarray(band.filter(ImageFilter.GaussianBlur(1.2)), np.float32) for band in picture.split()]
    steps = [np.hypot(*np.gradient(channel)) for channel in channels]
    lines = np.clip(np.max(steps, axis=0) * 7 - 20, 0, 200)
    shade = (255 - np.asarray(ImageOps.grayscale(picture), np.float32)) * 0.25
    drawn = np.clip(255 - np.maximum(lines, shade), 0, 255).astype(np.uint8)
    return Image.fromarray(drawn).convert("RGB")


RULES: dict[str, Callable[[Image.Image], Image.Image]] = {"pixel": pixel, "pencil": pencil, "resized": lambda picture: picture}


def styles(assets: Path, emoji: Path) -> Iterator[tuple[str, str, str, Image.Image]]:
    """Style, split, key and picture (128 x 128 RGB on white) of every emoji but the validation share."""
    bank = open_bank()
    hands = {style: by_key(assets / "data" / name) for style, (name, _) in HANDS.items()}
    for key, part in zip(bank.keys, bank.splits, strict=True):
        if part == "validation":
            continue
        split = part
        if part == "train" and all(key in files for files in hands.values()):
            split = "unseen" if int(hashlib.sha256(key.encode()).hexdigest(), 16) % 8 == 0 else "train"
        for style, files in hands.items():
            if key in files:
                with Image.open(files[key]) as picture:
                    yield style, split, key, square(flatten(picture), HANDS[style][1])
        with Image.open(emoji / part / f"{key}.png") as picture:
            own = square(flatten(picture))
        for style, rule in RULES.items():
            yield style, split, key, rule(own)


def square(picture: Image.Image, margin: int = 0) -> Image.Image:
    """A picture fitted into 128 x 128 on white, with a margin."""
    inner = ImageOps.pad(picture, (SIDE - 2 * margin,) * 2, Image.Resampling.LANCZOS, color="white")
    return ImageOps.expand(inner, margin, "white")


def write(out: Path, assets: Path, emoji: Path) -> dict[str, int]:
    """Write ``out/STYLE/{train,unseen,held_out}`` with metadata.jsonl; returns the counts."""
    captions = dict(zip(open_bank().keys, open_bank().captions, strict=True))
    rows: dict[str, list[str]] = {}
    for style, part, key, picture in styles(assets, emoji):
        folder = out / style / part
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{key}.png")
        rows.setdefault(f"{style}/{part}", []).extend(
            json.dumps({"file_name": f"{key}.png", "text": text}) for text in captions[key]
        )
    for name, lines in rows.items():
        (out / name / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return {name: len(list((out / name).glob("*.png"))) for name in rows}


if __name__ == "__main__":
    if len(sys.argv) != 2 or "LATENTPIPE_ASSETS" not in os.environ:
        sys.exit(__doc__)
    for name, count in write(Path(sys.argv[1]), Path(os.environ["LATENTPIPE_ASSETS"]), Path("data/emoji")).items():
        print(f"{name}: {count} pictures")
