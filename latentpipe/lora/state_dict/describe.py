"""What a LoRA file is: its layout, its layers by component, its hash, and what it says about itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from latentpipe.lora.adapter import LoraLayer
from latentpipe.lora.state_dict.cloneofsimo import is_ancestral
from latentpipe.lora.state_dict.io import read_lora, stated_base, trigger_words
from latentpipe.utils.io import SUFFIXES, is_safetensors, read_header
from latentpipe.utils.reading import parse_json

OWN, SHOWN_APART = "latentpipe.", {"base", "trigger_words", "layers", "component"}


def lora_facts(path: Path) -> dict[str, Any]:
    """What a LoRA file is: layout, layers by component, hashes, and what its metadata says; UserError as `read_lora`."""
    lora = read_lora(path)
    tensors = [tensor for _, _, layer in lora.layers() for tensor in layer.tensors.values()]
    size = sum(file.stat().st_size for file in path.glob("adapter_model.safetensors")) if path.is_dir() else path.stat().st_size
    own = {name.removeprefix(OWN): _parsed(value) for name, value in lora.metadata.items() if name.startswith(OWN)}
    return {
        "file": str(path),
        "layout": layout(path),
        "bytes": size,
        "hash": lora.hash,
        "dtype": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "finite": all(bool(tensor.isfinite().all()) for tensor in tensors),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "components": {component: _component(layers.values()) for component, layers in lora.parts.items()},
        "base": stated_base(lora),
        "trigger_words": trigger_words(lora),
        **{name: value for name, value in own.items() if name not in SHOWN_APART},
        "metadata": {name: _parsed(value) for name, value in lora.metadata.items() if name.startswith(("ss_", "modelspec."))},
        "unread": list(lora.unread),
        "embeddings": [one.name for one in lora.embeddings],
    }


def is_lora(path: Path) -> bool:
    """Whether a safetensors file has the keys of an adapter."""
    if not path.is_file() or not (path.suffix in SUFFIXES or is_safetensors(path)):
        return False
    marks = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".hada_w1", ".lokr_w", ".lora.", "_lora.")
    return any(mark in name for name in read_header(path).shapes for mark in marks)


def layout(path: Path) -> str:
    """Which program's way of naming a file's keys have: peft, diffusers, kohya or cloneofsimo."""
    if path.is_dir():
        return "peft (folder)"
    names = list(read_header(path).shapes)
    if is_ancestral(names):
        return "cloneofsimo"
    if any("base_model.model." in name for name in names):
        return "peft"
    if any("processor." in name or "_lora." in name for name in names):
        return "diffusers (attention processors)"
    if any(name.startswith(("lora_", "lycoris_")) for name in names):
        return "kohya"
    known = ("unet.", "transformer.", "text_encoder", "vae.")
    return "diffusers" if any(name.startswith(known) for name in names) else "peft (no component in its keys)"


def _component(layers: Iterable[LoraLayer]) -> dict[str, Any]:
    """Layers of one component: how many, and how many of each rank, alpha and kind."""
    layers = list(layers)
    kinds = Counter("dora" if layer.dora else layer.kind for layer in layers)
    return {
        "modules": len(layers),
        "kinds": dict(kinds),
        "ranks": {str(rank): count for rank, count in sorted(Counter(layer.rank for layer in layers).items())},
        "alphas": {f"{alpha:g}": count for alpha, count in sorted(Counter(layer.alpha for layer in layers).items())},
        "rslora": any(layer.rslora for layer in layers),
        "parameters": sum(layer.parameters for layer in layers),
    }


def _parsed(text: str) -> Any:
    """The value of a metadata entry that is JSON; the text itself where it is none."""
    try:
        return parse_json(text, foreign=True) if text[:1] in "[{" else text
    except ValueError:
        return text
