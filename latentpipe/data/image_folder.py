"""A folder of captioned pictures: the imagefolder convention, or a caption file beside each picture (`data.listing`)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from latentpipe.data.listing import SUFFIXES, Listing, list_pictures
from latentpipe.utils.errors import LatentpipeWarning, UserError, counted
from latentpipe.utils.images import Unreadable, fit_square, flatten, picture_file
from latentpipe.utils.io import printable


@dataclass(frozen=True)
class Item:
    """One picture file, its captions (none, one or several) and its kind ("" where the metadata names none)."""

    path: Path
    captions: tuple[str, ...]
    kind: str = ""


@dataclass
class Pictures:
    """What was read: pixels uint8 N H W 3, captions and kind per picture, and the files that were skipped with the reason.

    source  where captions are from, in words
    """

    pixels: np.ndarray
    captions: list[tuple[str, ...]]
    names: list[str]
    skipped: dict[str, str] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    source: str = ""

    def report(self) -> str:
        """One line on what was read, and one for each file that was not."""
        lines = [f"{counted(len(self.names), 'picture')} read, {len(self.skipped)} skipped"]
        lines += [f"  {self.source}"] if self.source else []
        return printable("\n".join(lines + [f"  skipped {name}: {reason}" for name, reason in self.skipped.items()]))


def read_index(folder: Path, column: str | None = None, captions: bool = True) -> list[Item]:
    """The folder's files with their captions, in the order of the metadata, else by name; see `listing.list_pictures`.

    column    of the metadata that holds the captions; None: text, caption or prompt
    captions  False: caption files are not opened
    What is left out (hidden files, links in circles, columns that are not known) is told as a warning each. The metadata's column
    `kind` is kept, where there is one.
    """
    return _items(Path(folder), _listed(Path(folder), column, captions))


def _listed(folder: Path, column: str | None, captions: bool) -> Listing:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected a folder of pictures with metadata.jsonl or metadata.csv.")
    found = list_pictures(folder, column, captions)
    if not found.captions:
        told = "".join(f" {note}." for note in found.notes)
        raise UserError(f"{folder} holds no picture ({', '.join(sorted(SUFFIXES))}).{told}")
    for note in found.notes:
        warnings.warn(LatentpipeWarning(note), stacklevel=4)
    return found


def _items(folder: Path, found: Listing) -> list[Item]:
    return [Item(folder / name, tuple(texts), found.kinds.get(name, "")) for name, texts in found.captions.items()]


def read_pictures(folder: Path, size_px: int, max_images: int | None = None, column: str | None = None) -> Pictures:
    """Every readable picture (or the first `most` files) as an upright RGB square of `size_px` (alpha on white, Lanczos).

    Bad files are skipped and listed with the reason; UserError when nothing is left. `column` as for `read_index`.
    """
    arrays: list[np.ndarray] = []
    folder = Path(folder)
    found = _listed(folder, column, True)
    result = Pictures(np.empty((0, size_px, size_px, 3), np.uint8), [], [], source=found.summary())
    for item in _items(folder, found)[:max_images]:
        name = item.path.relative_to(folder).as_posix()
        try:
            arrays.append(read_square(item.path, size_px))
        except UserError as error:
            result.skipped[name] = error.reason if isinstance(error, Unreadable) else str(error)
            continue
        result.names.append(name)
        result.captions.append(item.captions)
        result.kinds.append(item.kind)
    if not arrays:
        raise UserError(f"No picture in {folder} could be read.\n{result.report()}")
    result.pixels = np.stack(arrays)
    return result


def read_square(path: Path, size_px: int, data: bytes | None = None) -> np.ndarray:
    """One file as an upright RGB square, uint8 size size 3 (alpha on white, Lanczos); UserError if it is bad.

    data  its bytes, where it lies in an archive
    """
    with picture_file(path, data=data) as picture:
        return np.asarray(fit_square(flatten(picture), size_px))
