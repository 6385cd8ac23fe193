"""What an adapter adds to a weight, as one tensor."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from latentpipe.lora.adapter import Lora, LoraLayer
from latentpipe.lora.injection import KEY, filled
from latentpipe.utils.errors import LatentpipeWarning, UserError


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


NOISE = 1e-6  # singular values below this share of the largest are rounding
EXACT = 1e-5  # a relative error below this is not worth a warning


@torch.no_grad()
def factored(matrix: torch.Tensor, rank: int | float | None = None) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best B (out r) and A (r in) in fp32 with B A near `matrix` (out in), and the share of its energy they hold.

    rank  an int: at most so many columns; a float in (0, 1): as few as hold that share of the energy (the sum of the
          squared entries); None: as many as the matrix has. The truncated SVD is the best of its rank (Eckart and Young,
          1936); each singular value is shared evenly between B and A, so that neither leaves the range of fp16 first.

    A zero matrix gives zero factors of rank 1 and the share 1.
    """
    left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    energy = values.double().square()
    total = energy.sum()
    if not total:
        return left[:, :1] * 0, right[:1] * 0, 1.0
    count = int((values > NOISE * values[0]).sum())
    if isinstance(rank, float):
        count = min(count, int((energy.cumsum(0) < rank * total).sum()) + 1)
    elif rank is not None:
        count = min(count, rank)
    root = values[:count].sqrt()
    return left[:, :count] * root, root[:, None] * right[:count], float(energy[:count].sum() / total)


def plain_layer(change: torch.Tensor, rank: int | float | None = None) -> tuple[LoraLayer, float]:
    """A change of a weight (out in, or out in kh kw) as a plain LoRA layer with alpha = rank, and the share of energy held."""
    up, down, share = factored(change.flatten(1), rank)
    count = down.shape[0]
    if change.ndim == 4:
        up, down = up[:, :, None, None], down.reshape(count, *change.shape[1:])
    return LoraLayer("lora", {"lora_A": down.contiguous(), "lora_B": up.contiguous()}, count, float(count)), share


@torch.no_grad()
def as_plain(lora: Lora, rank: int | None = None) -> Lora:
    """The adapter with every LoHa and LoKr layer as plain LoRA (B A), in fp32.

    rank  the most that a layer may have; a plain layer above it is reduced too. None: as many as the layer needs to be
          exact, which for LoHa is up to r squared and for LoKr up to the whole matrix.

    Where the rank does not suffice, the best factors of that rank are kept and a warning gives the relative error over all
    layers. A convolution's A comes out flattened (r, in kh kw) where its file does not tell the kernel. UserError for
    DoRA, whose change depends on the base's weights, and for a rank below 1.
    """
    if rank is not None and rank < 1:
        raise UserError(f"The rank is {rank}; expected 1 or more.")
    parts: dict[str, dict[str, LoraLayer]] = {}
    lost = whole = 0.0
    for component, path, layer in lora.layers():
        if layer.dora:
            raise UserError(
                f"LoRA '{lora.name}' has a DoRA layer ({component}.{path}), whose change depends on the base's weights, so it "
                "has no plain form without them; mix it unmerged, or save the model with it fused and extract from that."
            )
        if layer.kind != "lora" or (rank is not None and layer.rank > rank):
            change = _change(layer)
            layer, share = plain_layer(change, rank)
            energy = change.double().square().sum().item()
            lost, whole = lost + (1 - share) * energy, whole + energy
        parts.setdefault(component, {})[path] = layer
    error = (lost / whole) ** 0.5 if whole else 0.0
    if error > EXACT:
        warnings.warn(
            f"LoRA '{lora.name}' as plain LoRA of rank {rank} is not exact: its change of the weights differs by {error:.2%} "
            "(relative, over the layers that were converted); a higher rank comes nearer.",
            LatentpipeWarning,
            stacklevel=2,
        )
    return replace(lora, parts=parts)


def _change(layer: LoraLayer) -> torch.Tensor:
    """The change at weight 1, in fp32: out in, or out in kh kw where the layer tells its kernel."""
    rows, columns = delta_shape(layer)
    tensors = layer.tensors
    name = next(
        (name for name in ("hada_t1", "lokr_t2", "lokr_w2", "lora_A") if name in tensors and tensors[name].ndim == 4), None
    )
    if name is None:
        return delta(layer, torch.zeros(rows, columns))
    kernel = tensors[name].shape[2:]
    return delta(layer, torch.zeros(rows, columns // kernel.numel(), *kernel))
