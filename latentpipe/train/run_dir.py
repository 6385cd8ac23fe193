"""Before a run: its folders, its resolved config, and the model that it begins with."""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from latentpipe.train import checkpoint
from latentpipe.train.config import Run, Strict, dump
from latentpipe.utils.atomic import atomic_file, sweep
from latentpipe.utils.errors import LatentpipeWarning, UserError
from latentpipe.utils.io import refuse_name
from latentpipe.utils.reading import read_json, read_yaml

# What a finished model's folder holds; with anything else in it a folder is somebody's, and is not replaced
MODEL_FILES = frozenset({"config.json", "model_index.json", "card.json", "latent_rgb.json", "precision.json", "README.md"})
WEIGHTS = re.compile(r"diffusion_pytorch_model.*\.(safetensors|json)")


@contextmanager
def prepare_run_dir(config: Strict, run: Run) -> Iterator[Callable[[], None]]:
    """Check and make the folders of a run, which is alone in `run.work` inside.

    Yields what writes the resolved config, once a resumed run has really begun. UserError where a folder cannot be used.
    """
    usable(run)
    for folder in (run.work, run.out.parent):
        _writable(folder)
    with alone(run.work):
        for folder in (run.work, run.work / "checkpoints", run.out.parent):
            sweep(folder)
        usable(run)  # another run may have ended since
        record = run.work / "config.yaml"
        if run.resume and record.is_file():
            _note_changes(record, config)

        def write() -> None:
            with atomic_file(record) as part:
                part.write_text(dump(config))

        if not run.resume:
            write()
        yield write


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """No other training of this user's machines runs in a folder inside; UserError names the one that does.

    The lock is the operating system's (flock, or its like on Windows): it ends with the process, however that ends.
    """
    from filelock import FileLock, Timeout

    lock, holder = FileLock(work / ".lock"), work / ".running.json"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"Another training runs in {work}{_holder(holder)}. Wait until it has ended, or stop it; "
            "or choose another --run.work."
        ) from None
    except (OSError, NotImplementedError) as error:  # a file system without locks
        warnings.warn(LatentpipeWarning(f"{work} cannot be locked ({error}); start no other training in it."), stacklevel=4)
    try:
        with atomic_file(holder) as part:
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            part.write_text(json.dumps({"process": os.getpid(), "machine": platform.node(), "since": since}))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _holder(record: Path) -> str:
    """Who runs in a folder, as far as it is written there."""
    try:
        found = read_json(record)
        return f": process {found['process']} on {found['machine']}, since {found['since']}"
    except (UserError, KeyError):  # it has only just begun
        return ""


def usable(run: Run) -> None:
    """UserError where the result would lie among the checkpoints or take the place of something else, or where an earlier run
    is not to be resumed; asked before a model is opened.
    """
    out, work = (refuse_name(path).resolve() for path in (run.out, run.work))
    if work == out or work.is_relative_to(out):
        raise UserError(
            f"run.work ({run.work}) lies in run.out ({run.out}), which is replaced at the end; choose another folder."
        )
    if out.is_relative_to(work / "checkpoints") or (out.exists() and not _replaceable(out)):
        raise UserError(f"run.out ({run.out}) holds something that is no model, and would be replaced; choose another folder.")
    if checkpoint.saved(run.work) and not run.resume:
        raise UserError(
            f"{run.work} holds checkpoints of an earlier run; add --run.resume to go on from there, or choose another --run.work."
        )


def _note_changes(record: Path, config: Strict) -> None:
    """A warning on what is set otherwise than when the run was begun."""
    before, now = _flat(read_yaml(record)), _flat(config.model_dump(mode="json"))
    free = {"run.resume", "run.out", "run.work", "run.save_every_steps", "run.sample_every_steps"}
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if key not in free and before.get(key) != now[key]]
    if changed:
        warnings.warn(f"this run goes on with another config: {', '.join(changed)}", LatentpipeWarning, stacklevel=5)


def _replaceable(folder: Path) -> bool:
    """Whether a folder is empty or holds a model of ours and nothing else."""
    if not folder.is_dir():
        return False
    entries = {path.name for path in folder.iterdir()}
    try:
        index = read_json(folder / "model_index.json") if "model_index.json" in entries else {}
        kind = index or (read_json(folder / "config.json") if "config.json" in entries else {})
    except ValueError:
        return False
    known = {name for name in entries if name in MODEL_FILES or name in index or WEIGHTS.fullmatch(name)}
    return not entries or ("_class_name" in kind and known == entries)


def _writable(folder: Path) -> None:
    """Make a folder and try it out, before hours of training rather than after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({(error.strerror or str(error)).lower()}); choose another folder."
        ) from None


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    return {name: value for key, inner in values.items() for name, value in _flat(inner, f"{prefix}{key}.").items()}


def refuse_other_shape(source: Path, found: Mapping[str, Any], wanted: dict[str, Any]) -> None:
    """UserError where the model to warm-start from differs from the config in one of `wanted`."""
    pairs = {name: (_plain(found[name]), _plain(value)) for name, value in wanted.items()}
    other = [f"{name} {mine} (config: {value})" for name, (mine, value) in pairs.items() if mine != value]
    if other:
        raise UserError(f"run.warm_start {source} is a model of another shape: {', '.join(other)}.")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
