"""Sets of pictures to explore with: a folder, the emoji bank that ships, or single files; the way to their latents and back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from latentpipe.data.emoji_bank import SIDE, open_bank
from latentpipe.data.image_folder import read_index, read_pictures, read_square
from latentpipe.utils.errors import LatentpipeWarning, UserError, counted
from latentpipe.utils.images import bytes_to_images
from latentpipe.utils.progress import ProgressCallback
from latentpipe.vae.protocol import Stage

USUAL_PX = 64  # side that sets are read at, where the VAE takes it
BATCH_PX = 16 * 256 * 256  # pixels that are encoded or decoded at once


@dataclass(frozen=True)
class PictureSet:
    """Pictures of one size: the set's name in words, images N 3 H W, captions and keys or file names (N each)."""

    name: str
    images: torch.Tensor
    captions: list[tuple[str, ...]]
    keys: list[str]


def side_for(downscale: int, size_px: int | None = None) -> int:
    """The side in pixels to explore a VAE at: `size_px`, else 64 or the next multiple of `downscale`; UserError for others."""
    if size_px is None:
        return -(-USUAL_PX // downscale) * downscale
    if size_px < 1 or size_px % downscale:
        near = max(1, round(size_px / downscale)) * downscale
        raise UserError(f"The size is {size_px} pixels; this VAE takes positive multiples of {downscale}. Give --size {near}.")
    return size_px


def read_set(folder: Path | None, size_px: int, max_images: int | None = None, split: str | None = None) -> PictureSet:
    """Pictures of a folder (the first `most` files), or of the emoji bank where there is none.

    The bank's pictures are 32 pixels wide and are enlarged; its order is fixed and mixed. `split` is of the bank alone: train,
    validation or held_out. UserError: no readable picture.
    """
    if folder is None:
        return _bank_set(size_px, max_images, split)
    pictures = read_pictures(folder, size_px, max_images)
    if pictures.skipped:
        warnings.warn(LatentpipeWarning(f"{folder}: {pictures.report()}"), stacklevel=2)
    images = bytes_to_images(torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2))
    return PictureSet(Path(folder).resolve().name, images, pictures.captions, pictures.names)


def first(pictures: PictureSet, n: int) -> PictureSet:
    """The first `n` pictures of a set."""
    return PictureSet(pictures.name, pictures.images[:n], pictures.captions[:n], pictures.keys[:n])


@torch.no_grad()
def encode(
    stage: Stage, images: torch.Tensor, report: ProgressCallback | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Images N 3 H W to latents N C h w in float32 on the CPU, a few at a time.

    The modes of the posteriors, or samples of them where a `generator` is given.
    """
    at_once = max(1, BATCH_PX // (images.shape[-1] * images.shape[-2]))
    parts = []
    for first in range(0, len(images), at_once):
        part = images[first : first + at_once]
        parts.append(stage.encode(part.to(stage.device, stage.dtype), generator).float().cpu())
        if report is not None:
            report(first + len(part), len(images), "encode")
    return torch.cat(parts)


@torch.no_grad()
def decode(stage: Stage, latents: torch.Tensor, report: ProgressCallback | None = None) -> torch.Tensor:
    """Latents B C h w to images B 3 H W in float32 on the CPU, a few at a time."""
    unit = stage.space.downscale
    at_once = max(1, BATCH_PX // (latents.shape[-1] * latents.shape[-2] * unit**2))
    parts = []
    for first in range(0, len(latents), at_once):
        part = latents[first : first + at_once]
        parts.append(stage.decode(part.to(stage.device, stage.dtype)).float().cpu())
        if report is not None:
            report(first + len(part), len(latents), "decode")
    return torch.cat(parts)


def _bank_set(size_px: int, max_images: int | None, split: str | None) -> PictureSet:
    bank = open_bank()
    splits = (split,) if split is not None else ("train", "validation", "held_out")
    rows = [row for name in splits for row in bank.rows_of(name)][:max_images]
    if not rows:
        raise UserError(f"The emoji bank has no split '{split}'; expected one of {', '.join(sorted(set(bank.splits)))}.")
    pixels = torch.from_numpy(bank.pixels[rows]).view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2) / 127.5 - 1
    if size_px != SIDE:
        pixels = torch.nn.functional.interpolate(pixels, size=size_px, mode="bicubic", antialias=True).clamp(-1, 1)
    name = "emoji bank" if split is None else f"emoji bank, {split}"
    return PictureSet(name, pixels.contiguous(), [bank.captions[row] for row in rows], [bank.keys[row] for row in rows])


@dataclass(frozen=True)
class GivenPictures:
    """Images N 3 side side, the name of each, and the reason for each file that was skipped."""

    images: torch.Tensor
    names: list[str]
    skipped: dict[str, str]


def read_given_pictures(
    paths: Sequence[Path], side: int, as_bank: bool = False, max_images: int | None = None, report: ProgressCallback | None = None
) -> GivenPictures:
    """Files, and the pictures of folders (the first `most` of each), as squares of `side` pixels, [-1, 1].

    as_bank  reduce to 32 pixels first, then enlarge, as the emoji bank's pictures are: sharpness alone shall tell nothing
    UserError: a path that does not exist, or nothing readable.
    """
    files: list[tuple[str, Path]] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; expected pictures, or folders of pictures.")
        items = [item.path for item in read_index(path, captions=False)[:max_images]] if path.is_dir() else [path]
        files += [(file.relative_to(path).as_posix() if path.is_dir() else path.name, file) for file in items]
    names, parts, skipped = [], [], {}
    for done, (name, file) in enumerate(files, 1):
        try:
            parts.append(_read(file, side, as_bank))
            names.append(name)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            skipped[name] = str(error) or type(error).__name__
        if report is not None:
            report(done, len(files), "read")
    if not parts:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in skipped.items())
        raise UserError(f"None of {counted(len(files), 'file')} could be read as a picture.\n{reasons}".rstrip())
    return GivenPictures(torch.cat(parts), names, skipped)


def _read(file: Path, side: int, as_bank: bool) -> torch.Tensor:
    if not as_bank:
        return _images(read_square(file, side))
    # As `data.emoji_bank` makes its own: 128 pixels by Lanczos, boxes to 32, then as `image_set.read_set` enlarges them.
    image = F.interpolate(_images(read_square(file, 4 * SIDE)), SIDE, mode="area")
    return image if side == SIDE else F.interpolate(image, size=side, mode="bicubic", antialias=True).clamp(-1, 1)


def _images(pixels: np.ndarray) -> torch.Tensor:
    return bytes_to_images(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
