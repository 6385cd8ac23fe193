"""A pickle's tensors as a safetensors file, by a process of its own whose memory is bounded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from latentpipe.errors import UserError
from latentpipe.files import check_file, is_safetensors
from latentpipe.reading import parse_object

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
    command = [sys.executable, "-P", "-m", "latentpipe.checkpoints.pickles.child", str(source.resolve()), str(target)]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [*command, str(SHARE * size + ROOM)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        out, err = process.communicate()
    finally:
        process.kill()
        process.wait()
    try:
        found = parse_object(out.splitlines()[-1] if out.strip() else "")
    except ValueError:
        last = (err.strip().splitlines() or [f"it ended with status {process.returncode}"])[-1]
        if "No space left" in last or "StorageFull" in last:
            raise OSError(28, os.strerror(28), str(target)) from None
        raise UserError(f"{source}: the process that read it failed ({last[:200]}); nothing was written.") from None
    if "refused" in found:
        raise UserError(f"{source}: {found['refused']}; expected tensors by name, as torch.save writes a state_dict.")
    return Unpickled(target, int(found["names"]), bool(found["list"]), dict(found["facts"]))


@contextmanager
def unpickled(source: Path) -> Iterator[Unpickled]:
    """The same in a temporary folder, for as long as the block takes."""
    with TemporaryDirectory(prefix="latentpipe-", ignore_cleanup_errors=True) as room:
        yield unpickle(source, Path(room) / "weights.safetensors")


def is_pickle(path: Path) -> bool:
    """Whether a file is for `unpickle`: it is there, and does not begin as a safetensors file."""
    return path.is_file() and not is_safetensors(path) and path.suffix not in (".safetensors", ".sft")
