"""Encode and decode in bands of rows: the result of the whole picture at a fraction of its memory.

Unlike tiles that are blended, bands are exact: normalizations use the statistics of the whole picture, convolutions
see their true neighbours, and the attention of the middle block sees every position. `untileable_reason` says which
autoencoders can do this. Pictures of a batch are done one after another. Inference only: no gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from latentpipe.utils.errors import UserError
from latentpipe.utils.system import release_freed_memory
from latentpipe.vae.tiling.feature_map import (
    LazyFeatureMap,
    activate,
    add,
    bands,
    conv,
    norm,
    point,
    shared,
    source,
    store,
    upsample_conv,
)
from latentpipe.vae.tiling.support import is_tiny, is_tiny_block, untileable_reason

RELU = nn.ReLU()


@torch.no_grad()
def decode(vae: Any, raw: torch.Tensor, rows: int) -> torch.Tensor:
    """What ``vae.decode(raw)`` gives: raw latents (B C h w) to images (B 3 H W), in bands of `rows` rows.

    Every map on the way is computed in bands of `rows` of its own rows: a band is as wide as the picture, and the
    smaller maps have more channels, so no band is larger than `rows` rows of the picture's size.
    """
    _check(vae, rows)
    build = _tiny_decoded if is_tiny(vae) else _decoded
    return _each(raw, rows, lambda one: build(vae, one, rows))


@torch.no_grad()
def encode(vae: Any, images: torch.Tensor, rows: int) -> Any:
    """What ``vae.encode(images)`` gives (with ``latent_dist`` or ``latents``), in bands of `rows` rows; B 3 H W in [-1, 1]."""
    _check(vae, rows)
    if is_tiny(vae):
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput

        return AutoencoderTinyOutput(latents=_each(images, rows, lambda one: _tiny_encoded(vae, one, rows)))
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

    moments = _each(images, rows, lambda one: _encoded(vae, one, rows))
    return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))


def _check(vae: Any, rows: int) -> None:
    reason = untileable_reason(vae)
    if reason:
        raise UserError(f"{reason} Encode and decode without bands.")
    if rows < 1:
        raise UserError(f"A band of {rows} rows was asked for; expected 1 or more.")


def _each(batch: torch.Tensor, rows: int, build: Any) -> torch.Tensor:
    """Store what `build` makes of each picture of a batch, B C H W."""
    out: torch.Tensor | None = None
    with release_freed_memory(batch.device):
        for index in range(len(batch)):
            m = build(batch[index : index + 1])
            if out is None:
                out = batch.new_empty((len(batch), m.channels, m.height, m.width))
            store(m, rows, into=out[index : index + 1])
            del m  # it holds maps that the next picture needs room for
    if out is None:
        raise UserError("An empty batch was given; expected one picture or more.")
    return out


# ---------------------------------------------------------------- KL autoencoders


def _decoded(vae: Any, raw: torch.Tensor, rows: int) -> LazyFeatureMap:
    m = source(raw)
    if vae.post_quant_conv is not None:
        m = conv(m, vae.post_quant_conv)
    part = vae.decoder
    most = _floor(part, raw.shape[-2] * raw.shape[-1])
    m = _middle(store(conv(m, part.conv_in), rows), part.mid_block, rows, most)
    for block in part.up_blocks:
        for module in block.resnets:
            m = _resnet(m, module, rows, most)
        for sampler in block.upsamplers or ():
            m = upsample_conv(m, sampler.conv)
    return conv(norm(m, part.conv_norm_out, part.conv_act, rows), part.conv_out)


def _encoded(vae: Any, images: torch.Tensor, rows: int) -> LazyFeatureMap:
    part = vae.encoder
    most = _floor(part, images.shape[-2] * images.shape[-1])
    m = conv(source(images), part.conv_in)
    for block in part.down_blocks:
        for module in block.resnets:
            m = _resnet(m, module, rows, most)
        for sampler in block.downsamplers or ():
            m = store(conv(m, sampler.conv, (0, 1, 0, 1) if sampler.padding == 0 else None), rows)
    m = _middle(m, part.mid_block, rows, most)
    m = conv(norm(m, part.conv_norm_out, part.conv_act, rows), part.conv_out)
    return m if getattr(vae, "quant_conv", None) is None else conv(m, vae.quant_conv)


def _floor(part: Any, pixels: int) -> int:
    """The values that must be held at once, whatever is computed anew: the largest map and what it is computed from.

    `pixels` of the first map of the part.
    """
    upwards = hasattr(part, "up_blocks")
    attention = any(a is not None for a in part.mid_block.attentions or ())
    middle = part.mid_block.resnets[0].out_channels * (3 if attention else 1)
    held = part.conv_in.out_channels * pixels if upwards else 0
    most = middle * pixels if upwards else 0
    for block in part.up_blocks if upwards else part.down_blocks:
        for module in block.resnets:
            out = module.out_channels * pixels
            fresh = out != held or module.conv_shortcut is not None  # else the output takes the input's place
            most, held = max(most, out + (held if fresh else 0)), out
        if upwards and block.upsamplers:
            pixels *= 4
        elif not upwards and block.downsamplers:
            pixels //= 4
            most, held = max(most, held + held // 4), held // 4
    return most if upwards else max(most, middle * pixels)


def _middle(m: LazyFeatureMap, block: Any, rows: int, most: int) -> LazyFeatureMap:
    m = _resnet(m, block.resnets[0], rows, most)
    for attention, module in zip(block.attentions or [None] * len(block.resnets[1:]), block.resnets[1:], strict=True):
        if attention is not None:
            m = _attention(m, attention, rows)
        m = _resnet(m, module, rows, most)
    return m


def _resnet(m: LazyFeatureMap, block: Any, rows: int, most: int) -> LazyFeatureMap:
    """A ResnetBlock2D. Its output takes the place of its input, or of the map between its two convolutions.

    Without a map between them the first convolution is computed twice (for the statistics, and for the output); so it is
    stored wherever `most` values allow.
    """
    inner = conv(norm(m, block.norm1, block.nonlinearity, rows), block.conv1)
    if m.tensor is None or block.conv_shortcut is not None or m.size + inner.size <= most:
        inner = store(inner, rows)
    outer = conv(norm(inner, block.norm2, block.nonlinearity, rows), block.conv2)
    shortcut = m if block.conv_shortcut is None else conv(m, block.conv_shortcut)
    factor = block.output_scale_factor
    out = add(shortcut, outer, None if factor == 1 else lambda band: band / factor)
    fits = m.tensor is not None and m.channels == out.channels
    return store(out, rows, over=m.tensor if fits else inner.tensor)


def _attention(m: LazyFeatureMap, module: Any, rows: int) -> LazyFeatureMap:
    """Self-attention over all positions of a stored map, a band of queries at a time; the result takes the map's place."""
    assert m.tensor is not None
    normal = norm(m, module.group_norm, None, rows)
    flat = m.tensor[0].permute(1, 2, 0).view(-1, m.channels)  # h w, C

    def tokens(a: int, b: int) -> torch.Tensor:
        return normal.rows(a, b)[0].permute(1, 2, 0).reshape(-1, m.channels)

    keys = flat.new_empty(len(flat), module.to_k.out_features)
    values = flat.new_empty(len(flat), module.to_v.out_features)
    for a, b in bands(m, rows):
        band = tokens(a, b)
        keys[a * m.width : b * m.width] = module.to_k(band)
        values[a * m.width : b * m.width] = module.to_v(band)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(1, len(x), module.heads, -1).transpose(1, 2)

    for a, b in bands(m, rows):
        seen = F.scaled_dot_product_attention(heads(module.to_q(tokens(a, b))), heads(keys), heads(values))
        out = module.to_out[0](seen.transpose(1, 2).reshape((b - a) * m.width, -1))
        part = flat[a * m.width : b * m.width]
        part.add_(out).div_(module.rescale_output_factor)
    m.moments = None
    return m


