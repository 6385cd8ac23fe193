"""Adapters made by code, for the tests of files."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from latentpipe.lora.adapter import Lora, LoraLayer

LINEARS = {
    "unet": [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    ],
    "text_encoder": ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1"],
    "text_encoder_2": ["encoder.layers.0.self_attn.out_proj", "text_projection"],
    "vae": ["decoder.mid_block.attentions.0.to_out.0", "encoder.mid_block.attentions.0.to_q"],
    "transformer": ["transformer_blocks.0.attn.add_k_proj", "single_transformer_blocks.1.proj_out"],
}
CONVS = {
    "unet": ["conv_in", "up_blocks.1.resnets.0.conv_shortcut"],
    "vae": ["decoder.up_blocks.0.resnets.0.conv1", "post_quant_conv"],
}


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(rank: int = 2, alpha: float = 3.0, out: int = 6, into: int = 4, seed: int = 0, **more: Any) -> LoraLayer:
    """LoRA of a linear layer."""
    return LoraLayer(
        "lora", {"lora_A": values(rank, into, seed=seed), "lora_B": values(out, rank, seed=seed + 1)}, rank, alpha, **more
    )


def conv(rank: int = 2, alpha: float = 3.0, out: int = 6, into: int = 4, side: int = 3, seed: int = 0) -> LoraLayer:
    """LoRA of a convolution."""
    down, up = values(rank, into, side, side, seed=seed), values(out, rank, 1, 1, seed=seed + 1)
    return LoraLayer("lora", {"lora_A": down, "lora_B": up}, rank, alpha)


def dora(layer: LoraLayer) -> LoraLayer:
    """The same with magnitudes in peft's shape."""
    out = layer.tensors["lora_B"].shape[0]
    lengths = values(out, seed=9).abs() + 0.1
    shaped = lengths.reshape(1, -1, 1, 1) if layer.tensors["lora_A"].ndim == 4 else lengths
    return LoraLayer("lora", {**layer.tensors, "lora_magnitude_vector": shaped}, layer.rank, layer.alpha, layer.rslora)


def loha(rank: int, alpha: float, out: int, into: int, seed: int, core: bool = False) -> LoraLayer:
    """LoHa of a linear layer, or with a core of a 3x3 convolution."""
    tensors = {}
    for n in (1, 2):
        tensors[f"hada_w{n}_a"] = values(*((rank, out) if core else (out, rank)), seed=seed + n)
        tensors[f"hada_w{n}_b"] = values(rank, into, seed=seed + n + 2)
        if core:
            tensors[f"hada_t{n}"] = values(rank, rank, 3, 3, seed=seed + n + 4)
    return LoraLayer("loha", tensors, rank, alpha)


def lokr(rank: int, alpha: float, whole: tuple[bool, bool], seed: int, core: bool = False) -> LoraLayer:
    """LoKr of a weight of 2 x 3 blocks of 4 x 5, each factor whole or in two."""
    tensors = {}
    if whole[0]:
        tensors["lokr_w1"] = values(2, 3, seed=seed)
    else:
        tensors |= {"lokr_w1_a": values(2, rank, seed=seed), "lokr_w1_b": values(rank, 3, seed=seed + 1)}
    if whole[1]:
        tensors["lokr_w2"] = values(4, 5, *((3, 3) if core else ()), seed=seed + 2)
    elif core:
        tensors |= {"lokr_w2_a": values(rank, 4, seed=seed + 2), "lokr_w2_b": values(rank, 5, seed=seed + 3)}
        tensors["lokr_t2"] = values(rank, rank, 3, 3, seed=seed + 4)
    else:
        tensors |= {"lokr_w2_a": values(4, rank, seed=seed + 2), "lokr_w2_b": values(rank, 5, seed=seed + 3)}
    return LoraLayer("lokr", tensors, rank, alpha)


@st.composite
def layers(draw: Any, square: bool) -> LoraLayer:
    """A layer of any kind, of a convolution or of a linear layer."""
    rank, seed = draw(st.integers(1, 4)), draw(st.integers(0, 99))
    alpha = draw(
        st.one_of(st.just(float(rank)), st.floats(0.125, 64, width=32), st.floats(-3, 64).filter(lambda x: abs(x) > 0.01))
    )
    out, into = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["lora", "dora", "loha", "lokr"]))
    if kind == "loha":
        return loha(rank, alpha, out, into, seed, core=square and draw(st.booleans()))
    if kind == "lokr":
        return lokr(rank, alpha, (draw(st.booleans()), draw(st.booleans())), seed, core=square)
    made = conv(rank, alpha, out, into, draw(st.sampled_from([1, 3])), seed) if square else linear(rank, alpha, out, into, seed)
    made = LoraLayer("lora", made.tensors, rank, alpha, draw(st.booleans()))
    made = dora(made) if kind == "dora" else made
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    return LoraLayer("lora", {name: value.to(dtype) for name, value in made.tensors.items()}, rank, alpha, made.rslora)


@st.composite
def loras(draw: Any) -> Lora:
    """An adapter of one to three components."""
    parts: dict[str, dict[str, LoraLayer]] = {}
    for component in sorted(draw(st.sets(st.sampled_from(sorted(LINEARS)), min_size=1, max_size=3))):
        if component == "transformer" and "unet" in parts:
            continue
        places = [(path, False) for path in LINEARS[component]] + [(path, True) for path in CONVS.get(component, [])]
        chosen = draw(st.lists(st.sampled_from(places), min_size=1, max_size=3, unique=True))
        parts[component] = {path: draw(layers(square)) for path, square in chosen}
    return Lora(parts, metadata={"latentpipe.trigger_words": '["flat style"]'})
