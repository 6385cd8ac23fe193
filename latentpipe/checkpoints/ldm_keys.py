"""AutoencoderKL under its two vocabularies, LDM's (A1111, ComfyUI) and diffusers', by one table for both directions."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from latentpipe.checkpoints.places.glance import Shapes

RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.18
IGNORED = ("loss.", "model_ema.")  # what training left in LDM files beside the autoencoder


def is_ldm(names: Collection[str]) -> bool:
    """Whether names are those of an LDM autoencoder, without prefix."""
    return "decoder.conv_in.weight" in names and any(name.startswith("decoder.up.") for name in names)


def is_diffusers(names: Collection[str]) -> bool:
    """Whether names are those of diffusers' AutoencoderKL, without prefix."""
    condition = any(name.startswith("decoder.condition_encoder.") for name in names)  # AsymmetricAutoencoderKL
    return "decoder.up_blocks.0.resnets.0.conv1.weight" in names and not condition


def modern(name: str) -> str:
    """A diffusers name as written today; files of 2022 call attention weights query, key, value and proj_attn."""
    head, _, tail = name.rpartition(".")
    stem, _, leaf = head.rpartition(".")
    return f"{stem}.{OLD_ATTENTION[leaf]}.{tail}" if ".attentions." in stem and leaf in OLD_ATTENTION else name


def key_table(names: Collection[str]) -> dict[str, str]:
    """LDM name -> diffusers name for every tensor that an autoencoder of as many levels and layers can have."""
    levels = len(_numbers(names, r"decoder\.up(?:_blocks)?\.(\d+)\."))
    layers = len(_numbers(names, r"decoder\.up(?:_blocks)?\.\d+\.(?:block|resnets)\.(\d+)\."))
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side, down in (("encoder", True), ("decoder", False)):
        for ldm, own in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
            modules[f"{side}.{ldm}"] = f"{side}.{own}"
        blocks = {f"{side}.mid.attn_1": (f"{side}.mid_block.attentions.0", ATTENTION)}
        for j in range(2):
            blocks[f"{side}.mid.block_{j + 1}"] = (f"{side}.mid_block.resnets.{j}", RESNET)
        for i in range(levels):
            # LDM counts levels by resolution in both halves; diffusers counts each half from its own entrance
            theirs = f"{side}.down.{i}" if down else f"{side}.up.{levels - 1 - i}"
            ours = f"{side}.down_blocks.{i}" if down else f"{side}.up_blocks.{i}"
            sampler = ("downsample", "downsamplers") if down else ("upsample", "upsamplers")
            modules[f"{theirs}.{sampler[0]}.conv"] = f"{ours}.{sampler[1]}.0.conv"
            for j in range(layers):
                blocks[f"{theirs}.block.{j}"] = (f"{ours}.resnets.{j}", RESNET)
                blocks[f"{theirs}.attn.{j}"] = (f"{ours}.attentions.{j}", ATTENTION)
        for ldm, (own, leaves) in blocks.items():
            modules |= {f"{ldm}.{leaf}": f"{own}.{mine}" for leaf, mine in leaves.items()}
    return {f"{ldm}.{part}": f"{own}.{part}" for ldm, own in modules.items() for part in ("weight", "bias")}


def as_linear(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """An attention weight as diffusers keeps it: (C, C) where LDM has (C, C, 1, 1)."""
    if ".attentions." in name and name.endswith(".weight") and tensor.ndim > 2:
        return tensor.flatten(1) if tensor.shape[2:].numel() == 1 else tensor
    return tensor


def to_ldm(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers-named tensors under LDM's names; KeyError on a name that LDM has none for."""
    back = {own: ldm for ldm, own in key_table(tensors).items()}
    found = {}
    for name, tensor in tensors.items():
        matrix = ".attentions." in name and tensor.ndim == 2
        found[back[name]] = tensor[:, :, None, None].contiguous() if matrix else tensor
    return found


def ldm_config(shapes: Shapes) -> dict[str, Any]:
    """The AutoencoderKL config that shapes (diffusers names) tell; norm_num_groups, which they do not, is absent.

    KeyError where a tensor that every AutoencoderKL has is missing.
    """
    levels = len(_numbers(shapes, r"encoder\.down_blocks\.(\d+)\."))
    attention = {
        (side, i): f"{side}.{kind}_blocks.{i}.attentions.0.to_q.weight" in shapes
        for side, kind in (("encoder", "down"), ("decoder", "up"))
        for i in range(levels)
    }
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)],
        "layers_per_block": len(_numbers(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")),
        "down_block_types": [f"{'Attn' if attention['encoder', i] else ''}DownEncoderBlock2D" for i in range(levels)],
        "up_block_types": [f"{'Attn' if attention['decoder', i] else ''}UpDecoderBlock2D" for i in range(levels)],
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "act_fn": "silu",
    }


def _numbers(names: Collection[str], pattern: str) -> set[str]:
    return {match[1] for name in names if (match := re.match(pattern, name))}
