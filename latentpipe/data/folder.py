"""A folder of captioned pictures: the imagefolder convention (metadata.csv or metadata.jsonl)."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from latentpipe.atomic import LEFTOVER
from latentpipe.errors import UserError
from latentpipe.images import Unreadable, fit_square, flatten, picture_file
from latentpipe.reading import parse_json, read_text

MOST_METADATA = 2**30  # bytes
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True)
class Item:
    """One picture file, its captions (none, one or several) and its kind ("" where the metadata names none)."""

    path: Path
    captions: tuple[str, ...]
    kind: str = ""


@dataclass
class Pictures:
    """What was read: pixels uint8 N H W 3, captions and kind per picture, and the files that were skipped with the reason."""

    pixels: np.ndarray
    captions: list[tuple[str, ...]]
    names: list[str]
    skipped: dict[str, str] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)

    def report(self) -> str:
        """One line on what was read, and one for each file that was not."""
        lines = [f"{len(self.names)} pictures read, {len(self.skipped)} skipped"]
        return "\n".join(lines + [f"  skipped {name}: {reason}" for name, reason in self.skipped.items()])


def read_index(folder: Path) -> list[Item]:
    """The folder's files with their captions, in the order of the metadata, else by name.

    metadata.jsonl or metadata.csv hold `file_name`, `text` and, where wanted, `kind`; a file named twice has two captions.
    Without either, every picture is listed without captions.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected a folder of pictures with metadata.jsonl or metadata.csv.")
    rows = _rows(folder)
    if rows is None:
        rows = [(name, None, "") for name in _names(folder)]
    captions: dict[str, list[str]] = {}
    kinds: dict[str, str] = {}
    for name, text, kind in rows:
        captions.setdefault(name, []).extend([text] if text else [])
        kinds[name] = kind or kinds.get(name, "")
    for name in captions:
        # by its text: a link inside the folder was put there by its owner, and following 100,000 of them takes seconds
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
            raise UserError(f"{folder}: metadata names '{name}', which lies outside the folder.")
    if not captions:
        raise UserError(f"{folder} holds no picture ({', '.join(sorted(SUFFIXES))}).")
    return [Item(folder / name, tuple(texts), kinds[name]) for name, texts in captions.items()]


def read_pictures(folder: Path, size_px: int, most: int | None = None) -> Pictures:
    """Every readable picture (or the first `most` files) as an upright RGB square of `size_px` (alpha on white, Lanczos).

    Bad files are skipped and listed with the reason; UserError when nothing is left.
    """
    arrays: list[np.ndarray] = []
    result = Pictures(np.empty((0, size_px, size_px, 3), np.uint8), [], [])
    for item in read_index(folder)[:most]:
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


def read_square(path: Path, size_px: int) -> np.ndarray:
    """One file as an upright RGB square, uint8 size size 3 (alpha on white, Lanczos); UserError if it is bad."""
    with picture_file(path) as picture:
        return np.asarray(fit_square(flatten(picture), size_px))


def _names(folder: Path) -> list[str]:
    """Relative names of all pictures below a folder, in order; on text, for folders of 100,000 files and more."""
    names: list[str] = []
    for at, inside, files in os.walk(folder):
        inside[:] = [name for name in inside if not LEFTOVER.fullmatch(name)]  # a killed run's, and nobody's pictures
        inner = os.path.relpath(at, folder).replace(os.sep, "/")
        prefix = "" if inner == "." else f"{inner}/"
        names += [prefix + name for name in files if os.path.splitext(name)[1].lower() in SUFFIXES]
    return sorted(names, key=lambda name: name.split("/"))


def _rows(folder: Path) -> list[tuple[str, str | None, str]] | None:
    """(file_name, text, kind) from the metadata file; None where there is none."""
    jsonl, table = folder / "metadata.jsonl", folder / "metadata.csv"
    try:
        if jsonl.is_file():
            lines = read_text(jsonl, MOST_METADATA, "captions").split("\n")
            records = [(number, parse_json(line, foreign=True)) for number, line in enumerate(lines, 1) if line.strip()]
        elif table.is_file():
            with table.open(newline="", encoding="utf-8-sig") as file:
                records = list(enumerate(csv.DictReader(file), 2))
        else:
            return None
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{folder}: its metadata cannot be read ({error}).") from None
    path = jsonl if jsonl.is_file() else table
    rows: list[tuple[str, str | None, str]] = []
    for number, record in records:
        if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
            raise UserError(f"{path}, line {number}: expected 'file_name' and 'text'; given {record!r:.200}.")
        text, kind = record.get("text"), record.get("kind")
        rows.append((record["file_name"], text if isinstance(text, str) else None, kind if isinstance(kind, str) else ""))
    return rows
