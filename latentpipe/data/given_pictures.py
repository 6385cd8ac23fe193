"""Pictures from files and folders as a detector wants them: all read the same way, broken ones named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from latentpipe.data.emoji_bank import SIDE
from latentpipe.data.image_folder import read_index, read_square
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.images import bytes_to_images
from latentpipe.utils.progress import ProgressCallback


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
