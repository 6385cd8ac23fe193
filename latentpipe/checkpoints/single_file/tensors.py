"""The tensors of a part under diffusers' names, as they are stored (mapped, not copied); scaled fp8 is multiplied out."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from latentpipe.checkpoints import ldm_keys as kl
from latentpipe.checkpoints.single_file import tables
from latentpipe.checkpoints.single_file.gguf_tensors import read_gguf_tensors
from latentpipe.checkpoints.single_file.parts import Part
from latentpipe.checkpoints.single_file.tables import StateDict
from latentpipe.checkpoints.single_file.unet import diffusers_names
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import is_gguf, read_tensors

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def read_part(part: Part, config: dict[str, Any], projection: bool = False) -> StateDict:
    """A part's tensors under the names of diffusers or transformers, as stored.

    config      of the network
    projection  whether a CLIP text encoder has a text_projection
    """
    stored = _stored(part)
    if part.layout == "ldm":
        layers = config.get("layers_per_block", 2)
        if type(layers) is not int:
            raise UserError(f"{part.path}: layers_per_block is {layers}; LDM's names are known for one number for all levels.")
        return {mine: stored[own] for mine, own in diffusers_names(part, layers).items()}
    if part.layout == "bfl":
        return tables.from_bfl(stored)
    if part.layout == "sd3":
        return tables.from_sd3(stored)
    if part.slot == "vae":
        return _vae(stored)
    if part.layout == "t5":
        return _t5(stored)
    if part.layout == "open-clip":
        return _open_clip(part, stored, config, projection)
    if part.layout == "clip":
        return _clip(part, stored, config, projection)
    return stored


def usual_dtype(tensors: StateDict) -> torch.dtype:
    """The dtype that most values of a part have; bf16 for fp8, which nothing computes in."""
    counts: Counter[torch.dtype] = Counter()
    for value in tensors.values():
        if value.is_floating_point():
            counts[value.dtype] += value.numel()
    most = counts.most_common(1)[0][0] if counts else torch.float32
    return torch.bfloat16 if most in FP8 else most


def _stored(part: Part) -> StateDict:
    """A part's tensors by their own names; fp8 that has scales times these."""
    read = read_gguf_tensors if is_gguf(part.path) else read_tensors
    found = read(part.path, part.names.values())
    stored = {own: found[full] for own, full in part.names.items()}
    if part.scales:
        scales = read_tensors(part.path, part.scales.values())
        for own, full in part.scales.items():
            if own in stored and stored[own].dtype in FP8:
                stored[own] = _scaled(stored[own], scales[full], f"{part.path}: {full}")
    return stored


def _scaled(weight: torch.Tensor, scale: torch.Tensor, what: str) -> torch.Tensor:
    """An fp8 weight times its scale (one, or one for each row), in bf16."""
    if scale.numel() not in (1, weight.shape[0]) or not torch.isfinite(scale.float()).all():
        raise UserError(
            f"{what} has {scale.numel()} values; expected one finite number, or one for each of {weight.shape[0]} rows."
        )
    factor = scale.float().reshape(-1, *[1] * (weight.ndim - 1)) if scale.numel() > 1 else scale.float().reshape(())
    return (weight.float() * factor).to(torch.bfloat16)


def _vae(stored: StateDict) -> StateDict:
    table = kl.key_table(stored) if kl.is_ldm(stored) else {}
    kept = {name: value for name, value in stored.items() if not name.startswith(kl.IGNORED)}
    moved = {table.get(name, kl.modern(name)): value for name, value in kept.items()}
    return {name: kl.as_linear(name, value) for name, value in moved.items()}


def _t5(stored: StateDict) -> StateDict:
    """T5's encoder; its table of words stands under two names, which are one tensor."""
    words = stored.get("shared.weight", stored.get("encoder.embed_tokens.weight"))
    kept = {name: value for name, value in stored.items() if not name.startswith(("decoder.", "lm_head.", "spiece_model"))}
    return kept if words is None else kept | {"shared.weight": words, "encoder.embed_tokens.weight": words}


def _clip(part: Part, stored: StateDict, config: dict[str, Any], projection: bool) -> StateDict:
    """CLIP's text encoder as transformers has it. Some files of Stable Diffusion 1 lack ``text_model.``."""
    inner = ("embeddings.", "encoder.", "final_layer_norm.")
    found = {f"text_model.{name}" if name.startswith(inner) else name: value for name, value in stored.items()}
    own = found.pop("text_projection.weight", found.pop("text_projection", None))
    if projection and part.slot == "clip_l":  # Stable Diffusion 3 takes what CLIP-L pools as it is
        width = int(config["hidden_size"])
        dtype = usual_dtype(found)
        own = torch.eye(int(config["projection_dim"]), width, dtype=dtype)
    return found | ({"text_projection.weight": own} if projection and own is not None else {})


def _open_clip(part: Part, stored: StateDict, config: dict[str, Any], projection: bool) -> StateDict:
    """OpenCLIP's text encoder by diffusers' converter: the rows of in_proj are taken apart."""
    from types import SimpleNamespace

    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    layers = int(config["num_hidden_layers"])
    kept = {}
    for name, value in stored.items():
        match = re.match(r"(?:model\.)?transformer\.resblocks\.(\d+)\.", name)
        if not (match and int(match[1]) >= layers):  # Stable Diffusion 2 reads the last layer but one
            kept[name.removeprefix("model.")] = value
    own = kept.pop("text_projection", None)
    width = SimpleNamespace(config=SimpleNamespace(hidden_size=int(config["hidden_size"])))
    found = convert_open_clip_checkpoint(width, {f"_.{name}": value for name, value in kept.items()}, prefix="_.")
    if projection and own is not None:
        found["text_projection.weight"] = own.T.contiguous()
    known = {f"_.{name}" for name in kept}
    strange = [name for name in known if not name.startswith("_.transformer.") and name.removeprefix("_.") not in _OPEN_CLIP]
    return found | {name.removeprefix("_."): kept[name.removeprefix("_.")] for name in strange}


_OPEN_CLIP = {"positional_embedding", "token_embedding.weight", "ln_final.weight", "ln_final.bias", "attn_mask"}


def tensors_in_folder(folder: Path) -> StateDict:
    """The tensors of a part in a diffusers folder: one file, shards with an index, or its fp16 variant."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [path for path in files if "." not in path.stem] or files
    found = {name: value for path in plain for name, value in read_tensors(path).items()}
    return _t5(found) if any(name.startswith("encoder.block.0.layer.0.") for name in found) else found
