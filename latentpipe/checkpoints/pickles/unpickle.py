"""A pickle's tensors as a safetensors file, by a process of its own whose memory is bounded."""

from __future__ import annotations

import atexit
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from latentpipe.utils.errors import UserError
from latentpipe.utils.io import check_file, is_gguf, is_safetensors
from latentpipe.utils.reading import parse_object

SHARE, ROOM = 3, 2**30  # what the process may take beside its libraries: times the file's size, and bytes
PACKAGE = Path(__file__).parents[3]


@dataclass(frozen=True)
class Unpickled:
    """What a pickle held: how many tensors, whether as a list (named 0, 1, ...), and what it says of itself."""

    path: Path
    names: int
    listed: bool
    facts: dict[str, str]


def unpickle(source: Path, target: Path) -> Unpickled:
    """Write the tensors of a torch file into the safetensors file `target`, names as they are; nothing in it is run.

    UserError names what is refused: code, other things than tensors, more memory than its size explains.
    """
    size = check_file(source)
    if not size:
        raise UserError(f"{source} is empty (0 bytes); fetch it again.")
    found = _asked([str(source.resolve()), str(target), SHARE * size + ROOM])
    if "No space left" in str(found.get("failed")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    if "failed" in found:
        raise UserError(f"{source}: the process that read it failed ({str(found['failed'])[:200]}); nothing was written.")
    if "refused" in found:
        raise UserError(f"{source}: {found['refused']}; expected tensors by name, as torch.save writes a state_dict.")
    return Unpickled(target, int(found["names"]), bool(found["list"]), dict(found["facts"]))


@contextmanager
def unpickled(source: Path) -> Iterator[Unpickled]:
    """The same in a temporary folder, for as long as the block takes."""
    with TemporaryDirectory(prefix="latentpipe-", ignore_cleanup_errors=True) as room:
        yield unpickle(source, Path(room) / "weights.safetensors")


def is_pickle(path: Path) -> bool:
    """Whether a file is for `unpickle`: it is there, and does not begin as a safetensors file or GGUF."""
    return path.is_file() and not (is_safetensors(path) or is_gguf(path)) and path.suffix not in (".safetensors", ".sft")


# --- the process ----------------------------------------------------------------------------------------------

_running: list[subprocess.Popen[str]] = []
_one = threading.Lock()


def _asked(question: list[str | int]) -> dict[str, Any]:
    """What the process answers; it is started with the first question, and ends with this process, or when that is stopped."""
    with _one:
        process = _started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BaseException:
            _stop()
            raise
        if not line or not hasattr(os, "fork"):
            _stop()
        try:
            return parse_object(line)
        except ValueError:
            return {"failed": "it ended without an answer"}


def _started() -> subprocess.Popen[str]:
    if not _running or _running[0].poll() is not None:
        _stop()
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-P", "-m", "latentpipe.checkpoints.pickles.child"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        _running.append(subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes))
    return _running[0]


def _stop() -> None:
    """End the process and what it forked."""
    for process in _running:
        if hasattr(os, "killpg"):
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.communicate()
    _running.clear()


atexit.register(_stop)
