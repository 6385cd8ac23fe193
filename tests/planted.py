"""VAEs whose weights fit into fp16 while some activation does not: the black picture, made by hand."""

from __future__ import annotations

from typing import Any

import torch
from helpers import tiny_vae

HUGE = 2.0**19  # a random weight (below 0.1) times this is below 65504; what the convolution returns is above
# place -> (direction, the block that must be named)
PLACES = {
    "conv1": ("decode", "decoder.up_blocks.1.resnets.1.conv1"),
    "encoder conv1": ("encode", "encoder.down_blocks.1.resnets.0.conv1"),
    "add": ("decode", "decoder.mid_block.resnets.0"),
    "encoder add": ("encode", "encoder.down_blocks.0.resnets.0"),
    "value": ("decode", "decoder.mid_block.attentions.0.to_v"),
    "encoder value": ("encode", "encoder.mid_block.attentions.0.to_v"),
    "stream": ("decode", "decoder.conv_in"),
    "tiny": ("decode", "decoder.layers.2.conv.4"),
    "encoder tiny": ("encode", "encoder.layers.1.conv.4"),
}


@torch.no_grad()
def planted(place: str) -> Any:
    """A VAE of fp32 weights that overflows in fp16 at `place`, a key of PLACES; every weight fits into fp16."""
    vae = tiny_ae() if "tiny" in place else tiny_vae(mid_block_add_attention=True)
    direction, block = PLACES[place]
    part = vae.decoder if direction == "decode" else vae.encoder
    if "conv1" in place or "tiny" in place:
        times(vae.get_submodule(block), HUGE)
    if "tiny" in place:
        part.layers[-1].weight /= 2.0**12
    if "add" in place:
        resnet = vae.get_submodule(block)
        for conv in (part.conv_in, resnet.conv2):
            times(conv, 2.0**13)
            conv.bias += 40000
    if "value" in place:
        attention = part.mid_block.attentions[0]
        times(attention.to_v, 2.0**17)
        attention.to_out[0].weight /= 2.0**10
    if "stream" in place:
        for name, module in part.named_modules():
            if name == "conv_in" or name.endswith(("conv2", "to_out.0")):
                times(module, HUGE / 2)
    return vae


def tiny_ae() -> Any:
    """A small AutoencoderTiny with random weights, 4 channels at 1/2 size."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    sizes = {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16)}
    return AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4).eval()


def times(module: Any, factor: float) -> None:
    """Multiply a module's weight, and its bias where it has one."""
    module.weight *= factor
    if module.bias is not None:
        module.bias *= factor


def encode(vae: Any, images: torch.Tensor) -> Any:
    """What diffusers' encode returns: a posterior, or raw latents."""
    encoded = vae.encode(images)
    return encoded.latent_dist if hasattr(encoded, "latent_dist") else encoded.latents


def decode(vae: Any, raw: torch.Tensor) -> torch.Tensor:
    """Diffusers' decode, as it is."""
    return vae.decode(raw, return_dict=False)[0]


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """In dB, the peak being the range of `second`."""
    second = second.double()
    error = (first.double() - second).square().mean()
    return float(10 * torch.log10((second.max() - second.min()) ** 2 / error))
