"""Pictures in the rows of parquet and arrow files, as `datasets` writes them: a column of pictures, a column of captions."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentpipe.data.listing import COLUMNS
from latentpipe.utils.errors import UserError
from latentpipe.utils.reading import file_size

TABLES = (".parquet", ".arrow")
PICTURES = ("image", "jpg", "png", "picture")  # usual names of the column, the first that there is counts
ROWS = 64  # rows that are read at once


def table_rows(path: Path, column: str | None = None) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Every row's number and captions, read as a stream.

    column  that holds the captions; None: text, caption or prompt, or none
    """
    file = _Table(path)
    names = [name for name in ((column,) if column else COLUMNS) if name in file.names][:1]
    if column and not names:
        raise UserError(f"{path} has no column '{column}' (--caption-column); it has {', '.join(file.names)}.")
    file.pictures()
    row = 0
    for first in file.starts:
        for batch in file.batches(first, names or [file.pictures()]):
            texts = batch.column(names[0]).to_pylist() if names else [None] * batch.num_rows
            for text in texts:
                found = text if isinstance(text, list) else [text]
                yield row, tuple(one for one in found if isinstance(one, str) and one)
                row += 1


class TableReader:
    """The pictures of one table, by their rows; fastest where those are asked for in order."""

    def __init__(self, path: Path) -> None:
        self._file, self._first, self._batch = _Table(path), 0, None
        self._rows: Iterator[Any] | None = None
        self._group = -1

    def picture(self, row: int) -> bytes | None:
        """The bytes in a row's cell; None where it holds none."""
        group = bisect.bisect_right(self._file.starts, row) - 1
        if group != self._group or row < self._first:
            self._group, self._batch = group, None
            self._first = self._file.starts[group]
            self._rows = iter(self._file.batches(self._first, [self._file.pictures()]))
        while self._batch is None or row >= self._first + self._batch.num_rows:
            assert self._rows is not None
            if self._batch is not None:
                self._first += self._batch.num_rows
            self._batch = next(self._rows, None)
            if self._batch is None:
                raise UserError(f"{self._file.path} has changed since it was listed: row {row} is gone.")
        cell = self._batch.column(0)[row - self._first].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        return data if isinstance(data, bytes) else None


class _Table:
    """One file, whichever of the two it is: its columns, the rows that its parts begin at, and a part as batches."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            import pyarrow
            import pyarrow.parquet
        except ModuleNotFoundError:
            raise UserError(f"{path}: tables are read by pyarrow: pip install 'latentpipe[tables]'.") from None
        self._arrow = pyarrow
        file_size(path, "a table")  # a pipe under its name would be waited for
        try:
            self._open()
        except (pyarrow.ArrowException, OSError) as error:
            raise self._unreadable(error) from None

    def _open(self) -> None:
        arrow = self._arrow
        if self.path.suffix.lower() == ".parquet":
            self._parquet = arrow.parquet.ParquetFile(self.path, memory_map=True)
            counts = [self._parquet.metadata.row_group(group).num_rows for group in range(self._parquet.num_row_groups)]
            self.names = list(self._parquet.schema_arrow.names)
        else:
            source = arrow.memory_map(str(self.path))
            try:
                reader = arrow.ipc.open_stream(source)  # what `datasets` keeps
                self._parts = list(reader)
            except arrow.ArrowInvalid:
                whole = arrow.ipc.open_file(source)
                reader, self._parts = whole, [whole.get_batch(part) for part in range(whole.num_record_batches)]
            counts, self.names = [part.num_rows for part in self._parts], list(reader.schema.names)
        self._kept = [part for part, count in enumerate(counts) if count]
        self.starts = [0, *itertools.accumulate(count for count in counts if count)][:-1]

    def pictures(self) -> str:
        """The column of the pictures; UserError where none has one of the usual names."""
        found = next((name for name in PICTURES if name in self.names), None)
        if found is None:
            raise UserError(f"{self.path} has no column of pictures ({', '.join(PICTURES)}); it has {', '.join(self.names)}.")
        return found

    def batches(self, first: int, names: list[str]) -> Iterator[Any]:
        """The columns of the part that begins at a row, some rows at a time."""
        part = self._kept[self.starts.index(first)]
        try:
            if self.path.suffix.lower() == ".parquet":
                yield from self._parquet.iter_batches(ROWS, row_groups=[part], columns=names)
            else:
                yield self._parts[part].select(names)
        except (self._arrow.ArrowException, OSError) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> UserError:
        reason = (str(error).splitlines() or ["damaged"])[0][:200]
        return UserError(f"{self.path} cannot be read as a table ({reason}); fetch it again, or take it out.")
