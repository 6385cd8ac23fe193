"""Files of true size that take no room: a header and a hole, with the names and shapes of published models."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import written
from accelerate import init_empty_weights

BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1, "I64": 8}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
SD = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
XL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {**SD, "cross_attention_dim": 768},
    "sd2": {**SD, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sdxl": XL,
    "ssd-1b": {  # its published config
        **XL,
        "transformer_layers_per_block": (1, 2, 4),
        "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
        "mid_block_type": "UNetMidBlock2D",
    },
    "vega": {**XL, "transformer_layers_per_block": (1, 1, 2), "mid_block_type": "UNetMidBlock2D"},
    "sdxl-refiner": {
        **XL,
        "block_out_channels": (384, 768, 1536, 1536),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 4,
        "attention_head_dim": (6, 12, 24, 24),
        "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 2560,
    },
}


@lru_cache(maxsize=16)
def network(name: str, channels: int = 4) -> Any:
    """A denoiser of true size on the meta device."""
    import diffusers

    with init_empty_weights():
        if name in UNETS:
            return diffusers.UNet2DConditionModel(in_channels=channels, out_channels=4, **UNETS[name])
        if name.startswith("flux"):
            out = None if channels == 64 else 64
            return diffusers.FluxTransformer2DModel(
                in_channels=channels, out_channels=out, guidance_embeds=name != "flux-schnell"
            )
        large = name == "sd3.5-large"
        shape: dict[str, Any] = {"num_layers": 38 if large else 24, "num_attention_heads": 38 if large else 24}
        shape |= {
            "caption_projection_dim": 64 * shape["num_layers"],
            "pos_embed_max_size": 384 if name == "sd3.5-medium" else 192,
        }
        if name != "sd3":
            shape |= {"qk_norm": "rms_norm", "dual_attention_layers": () if large else tuple(range(13))}
        return diffusers.SD3Transformer2DModel(
            in_channels=16, pooled_projection_dim=2048, joint_attention_dim=4096, sample_size=128, **shape
        )


@lru_cache(maxsize=4)
def vae(channels: int = 4) -> Any:
    """The usual AutoencoderKL on the meta device."""
    from diffusers import AutoencoderKL

    quant = channels == 4
    with init_empty_weights():
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        widths = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": channels}
        return AutoencoderKL(**blocks, **widths, use_quant_conv=quant, use_post_quant_conv=quant)


@lru_cache(maxsize=8)
def clip(name: str) -> Any:
    """A text encoder on the meta device: "l", "h" or "g"."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with init_empty_weights():
        return (CLIPTextModelWithProjection if name == "g" else CLIPTextModel)(
            CLIPTextConfig(**{"l": CLIP_L, "h": CLIP_H, "g": CLIP_G}[name])
        )


@lru_cache(maxsize=1)
def t5() -> Any:
    """T5-XXL's encoder on the meta device."""
    from transformers import T5Config, T5EncoderModel

    with init_empty_weights():
        return T5EncoderModel(
            T5Config(
                d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128, feed_forward_proj="gated-gelu"
            )
        )


def denoiser(name: str, channels: int = 4) -> dict[str, torch.Tensor]:
    """A denoiser's tensors as its authors name them, without prefix."""
    model = network(name, channels)
    return written.ldm_unet(model) if name in UNETS else written.flux(model) if name.startswith("flux") else written.sd3(model)


def whole(name: str, channels: int = 4) -> dict[str, torch.Tensor]:
    """All tensors of a model's single file, on the meta device."""
    under, clip_l, comfy = written.under, written.clip, "text_encoders.{}.transformer."
    found = under(written.UNET, denoiser(name, channels)) | under(written.VAE, written.ldm_vae(vae(4 if name in UNETS else 16)))
    if name == "sd1":
        return found | under("cond_stage_model.transformer.", clip_l(clip("l")))
    if name == "sd2":
        return found | under("cond_stage_model.model.", written.open_clip(clip("h")))
    if name == "sdxl-refiner":
        return found | under("conditioner.embedders.0.model.", written.open_clip(clip("g")))
    if name in UNETS:
        found |= under("conditioner.embedders.0.transformer.", clip_l(clip("l")))
        return found | under("conditioner.embedders.1.model.", written.open_clip(clip("g")))
    found |= under(comfy.format("clip_l"), clip_l(clip("l"))) | under(comfy.format("t5xxl"), written.t5(t5()))
    return found if name.startswith("flux") else found | under(comfy.format("clip_g"), clip_l(clip("g")))


def hollow(
    tensors: dict[str, Any], path: Path, dtype: str = "F16", metadata: dict[str, str] | None = None, **dtypes: str
) -> Path:
    """A safetensors file of zeros that takes the room of its header: tensors (or shapes) of one dtype, but those in `dtypes`."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, value in tensors.items():
        shape = list(value.shape) if isinstance(value, torch.Tensor) else list(value)
        kind = dtypes.get(name, "I64" if name.endswith("position_ids") else dtype)
        size = BYTES[kind]
        for side in shape:
            size *= side
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return path
