"""Memory that ran out, in a sentence: what was needed at once, and what to do. Every library says it in its own words."""

from __future__ import annotations

import errno
import re

from latentpipe.utils.errors import UserError

_SIGNS = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|out_of_memory|unable to mmap"
    r"|unable to allocate|could not create a (primitive|memory object)|bad_alloc|bad allocation|_alloc_failed|memoryerror"
    r"|errno 12\b|os error 12\b|failed to allocate",
    re.IGNORECASE,
)
_ASKED = re.compile(r"(?:tried to allocate|unable to mmap|unable to allocate) ([\d.]+) ?(bytes|[kmgtp]i?b)", re.IGNORECASE)
_UNITS = {"bytes": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "p": 2**50}
_GPU = re.compile(r"cuda|cublas|cudnn|\bgpu\b|\bhip\b|\bmps\b", re.IGNORECASE)


def is_shortage(error: BaseException) -> bool:
    """Whether an error of any library says that memory ran out."""
    if isinstance(error, UserError):
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, Exception) and _SIGNS.search(str(error)) is not None


def sentence(error: BaseException) -> str:
    """What a person is told about such an error."""
    text = str(error)
    found = _ASKED.search(text)
    needed = ""
    if found:
        unit = found[2].lower()
        needed = f": {_bytes(float(found[1]) * _UNITS.get(unit, _UNITS.get(unit[0], 1)))} were needed at once"
    if _GPU.search(text):
        return (
            f"The memory of the GPU ran out{needed}. Take a smaller picture, fewer pictures at once or a smaller batch, half the "
            "precision (dtype fp16 or bf16), or compute on the processor (device cpu); close other programs that use the GPU."
        )
    return (
        f"The memory ran out{needed}, and as much was not free. Take a smaller picture, fewer pictures at once or a smaller "
        "batch, or a smaller model; close other programs, or raise the limit of this one (ulimit -v, the container's memory)."
    )


def refuse(error: BaseException, where: str = "") -> None:
    """Raise the UserError in place of an error that says that memory ran out; return where it says something else."""
    if is_shortage(error):
        raise UserError(f"{where}: {sentence(error)}" if where else sentence(error)) from None


def _bytes(count: float) -> str:
    for size, name in ((2**40, "TB"), (2**30, "GB"), (2**20, "MB")):
        if count >= size:
            return f"{count / size:,.1f} {name}"
    return f"{count / 2**10:,.1f} kB"
