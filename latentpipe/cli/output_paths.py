"""Where a verb writes, looked at before its work: what stands there already, and whether anything can be written there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentpipe.checkpoints.registry import find_model
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import own_home, printable

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
OTHER_FILES = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".svg", ".mp4", ".webm", ".pdf", ".txt", ".safetensors")
LONGEST = 255  # bytes of a name that file systems take


# --- one value ----------------------------------------------------------------------------------------------


def room(option: str, value: Path) -> None:
    """A place where a folder is or can be made, and files in it."""
    _named(option, value)
    there = value
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        what = "a file" if there.exists() else "a link that leads nowhere"
        raise UserError(f"{option} {value}: cannot be made a folder, since {there} is {what}.")
    try:
        with tempfile.TemporaryFile(dir=there):  # permissions tell root nothing: /proc grants them, and takes no file
            pass
    except OSError:
        raise UserError(f"{option} {value}: nothing can be written in {there}; name another place.") from None


def written(option: str, value: Path) -> None:
    """A file to write, or to write anew."""
    _named(option, value)
    if value.is_dir():
        raise UserError(f"{option} {value} is a folder; expected the name of a file to write.")
    room(option, value.parent)


def ending(*endings: str) -> Callable[[str, Path], None]:
    """A file to write, by its ending."""

    def rule(option: str, value: Path) -> None:
        if value.suffix.lower() not in endings:
            raise UserError(f"{option} {value}: expected the name of a file that ends in {' or '.join(endings)}.")
        written(option, value)

    return rule


def weights(option: str, value: Path) -> None:
    """A safetensors file to write; that library takes names in UTF-8 alone."""
    ending(".safetensors")(option, value)
    _utf8(option, value)


def new_weights(option: str, value: Path) -> None:
    """The same, where nothing is yet."""
    weights(option, value)
    new(option, value)


def new(option: str, value: Path) -> None:
    """A file or folder of weights that is not there yet."""
    _named(option, value)
    _utf8(option, value)
    if os.path.lexists(value):
        raise UserError(f"{option} {value} exists already; choose another name, or remove it first.")
    room(option, value.parent)


def empty(option: str, value: Path) -> None:
    """A folder that is new or empty."""
    _utf8(option, value)
    room(option, value)
    if value.is_dir() and any(value.iterdir()):
        raise UserError(f"{option} {value} is not empty; expected a new or empty folder.")


def sharded(option: str, value: Path) -> None:
    """A folder of shards, or a new or empty one."""
    _utf8(option, value)
    room(option, value)
    names = [path.name for path in value.iterdir()] if value.is_dir() else []
    other = [name for name in names if not name.startswith((".", "shard-")) and name not in ("manifest.json", "index.jsonl")]
    if other:
        raise UserError(
            f"{option} {value} holds {other[0]}, which is no shard; expected a new or empty folder, or one of shards."
        )


def drawing(option: str, value: Path) -> None:
    """A folder for pictures, or a picture's file."""
    _named(option, value)
    if is_picture(value):
        written(option, value)
    elif value.suffix.lower() in OTHER_FILES and not value.is_dir():
        raise UserError(f"{option} {value}: expected a folder, or the name of a file that ends in {', '.join(PICTURES)}.")
    else:
        room(option, value)


def is_picture(path: Path) -> bool:
    """Whether --out names a picture rather than a folder."""
    return path.suffix.lower() in PICTURES and not path.is_dir()


def _named(option: str, value: Path) -> None:
    """A name that file systems take."""
    if any(len(os.fsencode(part)) > LONGEST for part in value.parts) or "\0" in str(value):
        raise UserError(f"{option} {str(value)[:40]!r} ...: no file can have this name; expected one of at most {LONGEST} bytes.")


def _utf8(option: str, value: Path) -> None:
    """A name that the safetensors library takes."""
    if printable(str(value)) != str(value):
        raise UserError(
            f"{option} {printable(str(value))}: this name is not UTF-8 text, and weights cannot be kept under it; choose another."
        )


# --- by other values ----------------------------------------------------------------------------------------


def cached(values: dict[str, Any]) -> None:
    """The latents of a folder lie in it, where no file is named; or in shards elsewhere."""
    if values["shards"] is not None and values["out"] is not None:
        raise UserError("--shards names a folder of many files, and --out one file; leave one of them out.")
    if values["out"] is None and values["shards"] is None:
        room("FOLDER", values["folder"] / ".latents")


def fitted(values: dict[str, Any]) -> None:
    """An adapter lies among the user's own, where no file is named."""
    if values["out"] is None:
        room("LATENTPIPE_HOME", own_home() / "adapters")


def learnt(values: dict[str, Any]) -> None:
    """Probabilities of latents lie in a VAE's folder."""
    out = values["out"]
    folder = find_model(values["vae"], "vae") if out is None else out
    option = "VAE" if out is None else "--out"
    if folder.is_file():
        raise UserError(
            f"{option} {folder} is a single file; the probabilities lie in a VAE's folder ('latentpipe convert' makes one)."
        )
    if not folder.is_dir():
        raise UserError(f"{option} {folder}: no such folder; expected the folder of a VAE.")
    _utf8(option, folder)
    room(option, folder)


def swapped(values: dict[str, Any]) -> None:
    """A swapped pipeline lies beside the model, not in it."""
    if values["out"] is not None and values["out"].resolve().is_relative_to(find_model(values["model"]).resolve()):
        raise UserError(f"--out {values['out']} lies within the model; name a folder that does not.")


def kept(values: dict[str, Any]) -> None:
    """The page's pictures, where they are kept."""
    if values["save"]:
        room("--out", values["out"])


def trained(run: Any) -> None:
    """The result of a training, and its checkpoints."""
    for option, value in (("run.out", run.out), ("run.work", run.work)):
        _named(option, value)
        _utf8(option, value)
    room("run.out", run.out.parent)
    room("run.work", run.work)
