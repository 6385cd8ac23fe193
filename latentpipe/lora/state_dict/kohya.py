"""Kohya's and LyCORIS' tensors to peft's and back: DoRA's magnitudes, LoCon's third factor, whole LoKr factors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from latentpipe.lora.adapter import LoraLayer
from latentpipe.utils.errors import UserError

DOWN, UP = "lora_down.weight", "lora_up.weight"


def to_kohya(layer: LoraLayer) -> dict[str, torch.Tensor]:
    """The tensors of one module by the ends of kohya's keys; ``alpha`` such that alpha / rank is the layer's scale.

    A LoKr of two whole factors has no rank in kohya's reading and always scale 1; with another scale its first factor is
    written as a product with the identity, which gives the format a rank to divide alpha by (arXiv:2309.14859, eq. 8).
    """
    tensors = dict(layer.tensors)
    named = {"lora_A": DOWN, "lora_B": UP, "lora_magnitude_vector": "dora_scale"}
    rank = layer.rank
    if is_whole(tensors) and layer.scale != 1:
        first = tensors.pop("lokr_w1")
        rank = first.shape[1]
        tensors |= {"lokr_w1_a": first, "lokr_w1_b": torch.eye(rank, dtype=first.dtype)}
    out = {named.get(name, name): value for name, value in tensors.items()}
    if "dora_scale" in out:
        size = layer.tensors["lora_A"].ndim
        out["dora_scale"] = out["dora_scale"].reshape(-1, *[1] * (size - 1))
    return out | {"alpha": torch.tensor(layer.scale * rank, dtype=torch.float32)}


def is_whole(tensors: Mapping[str, object]) -> bool:
    """Whether it is a LoKr whose two factors are both whole matrices, so that no shape tells its rank."""
    return "lokr_w1" in tensors and "lokr_w2" in tensors


def magnitudes(scale: torch.Tensor, down: torch.Tensor, up: torch.Tensor, where: str) -> torch.Tensor:
    """Kohya's ``dora_scale`` (out 1 [1 1]) as peft's magnitudes: (out), or (1 out 1 1) of a convolution.

    LyCORIS also knows lengths of columns (1 in [1 1]); peft's DoRA has rows only, so these are refused.
    """
    out = up.shape[0]
    if scale.ndim > 1 and scale.shape[0] == 1 and scale.numel() > 1:
        raise UserError(
            f"{where}: its dora_scale {tuple(scale.shape)} sets the length of the weight's columns; only DoRA of rows "
            f"({out} 1) can be attached."
        )
    if scale.numel() != out:
        raise UserError(f"{where}: its dora_scale is {tuple(scale.shape)}, expected one number for each of {out} rows.")
    return as_magnitudes(scale, down)


def as_magnitudes(values: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """One number for each row of the weight, in peft's shape."""
    return values.reshape(1, -1, *[1] * (down.ndim - 2)) if down.ndim > 2 else values.reshape(-1)


def fold(mid: torch.Tensor, down: torch.Tensor, where: str) -> torch.Tensor:
    """LoCon's ``lora_mid`` (r r kh kw) after ``lora_down`` (r in [1 1]) as one kernel (r in kh kw); fp32.

    up(mid(down(x))) has the kernel sum_s mid[r, s] down[s, i], as the middle one alone sees neighbours.
    """
    rank = down.shape[0]
    if mid.ndim != 4 or tuple(mid.shape[:2]) != (rank, rank) or down[0].numel() != down.shape[1]:
        raise UserError(
            f"{where}: its lora_mid is {tuple(mid.shape)} and its lora_down {tuple(down.shape)}; "
            f"expected ({rank}, {rank}, kh, kw) and ({rank}, in, 1, 1)."
        )
    return torch.einsum("rskl,si->rikl", mid.float(), down.flatten(1).float()).contiguous()
