"""The header of a GGUF file, read within bounds: names, shapes and types of its tensors, where they lie, what it says of itself.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from latentpipe.utils.errors import UserError
from latentpipe.utils.io import MOST_TENSORS, Header, check_file, is_gguf
from latentpipe.utils.reading import MOST_HEADER

# Number of a type -> its name, how many values a block holds, and the bytes of a block; those that are read here.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2),
}
# Names of the others, for a sentence.
OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")
BLOCKS = {name: (values, size) for name, values, size in TYPES.values()}
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_KEYS, MOST_NAME, MOST_DIMENSIONS = 2**12, 2**10, 4
MOST_ITEMS = 2**20  # of an array: a language model's file lists its words, some 150,000
ALIGNMENT = "general.alignment"
SUFFIX = ".gguf"  # that folders are looked through for; what a file is gets decided by its first bytes


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says before its data.

    shapes    of each tensor, as torch orders them; types likewise ("Q8_0", ...; "type 99" for one without a name here)
    places    first byte of each tensor in the file, and how many; none for a type that is not read
    metadata  its short texts ("general.architecture": "flux")
    """

    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]
    places: dict[str, tuple[int, int]]
    metadata: dict[str, str]

    @property
    def header(self) -> Header:
        """The same as the header of a safetensors file."""
        return Header(self.shapes, self.types, self.metadata)

    @property
    def quantization(self) -> str:
        """The type of most of its quantized values, else of most values; empty for a file without tensors."""
        counts: dict[str, int] = {}
        for name, kind in self.types.items():
            counts[kind] = counts.get(kind, 0) + prod(self.shapes[name])
        blocks = {kind: count for kind, count in counts.items() if kind not in FLOATS} or counts
        return max(blocks, key=lambda kind: blocks[kind], default="")


def read_gguf(path: Path) -> GGUFHeader:
    """The header of a GGUF file; UserError where it is none, damaged, truncated, or larger than any model's."""
    path = Path(path)
    size = check_file(path)
    if not is_gguf(path):
        raise UserError(f"{path} is not a GGUF file ({size:,} bytes).")
    try:
        with open(path, "rb") as file:
            return _read(_Bytes(file, min(size, MOST_HEADER)), size)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not a complete GGUF file ({error}); given {size:,} bytes. Fetch or export it again.") from None


def stored_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor of a type that is read here."""
    values, size = BLOCKS[kind]
    return prod(shape) // values * size


class _Bytes:
    """Numbers and texts one after another, of the first `most` bytes of a file."""

    def __init__(self, file: BinaryIO, most: int) -> None:
        self.file, self.most, self.at = file, most, 0

    def take(self, count: int) -> bytes:
        self.at += count
        if self.at > self.most:
            raise ValueError(f"its header goes beyond byte {self.most:,}")
        found = self.file.read(count)
        if len(found) != count:
            raise ValueError(f"it ends within its header, at byte {self.at - count + len(found):,}")
        return found

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > self.most:
            raise ValueError(f"its header goes beyond byte {self.most:,}")
        self.file.seek(count, 1)

    def number(self, code: str) -> int:
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return int(value)

    def count(self, most: int, what: str) -> int:
        found = self.number("Q")
        if found > most:
            raise ValueError(f"it states {found:,} {what}, at most {most:,} are read")
        return found

    def name(self, what: str) -> str:
        data = self.take(self.count(MOST_NAME, f"bytes for the name of a {what}"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"the name of a {what} is no UTF-8") from None


def _read(data: _Bytes, size: int) -> GGUFHeader:
    data.take(4)
    version = data.number("I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, read are 2 and 3 of little-endian files")
    tensors, keys = data.count(MOST_TENSORS, "tensors"), data.count(MOST_KEYS, "entries of metadata")
    metadata: dict[str, str] = {}
    alignment = 32
    for _ in range(keys):
        key = data.name("entry of metadata")
        value = _value(data)
        if isinstance(value, str):
            metadata[key] = value
        if key == ALIGNMENT:
            if not isinstance(value, int) or not 8 <= value <= 2**16 or value % 8:
                raise ValueError(f"its alignment is {value}, expected a multiple of 8")
            alignment = value
    rows = list(_rows(data, tensors))
    start = -(-data.at // alignment) * alignment
    return _placed(rows, start, alignment, size, metadata)


def _value(data: _Bytes) -> str | int | None:
    """A value of the metadata: a short text or a whole number; None for what is passed over."""
    kind = data.number("I")
    if kind == STRING:
        length = data.count(MOST_HEADER, "bytes of a text")
        if length > 2**12:
            data.skip(length)
            return None
        return data.take(length).decode("utf-8", "replace")
    if kind == ARRAY:
        inner, count = data.number("I"), data.count(MOST_ITEMS, "values in a list")
        if inner == STRING:
            for _ in range(count):
                data.skip(data.count(MOST_HEADER, "bytes of a text"))
        else:
            data.skip(count * _width(inner))
        return None
    value = data.take(_width(kind))
    return int(struct.unpack(f"<{SCALARS[kind]}", value)[0]) if SCALARS[kind] not in "fd?" else None


def _width(kind: int) -> int:
    if kind not in SCALARS:
        raise ValueError(f"a value of its metadata is of type {kind}, which is not known")
    return struct.calcsize(f"<{SCALARS[kind]}")


def _rows(data: _Bytes, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Name, shape, type and offset of each tensor."""
    seen: set[str] = set()
    for _ in range(count):
        name = data.name("tensor")
        if name in seen:
            raise ValueError(f"two of its tensors are named {name[:80]!r}")
        seen.add(name)
        dimensions = data.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"{name[:80]!r} has {dimensions} dimensions, at most {MOST_DIMENSIONS} are read")
        shape = tuple(data.count(2**40, f"rows or columns of {name[:80]!r}") for _ in range(dimensions))[::-1]
        yield name, shape, data.number("I"), data.number("Q")


def _placed(
    rows: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int, size: int, metadata: Mapping[str, str]
) -> GGUFHeader:
    """The header with the place of each tensor; ValueError where one lies beyond the file's end, or on another."""
    places: dict[str, tuple[int, int]] = {}
    for name, shape, kind, offset in rows:
        if offset % alignment:
            raise ValueError(f"{name[:80]!r} begins at {offset:,}, which is no multiple of {alignment}")
        if kind not in TYPES:
            continue
        word, values, _ = TYPES[kind]
        if values > 1 and (not shape or shape[-1] % values):
            raise ValueError(f"{name[:80]!r} has rows of {shape[-1] if shape else 0}; {word} takes multiples of {values}")
        places[name] = start + offset, stored_bytes(shape, word)
        if sum(places[name]) > size:
            raise ValueError(f"{name[:80]!r} ends at byte {sum(places[name]):,}")
    end = 0
    for name, (first, count) in sorted(places.items(), key=lambda row: row[1]):
        if first < end and count:
            raise ValueError(f"{name[:80]!r} lies on another tensor")
        end = max(end, first + count)
    types = {name: TYPES[kind][0] if kind in TYPES else OTHERS.get(kind, f"type {kind}") for name, _, kind, _ in rows}
    return GGUFHeader({name: shape for name, shape, *_ in rows}, types, places, dict(metadata))
