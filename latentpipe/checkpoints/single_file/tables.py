"""Names of FLUX's and Stable Diffusion 3's transformers: their authors' -> diffusers'; stacked weights become views."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

StateDict = dict[str, torch.Tensor]
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_EMBEDDER = "time_text_embed"

# module -> module, or -> the modules that its rows are stacked from
BFL: dict[str, str | tuple[str, ...]] = {
    "time_in.in_layer": f"{_EMBEDDER}.timestep_embedder.linear_1",
    "time_in.out_layer": f"{_EMBEDDER}.timestep_embedder.linear_2",
    "vector_in.in_layer": f"{_EMBEDDER}.text_embedder.linear_1",
    "vector_in.out_layer": f"{_EMBEDDER}.text_embedder.linear_2",
    "guidance_in.in_layer": f"{_EMBEDDER}.guidance_embedder.linear_1",
    "guidance_in.out_layer": f"{_EMBEDDER}.guidance_embedder.linear_2",
    "txt_in": "context_embedder",
    "img_in": "x_embedder",
    "final_layer.linear": "proj_out",
}
BFL_DOUBLE: dict[str, str | tuple[str, ...]] = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": _ADDED,
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
BFL_SINGLE: dict[str, str | tuple[str, ...]] = {
    "modulation.lin": "norm.linear",
    "linear1": (*_QKV, "proj_mlp"),
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
SD3: dict[str, str | tuple[str, ...]] = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": f"{_EMBEDDER}.timestep_embedder.linear_1",
    "t_embedder.mlp.2": f"{_EMBEDDER}.timestep_embedder.linear_2",
    "y_embedder.mlp.0": f"{_EMBEDDER}.text_embedder.linear_1",
    "y_embedder.mlp.2": f"{_EMBEDDER}.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}
SD3_BLOCK: dict[str, str | tuple[str, ...]] = {
    "x_block.attn.qkv": _QKV,
    "context_block.attn.qkv": _ADDED,
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.attn.proj": "attn.to_out.0",
    "context_block.attn.proj": "attn.to_add_out",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
BLOCKS = {
    "double_blocks": ("transformer_blocks", BFL_DOUBLE),
    "single_blocks": ("single_transformer_blocks", BFL_SINGLE),
    "joint_blocks": ("transformer_blocks", SD3_BLOCK),
}


def from_bfl(tensors: Mapping[str, torch.Tensor]) -> StateDict:
    """FLUX.1's tensors under diffusers' names; names that have none there stay as they are."""
    found: StateDict = {}
    for name, value in tensors.items():
        found |= _moved(name, value, BFL) or _final(name, value) or {name: value}
    return found


def from_sd3(tensors: Mapping[str, torch.Tensor]) -> StateDict:
    """Stable Diffusion 3's tensors under diffusers' names; names that have none there stay as they are."""
    last = max((int(match[1]) for name in tensors if (match := re.match(r"joint_blocks\.(\d+)\.", name))), default=-1)
    found: StateDict = {}
    for name, value in tensors.items():
        if name == "pos_embed":
            found["pos_embed.pos_embed"] = value
        elif name.startswith(f"joint_blocks.{last}.context_block.adaLN_modulation.1."):
            end = name.rpartition(".")[2]  # the last block ends the texts' stream: scale and shift alone, in the other order
            found[f"transformer_blocks.{last}.norm1_context.linear.{end}"] = _swapped(value)
        else:
            found |= _moved(name, value, SD3) or _final(name, value) or {name: value}
    return found


def _moved(name: str, value: torch.Tensor, top: Mapping[str, str | tuple[str, ...]]) -> StateDict:
    """A tensor under diffusers' name, or its rows under several; empty where the tables do not name it."""
    block = re.match(r"(double_blocks|single_blocks|joint_blocks)\.(\d+)\.", name)
    prefix, table = "", top
    if block:
        own, table = BLOCKS[block[1]]
        prefix, name = f"{own}.{block[2]}.", name[block.end() :]
    module, _, end = name.rpartition(".")
    target = table.get(module)
    if target is None:
        return {}
    end = "weight" if end == "scale" else end
    if isinstance(target, str):
        return {f"{prefix}{target}.{end}": value}
    if len(target) == 3:
        rows = value.shape[0] // 3
        sizes = [rows, rows, value.shape[0] - 2 * rows]
    else:  # queries, keys, values, and four times as many rows of the MLP
        rows = value.shape[0] // 7
        sizes = [rows, rows, rows, value.shape[0] - 3 * rows]
    return {f"{prefix}{own}.{end}": part for own, part in zip(target, value.split(sizes), strict=True)}


def _final(name: str, value: torch.Tensor) -> StateDict:
    if name.startswith("final_layer.adaLN_modulation.1."):
        return {f"norm_out.linear.{name.rpartition('.')[2]}": _swapped(value)}
    return {}


def _swapped(value: torch.Tensor) -> torch.Tensor:
    """Their shift and scale are diffusers' scale and shift."""
    shift, scale = value.chunk(2)
    return torch.cat([scale, shift])
