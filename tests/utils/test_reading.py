"""JSON and YAML from files: within limits, strict, one sentence for each fault."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from latentpipe import UserError
from latentpipe.utils import reading

plain = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20
)


@given(values)
def test_what_json_writes_is_read_back(value: Any) -> None:
    text = json.dumps(value)
    if "\\ud" not in text:
        assert reading.parse_json(text) == json.loads(text) == value


@given(st.dictionaries(st.text("abc", min_size=1), values, max_size=4))
def test_what_yaml_writes_is_read_back(value: Any) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    assert reading.parse_yaml(text) == yaml.safe_load(text)


FAULTS = [
    ("[" * 100_000, "nested more than 64 deep"),
    ("[" * 70 + "]" * 70, "nested more than 64 deep"),
    ('{"a":' * 500 + "1" + "}" * 500, "nested more than 64 deep"),
    ('{"a": NaN}', "NaN, which is no number"),
    ('{"a": -Infinity}', "-Infinity, which is no number"),
    ('{"a": 1e999}', "1e999, which is beyond every float"),
    ('{"a": 1' + "0" * 30 + "}", "a whole number of 31 digits"),
    ('{"a": ' + "1" * 5000 + "}", "a whole number of 5000 digits"),
    ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
    ('{"a": "\\ud800"}', "half a surrogate pair"),
    ('{"a": 1,}', "line 1 column 9"),
    ("", "line 1 column 1"),
]


@pytest.mark.parametrize(("text", "reason"), FAULTS, ids=range(len(FAULTS)))
def test_faults_of_json_are_told(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        reading.parse_json(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=rf"a\.json: not a JSON file that is read here \(.*{reason}"):
        reading.read_json(tmp_path / "a.json")


def test_64_levels_and_64_bits_are_read() -> None:
    deep = reading.parse_json("[" * 64 + "]" * 64)
    for _ in range(63):
        (deep,) = deep
    assert deep == []
    assert reading.parse_json(f"[{2**64 - 1}, {-(2**63)}, 1e308]") == [2**64 - 1, -(2**63), 1e308]


def test_other_programs_may_write_nan_and_keys_twice() -> None:
    assert reading.parse_json('{"is_changed": [NaN, Infinity], "a": 1, "a": 2}', foreign=True) == {
        "is_changed": [None, None],
        "a": 2,
    }
    with pytest.raises(ValueError, match="64 deep"):
        reading.parse_json("[" * 100_000, foreign=True)


def test_infinity_is_a_number_where_that_is_asked_for() -> None:
    assert reading.parse_json('{"lambda_min_clipped": -Infinity}', infinite=True) == {"lambda_min_clipped": float("-inf")}
    with pytest.raises(ValueError, match="NaN"):
        reading.parse_json("[NaN]", infinite=True)


@pytest.mark.parametrize(("text", "kind"), [("[1]", "a list"), ('"a"', "a string"), ("1", "a number"), ("null", "nothing")])
def test_a_file_holds_an_object(tmp_path: Path, text: str, kind: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=f"expected a JSON object; given {kind}"):
        reading.read_json(tmp_path / "a.json")


def test_encodings(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + '{"a": "ü"}'.encode())
    assert reading.read_json(path) == {"a": "ü"}
    path.write_text('{"a": 1}', encoding="utf-16")
    with pytest.raises(UserError, match="is text in UTF-16; save it as UTF-8"):
        reading.read_json(path)
    path.write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(UserError, match=r"not text in UTF-8 \(byte 7 is 0xe9\)"):
        reading.read_json(path)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "folder").mkdir()
    for name, reason in (
        ("pipe", "not a file"),
        ("device", "not a file"),
        ("folder", "not a file"),
        ("circle", "cannot be read"),
    ):
        with pytest.raises(UserError, match=reason):
            reading.read_json(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        reading.read_json(tmp_path / "none")
    with pytest.raises(UserError, match="no name of a file"):
        reading.read_json(Path("a\0b"))


def test_huge_files_are_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"has 1,099,511,627,776 bytes; a JSON file has at most 16,777,216"):
        reading.read_json(tmp_path / "hole")
    with pytest.raises(UserError, match="at most 262,144"):
        reading.read_yaml(tmp_path / "hole")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "m0: &m0 {a: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 9))
YAML_FAULTS = [
    ("a: " + "[" * 5000, "nested more than 32 deep"),
    (BOMB, "more than 20,000 values"),
    (MERGES, "more than 20,000 values"),
    ("&a [*a]", "a value that holds itself"),
    ("a: 1\nb: 2\na: 3", "the key 'a' stands twice"),
    ("a: {b: 1, b: 2}", "the key 'b' stands twice"),
    ("a: !!int ''", "does not fit its tag"),
    ("a: !!bool x", "does not fit its tag"),
    ("a: !!timestamp x", "does not fit its tag"),
    ("a: !!python/object:os.system {}", "could not determine a constructor"),
    ("? [a]\n: 1", "unhashable key"),
    ("a: " + "1" * 5000, "4300 digits"),
    ("a: 2024-13-45", "month"),
    ("a: [", "flow"),
]


@pytest.mark.parametrize(("text", "reason"), YAML_FAULTS, ids=range(len(YAML_FAULTS)))
def test_faults_of_yaml_are_told(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    begin = time.process_time()
    with pytest.raises(UserError, match=rf"a\.yaml: not valid YAML: .*{reason}") as error:
        reading.read_yaml(tmp_path / "a.yaml")
    assert time.process_time() - begin < 5
    assert "\n" not in str(error.value)


def test_anchors_and_merges_are_taken() -> None:
    text = "base: &b {x: 1, y: 2}\none:\n  <<: *b\n  y: 3\ntwo: [*b, *b]\n"
    assert reading.parse_yaml(text) == yaml.safe_load(text)


class Row(BaseModel):
    """A schema."""

    model_config = {"extra": "forbid"}
    n: int
    names: list[str]


def test_a_schema_names_every_place() -> None:
    assert reading.validated({"n": 1, "names": ["a"]}, Row, "x").n == 1
    with pytest.raises(UserError) as error:
        reading.validated({"n": "a" * 500, "names": [1], "z": 0}, Row, "x.json")
    text = str(error.value)
    assert text.startswith("x.json: n: ")
    assert "names.0" in text and "z: extra inputs" in text  # noqa: PT018
    assert len(text) < 500
