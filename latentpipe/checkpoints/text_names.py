"""The names of a CLIP text encoder's tensors: with ``text_model.`` before them and, since transformers 5.6, without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from latentpipe.utils.io import read_tensors

CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")
PREFIX, OUTSIDE = "text_model.", "text_projection."
Value = TypeVar("Value")


def as_hashed(tensors: Mapping[str, Value], cls: str) -> dict[str, Value]:
    """Tensors under the names that a content hash is taken over: the same for a folder, a single file and a network in memory.

    cls  class of the network; only CLIP's text encoders are renamed, and lose their position numbers, which are no weights
    """
    if cls not in CLIP:
        return dict(tensors)
    return {
        name if name.startswith((PREFIX, OUTSIDE)) else f"{PREFIX}{name}": value
        for name, value in tensors.items()
        if not name.endswith("position_ids")
    }


def restore_prefix(path: Path) -> None:
    """Write a text encoder's file anew with the prefix, which readers before transformers 5.6 need."""
    from safetensors.torch import save_file

    named = {name if name.startswith(PREFIX) else f"{PREFIX}{name}": value for name, value in read_tensors(path).items()}
    save_file(named, path, metadata={"format": "pt"})


def as_named_by(model: Any, tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Tensors with or without the prefix, whichever a network uses; position numbers are no weights."""
    kept = {name: value for name, value in tensors.items() if not name.endswith("position_ids")}
    prefixed = any(name.startswith(PREFIX) for name in model.state_dict())
    return kept if prefixed else {name.removeprefix(PREFIX): value for name, value in kept.items()}
