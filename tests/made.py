"""Random adapters made for real components."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from latentpipe.lora.adapter import Lora, LoraLayer
from latentpipe.lora.target_modules import leaves, select_all


def layer_for(
    weight: torch.Tensor, rank: int, seed: int, alpha: float | None = None, scale: float = 0.1, dora: bool = False
) -> LoraLayer:
    """A random LoRA (or DoRA) layer for a weight."""
    generator = torch.Generator().manual_seed(seed)
    ones = (1,) * (weight.ndim - 2)
    tensors = {
        "lora_A": torch.randn(rank, *weight.shape[1:], generator=generator) * scale,
        "lora_B": torch.randn(weight.shape[0], rank, *ones, generator=generator) * scale,
    }
    if dora:
        length = weight.flatten(1).norm(dim=1) * (1 + 0.1 * torch.rand(len(weight), generator=generator))
        tensors["lora_magnitude_vector"] = length[None, :, None, None] if weight.ndim == 4 else length
    return LoraLayer("lora", tensors, rank, float(rank if alpha is None else alpha))


def random_lora(
    components: dict[str, nn.Module], sites: Sequence[str] = ("unet.all", "text"), name: str = "a", rank: int = 2, **how: Any
) -> Lora:
    """A random adapter on these sites."""
    parts: dict[str, dict[str, LoraLayer]] = {}
    seed = sum(map(ord, name))
    for component, paths in select_all(components, sites).items():
        modules = leaves(components[component])
        parts[component] = {
            path: layer_for(modules[path].weight, rank, seed + index, **how)  # type: ignore[arg-type]
            for index, path in enumerate(paths)
        }
    return Lora(parts, name)
