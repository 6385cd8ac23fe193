"""What an adapter adds to a weight, as one tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from latentpipe.lora.adapter import LoraLayer
from latentpipe.lora.injection import KEY, filled


@torch.no_grad()
def delta(layer: LoraLayer, base: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    """The change of a module's weight, in fp32: a tensor of the shape of `base` (out in, or out in kh kw).

    weight  the adapter's: w below

    LoRA: w s B A with s = alpha / r. DoRA: m (W + w s B A) / ||W + w s B A|| - W, the norm over each output's row
    (arXiv:2402.09353, eq. 5); w lies inside the norm, as in peft and diffusers, so the change is not proportional to it.
    LoHa and LoKr: w times what peft computes. At w = 0 every adapter is off: no change (a DoRA's in peft still sets the
    lengths of the rows).
    """
    tensors = layer.tensors
    if not weight:
        return torch.zeros(base.shape, device=base.device)
    if layer.kind != "lora":
        return _by_peft(layer, base) * weight
    up, down = (tensors[name].to(base.device, torch.float32).flatten(1) for name in ("lora_B", "lora_A"))
    change = ((up @ down) * layer.scale).reshape(base.shape) * weight
    if not layer.dora:
        return change
    full = base.float() + change
    rows = (-1, *[1] * (base.ndim - 1))
    length = full.flatten(1).norm(dim=1).reshape(rows)
    return tensors["lora_magnitude_vector"].to(base.device, torch.float32).reshape(rows) * full / length - base.float()


def _by_peft(layer: LoraLayer, base: torch.Tensor) -> torch.Tensor:
    """LoHa or LoKr, on an empty module of the weight's shape."""
    out, rest = base.shape[0], base.shape[1:]
    square = base.ndim == 4
    module = nn.Conv2d(rest[0], out, (rest[1], rest[2]), bias=False) if square else nn.Linear(rest[0], out, bias=False)
    wrapper: Any = filled(module.to(base.device), layer, "delta")
    return wrapper.get_delta_weight(KEY).reshape(base.shape).float()


def delta_shape(layer: LoraLayer) -> tuple[int, int]:
    """Rows and columns of the change: output channels, and input channels times kernel positions."""
    tensors = layer.tensors
    if layer.kind == "lora":
        return tensors["lora_B"].shape[0], tensors["lora_A"][0].numel()
    if layer.kind == "loha":
        if "hada_t1" in tensors:
            kernel = tensors["hada_t1"].shape[2:].numel()
            return tensors["hada_w1_a"].shape[1], tensors["hada_w1_b"].shape[1] * kernel
        return tensors["hada_w1_a"].shape[0], tensors["hada_w1_b"].shape[1]
    one = tensors["lokr_w1"].shape if "lokr_w1" in tensors else (tensors["lokr_w1_a"].shape[0], tensors["lokr_w1_b"].shape[1])
    if "lokr_w2" in tensors:
        two = (tensors["lokr_w2"].shape[0], tensors["lokr_w2"][0].numel())
    elif "lokr_t2" in tensors:
        kernel = tensors["lokr_t2"].shape[2:].numel()
        two = (tensors["lokr_w2_a"].shape[1], tensors["lokr_w2_b"].shape[1] * kernel)
    else:
        two = (tensors["lokr_w2_a"].shape[0], tensors["lokr_w2_b"].shape[1])
    return one[0] * two[0], one[1] * two[1]
