"""Checkpoints of a run: safetensors only, written beside and then renamed, so that none is ever half there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from latentpipe.utils.atomic import atomic_folder, discard
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import read_tensors
from latentpipe.utils.reading import parse_object, read_text


def save(work: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], keep: int = 2) -> Path:
    """Write ``work/checkpoints/step-00000042``; the oldest beyond `keep` are removed."""
    target = work / "checkpoints" / f"step-{step:08d}"
    with atomic_folder(target) as folder:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "state.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": step, **state}))
    for old in saved(work)[:-keep]:
        discard(old)
    return target


def newest(work: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest checkpoint; None where there is none."""
    found = saved(work)
    if not found:
        return None
    folder = found[-1]
    try:
        return read_tensors(folder / "state.safetensors"), parse_object(read_text(folder / "state.json"), foreign=True)
    except Exception as error:
        raise UserError(f"{folder} cannot be read ({error}); delete it to go on from the one before.") from None


def saved(work: Path) -> list[Path]:
    """The folders of all checkpoints of a run, the oldest first."""
    return sorted((work / "checkpoints").glob("step-*"))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as flat named tensors (parameter order is the module's)."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`; a parameter that another optimizer moved before begins without a state."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    matrices = getattr(optimizer, "matrices", ())
    kept = {index: entry for index, entry in state.items() if ("momentum" in entry) == (id(parameters[index]) in matrices)}
    optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})
