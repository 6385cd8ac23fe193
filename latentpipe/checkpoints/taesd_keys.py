"""Tiny autoencoders of the TAESD family in their authors' files: plain Sequential keys, one file for each half.

Source: github.com/madebyollin/taesd, taesd.py (MIT). A layer is one of

    ["conv", n_in, n_out, stride, bias]   3 x 3
    ["block", n_in, n_out, pool]          relu(conv3(x) + skip(x)); with pool, x + pool(x) enters
    ["relu"], ["up"]                      "up" doubles the sides; neither has weights, so their indices are gaps in the keys

The decoder's index 0 is the clamp ``3 tanh(z / 3)``; diffusers counts from the layer after it.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from latentpipe.checkpoints.places.glance import Shapes
from latentpipe.utils.errors import UserError, counted

BlockLayers = list[list[Any]]


def own_names(shapes: Shapes) -> dict[str, str]:
    """Our name (encoder.layers.3.conv.0.weight, ...) -> the file's; empty where the file is no tiny autoencoder.

    Three vocabularies: diffusers' own, ComfyUI's pair (taesd_encoder.0.weight) and one half alone (0.weight).
    """
    if "encoder.layers.0.weight" in shapes or "decoder.layers.0.weight" in shapes:
        return {name: name for name in shapes}
    prefixes = {"taesd_encoder.": "encoder", "taesd_decoder.": "decoder"}
    if not any(name.startswith(tuple(prefixes)) for name in shapes):
        if not all(re.match(r"\d+\.", name) for name in shapes) or not {"0.weight", "1.weight"} & set(shapes):
            return {}
        prefixes = {"": "encoder" if "0.weight" in shapes else "decoder"}
    found = {}
    for prefix, side in prefixes.items():
        for name in shapes:
            number, _, tail = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and number.isdecimal() and len(number) < 4:
                found[f"{side}.layers.{int(number) - (side == 'decoder')}.{tail}"] = name
    known = set(found.values())
    return found | {name: name for name in shapes if name not in known}  # a strict load names the others


def taesd_config(shapes: Shapes, downscale: int | None, path: Path) -> dict[str, Any]:
    """The config that shapes (our names) tell: AutoencoderTiny where diffusers has all of its layers, else our TinyVAE.

    The keys tell no strides of leading convolutions: the decoder's upsamplings do, or `downscale` where there is none.
    """
    encoder, decoder = (_layers(shapes, side, path) for side in ("encoder", "decoder"))
    if not encoder:
        raise UserError(f"{path} holds a decoder without an encoder; give both: latentpipe convert ENCODER DECODER --out FOLDER.")
    if decoder:
        if encoder[-1][2] != decoder[0][1]:
            raise UserError(
                f"{path}: its encoder makes {counted(encoder[-1][2], 'channel')} and its decoder takes {decoder[0][1]}."
            )
        measured = 2 ** sum(layer == ["up"] for layer in decoder)
        if downscale not in (None, measured):
            raise UserError(f"{path}: its decoder enlarges {measured} times, but downscale {downscale} was given.")
        downscale = measured
    if downscale is None:
        raise UserError(
            f"{path} is an encoder alone, and its keys do not tell the strides of its first layers; "
            f"by what factor does it reduce a picture's side? latentpipe convert {path} --out FOLDER --downscale N."
        )
    _set_strides(encoder, downscale, path)
    config = {"latent_channels": encoder[-1][2]}
    stock = _stock(encoder, decoder)
    if stock:
        return {"_class_name": "AutoencoderTiny", **config, **stock}
    ours = {"downscale": downscale, "encoder_layers": encoder, "decoder_layers": decoder or None}
    # diffusers ignores keys that it does not know and layers that it lacks; an activation that it lacks stops it
    from latentpipe.vae.tiny import OPENS_HERE_ONLY

    return {"_class_name": "TinyVAE", **config, **ours, "act_fn": OPENS_HERE_ONLY}


def _layers(shapes: Shapes, side: str, path: Path) -> BlockLayers:
    """The layers of one half, strides of leading convolutions 1 for now; empty where the half is absent."""
    entries: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        match = re.fullmatch(rf"{side}\.layers\.(\d+)\.(.+)", name)
        if match:
            entries.setdefault(int(match[1]), {})[match[2]] = shape
    layers: BlockLayers = []
    for index in range(max(entries, default=-1) + 1):
        tensors = entries.get(index)
        before_plain = "weight" in entries.get(index + 1, {}) and "bias" not in entries.get(index + 1, {})
        if tensors is None:
            layers.append(["up"] if side == "decoder" and before_plain else ["relu"])
        elif len(tensors.get("weight", ())) == 4:
            n_out, n_in = tensors["weight"][:2]
            bias = "bias" in tensors
            layers.append(["conv", n_in, n_out, 1 if bias or side == "decoder" else 2, bias])
        elif len(tensors.get("conv.0.weight", ())) == 4:
            n_out, n_in = tensors["conv.0.weight"][:2]
            layers.append(["block", n_in, n_out, "pool.0.weight" in tensors])
        else:
            raise UserError(f"{path}: layer {index} of its {side} is neither a convolution nor a block of a tiny autoencoder.")
    _check_chain(layers, side, path)
    return layers


def _check_chain(layers: BlockLayers, side: str, path: Path) -> None:
    weighted = [layer for layer in layers if len(layer) > 1]
    for first, second in pairwise(weighted):
        if first[2] != second[1]:
            raise UserError(f"{path}: a layer of its {side} gives {counted(first[2], 'channel')} and the next takes {second[1]}.")
    if weighted and (weighted[0][0] != "conv" or weighted[-1][0] != "conv"):
        raise UserError(f"{path}: its {side} does not begin and end with a convolution; the file is incomplete.")


def _set_strides(encoder: BlockLayers, downscale: int, path: Path) -> None:
    """Give the convolutions before the first block stride 2 where `downscale` needs it, in place."""
    known = 2 ** sum(layer[0] == "conv" and layer[3] == 2 for layer in encoder)
    first_block = next((index for index, layer in enumerate(encoder) if layer[0] == "block"), len(encoder) - 1)
    leading = [layer for layer in encoder[:first_block] if layer[0] == "conv" and layer[4]]
    if downscale == known:
        return
    if downscale != known * 2 ** len(leading):
        raise UserError(
            f"{path}: its encoder reduces the side {known} times, or {known * 2 ** len(leading)} times if its first "
            f"convolutions have stride 2; {downscale} fits neither."
        )
    for layer in leading:
        layer[3] = 2


def _stock(encoder: BlockLayers, decoder: BlockLayers) -> dict[str, Any]:
    """AutoencoderTiny's config of these layers; empty where it has none."""
    if not decoder:
        return {}
    width = encoder[0][2]
    counts = {"encoder": _counts(encoder), "decoder": _counts(decoder)}
    config = {
        "in_channels": encoder[0][1],
        "out_channels": decoder[-1][2],
        "encoder_block_out_channels": [width] * len(counts["encoder"]),
        "decoder_block_out_channels": [width] * len(counts["decoder"]),
        "num_encoder_blocks": counts["encoder"],
        "num_decoder_blocks": counts["decoder"],
        "act_fn": "relu",
    }
    built: dict[str, BlockLayers] = {}
    for side, numbers in counts.items():
        last = len(numbers) - 1
        built[side] = [["conv", encoder[0][1], width, 1, True]] if side == "encoder" else []
        built[side] += [] if side == "encoder" else [["conv", decoder[0][1], width, 1, True], ["relu"]]
        for stage, number in enumerate(numbers):
            if side == "encoder" and stage:
                built[side].append(["conv", width, width, 2, False])
            built[side] += [["block", width, width, False]] * number
            if side == "decoder" and stage < last:
                built[side] += [["up"], ["conv", width, width, 1, False]]
    built["encoder"].append(["conv", width, encoder[-1][2], 1, True])
    built["decoder"].append(["conv", width, decoder[-1][2], 1, True])
    return config if built == {"encoder": encoder, "decoder": decoder} else {}


def _counts(layers: BlockLayers) -> list[int]:
    """How many blocks follow each change of resolution."""
    counts = [0]
    for layer in layers:
        if layer[0] == "conv" and not layer[4]:
            counts.append(0)
        counts[-1] += layer[0] == "block"
    return counts
