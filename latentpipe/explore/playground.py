"""What a playground shows: pictures in, pictures out, the latents between them moved a little at each call.

picture -> encode -> mix, move along directions, scale, add noise -> decode -> picture
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from PIL import Image, ImageDraw, ImageFont

from latentpipe.data.emoji_bank import SIDE, open_bank
from latentpipe.data.image_set import decode, encode, read_set, side_for
from latentpipe.explore import edit as latent_edit
from latentpipe.explore import traverse
from latentpipe.explore.clips import write_clip as write_clip
from latentpipe.explore.directions import Direction
from latentpipe.explore.interpolate import LINES as WAYS
from latentpipe.explore.interpolate import between_pictures, between_prompts, latents_of
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import to_pixels
from latentpipe.utils.progress import ProgressCallback
from latentpipe.vae.protocol import Stage

PICTURES = 200  # of the emoji bank that directions are learned from
LIMIT_SD = 10.0
TITLE_PX = 18
__all__ = [
    "WAYS",
    "Edit",
    "bank_picture",
    "between_pictures",
    "between_prompts",
    "direction",
    "directions",
    "edited_picture",
    "latents_of",
    "plane",
    "playground_page",
    "traversal",
    "write_clip",
]  # fmt: skip
_known: WeakKeyDictionary[Stage, dict[str, Direction]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Edit:
    """What is done to the latents of a picture, in this order; the defaults do nothing.

    share  of another picture, 0 to 1, mixed in by slerp
    moves  how far along each direction by name, in standard deviations (`directions`)
    scale  what the latents are multiplied by, 0 to 3
    noise  standard deviation of normal noise that is added, 0 to 3 (the latents' own is about 1), drawn from `seed`
    """

    share: float = 0.0
    moves: Mapping[str, float] | None = None
    scale: float = 1.0
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float, float]] = {
            "share": (self.share, 0, 1),
            "scale": (self.scale, 0, 3),
            "noise": (self.noise, 0, 3),
        }
        ranges |= {f"the move along {name}": (far, -LIMIT_SD, LIMIT_SD) for name, far in (self.moves or {}).items()}
        ranges |= {"noise": (self.noise, 0, 3), "seed": (self.seed, 0, 2**32 - 1)}
        for name, (value, low, high) in ranges.items():
            if not low <= value <= high:  # also where it is not a number
                raise UserError(f"{name} is {value}; expected {low:g} to {high:g}.")


def edited_picture(stage: Stage, first: Image.Image, second: Image.Image | None, edit: Edit) -> Image.Image:
    """A picture (its centred square, at the side of `image_set.side_for`) after an edit of its latents.

    second  what `edit.share` mixes in; UserError where it is missing, or for a direction that is not known
    """
    latents = latents_of(stage, first)
    if edit.share and second is None:
        raise UserError("There is no second picture to mix in; drop one, or set the share to 0.")
    if edit.share and second is not None:
        latents = latent_edit.mix(latents, latents_of(stage, second), edit.share)
    for name, far in (edit.moves or {}).items():
        latents = latent_edit.add(latents, direction(stage, name), far)
    latents = latent_edit.noise(latent_edit.scale(latents, edit.scale), edit.noise, edit.seed)
    return to_pixels(decode(stage, latents))[0]


def directions(stage: Stage, report: ProgressCallback | None = None) -> list[str]:
    """Names of the directions that are known of a VAE, those that change pictures most first.

    Channels, principal components and captions' words, learned once from PICTURES emoji.
    """
    if stage not in _known:
        known = read_set(None, side_for(stage.space.downscale), PICTURES)
        latents = encode(stage, known.images, report)
        found = traverse.candidates(latents, known.captions, report=report)
        _known[stage] = {one.name: one for one, _ in traverse.ranked(stage, latents[:2], found, report=report)}
    return list(_known[stage])


def direction(stage: Stage, name: str) -> Direction:
    """A direction by its name; UserError where it is not known yet (`directions` learns them)."""
    known = _known.get(stage, {})
    if name not in known:
        raise UserError(f"No direction '{name[:80]}' is known of this VAE; known: {', '.join(known) or 'none yet'}.")
    return known[name]


def traversal(
    stage: Stage,
    picture: Image.Image,
    names: Sequence[str],
    columns: int = 7,
    most: float = 3.0,
    report: ProgressCallback | None = None,
) -> Image.Image:
    """A sheet: each direction in a row, from `-most` to `most` standard deviations."""
    rows = [direction(stage, name) for name in names]
    return traverse.sheet(stage, latents_of(stage, picture), rows, _amounts(columns, most), report)


def plane(
    stage: Stage,
    picture: Image.Image,
    names: tuple[str, str],
    side: int = 5,
    most: float = 3.0,
    report: ProgressCallback | None = None,
) -> Image.Image:
    """A square sheet of a plane: the first direction from left to right, the second from top to bottom."""
    amounts = _amounts(side, most)
    across, down = (direction(stage, name) for name in names)
    start = latents_of(stage, picture)
    batch = torch.cat([traverse.moved(row[None], across, amounts) for row in traverse.moved(start, down, amounts)])
    pictures = to_pixels(decode(stage, batch, report))
    rows = [pictures[first : first + side] for first in range(0, len(pictures), side)]
    sheet = traverse.page(rows, [f"{far:+.2g} sd" for far in amounts], [f"{far:+.2g} sd" for far in amounts])
    titled = Image.new("RGB", (sheet.width, sheet.height + TITLE_PX), "white")
    titled.paste(sheet, (0, TITLE_PX))
    text = f"across: {across.name}, down: {down.name}"
    ImageDraw.Draw(titled).text((4, 2), text, fill=(60, 60, 60), font=ImageFont.load_default(12))
    return titled


def playground_page(rows: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Rows of pictures by their names; the columns are shares of the second end."""
    count = len(next(iter(rows.values())))
    return traverse.page(list(rows.values()), list(rows), [f"{index / (count - 1):.0%}" for index in range(count)])


def bank_picture(caption: str) -> Image.Image:
    """An emoji of the bank by its caption, enlarged to 128 pixels; UserError where there is none."""
    bank = open_bank()
    for pixels, captions in zip(bank.pixels, bank.captions, strict=True):
        if caption in captions:
            small = Image.fromarray(pixels.reshape(SIDE, SIDE, 3).astype("uint8"))
            return small.resize((128, 128), Image.Resampling.BICUBIC)
    raise UserError(f"The emoji bank has no picture of '{caption[:80]}'.")


def _amounts(count: int, most: float) -> list[float]:
    if not 2 <= count <= 15 or not 0 < most <= LIMIT_SD:
        raise UserError(f"{count} pictures up to {most:g} standard deviations; expected 2 to 15, and at most {LIMIT_SD:g}.")
    return torch.linspace(-most, most, count).tolist()
