"""Memory that runs out: the real errors of torch, numpy and the system become a sentence; others stay what they are."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentpipe import UserError
from latentpipe.cli import app
from latentpipe.utils import io, out_of_memory


@contextmanager
def room(extra: int) -> Iterator[None]:
    """At most `extra` bytes of address space more than are taken now."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def raised(call: Callable[[], Any]) -> Exception:
    """What a call raises."""
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("it went well")


REAL = {
    "torch": (lambda: torch.empty(2**50), "4,096.0 TB were needed at once"),
    "numpy": (lambda: np.empty(2**55), "262,144.0 TB were needed at once"),
    "python": (lambda: bytearray(2**60), "The memory ran out, and"),
}


@pytest.mark.parametrize("library", REAL)
def test_what_libraries_say(library: str) -> None:
    call, expected = REAL[library]
    error = raised(call)
    assert out_of_memory.is_shortage(error)
    assert re.search(expected, out_of_memory.sentence(error))
    with pytest.raises(UserError, match=r"^x: The memory ran out.*Take a smaller picture"):
        out_of_memory.refuse(error, "x")


def test_a_file_that_cannot_be_mapped(tmp_path: Path) -> None:
    with open(tmp_path / "x", "wb") as file:
        file.truncate(2**33)
    with room(2**28):
        error = raised(lambda: torch.UntypedStorage.from_file(str(tmp_path / "x"), False, 2**33))
    assert "unable to mmap" in str(error)
    assert "8.0 GB were needed at once" in out_of_memory.sentence(error)


def test_weights_that_do_not_fit_name_their_file(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[2147483648],"data_offsets":[0,8589934592]}}'
    with open(tmp_path / "x.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**33)
    with room(2**28), pytest.raises(UserError, match=r"x\.safetensors \(8,589,934,672 bytes\): The memory ran out"):
        io.read_tensors(tmp_path / "x.safetensors")


def test_of_a_gpu() -> None:
    text = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.00 GiB is free."
    for kind in (torch.OutOfMemoryError, RuntimeError):
        error = kind(text)
        assert out_of_memory.is_shortage(error)
        assert "The memory of the GPU ran out: 2.5 GB were needed at once" in out_of_memory.sentence(error)
        assert "device cpu" in out_of_memory.sentence(error)
    assert out_of_memory.is_shortage(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))


@pytest.mark.parametrize("text", ["could not create a primitive", "std::bad_alloc", "Cannot allocate memory (os error 12)"])
def test_words_without_a_size(text: str) -> None:
    assert out_of_memory.is_shortage(RuntimeError(text))
    assert out_of_memory.sentence(RuntimeError(text)).startswith("The memory ran out, and")


@pytest.mark.parametrize(
    "error", [ValueError("x"), UserError("out of memory"), KeyError("memory"), RuntimeError("shape mismatch")]
)
def test_other_errors_are_none(error: Exception) -> None:
    assert not out_of_memory.is_shortage(error)
    out_of_memory.refuse(error)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("could not create a primitive"), OSError(12, "Cannot allocate memory")]
)
def test_the_command_line_says_it(error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def verb(name: str, arguments: list[str]) -> None:
        raise error

    monkeypatch.setitem(app.VERBS, "env", verb)
    assert app.main(["env"]) == 2
    assert capsys.readouterr().err.startswith("latentpipe: The memory ran out")
