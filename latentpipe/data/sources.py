"""What is encoded in shards: a folder of pictures, of WebDataset tars, or of parquet and arrow files.

It is listed once, in an order that depends on nothing else; afterwards each worker reads its own part, a picture at a time.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentpipe.data.image_folder import read_index
from latentpipe.data.listing import COLUMNS, MOST_CAPTION, SUFFIXES
from latentpipe.data.tables import TABLES, TableReader, table_rows
from latentpipe.utils.errors import UserError
from latentpipe.utils.reading import file_size, parse_json

MOST_BYTES = 2**28  # of a picture in an archive


@dataclass(frozen=True)
class Entry:
    """One picture of a source.

    name      relative to the source; of a picture in a tar or a table with that file's name before it
    captions  none, one or several
    kind      as `image_folder.Item` has it
    size      bytes that it had when it was listed; -1 where only its table knows
    file      the tar or table that it lies in; "" for a file of its own
    at        the byte that it begins at in its tar, its row in a table
    """

    name: str
    captions: tuple[str, ...] = ()
    kind: str = ""
    size: int = -1
    file: str = ""
    at: int = 0


def entries(folder: Path, column: str | None = None) -> Iterator[Entry]:
    """The pictures of a source: those of a folder by name; of tars and tables by the file's name, then in its order.

    column  that holds the captions; None: text, caption or prompt
    UserError: nothing to read, a file that cannot be read, tars and tables in one folder, arrow files without pyarrow.
    """
    tars, tables = packed(folder)
    if tars and tables:
        raise UserError(f"{folder} holds tars and tables ({tars[0]}, {tables[0]}); give a folder with one kind of them.")
    if tars:
        for name in tars:
            yield from tar_entries(folder, name, column)
    elif tables:
        for name in tables:
            for row, captions in table_rows(folder / name, column):
                yield Entry(f"{name}/{row:09d}", captions, file=name, at=row)
    else:
        items = {item.path.relative_to(folder).as_posix(): item for item in read_index(folder, column)}
        for name in sorted(items):
            item = items[name]
            size = item.path.stat().st_size if item.path.is_file() else -1  # one that its metadata names, and that is not there
            yield Entry(name, item.captions, item.kind, size)


def packed(folder: Path) -> tuple[list[str], list[str]]:
    """The tars and the tables of a folder, by name."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in (".tar", *TABLES)}
    visible = sorted(name for name in found if not any(part.startswith(".") for part in name.split("/")))
    return [name for name in visible if name.lower().endswith(".tar")], [
        name for name in visible if not name.lower().endswith(".tar")
    ]


def tar_entries(folder: Path, name: str, column: str | None = None) -> Iterator[Entry]:
    """The pictures of a WebDataset tar: files that follow each other with one key are one sample.

    A key is a file's name to the first dot. KEY.txt and KEY.caption are captions; in KEY.json they stand in `column`.
    """
    file_size(folder / name, "a tar")  # a pipe under its name would be waited for
    key, picture, captions = "", None, list[str]()
    try:
        with tarfile.open(folder / name, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep one for each file
                if not member.isfile():
                    continue
                before, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if (own := f"{before}/{stem}") != key:
                    if picture is not None:
                        yield _sample(picture, captions)
                    key, picture, captions = own, None, []
                last = "." + ending.lower().rpartition(".")[2]
                if last in SUFFIXES:
                    picture = Entry(f"{name}/{member.name}", size=member.size, file=name, at=member.offset_data)
                elif last in (".txt", ".caption", ".json") and member.size <= MOST_CAPTION:
                    content = archive.extractfile(member)
                    assert content is not None
                    captions += _captions(content.read(), last == ".json", column)
        if picture is not None:
            yield _sample(picture, captions)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:  # by which field of a header is damaged
        raise UserError(f"{folder / name} cannot be read as a tar ({error}); fetch it again, or take it out.") from None


def _sample(picture: Entry, captions: Iterable[str]) -> Entry:
    return Entry(picture.name, tuple(captions), "", picture.size, picture.file, picture.at)


def _captions(data: bytes, is_json: bool, column: str | None) -> list[str]:
    """The caption in a file beside a picture; none where it is not what its name says."""
    text = data.decode("utf-8-sig", "replace")
    if not is_json:
        return [joined] if (joined := " ".join(text.split("\n")).strip()) else []
    try:
        record = parse_json(text, foreign=True)
    except ValueError:
        return []
    names = (column,) if column else COLUMNS
    return [record[name] for name in names if isinstance(record, dict) and isinstance(record.get(name), str) and record[name]][:1]


@dataclass
class Reader:
    """The bytes of a source's pictures; the table that was read last stays open."""

    folder: Path
    _tables: dict[str, TableReader] = field(default_factory=dict)

    def bytes_of(self, entry: Entry) -> bytes | str:
        """A picture's file, or why there is none; UserError where it is not what it was when it was listed."""
        if entry.size > MOST_BYTES:
            return f"{entry.size:,} bytes, at most {MOST_BYTES:,} are read"
        if Path(entry.file).suffix.lower() in TABLES:
            if entry.file not in self._tables:
                self._tables = {entry.file: TableReader(self.folder / entry.file)}
            return self._tables[entry.file].picture(entry.at) or "its cell holds no picture"
        path = self.folder / (entry.file or entry.name)
        if not entry.file and entry.size < 0 and not path.is_file():
            return "no such file"
        try:
            with open(path, "rb") as file:
                file.seek(entry.at)
                data = file.read(entry.size if entry.file else -1)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, OverflowError):
            data = b""
        if len(data) != entry.size:
            raise UserError(changed(self.folder, entry.name))
        return data


def changed(folder: Path, name: str) -> str:
    """What a person is told of a source that is not the one that was listed."""
    return (
        f"{folder} has changed since it was listed ({name}); put back what was there, or encode it anew into another folder. "
        "What is done is kept."
    )


def as_line(entry: Entry) -> str:
    """An entry as a line of JSON, without what is left at its default."""
    facts: dict[str, Any] = {"name": entry.name}
    for key in ("captions", "kind", "size", "file", "at"):
        if (value := getattr(entry, key)) != getattr(EMPTY, key):
            facts[key] = value
    return json.dumps(facts, ensure_ascii=True) + "\n"


def from_line(line: str) -> Entry:
    """The inverse of `as_line`; ValueError where it is none."""
    facts = parse_json(line, foreign=True)  # a name may hold bytes that are no text
    if not isinstance(facts, dict) or not isinstance(facts.get("name"), str):
        raise ValueError(f"{line[:80]!r} is no entry")
    return Entry(**{**facts, "captions": tuple(facts.get("captions", ()))})


EMPTY = Entry("")
