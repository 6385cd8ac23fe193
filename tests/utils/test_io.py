"""Files: strict reading, content hashes, atomic writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentpipe import LatentSpace, UserError
from latentpipe.utils import io


@given(st.binary(max_size=200))
def test_no_bytes_are_taken_for_weights(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"not a complete safetensors file|is a GGUF file"):
        io.read_tensors(path)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="only safetensors"):
        io.read_tensors(tmp_path / "model.pt")


def some_tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.float16), "c": torch.tensor(2)}


def test_the_hash_does_not_know_the_order() -> None:
    tensors = some_tensors()
    assert io.content_hash(tensors) == io.content_hash(dict(reversed(tensors.items())))
    assert io.content_hash(tensors) == io.content_hash({name: value.clone() for name, value in tensors.items()})
    strided = tensors | {"a": tensors["a"].T.contiguous().T}
    assert io.content_hash(strided) == io.content_hash(tensors)


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
    assert io.content_hash(some_tensors() | change) != io.content_hash(some_tensors())


def test_the_hash_knows_names_and_normalization() -> None:
    tensors, space = some_tensors(), LatentSpace(1, 2, (1.0,), (0.0,))
    renamed = {name.upper(): value for name, value in tensors.items()}
    swapped = {"a": tensors["a"], "b": tensors["c"], "c": tensors["b"]}
    others = (None, LatentSpace(1, 2, (2.0,), (0.0,)), LatentSpace(1, 2, (1.0,), (1.0,)))
    found = [io.content_hash(renamed, space), io.content_hash(swapped, space), io.content_hash(tensors, space)]
    found += [io.content_hash(tensors, other) for other in others]
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
    assert (io.content_hash(first) == io.content_hash(second)) == same
