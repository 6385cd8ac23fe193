"""Files: strict reading, content hashes, atomic writing."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentpipe import LatentSpace, UserError, files


def write_folder(target: Path, content: str, failure: BaseException | None = None) -> None:
    """Write one file through `atomic_folder`, and fail where asked to."""
    with files.atomic_folder(target) as part:
        (part / "file").write_text(content)
        if failure is not None:
            raise failure


def write_file(target: Path, content: str, failure: BaseException | None = None) -> None:
    """Write through `atomic_file`, and fail where asked to."""
    with files.atomic_file(target) as part:
        part.write_text(content)
        if failure is not None:
            raise failure


@given(st.binary(max_size=200))
def test_no_bytes_are_taken_for_weights(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a complete safetensors file"):
        files.read_tensors(path)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="only safetensors"):
        files.read_tensors(tmp_path / "model.pt")


def some_tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.float16), "c": torch.tensor(2)}


def test_the_hash_does_not_know_the_order() -> None:
    tensors = some_tensors()
    assert files.content_hash(tensors) == files.content_hash(dict(reversed(tensors.items())))
    assert files.content_hash(tensors) == files.content_hash({name: value.clone() for name, value in tensors.items()})
    strided = tensors | {"a": tensors["a"].T.contiguous().T}
    assert files.content_hash(strided) == files.content_hash(tensors)


@pytest.mark.parametrize(
    "change",
    [
        {"a": torch.arange(6.0).view(3, 2)},
        {"a": torch.arange(6.0).view(2, 3) + torch.tensor([[0, 0, 0], [0, 0, 1e-6]])},
        {"a": torch.arange(6.0, dtype=torch.float64).view(2, 3)},
        {"b": torch.ones(3, dtype=torch.bfloat16)},
        {"b": torch.ones(4, dtype=torch.float16)},
        {"c": torch.tensor(2, dtype=torch.int32)},
        {"d": torch.zeros(0)},
    ],
)
def test_the_hash_knows_every_value_shape_and_dtype(change: dict[str, torch.Tensor]) -> None:
    assert files.content_hash(some_tensors() | change) != files.content_hash(some_tensors())


def test_the_hash_knows_names_and_normalization() -> None:
    tensors, space = some_tensors(), LatentSpace(1, 2, (1.0,), (0.0,))
    renamed = {name.upper(): value for name, value in tensors.items()}
    swapped = {"a": tensors["a"], "b": tensors["c"], "c": tensors["b"]}
    others = (None, LatentSpace(1, 2, (2.0,), (0.0,)), LatentSpace(1, 2, (1.0,), (1.0,)))
    found = [files.content_hash(renamed, space), files.content_hash(swapped, space), files.content_hash(tensors, space)]
    found += [files.content_hash(tensors, other) for other in others]
    assert len(set(found)) == 6


@given(st.dictionaries(st.text(max_size=4), st.lists(st.floats(width=32, allow_nan=False), max_size=3), max_size=3), st.data())
def test_two_hashes_agree_exactly_for_equal_tensors(values: dict[str, list[float]], data: Any) -> None:
    other = data.draw(
        st.just(values) | st.dictionaries(st.text(max_size=4), st.lists(st.floats(width=32, allow_nan=False), max_size=3))
    )
    first, second = ({name: torch.tensor(entry) for name, entry in each.items()} for each in (values, other))
    same = first.keys() == second.keys() and all(
        first[name].numpy().tobytes() == second[name].numpy().tobytes() for name in first
    )
    assert (files.content_hash(first) == files.content_hash(second)) == same


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with files.atomic_folder(tmp_path / "new" / "out") as part:
        (part / "file").write_text("1")
        assert not (tmp_path / "new" / "out").exists()
    assert (tmp_path / "new" / "out" / "file").read_text() == "1"
    with files.atomic_folder(tmp_path / "new" / "out") as part:
        (part / "other").write_text("2")
    assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == ["other"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failure", [FULL, KeyboardInterrupt()])
def test_a_failed_folder_leaves_the_old_one(tmp_path: Path, failure: BaseException) -> None:
    with pytest.raises(type(failure)):
        write_folder(tmp_path / "out", "half", failure)
    assert not list(tmp_path.iterdir())
    write_folder(tmp_path / "out", "old")
    with pytest.raises(type(failure)):
        write_folder(tmp_path / "out", "half", failure)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_a_failed_rename_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    rename = os.replace

    def fails_for_the_new_one(source: Any, target: Any) -> None:
        if str(source).endswith(".part"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails_for_the_new_one)
    with pytest.raises(OSError, match="Input/output"):
        write_folder(tmp_path / "out", "new")
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_leftovers_of_a_crash_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "stale").write_text("x")
    with files.atomic_folder(tmp_path / "out") as part:
        (part / "file").write_text("1")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x.bin"
    with files.atomic_file(target) as part:
        part.write_text("1")
        assert not target.exists()
    with pytest.raises(OSError, match="No space"):
        write_file(target, "half", FULL)
    assert target.read_text() == "1"
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "new" / "y.bin", "half", FULL)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.bin"]


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "taken.txt").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_file(tmp_path / "taken.txt", "x")
    assert caught.value.filename == str(tmp_path / "taken.txt")
    missing = tmp_path / "missing.txt"
    with pytest.raises(OSError, match=r"missing\.txt") as caught, files.atomic_file(missing):
        raise OSError(28, "No space left on device", str(missing.with_name(".missing.txt.part")))
    assert caught.value.filename == str(missing)
