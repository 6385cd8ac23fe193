"""Move latents along directions and look: a walk, the sheet of several walks, and how much each changes the picture."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from latentpipe.data.image_set import decode
from latentpipe.explore.attributes import NAMES, labels
from latentpipe.explore.directions import Direction, channels, principal, supervised
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import to_bytes, to_pixels, wrap
from latentpipe.utils.progress import ProgressCallback
from latentpipe.vae.protocol import Stage

AMOUNTS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
LABEL_PX = 112


def walk(
    stage: Stage,
    latents: torch.Tensor,
    direction: Direction,
    amounts: Sequence[float] = AMOUNTS,
    report: ProgressCallback | None = None,
) -> torch.Tensor:
    """The pictures along a direction: images (one for each amount, 3 H W, on the CPU).

    latents  C h w or 1 C h w, of the picture to begin from
    amounts  how far, in standard deviations (0: the picture itself, rebuilt)
    ValueError where latents and direction differ in shape.
    """
    return decode(stage, moved(latents, direction, amounts), report)


def sheet(
    stage: Stage,
    latents: torch.Tensor,
    directions: Sequence[Direction],
    amounts: Sequence[float] = AMOUNTS,
    report: ProgressCallback | None = None,
) -> Image.Image:
    """A page: one row for each direction, one column for each amount; arguments as for `walk`."""
    batch = torch.cat([moved(latents, direction, amounts) for direction in directions])
    pictures = to_pixels(decode(stage, batch, report))
    rows = [pictures[first : first + len(amounts)] for first in range(0, len(pictures), len(amounts))]
    return page(rows, [direction.name for direction in directions], [f"{amount:+g} sd" if amount else "0" for amount in amounts])


def beginning(captions: Sequence[Sequence[str]], attributes: Sequence[str] = ()) -> int:
    """Index of the first picture that has least of the first attribute by its caption, so that a walk leads to it; else 0."""
    if not attributes:
        return 0
    known = labels(captions, attributes[0])
    return int(np.flatnonzero(known == np.nanmin(known))[0])


def candidates(
    latents: torch.Tensor,
    captions: Sequence[Sequence[str]],
    attributes: Sequence[str] = (),
    report: ProgressCallback | None = None,
) -> list[Direction]:
    """The directions to rank for these pictures: channels, the first 16 principal components, and what their captions tell.

    latents     N C h w, with `captions` (N)
    attributes  these alone, instead (`attributes.labels`); UserError where the captions do not know one
    """
    if attributes:
        return supervised(latents, {name: labels(captions, name) for name in attributes}, report)
    known = {}
    for name in NAMES:
        with suppress(UserError):  # other pictures have other captions
            known[name] = labels(captions, name)
    return channels(latents, report) + principal(latents, 16, report) + supervised(latents, known, report)


def changes(
    stage: Stage,
    latents: torch.Tensor,
    directions: Sequence[Direction],
    amount: float = 2.0,
    report: ProgressCallback | None = None,
) -> list[float]:
    """How much each direction changes the decoded picture: grey levels, RMS between `-amount` and `+amount`, mean over pictures.

    latents  B C h w, the pictures to begin from
    """
    total = 2 * len(latents) * len(directions)
    found = []
    for index, direction in enumerate(directions):
        ends = torch.cat([latents + sign * amount * direction.vector.to(latents) for sign in (-1, 1)])
        first, second = to_bytes(decode(stage, ends)).float().chunk(2)
        found.append((first - second).square().flatten(1).mean(1).sqrt().mean().item())
        if report is not None:
            report(2 * len(latents) * (index + 1), total, "decode")
    return found


def ranked(
    stage: Stage,
    latents: torch.Tensor,
    directions: Sequence[Direction],
    amount: float = 2.0,
    report: ProgressCallback | None = None,
) -> list[tuple[Direction, float]]:
    """Directions with their `changes`, those that change the picture most first; arguments as for `changes`."""
    pairs = zip(directions, changes(stage, latents, directions, amount, report), strict=True)
    return sorted(pairs, key=lambda pair: -pair[1])


def moved(latents: torch.Tensor, direction: Direction, amounts: Sequence[float]) -> torch.Tensor:
    """Latents (C h w or 1 C h w) moved by each amount: len(amounts) C h w."""
    start = latents if latents.ndim == 4 else latents[None]
    if start.shape != (1, *direction.vector.shape):
        raise ValueError(f"Expected the latents of one picture, {tuple(direction.vector.shape)}; given {tuple(latents.shape)}.")
    steps = torch.tensor(list(amounts), dtype=start.dtype, device=start.device).view(-1, 1, 1, 1)
    return start + steps * direction.vector.to(start)


def page(rows: Sequence[Sequence[Image.Image]], names: Sequence[str], heads: Sequence[str], gap: int = 3) -> Image.Image:
    """Rows of pictures of one size on white, each row with its name at the left, each column with its head."""
    width, height = rows[0][0].size
    font = ImageFont.load_default(12)
    top = 18
    size = (LABEL_PX + len(heads) * (width + gap), top + len(rows) * (height + gap))
    result = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(result)
    for column, head in enumerate(heads):
        left = LABEL_PX + column * (width + gap)
        draw.text((left + (width - font.getlength(head)) / 2, 2), head, fill=(60, 60, 60), font=font)
    for row, (pictures, name) in enumerate(zip(rows, names, strict=True)):
        y = top + row * (height + gap)
        for line, text in enumerate(wrap(name, LABEL_PX - 8, font)[: max(1, height // 14)]):
            draw.text((4, y + 2 + 14 * line), text, fill=(60, 60, 60), font=font)
        for column, picture in enumerate(pictures):
            result.paste(picture, (LABEL_PX + column * (width + gap), y))
    return result
