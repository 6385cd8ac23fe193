"""Files: safetensors in, strictly; folders and files out, atomically; content hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentpipe.errors import UserError
from latentpipe.latents import LatentSpace

HASH_LENGTH = 16  # characters shown to people; files keep all 64


def home() -> Path:
    """People's own files: $LATENTPIPE_HOME, else latentpipe/ in the user's data folder; holds models/, vae/, lora/."""
    if os.environ.get("LATENTPIPE_HOME"):
        return Path(os.environ["LATENTPIPE_HOME"])
    data = os.environ.get("XDG_DATA_HOME") or os.environ.get("LOCALAPPDATA")
    return Path(data or Path.home() / ".local" / "share") / "latentpipe"


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block succeeds, and vanishes when it fails."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(temporary, target)
        except BaseException:
            if old.exists() and not target.exists():
                os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its name when the block succeeds, and vanishes when it fails."""
    target = Path(target)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(target)  # the name that was asked for
        raise
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError where there is none."""
    try:
        value = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file ({error}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object; given {type(value).__name__}.")
    return value


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its data is read: shape and dtype ("F16", ...) by name, and its metadata."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file; UserError as in `read_tensors`."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return Header(
            {name: tuple(part.get_shape()) for name, part in slices.items()},
            {name: str(part.get_dtype()) for name, part in slices.items()},
            dict(file.metadata() or {}),
        )


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or those named; UserError where it is missing, truncated or no such file."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    size = check_file(path)
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path}: only safetensors files are read here (a pickle can run code when it is opened); "
            "'latentpipe convert' turns other weights into one."
        )
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: not a complete safetensors file ({error}); given {size:,} bytes. Fetch or export it again."
        ) from None


def check_file(path: Path) -> int:
    """The size in bytes of a file that can be read; UserError where there is none, a folder, or a link in a circle."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise UserError(f"{path}: not a file; expected weights in safetensors format.")
        with open(path, "rb") as file:
            return file.seek(0, os.SEEK_END)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; expected weights in safetensors format.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()}).") from None


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
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            problems.append(f"{name} holds values that are not finite")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UserError(f"{source} does not fit {type(model).__name__}: {shown}.")
    model.load_state_dict(dict(tensors))


def content_hash(tensors: Mapping[str, torch.Tensor], space: LatentSpace | None = None) -> str:
    """sha256 over sorted tensor names, shapes, dtypes and bytes, and the normalization where there is one.

    It names the weights, not the file: metadata, key order and sharding do not change it.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    if space is not None:
        digest.update(json.dumps([space.scale, space.shift]).encode())
    return digest.hexdigest()