# ---------------------------------------------------------------- tiny autoencoders


def _tiny_decoded(vae: Any, raw: torch.Tensor, rows: int) -> LazyFeatureMap:
    m = point(source(raw), lambda band: torch.tanh(band / 3) * 3)
    return point(_sequence(m, vae.decoder.layers, rows), lambda band: band.mul(2).sub(1))


def _tiny_encoded(vae: Any, images: torch.Tensor, rows: int) -> LazyFeatureMap:
    return _sequence(point(source(images), lambda band: band.add(1).div(2)), vae.encoder.layers, rows)


def _sequence(m: LazyFeatureMap, layers: Any, rows: int) -> LazyFeatureMap:
    """Layers one after another. A block that reads a stored map writes over it; one that reads a computed map stays computed."""
    deep = False  # whether the map is computed from a block
    pending = list(layers)
    while pending:
        layer = pending.pop(0)
        if isinstance(layer, nn.Upsample):
            m, deep = upsample_conv(m if m.tensor is not None else store(m, rows), pending.pop(0)), False
        elif isinstance(layer, nn.Conv2d):
            m = conv(m, layer)
            if layer.stride[0] > 1:
                m, deep = store(m, rows), False
        elif isinstance(layer, nn.GroupNorm):
            m = norm(m, layer, None, rows)
        elif is_tiny_block(layer):
            m, deep = (store(m, rows), False) if deep else (m, False)
            out = _tiny_block(m, layer, rows)
            over = m.tensor if m.channels == out.channels else None
            m, deep = (out, True) if m.tensor is None else (store(out, rows, over=over), False)
        else:
            m = point(m, lambda band, act=layer: act(band))  # type: ignore[misc]
    return m


def _tiny_block(m: LazyFeatureMap, block: Any, rows: int) -> LazyFeatureMap:
    pool = getattr(block, "pool", None)
    if pool is not None:
        m = shared(m)
        m = add(m, _sequence(m, pool, rows))
    m = shared(m)
    skip = m if isinstance(block.skip, nn.Identity) else conv(m, block.skip)
    return add(skip, _sequence(m, block.conv, rows), lambda band: activate(band, getattr(block, "fuse", RELU)))
