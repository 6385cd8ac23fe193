"""Files: people's own folder; safetensors in, strictly; content hashes; folders and files out, atomically (`atomic`)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from latentpipe.utils.atomic import atomic_file as atomic_file
from latentpipe.utils.atomic import atomic_folder as atomic_folder
from latentpipe.utils.errors import UserError
from latentpipe.utils.out_of_memory import refuse
from latentpipe.utils.reading import MOST_HEADER, file_size
from latentpipe.utils.reading import read_json as read_json

if TYPE_CHECKING:
    import torch


SUFFIXES = (".safetensors", ".sft")  # of a safetensors file; others are judged by their first bytes
HASH_LENGTH = 16  # characters shown to people; files keep all 64
MOST_TENSORS, MOST_DIMENSIONS = 2**17, 16  # of a safetensors file; the largest models have some thousand, of five
FLOATS = ("float16", "bfloat16", "float32", "float64")


class Normalization(Protocol):
    """Factors and shifts of a VAE's latents, one for each channel, as `vae.latent_space.LatentSpace` has them."""

    @property
    def scale(self) -> tuple[float, ...]:
        """What raw latents are multiplied with."""

    @property
    def shift(self) -> tuple[float, ...]:
        """What is taken from raw latents before."""


def home() -> Path:
    """People's own files: $LATENTPIPE_HOME, else latentpipe/ in the user's data folder.

    It holds models/, vae/, lora/, adapters/, embeddings/, parts/.
    For a user without a home (in a container) it is a place where nothing can be; `own_home` is to write into.
    """
    if os.environ.get("LATENTPIPE_HOME"):
        return Path(os.environ["LATENTPIPE_HOME"])
    data = os.environ.get("XDG_DATA_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        return Path(data or Path.home() / ".local" / "share") / "latentpipe"
    except RuntimeError:  # no HOME, and the user has no name
        return Path(os.devnull) / "latentpipe"


def own_home() -> Path:
    """`home`, to write into; UserError names the variable to set where there is none."""
    if home().parent == Path(os.devnull):
        raise UserError("This user has no home folder to keep files in; set LATENTPIPE_HOME (or HOME) to a folder.")
    return home()


def printable(name: str) -> str:
    """A file's name as text that every file and console takes: bytes that are not UTF-8 become the replacement character."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def folders_once(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As `os.walk`: each folder below `root` with its folders and files by name, sorted; hidden folders are passed by.

    Links to folders are followed, each folder once. Clearing the list of folders keeps from going deeper.
    """
    seen: set[str] = set()
    for at, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(at)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            seen.add(real)
            yield Path(at), folders, sorted(names)


def free_name(path: Path) -> Path:
    """The path itself, or with -2, -3, ... behind its stem: the first that does not exist."""
    count, free = 1, path
    while free.exists():
        count += 1
        free = path.with_stem(f"{path.stem}-{count}")
    return free


def refuse_name(path: Path) -> Path:
    """The path; UserError where its name is not UTF-8, which the safetensors library neither reads nor writes."""
    if printable(str(path)) != str(path):
        raise UserError(
            f"{path}: this name is not UTF-8 text, and weights cannot be kept under it; rename it, or choose another."
        )
    return path


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its data is read: shape and dtype ("F16", ...) by name, and its metadata."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file; UserError as in `read_tensors`."""
    with _opened(path, "np") as file:  # maps no room for the tensors, which a file larger than the memory has not
        return _header(file)


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or those named; UserError where it is missing, truncated or no such file, where its
    header is larger than any model's, or where the memory does not hold it.
    """
    with _opened(path) as file:
        _header(file)
        return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}


def _header(file: Any) -> Header:
    names = list(file.keys())
    if len(names) > MOST_TENSORS:
        raise ValueError(f"it names {len(names):,} tensors, at most {MOST_TENSORS:,} are read")
    slices = {name: file.get_slice(name) for name in names}
    shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    for name, shape in shapes.items():
        if len(shape) > MOST_DIMENSIONS or any(side >= 2**40 for side in shape):
            raise ValueError(f"{name[:80]} has {len(shape)} dimensions, {', '.join(map(str, shape[:4]))}, ...")
    return Header(shapes, {name: str(part.get_dtype()) for name, part in slices.items()}, dict(file.metadata() or {}))


@contextmanager
def _opened(path: Path, framework: str = "pt") -> Iterator[Any]:
    from safetensors import safe_open

    path = refuse_name(Path(path))
    size = check_file(path)
    if is_gguf(path):
        raise UserError(
            f"{path} is a GGUF file, which is read for the transformer of a model alone (--model); give this one as safetensors."
        )
    if path.suffix not in SUFFIXES and not is_safetensors(path):
        raise UserError(
            f"{path}: only safetensors files are read here (a pickle can run code when it is opened); "
            "'latentpipe convert' turns other weights into one."
        )
    try:
        with open(path, "rb") as start:
            length = int.from_bytes(start.read(8), "little")
        if MOST_HEADER < length < size:
            raise ValueError(f"its header has {length:,} bytes, at most {MOST_HEADER:,} are read")
        with safe_open(path, framework) as file:
            yield file
    except Exception as error:  # safetensors' own, the system's, and torch's for shapes and dtypes that it has not
        refuse(error, f"{path} ({size:,} bytes)")
        raise UserError(
            f"{path}: not a complete safetensors file ({error}); given {size:,} bytes. Fetch or export it again."
        ) from None


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as a safetensors file does (8 bytes: the header's length; then JSON), whatever its name says."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return file.read(1) == b"{" and 1 < length <= file.seek(0, os.SEEK_END) - 8
    except OSError:
        return False


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does, whatever its name says."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def check_file(path: Path) -> int:
    """The size in bytes of a file that can be read; UserError where there is none, a folder, or a link in a circle."""
    return file_size(path, "weights in safetensors format")


def file_hash(path: Path) -> str:
    """sha256 over a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_strictly(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: Path) -> None:
    """Fill a model from tensors; UserError names missing, extra, misshapen and non-finite ones."""

    wanted = model.state_dict()
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"extra {name}" for name in tensors if name not in wanted]
    for name, tensor in tensors.items():
        if name in wanted and tensor.shape != wanted[name].shape:
            problems.append(f"{name} is {tuple(tensor.shape)}, expected {tuple(wanted[name].shape)}")
        elif name in wanted and wanted[name].is_floating_point() and str(tensor.dtype).removeprefix("torch.") not in FLOATS:
            problems.append(f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}, expected a float of 16 to 64 bits")
        elif tensor.is_floating_point() and not _finite(tensor):
            problems.append(f"{name} holds values that are not finite")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UserError(f"{source} does not fit {type(model).__name__}: {shown}.")
    model.load_state_dict(dict(tensors))


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite, also as the 32-bit floats that they are computed in."""
    import torch

    if not tensor.numel():
        return True
    low, high = (tensor.float() if tensor.dtype == torch.float64 else tensor).aminmax()  # one pass; NaN where any value is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def content_hash(tensors: Mapping[str, torch.Tensor], space: Normalization | None = None) -> str:
    """sha256 over sorted tensor names, shapes, dtypes and bytes, and the normalization where there is one.

    It names the weights, not the file: metadata, key order and sharding do not change it.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    if space is not None:
        digest.update(json.dumps([space.scale, space.shift]).encode())
    return digest.hexdigest()
