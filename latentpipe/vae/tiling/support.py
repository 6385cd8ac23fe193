"""Which autoencoders can work in bands of rows (`latentpipe.vae.tiling.tiled`), and why the others cannot."""

from __future__ import annotations

from typing import Any

from torch import nn


def untileable_reason(vae: Any) -> str:
    """Empty where this autoencoder can work in bands, else one sentence that says why it cannot."""
    from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderTiny

    name = type(vae).__name__
    kinds = (AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderTiny)
    known = type(vae) if _is_own_tiny(vae) else next((kind for kind in kinds if isinstance(vae, kind)), None)
    if known is None:
        return f"{name} cannot work in bands: AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderTiny and TinyVAE can."
    for method in ("encode", "decode", "_encode", "_decode"):
        if getattr(type(vae), method, None) is not getattr(known, method, None):
            return f"{name} cannot work in bands: it has a {method}() of its own."
    for part in (vae.encoder, vae.decoder):
        reason = "" if part is None else _reason_against_tiny(part) if is_tiny(vae) else _reason_against_part(part)
        if reason:
            return f"{name} cannot work in bands: {reason}."
    for path, module in vae.named_modules():
        if isinstance(module, nn.Conv2d) and (
            module.padding_mode != "zeros" or isinstance(module.padding, str) or tuple(module.dilation) != (1, 1)
        ):
            return f"{name} cannot work in bands: {path} is a convolution that is dilated or does not pad with zeros."
    return ""


def _reason_against_part(part: Any) -> str:
    from diffusers.models.attention_processor import Attention
    from diffusers.models.autoencoders.vae import Decoder, Encoder, MaskConditionDecoder
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UpDecoderBlock2D

    if type(part) not in (Encoder, Decoder, MaskConditionDecoder):
        return f"its {type(part).__name__} is not diffusers' own"
    blocks = list(part.down_blocks if hasattr(part, "down_blocks") else part.up_blocks)
    for block in blocks:
        if type(block) not in (DownEncoderBlock2D, UpDecoderBlock2D):
            return f"it has a {type(block).__name__}"
    for block in [part.mid_block, *blocks]:
        for r in block.resnets:
            if type(r) is not ResnetBlock2D or r.time_emb_proj is not None or r.upsample or r.downsample:
                return f"it has a {type(r).__name__} with more than two convolutions and a shortcut"
    for a in part.mid_block.attentions or []:
        plain = type(a) is Attention and a.group_norm is not None and a.spatial_norm is None
        if a is not None and not (plain and a.norm_q is None and a.norm_k is None and a.residual_connection):
            return "its middle block has an unusual attention"
    last = part.conv_norm_out
    return "" if isinstance(last, nn.GroupNorm) else f"its last normalization is a {type(last).__name__}"


def _reason_against_tiny(part: Any) -> str:
    from diffusers.models.autoencoders.vae import DecoderTiny, EncoderTiny

    from latentpipe.vae.tiny import TinyHalf

    own = type(part).forward in (EncoderTiny.forward, DecoderTiny.forward, TinyHalf.forward)
    if not own:
        return f"its {type(part).__name__} has a forward() of its own"
    layers = list(part.layers)
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, nn.Upsample):
            fits = isinstance(following, nn.Conv2d) and _is_plain(following)
            if float(layer.scale_factor) != 2 or layer.mode != "nearest" or not fits:  # type: ignore[arg-type]
                return "it enlarges by something else than nearest neighbour x2 and a 3x3 convolution"
        elif not (isinstance(layer, nn.Conv2d) or is_tiny_block(layer) or _is_pointwise(layer)):
            return f"it has a {type(layer).__name__}"
    return ""


def is_tiny(vae: Any) -> bool:
    """Of the TAESD family."""
    from diffusers import AutoencoderTiny

    return isinstance(vae, AutoencoderTiny) or _is_own_tiny(vae)


def _is_own_tiny(vae: Any) -> bool:
    from latentpipe.vae.tiny import TinyVAE  # not before: it imports diffusers' models

    return type(vae) is TinyVAE


def is_tiny_block(layer: Any) -> bool:
    """An AutoencoderTinyBlock, or one with a further branch `pool` before its convolutions: x = x + pool(x).

    Where it has no `fuse`, its last step is a ReLU.
    """
    from latentpipe.vae.tiny import TinyBlock

    return isinstance(layer, TinyBlock) or all(hasattr(layer, name) for name in ("conv", "skip", "fuse"))


def _is_pointwise(layer: Any) -> bool:
    return isinstance(layer, nn.ReLU | nn.SiLU | nn.GELU | nn.Mish | nn.LeakyReLU | nn.Identity)


def _is_plain(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((3, 3), (1, 1), (1, 1), 1)
