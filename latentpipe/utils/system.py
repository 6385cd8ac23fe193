"""The machine: its devices, and freed memory handed back to it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_C_LIBRARY = ctypes.CDLL(None) if os.name == "posix" else None
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def best_device() -> str:
    """ "cuda", "mps" or "cpu", whichever is present first."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def has_bf16_units(device: str = "") -> bool:
    """Whether a kind of device ("cpu", "cuda"; "": the best that is present) computes bf16 faster than fp32."""
    if device == "cuda" or (not device and torch.cuda.is_available()):
        return torch.cuda.is_bf16_supported()
    flags = Path("/proc/cpuinfo")
    known = ("avx512_bf16", "amx_bf16", " bf16 ")
    return device in ("", "cpu") and flags.is_file() and any(name in flags.read_text() for name in known)


@contextmanager
def release_freed_memory(device: torch.device) -> Iterator[None]:
    """Inside, blocks of 1 MB and more go back to the system as soon as they are free.

    glibc would keep freed bands, whose holes the next layer's bands rarely fit: up to 50 % more memory was measured, against
    5 % more time for fresh pages. Afterwards its limits are such as it finds by itself once large blocks were freed.
    """
    change = getattr(_C_LIBRARY, "mallopt", None) if device.type == "cpu" and hasattr(_C_LIBRARY, "malloc_trim") else None
    if change is None:
        return (yield)
    change(_MMAP_THRESHOLD, 2**20)
    _C_LIBRARY.malloc_trim(0)  # type: ignore[union-attr]
    try:
        yield
    finally:
        change(_MMAP_THRESHOLD, 16 * 2**20)
        change(_TRIM_THRESHOLD, 32 * 2**20)
