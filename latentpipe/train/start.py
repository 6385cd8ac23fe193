"""Before a run: its folders, its resolved config, and the model that it begins with."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from latentpipe.config import Run, Strict, dump
from latentpipe.errors import Note, UserError
from latentpipe.files import atomic_file
from latentpipe.reading import read_json, read_yaml

# What a finished model's folder holds; with anything else in it a folder is somebody's, and is not replaced
MODEL_FILES = frozenset({"config.json", "model_index.json", "card.json", "latent_rgb.json", "precision.json", "README.md"})
WEIGHTS = re.compile(r"diffusion_pytorch_model.*\.(safetensors|json)")


def begin(config: Strict, run: Run) -> Callable[[], None]:
    """Check and make the folders of a run; returns what writes the resolved config, once a resumed run has really begun."""
    out, work = run.out.resolve(), run.work.resolve()
    if work == out or work.is_relative_to(out):
        raise UserError(
            f"run.work ({run.work}) lies in run.out ({run.out}), which is replaced at the end; choose another folder."
        )
    if out.is_relative_to(work / "checkpoints") or (out.exists() and not _replaceable(out)):
        raise UserError(f"run.out ({run.out}) holds something that is no model, and would be replaced; choose another folder.")
    started = (run.work / "checkpoints").is_dir() and any((run.work / "checkpoints").iterdir())
    if started and not run.resume:
        raise UserError(
            f"{run.work} holds checkpoints of an earlier run; add --run.resume to go on from there, or choose another --run.work."
        )
    for folder in (run.work, run.out.parent):
        _writable(folder)
    record = run.work / "config.yaml"
    if run.resume and record.is_file():
        before, now = _flat(read_yaml(record)), _flat(config.model_dump(mode="json"))
        free = {"run.resume", "run.out", "run.work", "run.save_every_steps", "run.sample_every_steps"}
        changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if key not in free and before.get(key) != now[key]]
        if changed:
            warnings.warn(f"this run goes on with another config: {', '.join(changed)}", Note, stacklevel=3)

    def write() -> None:
        with atomic_file(record) as part:
            part.write_text(dump(config))

    if not run.resume:
        write()
    return write


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
