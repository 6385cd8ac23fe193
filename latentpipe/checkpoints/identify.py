"""What a file looks like that is no VAE of ours, in words."""

from __future__ import annotations

import re
from collections.abc import Mapping

ADAPTER = re.compile(r"\.(lora_[AB]|base_layer|lora_magnitude_vector)\.")

# The first pattern that some name matches decides; each is a mark that only that kind of file has.
MARKS = (
    (r"(encoder|decoder)\..*\.(lora_[AB]|base_layer)\.", "a VAE with an adapter attached; merge the adapter into it first"),
    (r"lora_(unet|te\d?|transformer)_|.*\.?_?lora[._](down|up|[AB])\.|(unet|text_encoder):\d+:(up|down)", "a LoRA"),
    (r"emb_params$|string_to_param|<.*>$|clip_[lg]$", "a textual inversion embedding"),
    (r"controlnet_cond_embedding\.|control_model\.|input_hint_block\.", "a ControlNet"),
    (r"image_proj\.|ip_adapter\.", "an IP-Adapter"),
    (r"model\.diffusion_model\.", "a checkpoint that holds a denoiser and no VAE"),
    (r"time_embedding\.|time_embed\.|input_blocks\.", "a UNet (a denoiser)"),
    (r"(transformer|single_transformer|double|single|joint)_blocks\.\d+\.", "a denoising transformer"),
    (r"vision_model\.", "an image encoder"),
    (r"text_model\.|encoder\.block\.\d+\.layer\.|shared\.weight$", "a text encoder"),
    (r"decoder_unet\.", "a ConsistencyDecoderVAE without its config; give its diffusers folder"),
    (r"decoder\.condition_encoder\.", "an AsymmetricAutoencoderKL without its config; give its diffusers folder"),
    (r"(encoder|decoder)\.(down|up)_blocks\.\d+\.\d+\.", "an AutoencoderDC without its config; give its diffusers folder"),
    (r"(encoder|decoder)\.stages\.", "an AutoencoderDC in its authors' format, which is not read; give its diffusers folder"),
    (r"quantize\.|codebook\.", "a vector-quantized autoencoder, which has no continuous latents"),
)


def looks_like(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A phrase for what tensors of these names and shapes are; their first names where nothing is recognized."""
    for pattern, phrase in MARKS:
        mark = re.compile(pattern)
        if any(mark.match(name) for name in shapes):
            return phrase
    if any(len(shape) == 5 for shape in shapes.values()):
        return "a video model (3-D convolutions)"
    shown = ", ".join(sorted(shapes)[:3])
    return f"something else (it has {len(shapes)} tensors: {shown}, ...)" if shapes else "an empty file (it has no tensors)"


def carries_adapter(names: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether an adapter is attached: its matrices lie beside the layers that they change."""
    return any(ADAPTER.search(name) for name in names)
