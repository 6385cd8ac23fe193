"""The oldest LoRA files (cloneofsimo/lora): tensors by number alone, in the order in which the layers were found.

``unet:i:up`` and ``unet:i:down`` in safetensors, bare lists [up, down, up, down, ...] in .pt files. The order is that of the
modules at the time: blocks down, up, mid; in a block attn1 (q k v out), the projection of ff (where it was trained), attn2.
A CLIP encoder's attention registers k, v, q, out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from latentpipe.lora.state_dict.keys import Base
from latentpipe.utils.errors import UserError

_KEY = re.compile(r"(unet|text_encoder):(\d{1,6}):(up|down)")
_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\.transformer_blocks\.(\d+)")
_SD = [f"down_blocks.{b}.attentions.{n}" for b in range(3) for n in range(2)]
_SD += [f"up_blocks.{b}.attentions.{n}" for b in range(1, 4) for n in range(3)] + ["mid_block.attentions.0"]
SD_BLOCKS = [f"{place}.transformer_blocks.0" for place in _SD]  # SD1.x and SD2.x
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CLIP = ("k_proj", "v_proj", "q_proj", "out_proj")


def is_ancestral(names: Sequence[str]) -> bool:
    """Whether a file's keys are numbers."""
    return any(_KEY.fullmatch(name) for name in names)


def from_list(tensors: Sequence[object], where: str) -> dict[str, torch.Tensor]:
    """A .pt file's list [up, down, ...] by the keys that the safetensors files have."""
    pairs = [value for value in tensors if isinstance(value, torch.Tensor) and value.ndim == 2]
    if len(pairs) != len(tensors) or not pairs or len(pairs) % 2:
        raise UserError(f"{where}: holds a list of {len(tensors)}; expected the tensors up, down, up, down, ... of a LoRA.")
    sizes = {(up.shape[0], down.shape[1]) for up, down in zip(pairs[::2], pairs[1::2], strict=True)}
    # a CLIP encoder's attention is square and of one width; a UNet's is not
    component = "text_encoder" if len(sizes) == 1 and all(out == into for out, into in sizes) else "unet"
    return {f"{component}:{index // 2}:{'down' if index % 2 else 'up'}": value for index, value in enumerate(pairs)}


def rename(
    tensors: Mapping[str, torch.Tensor], base: Base | None
) -> tuple[dict[tuple[str, str], dict[str, tuple[str, torch.Tensor]]], list[str]]:
    """Key and tensor by component, path and role; and the keys of something else (learnt words).

    base  module paths by component; without it the layout of SD1.5
    """
    found: dict[str, dict[int, dict[str, tuple[str, torch.Tensor]]]] = {}
    unread = []
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            role = "lora_B" if match[3] == "up" else "lora_A"
            found.setdefault(match[1], {}).setdefault(int(match[2]), {})[role] = (key, tensor)
        else:
            unread.append(key)
    layers: dict[tuple[str, str], dict[str, tuple[str, torch.Tensor]]] = {}
    for component, numbered in found.items():
        if sorted(numbered) != list(range(len(numbered))):
            raise UserError(f"its layers of {component} are not numbered from 0 without a gap; the file is not whole.")
        paths = _unet_paths(numbered, base) if component == "unet" else _text_paths(len(numbered))
        layers |= {(component, path): numbered[index] for index, path in enumerate(paths)}
    return layers, unread


def _unet_paths(numbered: Mapping[int, Mapping[str, tuple[str, torch.Tensor]]], base: Base | None) -> list[str]:
    blocks = _blocks((base or {}).get("unet", ())) or SD_BLOCKS
    fifth = numbered.get(4, {})
    sizes = [tensor.shape for _, (_, tensor) in sorted(fifth.items()) if tensor.ndim == 2]
    forward = len(sizes) == 2 and sizes[1][0] == 8 * sizes[0][1]  # GEGLU: 4 times as wide, twice
    inside = [f"attn1.{name}" for name in ATTENTION]
    inside += ["ff.net.0.proj"] * forward + [f"attn2.{name}" for name in ATTENTION]
    if len(numbered) != len(blocks) * len(inside):
        raise UserError(
            f"it holds {len(numbered)} numbered layers of a UNet, but this one has {len(blocks)} attention blocks of "
            f"{len(inside)}, which makes {len(blocks) * len(inside)}; which layer is which cannot be known."
        )
    return [f"{block}.{name}" for block in blocks for name in inside]


def _text_paths(count: int) -> list[str]:
    if count % len(CLIP):
        raise UserError(f"it holds {count} numbered layers of a text encoder; expected four for each of its blocks.")
    return [f"encoder.layers.{block}.self_attn.{name}" for block in range(count // len(CLIP)) for name in CLIP]


def _blocks(paths: Iterable[str]) -> list[str]:
    """The attention blocks among a UNet's module paths, in the order down, up, mid."""
    order = {"down": 0, "up": 1, None: 2}
    found = {match[0]: match for path in paths if (match := _BLOCK.match(path))}
    keys = {name: (order[m[1]], int(m[2] or 0), int(m[3]), int(m[4])) for name, m in found.items()}
    return sorted(keys, key=lambda name: keys[name])
