"""Factors into a VAE's weights that keep its activations small and its output the same.

GroupNorm removes the scale of what it gets, and a ReLU network passes a scale through, so a factor in one layer can be
taken out in a later one. Factors are powers of two, exact in floating point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from latentpipe.utils.errors import UserError

LARGEST = 65504.0  # the largest number of fp16
TARGET = LARGEST / 16  # activations are kept below this, since other pictures have larger ones


def check_class(vae: Any) -> None:
    """UserError for an autoencoder whose factors are not known here."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    from latentpipe.vae.tiny import TinyVAE

    activation = getattr(vae, "config", {}).get("act_fn")
    relu = isinstance(vae, TinyVAE) or (isinstance(vae, AutoencoderTiny) and activation == "relu")
    if not (relu or isinstance(vae, AutoencoderKL)):
        known = "AutoencoderKL, and AutoencoderTiny and TinyVAE with ReLU"
        raise UserError(f"make-fp16-safe knows {known}; given {type(vae).__name__}. Run it in bf16 or fp32.")
    if vae.decoder is None:
        raise UserError("This VAE has no decoder; make-fp16-safe expects both halves. Run it in bf16 or fp32.")


@torch.no_grad()
def rescale(vae: Any, largest: Mapping[str, float]) -> dict[str, float]:
    """Rescale an AutoencoderKL or AutoencoderTiny in place; return layer -> factor of what it returns, where it is not 1.

    `largest` has the largest absolute output of every module, by name, in the order in which they ended. Only what
    passes TARGET is scaled, and by as little as possible: GroupNorm's eps (1e-6) is no part of a saved VAE, so it
    cannot shrink with the variance beside it.
    """
    from diffusers import AutoencoderKL

    check_class(vae)
    return _kl(vae, largest) if isinstance(vae, AutoencoderKL) else _tiny(vae, largest)


def _factor(size: float) -> float:
    """The largest power of two, at most 1, that brings `size` below TARGET."""
    return 1.0 if size <= TARGET else 2.0 ** math.floor(math.log2(TARGET / size))


def _times(vae: Any, scales: dict[str, float], name: str, weight: float, bias: float) -> None:
    """Multiply a layer's weight and bias. The bias scales as what the layer returns does, so `scales` notes its factor."""
    layer = vae.get_submodule(name)
    layer.weight *= weight
    if layer.bias is not None:
        layer.bias *= bias
    if bias != 1:
        scales[name] = bias


def _kl(vae: Any, largest: Mapping[str, float]) -> dict[str, float]:
    """Scale the residual stream segment by segment (conv_norm_out removes the last factor), and within its blocks."""
    scales: dict[str, float] = {}
    for half in ("encoder", "decoder"):
        before = 1.0
        for segment in _segments(vae, half, largest):
            writers = [f"{unit}{part}" for unit in segment for part in ("", ".conv2", ".conv_shortcut", ".to_out.0", ".conv")]
            scale = _factor(max(largest.get(name, 0.0) for name in writers))
            for unit in segment:
                _unit(vae, scales, unit, scale, before, largest)
                before = scale
    return scales


def _segments(vae: Any, half: str, largest: Mapping[str, float]) -> list[list[str]]:
    """The blocks along the residual stream as they ran; a segment begins where the whole stream passes a convolution."""
    segments: list[list[str]] = []
    for name in largest:
        module = vae.get_submodule(name)
        kind = type(module).__name__
        if name == f"{half}.conv_in":
            segments.append([name])
        elif name.startswith(f"{half}.") and kind in ("ResnetBlock2D", "Attention", "Downsample2D", "Upsample2D"):
            shortcut = getattr(module, "conv_shortcut", None)
            if shortcut is not None or isinstance(getattr(module, "conv", None), nn.Conv2d):
                segments.append([])
            segments[-1].append(name)
    return segments


def _unit(vae: Any, scales: dict[str, float], unit: str, scale: float, before: float, largest: Mapping[str, float]) -> None:
    """One block whose input has the factor `before` and whose output gets `scale`."""
    module = vae.get_submodule(unit)
    kind = type(module).__name__
    if kind == "ResnetBlock2D":
        inner = _factor(largest[f"{unit}.conv1"])
        _times(vae, scales, f"{unit}.conv1", inner, inner)  # norm2 removes it
        _times(vae, scales, f"{unit}.conv2", scale, scale)
        if module.conv_shortcut is not None:
            _times(vae, scales, f"{unit}.conv_shortcut", scale / before, scale)
    elif kind == "Attention":
        inner = _factor(largest[f"{unit}.to_v"])
        _times(vae, scales, f"{unit}.to_v", inner, inner)
        _times(vae, scales, f"{unit}.to_out.0", scale / inner, scale)
        query, key = (max(largest[f"{unit}.{name}"], 1e-6) for name in ("to_q", "to_k"))
        if max(query, key) > TARGET:  # their product stays
            balance = 2.0 ** round(math.log2(key / query) / 2)
            _times(vae, scales, f"{unit}.to_q", balance, balance)
            _times(vae, scales, f"{unit}.to_k", 1 / balance, 1 / balance)
    elif unit.endswith("conv_in"):
        _times(vae, scales, unit, scale, scale)
    elif isinstance(getattr(module, "conv", None), nn.Conv2d):
        _times(vae, scales, f"{unit}.conv", scale / before, scale)


def _tiny(vae: Any, largest: Mapping[str, float]) -> dict[str, float]:
    """One factor from the first convolution to the last, which takes it out; a `pool` branch's GroupNorm removes it within."""
    scales: dict[str, float] = {}
    for half in ("encoder", "decoder"):
        names = [name for name, module in vae.named_modules() if name.startswith(f"{half}.") and isinstance(module, nn.Conv2d)]
        blocks = [name for name in largest if type(vae.get_submodule(name)).__name__.endswith("Block") and name.startswith(half)]
        scale = _factor(max(largest[name] for name in [*names[:-1], *blocks]))
        writers = {names[0]} | {
            pool[-1] for block in blocks if (pool := [name for name in names if name.startswith(f"{block}.pool")])
        }
        for name in names[:-1]:
            _times(vae, scales, name, scale if name in writers else 1.0, scale)
        _times(vae, scales, names[-1], 1 / scale, 1.0)
    return scales
