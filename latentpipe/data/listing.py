"""Which picture files a folder holds and what their captions are: metadata files, caption files, links, hidden files."""

from __future__ import annotations

import csv
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from latentpipe.utils.errors import UserError
from latentpipe.utils.reading import parse_json, read_text

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
METADATA = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("text", "caption", "prompt")  # usual names for a caption, the first that a row has counts
BESIDE = (".txt", ".caption")  # files that hold the caption of the picture with their stem
SPLITS = {"train", "training", "test", "testing", "eval", "validation", "valid", "val", "dev"}  # as `datasets` knows them
NOT_OURS = {"__MACOSX", "@eaDir"}  # folders of resource forks and thumbnails
SHOWN = 3
MOST_METADATA, MOST_CAPTION = 2**30, 2**20  # bytes


@dataclass
class Listing:
    """What a folder holds: file names (relative, "/" between parts) with their captions, in order.

    captions  of each file; a file that its metadata names twice has two
    kinds     of the files whose metadata has a column `kind`
    source    where captions came from, and how many of each ("text in metadata.jsonl", ".txt files")
    notes     a sentence for all that was left out or not understood
    """

    captions: dict[str, list[str]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    source: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Where the captions are from, in words; "" where there are none."""
        return ", ".join(f"{count} caption{'s' * (count != 1)} from {where}" for where, count in self.source.items())


@dataclass
class _Walk:
    """Folders below one: relative name ("" for itself) -> its pictures and other files; and what was passed by."""

    found: dict[str, list[str]] = field(default_factory=dict)
    hidden: int = 0
    circles: list[str] = field(default_factory=list)


def list_pictures(folder: Path, column: str | None = None, captions: bool = True) -> Listing:
    """The pictures of a folder and its subfolders, as `datasets` reads an imagefolder.

    A metadata.jsonl or metadata.csv speaks for its folder and those below it: its rows, by `file_name`, are the pictures, and
    their captions stand in `column` (None: text, caption or prompt, the first that a row has). Elsewhere every picture counts,
    and NAME.txt or NAME.caption beside NAME.png is its caption, as it stands, its lines joined. Linked folders are followed
    once. Hidden files and folders, and resource forks of macOS, are left out and counted.

    captions  False: caption files are not opened
    UserError: metadata that cannot be read or that names a file outside, a `column` that no row has.
    """
    folder, listing = Path(folder), Listing()
    places = [""] if any((folder / name).is_file() for name in METADATA) else None
    walk, told = _Walk() if places else _walk(folder), set[str]()
    for place in places or sorted(walk.found, key=_parts):
        if any((folder / place / name).is_file() for name in METADATA):
            _take_metadata(listing, folder, place, column, captions)
            told.add(place)
    _take_files(listing, folder, {at: files for at, files in walk.found.items() if _home(at, told) is None}, captions)
    if not places:
        listing.captions = {name: listing.captions[name] for name in _ordered(listing.captions, told)}
        _say(listing, folder, walk)
    if column is not None and captions and not any(source.startswith(f"{column} in") for source in listing.source):
        raise UserError(f"{folder}: no row of its metadata has a caption in the column '{column}' (caption_column).")
    return listing


def _walk(folder: Path) -> _Walk:
    """Every visible folder below one; linked ones after all others, so that a picture keeps its own name."""
    walk, links = _Walk(), list[str]()
    seen: set[str] = set()

    def go(start: str) -> None:
        for at, folders, files in os.walk(folder / start if start else folder):
            inner = os.path.relpath(at, folder).replace(os.sep, "/")
            prefix = "" if inner == "." else inner
            real = os.path.realpath(at)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            for name in [name for name in folders if _hidden(name)]:
                folders.remove(name)
                walk.hidden += sum(map(_is_picture, (file for _, _, inside in os.walk(Path(at) / name) for file in inside)))
            links.extend(f"{prefix}/{name}".lstrip("/") for name in folders if os.path.islink(os.path.join(at, name)))
            walk.hidden += sum(_is_picture(name) for name in files if _hidden(name))
            walk.found[prefix] = [name for name in files if not _hidden(name)]

    go("")
    top = os.path.realpath(folder)
    while links:
        link = min(links, key=_parts)
        links.remove(link)
        real = os.path.realpath(folder / link)
        if real in seen or top.startswith(real.rstrip(os.sep) + os.sep):
            walk.circles.append(link)
        else:
            go(link)
    return walk


def _take_metadata(listing: Listing, folder: Path, place: str, column: str | None, captions: bool) -> None:
    """The rows of one folder's metadata file."""
    rows, path = _rows(folder / place)
    names = (column,) if column else COLUMNS
    columns: set[str] = set()
    for number, record in rows:
        if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
            raise UserError(f"{path}, line {number}: expected 'file_name' and 'text'; given {record!r:.200}.")
        name = record["file_name"]
        # by its text: a link inside the folder was put there by its owner, and following 100,000 of them takes seconds
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
            raise UserError(f"{folder}: metadata names '{name}', which lies outside the folder.")
        found = next((key for key in names if isinstance(record.get(key), str) and record[key]), None)
        own = listing.captions.setdefault(whole := f"{place}/{name}" if place else name, [])
        if isinstance(kind := record.get("kind"), str) and kind:
            listing.kinds[whole] = kind
        if found:
            own.append(record[found])
            listing.source[f"{found} in {path.relative_to(folder).as_posix()}"] += 1
        columns |= {str(key) for key in record} - {"file_name", "kind"}
    if captions and columns - set(COLUMNS) and not (columns & set(names)):
        shown = ", ".join(f"'{name}'" for name in sorted(columns)[:12])
        listing.notes.append(
            f"{path}: none of its columns ({shown}) is {' or '.join(names)}, so its pictures have no captions; rename one to "
            "'text', or name it (train-lora --data.caption-column, encode --caption-column)"
        )


def _rows(folder: Path) -> tuple[list[tuple[int, object]], Path]:
    """Numbered records of a folder's metadata file, and its path."""
    jsonl, table = (folder / name for name in METADATA)
    path = jsonl if jsonl.is_file() else table
    try:
        if path is jsonl:
            lines = read_text(jsonl, MOST_METADATA, "captions").split("\n")
            return [(number, parse_json(line, foreign=True)) for number, line in enumerate(lines, 1) if line.strip()], path
        with table.open(newline="", encoding="utf-8-sig") as file:
            return list(enumerate(csv.DictReader(file), 2)), path
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{folder}: its metadata cannot be read ({error}).") from None


def _take_files(listing: Listing, folder: Path, found: dict[str, list[str]], captions: bool) -> None:
    """Pictures that no metadata speaks for, with the caption files beside them."""
    for at, files in found.items():
        prefix = f"{at}/" if at else ""
        texts = {os.path.splitext(name)[0]: name for name in sorted(files) if name.lower().endswith(BESIDE)} if captions else {}
        for name in files:
            if not _is_picture(name):
                continue
            beside = texts.get(os.path.splitext(name)[0])
            caption = _caption(folder / at / beside) if beside else ""
            if beside and caption:
                listing.source[f"{os.path.splitext(beside)[1].lower()} files"] += 1
            listing.captions[prefix + name] = [caption] if caption else []


def _caption(path: Path) -> str:
    """A caption file's text, its lines joined."""
    try:
        return " ".join(read_text(path, MOST_CAPTION, "a caption").split("\n")).strip()
    except UserError as error:
        raise UserError(f"{error} A caption is UTF-8 text of at most {MOST_CAPTION:,} bytes.") from None


def _say(listing: Listing, folder: Path, walk: _Walk) -> None:
    if walk.hidden:
        are = "picture is" if walk.hidden == 1 else "pictures are"
        listing.notes.append(f"{folder}: {walk.hidden} {are} hidden (.name, __MACOSX) and left out")
    if walk.circles:
        names = ", ".join(sorted(walk.circles)[:SHOWN]) + (", ..." if len(walk.circles) > SHOWN else "")
        listing.notes.append(f"{folder}: linked folders lead to what is read already, or above it, and are left out: {names}")
    splits = sorted({name.split("/")[0] for name in listing.captions if "/" in name} & SPLITS)
    if len(splits) > 1:
        listing.notes.append(f"{folder}: holds the splits {', '.join(splits)}, all of which are read; give one of them alone")


def _ordered(names: dict[str, list[str]], told: set[str]) -> list[str]:
    """By name; the rows of a metadata file in their own order, where its folder stands."""

    def place(numbered: tuple[int, str]) -> tuple[list[str], int]:
        number, name = numbered
        home = _home(name, told)
        return (_parts(name), 0) if home is None else (_parts(home), number)

    return [name for _, name in sorted(enumerate(names), key=place)]


def _home(place: str, folders: set[str]) -> str | None:
    """The outermost of the folders that a relative name is or lies in; None for none."""
    parts = _parts(place)
    return next((at for n in range(len(parts) + 1) if (at := "/".join(parts[:n])) in folders), None)


def _parts(name: str) -> list[str]:
    return name.split("/")


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in NOT_OURS


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES
