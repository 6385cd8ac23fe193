"""Text, JSON and YAML that somebody else wrote: read within limits and strictly, with one sentence for whatever is wrong.

Sizes are looked at before anything is made of them, so that no file costs more than a second or some hundred megabytes.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from latentpipe.utils.errors import UserError

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

MOST_JSON = 2**24  # bytes
MOST_HEADER = 2**26  # bytes; a latent cache keeps the captions of all its pictures in its header
MOST_YAML = 2**18  # bytes
DEEPEST = 64  # lists and mappings within each other
MOST_DIGITS = 20  # of a whole number: 64 bits

Schema = TypeVar("Schema", bound="BaseModel")


def file_size(path: Path, expected: str = "a file") -> int:
    """The size in bytes of a file that can be read; UserError where there is none, or a folder, a pipe, a device, a circle."""
    try:
        if stat.S_ISREG(Path(path).stat().st_mode):
            with open(path, "rb") as file:
                return file.seek(0, os.SEEK_END)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; expected {expected}.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()}).") from None
    except ValueError as error:  # a null byte in the name
        raise UserError(f"{str(path)!r}: no name of a file ({error}); expected {expected}.") from None
    raise UserError(f"{path}: not a file; expected {expected}.")


def read_bytes(path: Path, most: int, expected: str = "a file") -> bytes:
    """The bytes of a file of at most `most`; UserError where it is none, or larger."""
    size = file_size(path, expected)
    if size > most:
        raise UserError(f"{path} has {size:,} bytes; {expected} has at most {most:,} here.")
    try:
        with open(path, "rb") as file:
            return file.read(most)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()}).") from None


def read_text(path: Path, most: int = MOST_JSON, expected: str = "a text file") -> str:
    """A text file in UTF-8, with or without a byte order mark, of at most `most` bytes; UserError where it is none."""
    data = read_bytes(path, most, expected)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is text in UTF-16; save it as UTF-8.")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is {data[error.start]:#04x}"
        raise UserError(f"{path}: not text in UTF-8 ({byte}); expected {expected}.") from None


def read_json(path: Path, infinite: bool = False) -> dict[str, Any]:
    """A JSON object from a file, as `parse_json` reads it; UserError where there is none."""
    text = read_text(path, expected="a JSON file")
    try:
        value = parse_json(text, infinite=infinite)
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file that is read here ({error}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object; given {_kind(value)}.")
    return value


def parse_json(text: str, most: int = MOST_JSON, foreign: bool = False, infinite: bool = False) -> Any:
    """The value of a JSON text; ValueError says what is wrong with it: its size, its depth, NaN, a number beyond 64 bits, a
    number that no float holds, a key that stands twice, half a surrogate pair.

    foreign   the text of a program that is known for NaN and double keys: they become None, and the last of them counts
    infinite  Infinity and -Infinity are numbers: diffusers writes one into the configs of schedulers
    """
    if len(text) > most:
        raise ValueError(f"{len(text):,} characters, at most {most:,} are read")
    hooks: dict[str, Any] = {"parse_constant": lambda _: None}
    if not foreign:
        hooks = {
            "parse_constant": _infinity if infinite else _constant,
            "parse_float": _float,
            "parse_int": _int,
            "object_pairs_hook": _object,
        }
    try:
        value = json.loads(text, **hooks)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}, line {error.lineno} column {error.colno}") from None
    _check_depth(value)
    if not foreign and "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair, which is no character") from None
    return value


def parse_object(text: str, most: int = MOST_JSON, foreign: bool = False) -> dict[str, Any]:
    """As `parse_json`, of a text that holds an object; ValueError where it holds something else."""
    value = parse_json(text, most, foreign)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, given {_kind(value)}")
    return value


def read_yaml(path: Path, expected: str = "a YAML file") -> Any:
    """The value of a YAML file; UserError where it is none, too large or deep, names a key twice, or multiplies by aliases."""
    text = read_text(path, MOST_YAML, expected)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}.") from None


def parse_yaml(text: str) -> Any:
    """The value of a YAML text (plain types alone); ValueError in one line."""
    import yaml

    from latentpipe.utils.yaml_loader import Loader

    if len(text) > MOST_YAML:
        raise ValueError(f"{len(text):,} characters, at most {MOST_YAML:,} are read")
    try:
        return Loader(text).get_single_data()
    except Exception as error:  # the constructors of PyYAML raise nearly every type for nonsense behind a tag
        if isinstance(error, yaml.YAMLError | ValueError):
            raise ValueError(" ".join(str(error).split())[:500].rstrip(".")) from None
        raise ValueError("a value that does not fit its tag") from None


def validated(value: Any, schema: type[Schema], source: str) -> Schema:
    """A plain value as a `schema`; UserError names `source` and what is wrong in each place."""
    from pydantic import ValidationError

    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{source}: {problems(error)}.") from None


def problems(error: ValidationError, most: int = 5) -> str:
    """What pydantic found, in one line: the place, what is expected there, and what is given."""
    found = []
    for one in error.errors():
        place = ".".join(str(part)[:80] for part in one["loc"] if not str(part).startswith(("list[", "constrained", "function")))
        given = one.get("input")
        shown = "" if isinstance(given, Mapping) or one["type"] == "missing" else f" (given: {repr(given)[:60]})"
        found.append(f"{place or 'its content'}: {one['msg'][:1].lower()}{one['msg'][1:200]}{shown}")
    return "; ".join(found[:most]) + (f"; and {len(found) - most} more" if len(found) > most else "")


_TOO_DEEP = f"lists and objects nested more than {DEEPEST} deep"


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is no number")


def _infinity(name: str) -> float:
    return _constant(name) if name == "NaN" else float(name)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]}, which is beyond every float")
    return value


def _int(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return found


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "nothing")
