"""Attributes that captions name, the edit that moves one, and how well it moved: encode, move, decode, compare."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from latentpipe.data.emoji_bank import open_bank, small
from latentpipe.data.image_set import decode, encode
from latentpipe.evaluate.metrics.latents import decibels
from latentpipe.evaluate.results import Score
from latentpipe.explore.directions import Direction, supervised
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.images import to_bytes, to_pixels
from latentpipe.utils.progress import ProgressCallback
from latentpipe.vae.protocol import Stage

LEAST = 5  # pictures of either kind that a direction is learnt from
TONES = ("light", "medium light", "medium", "medium dark", "dark")
TONE = re.compile(r"\b(medium light|medium dark|medium|light|dark) skin tone\b")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")
NAMES = ("skin tone", "smiling", "woman", "red", "flag")
"""Attributes that the emoji bank has enough pictures of."""


def labels(captions: Sequence[Sequence[str]], attribute: str) -> np.ndarray:
    """What captions say about an attribute, float64 N; NaN: nothing.

    "skin tone"       0 (light) to 4 (dark)
    "woman"           1, and 0 for "man"
    "smiling"         1 for smiling, grinning, beaming and laughing faces, 0 for other faces
    a colour          1, and 0 for pictures that name another colour
    any other words   1 where a caption holds all of them, else 0

    UserError where fewer than 5 pictures are of either kind.
    """
    found = np.array([_label(" ".join(texts).lower(), attribute.lower()) for texts in captions], np.float64)
    known = found[~np.isnan(found)]
    low, high = ((known == end).sum() if len(known) else 0 for end in (known.min(initial=0), known.max(initial=0)))
    if min(low, high) < LEAST or known.min() == known.max():
        count = int((known > 0).sum())
        raise UserError(
            f"'{attribute}': {count:,} of {counted(len(captions), 'caption')} have it and {len(known) - count:,} do not; "
            f"expected {LEAST} of either kind and more. Give other words of the captions ({', '.join(NAMES)}), or more pictures."
        )
    return found


def _label(text: str, attribute: str) -> float:
    words = set(re.findall(r"[a-z]+", text))
    if attribute == "skin tone":
        tone = TONE.search(text)
        return TONES.index(tone[1]) if tone else np.nan
    if attribute == "woman":
        return np.nan if ("woman" in words) == ("man" in words) else float("woman" in words)
    if attribute == "smiling":
        return float(bool(words & {"smiling", "grinning", "beaming", "smile", "joy", "laughing"})) if "face" in words else np.nan
    if attribute in COLOURS:
        return float(attribute in words) if words & set(COLOURS) else np.nan
    return float(set(re.findall(r"[a-z]+", attribute)) <= words)


def edit(
    stage: Stage,
    images: torch.Tensor,
    direction: Direction | Sequence[Direction],
    strength: float = 1.0,
    report: ProgressCallback | None = None,
) -> torch.Tensor:
    """Encode, move, decode: images N 3 H W with the attribute of labelled directions (`directions.supervised`) changed.

    direction  one for all pictures, or one for each (`local`)
    strength   1 moves by the distance between the means of the lowest and the highest label, -1 back
    """
    latents = encode(stage, images, report)
    each = [direction] * len(images) if isinstance(direction, Direction) else list(direction)
    if any(latents.shape[1:] != one.vector.shape for one in each):
        raise UserError(
            f"The direction is of latents {tuple(each[0].vector.shape)}; these pictures have {tuple(latents.shape[1:])}. "
            "Give pictures of the size that it was learnt at."
        )
    moves = torch.stack([one.gap * one.vector for one in each])
    return decode(stage, latents + strength * moves, report)


def local(latents: torch.Tensor, known: torch.Tensor, known_labels: np.ndarray, name: str, k: int = 40) -> list[Direction]:
    """A direction for each picture, learnt from its own neighbours: the `k` nearest with the lowest label, and with the highest.

    latents        B C h w, of the pictures that will be edited
    known          N C h w, with `known_labels` (N; NaN: no say)
    "Deep Feature Interpolation for Image Content Changes" (Upchurch et al., arXiv:1611.05507, section 3), in latents instead of
    features: neighbours share the picture's layout, so that what the two sets differ in is the attribute.
    """
    ends = np.nanmin(known_labels), np.nanmax(known_labels)
    sides = [torch.from_numpy(np.flatnonzero(known_labels == end)) for end in ends]
    found = []
    for latent in latents:
        near = []
        for rows in sides:
            distance = (known[rows] - latent).flatten(1).norm(dim=1)
            near.append(rows[distance.argsort()[:k]])
        label = [0.0] * len(near[0]) + [1.0] * len(near[1])
        found += supervised(known[torch.cat(near)], {name: label})
    return found


@dataclass(frozen=True)
class ToneEdit:
    """How an edit of the skin tone went, each with n and interval.

    read, read_before  the tone that is read from the picture, 0 (light) to 4 (dark), with the edit and rebuilt without it: the
                       nearest of the emoji's own five
    moved              share of pictures that read as the tone that was asked for
    kept, kept_before  share whose nearest emoji, of all and of any tone, is the same emoji
    to_target, to_target_before  PSNR (dB) to the emoji's own picture of the tone that was asked for
    ceiling            PSNR of that picture's reconstruction: no edit through this VAE can be expected to pass it
    """

    read: Score
    read_before: Score
    moved: Score
    kept: Score
    kept_before: Score
    to_target: Score
    to_target_before: Score
    ceiling: Score


def pairs_of(captions: Sequence[Sequence[str]], first: str, second: str) -> list[tuple[int, int]]:
    """Pairs of pictures whose captions are the same but for the skin tone, `first` ("light") and `second` ("dark")."""
    places: dict[tuple[str, str], int] = {}
    for index, texts in enumerate(captions):
        tone = TONE.findall(texts[0]) if texts else []
        if len(tone) == 1:
            places.setdefault((TONE.sub("", texts[0]), tone[0]), index)
    return [(at, places[base, second]) for (base, tone), at in places.items() if tone == first and (base, second) in places]


def judge(
    edited: torch.Tensor, rebuilt: torch.Tensor, target: torch.Tensor, ceiling: torch.Tensor, wanted: Sequence[str]
) -> ToneEdit:
    """Compare edited pictures with what was asked for, by the nearest picture (32 px, mean squared error) of the emoji bank.

    edited, rebuilt   images N 3 H W after the edit, and decoded without it
    target, ceiling   the emoji with the tone that was asked for, and its reconstruction
    wanted            the captions of the targets in the bank, N
    """
    (tones, kept), (tones_before, kept_before) = (_read(images, wanted) for images in (edited, rebuilt))
    moved = tones == [TONES.index(TONE.findall(caption)[0]) for caption in wanted]
    truth = to_bytes(target)
    near = [Score.of(decibels(to_bytes(images), truth).numpy(), "dB", "higher") for images in (edited, rebuilt, ceiling)]
    shares = [Score.of(values.astype(np.float64), "", "higher") for values in (moved, kept, kept_before)]
    return ToneEdit(Score.of(tones), Score.of(tones_before), *shares, *near)


def _read(images: torch.Tensor, wanted: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """For each picture (N): the nearest tone of the wanted emoji's five, and whether its nearest emoji of all is that emoji."""
    bank = open_bank()
    rows = np.stack([small(picture) for picture in to_pixels(images)])
    bases = np.array([TONE.sub("", texts[0]) if texts else "" for texts in bank.captions])
    tones = np.array([TONES.index((TONE.findall(texts[0]) or ["light"])[0]) if texts else 0 for texts in bank.captions])
    read, kept = [], []
    for row, caption in zip(np.square(bank.pixels).sum(1)[None] - 2 * rows @ bank.pixels.T, wanted, strict=True):
        family = np.flatnonzero(bases == TONE.sub("", caption))
        read.append(tones[family[row[family].argmin()]])
        kept.append(row.argmin() in family)
    return np.array(read, np.float64), np.array(kept)
