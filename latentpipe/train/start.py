"""Before a run: its folders, its resolved config, and the model that it begins with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from latentpipe.config import Run, Strict, dump
from latentpipe.errors import Note, UserError
from latentpipe.files import atomic_file


def begin(config: Strict, run: Run) -> None:
    """Prepare the work folder: refuse to mix two runs, write the resolved config."""
    out, work = run.out.resolve(), run.work.resolve()
    if work == out or work.is_relative_to(out):
        raise UserError(
            f"run.work ({run.work}) lies in run.out ({run.out}), which is replaced at the end; choose another folder."
        )
    if out.exists() and any(out.iterdir()) and not any((out / name).is_file() for name in ("config.json", "model_index.json")):
        raise UserError(f"run.out ({run.out}) holds something that is no model, and would be replaced; choose another folder.")
    started = (run.work / "checkpoints").is_dir() and any((run.work / "checkpoints").iterdir())
    if started and not run.resume:
        raise UserError(
            f"{run.work} holds checkpoints of an earlier run; add --run.resume to go on from there, or choose another --run.work."
        )
    run.work.mkdir(parents=True, exist_ok=True)
    record = run.work / "config.yaml"
    if run.resume and record.is_file():
        before, now = _flat(yaml.safe_load(record.read_text())), _flat(config.model_dump(mode="json"))
        free = {"run.resume", "run.out", "run.work", "run.save_every_steps", "run.sample_every_steps"}
        changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if key not in free and before.get(key) != now[key]]
        if changed:
            warnings.warn(f"this run goes on with another config: {', '.join(changed)}", Note, stacklevel=3)
    with atomic_file(record) as part:
        part.write_text(dump(config))


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
