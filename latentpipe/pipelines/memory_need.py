"""How much memory drawing with a model will take, before it is opened, and the precision that follows.

Weights by their headers, and the larger of one denoising pass and one decode, which follow each other, on tensors without values.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch

from latentpipe.checkpoints.pipeline_io import networks
from latentpipe.checkpoints.single_file.gather import Stated, open_file
from latentpipe.checkpoints.single_file.opening import WORDS
from latentpipe.checkpoints.single_file.parts import Part
from latentpipe.checkpoints.single_file.tokenizers import DATA
from latentpipe.utils.errors import LatentpipeWarning
from latentpipe.utils.gguf_header import BLOCKS, FLOATS, stored_bytes
from latentpipe.utils.io import read_header
from latentpipe.utils.logging import quiet
from latentpipe.utils.reading import parse_object, read_json
from latentpipe.utils.system import has_bf16_units
from latentpipe.vae import memory
from latentpipe.vae.latent_space import downscale_of
from latentpipe.vae.tiling import tiled

GIB = 2**30
SHOWN = {
    "sd1": ("SD 1.5", 512),
    "sd2": ("SD 2.1", 768),
    "sdxl": ("SDXL", 1024),
    "sd3": ("SD 3.5 medium", 1024),
    "flux": ("FLUX.1", 1024),
}
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 2, "F8_E5M2": 2}  # in memory: fp8 is computed in bf16
QUANTIZED = {kind for kind in BLOCKS if kind not in FLOATS}  # of GGUF
CLIP_TOKENS, T5_TOKENS = 77, {"SD3Transformer2DModel": 256, "FluxTransformer2DModel": 512}


@dataclass(frozen=True)
class Layout:
    """What a model is made of: config and class of each network, and how many numbers each holds.

    stored  bytes of all weights as they are stored
    packed  of these, bytes of quantized weights, which stay as they are; `numbers` does not count them
    """

    networks: Mapping[str, tuple[str, Mapping[str, Any]]]
    numbers: Mapping[str, int]
    stored: int
    packed: int = 0


@dataclass(frozen=True)
class Need:
    """Bytes that drawing takes.

    weights   of all networks in the dtype that they are computed in
    working   of the larger of one denoising pass and one decode
    free      what there is
    rows      height of the bands that the picture is decoded in, in pixels; None: whole
    """

    title: str
    size: tuple[int, int]
    weights: int
    working: int
    free: int
    rows: int | None = None

    @property
    def total(self) -> int:
        """Weights and working memory."""
        return self.weights + self.working

    @property
    def fits(self) -> bool:
        """Whether that much is free."""
        return self.total <= self.free

    def __str__(self) -> str:
        width, height = self.size
        side = f"{width}" if width == height else f"{width} x {height}"
        total, free = self.total / GIB, self.free / GIB
        told = (
            f"{self.title} at {side} px: {total:.1f} of {free:.1f} GiB"
            if total >= 0.95
            else (f"{self.title} at {side} px: {self.total / 2**20:,.0f} MiB of {free:.1f} GiB")
        )
        return f"{told}{'' if self.fits else ', which is too much'}"


def layout_of(place: Path, stated: Stated | None = None) -> Layout:
    """The networks of a model's folder or single file; UserError where it is none."""
    if place.is_file():
        opened = open_file(place, stated)
        numbers, stored = {}, 0
        for name, source in opened.sources.items():
            rows = _of_part(source) if isinstance(source, Part) else _of_folder(source)
            numbers[name], stored = rows[0], stored + rows[1]
        packed = sum(_packed(source) for source in opened.sources.values() if isinstance(source, Part))
        classes = {name: (str(opened.configs.index[name][1]), opened.config(name)) for name in opened.sources}
        return Layout(classes, numbers, stored + packed, packed)
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    numbers, stored = {}, 0
    for name, (_, cls) in networks(read_json(place / "model_index.json")).items():
        found[name] = cls, read_json(place / name / "config.json")
        count, size = _of_folder(place / name)
        numbers[name], stored = count, stored + size
    return Layout(found, numbers, stored)


def family_layout(family: str) -> Layout:
    """The networks of a family ("sd1", "sdxl", ...) by the configs that ship."""
    configs = read_json(DATA / f"{family}.json")
    index = configs["index"]
    classes = {name: (str(index[name][1]), configs[name]) for name in configs if name in index}
    classes = {name: row for name, row in classes.items() if "okenizer" not in name and name != "scheduler"}
    numbers = {name: sum(one.numel() for one in built(*row, torch.float32).parameters()) for name, row in classes.items()}
    return Layout(classes, numbers, 2 * sum(numbers.values()))


def need_of(
    layout: Layout,
    title: str,
    dtype: torch.dtype | None,
    device: torch.device,
    size: tuple[int, int] | None = None,
    n: int = 1,
    free: int | None = None,
) -> Need:
    """What drawing `n` pictures at once takes on a device.

    dtype  of the weights; None: as they are stored
    size   width and height in pixels; None: what the denoiser was trained at
    free   bytes; None: what the device has now
    """
    free = memory.available(device) if free is None else free
    weights = layout.stored if dtype is None else sum(layout.numbers.values()) * dtype.itemsize + layout.packed
    kind = dtype or torch.float16
    vae = layout.networks["vae"]
    down = downscale_of(vae[1])
    name = "unet" if "unet" in layout.networks else "transformer"
    size = size or _native(layout.networks[name][1], down)
    width, height = size[0] // down, size[1] // down
    passes = _pass(layout.networks[name], kind, device.type, n, height, width)
    shape = (n, int(vae[1].get("latent_channels", 4)), height, width)
    decode, rows = _decode(built(*vae, kind), shape, device.type, max(0, free - weights))
    return Need(title, size, weights, max(passes, decode), free, rows)


def families_that_fit(dtype: torch.dtype, device: torch.device) -> list[Need]:
    """The needs of the families whose configs ship, at the size that each is trained at."""
    return [need_of(family_layout(name), title, dtype, device, (side, side)) for name, (title, side) in SHOWN.items()]


def chosen_dtype(place: Path, device: torch.device, stated: Stated | None = None, free: int | None = None) -> torch.dtype | None:
    """The precision of `dtype` "auto": bf16 where the device has units for it, else fp32.

    Where that does not fit into memory, a smaller one that does (a warning says which): bf16, or None, as stored and mapped.
    `free` bytes; None: what the device has now.
    """
    wanted = torch.bfloat16 if has_bf16_units(device.type) else torch.float32
    layout = layout_of(place, stated)
    needs = {kind: need_of(layout, place.name, kind, device, free=free) for kind in dict.fromkeys((wanted, torch.bfloat16, None))}
    found = next((kind for kind, need in needs.items() if need.fits), None)
    if found != wanted:
        own = "as stored" if found is None else "in bf16"
        told = f"{needs[wanted]} in {WORDS[wanted]}; the weights are taken {own}, which needs {needs[found].total / GIB:.1f} GiB"
        warnings.warn(LatentpipeWarning(told), stacklevel=4)
    return found


def built(cls: str, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A network of shapes alone, on the meta device; None where neither diffusers nor transformers has its class."""
    import diffusers
    import transformers

    kind: Any = getattr(diffusers, cls, None) or getattr(transformers, cls, None)
    if kind is None:
        return None
    with torch.device("meta"), quiet():
        taken = dict(config)
        network = kind(kind.config_class.from_dict(taken)) if hasattr(kind, "config_class") else kind.from_config(taken)
    return torch.nn.Module.to(network, dtype).eval()


def _decode(vae: Any, shape: tuple[int, int, int, int], device: str, free: int) -> tuple[int, int | None]:
    """Bytes of a decode as the stage will choose it: whole where that fits, else the largest bands that do, else the smallest."""
    if vae is None:
        return 0, None
    whole = memory.predict(vae, "decode", shape, None, device)
    if whole <= memory.SHARE * free or not free or tiled.untileable_reason(vae):  # none free: the weights are too much already
        return whole, None
    found: tuple[int, int | None] = whole, None
    for rows in (rows for rows in memory.HEIGHTS if rows * shape[3] <= memory.AREA):
        found = memory.predict(vae, "decode", shape, rows, device), rows
        if found[0] <= memory.SHARE * free:
            break
    return found


def _pass(network: tuple[str, Mapping[str, Any]], dtype: torch.dtype, device: str, n: int, height: int, width: int) -> int:
    """Bytes of one pass of the denoiser, with guidance where its family draws so; 0 for one whose inputs are not known here."""
    cls, config = network
    odd = [config.get(key) for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "encoder_hid_dim")]
    plain = not any(odd) and config.get("addition_embed_type") in (None, "text_time")
    if cls not in ("UNet2DConditionModel", *T5_TOKENS) or not plain:
        return 0
    return _known_pass(cls, json.dumps(dict(config), sort_keys=True), dtype, device, n, height, width)


@lru_cache(maxsize=256)
def _known_pass(cls: str, described: str, dtype: torch.dtype, device: str, n: int, height: int, width: int) -> int:
    config = parse_object(described)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    model = built(cls, config, dtype)
    batch = n if cls == "FluxTransformer2DModel" else 2 * n
    given: dict[str, Any] = {"timestep": empty(batch)}
    if cls == "UNet2DConditionModel":
        given |= {"sample": empty(batch, model.config.in_channels, height, width)}
        given |= {"encoder_hidden_states": empty(batch, CLIP_TOKENS, model.config.cross_attention_dim)}
        if config.get("addition_embed_type") == "text_time":
            ids = 5 if config["projection_class_embeddings_input_dim"] == 2560 else 6
            pooled = config["projection_class_embeddings_input_dim"] - ids * config["addition_time_embed_dim"]
            given["added_cond_kwargs"] = {"text_embeds": empty(batch, pooled), "time_ids": empty(batch, ids)}
    else:
        text = T5_TOKENS[cls] + (CLIP_TOKENS if cls.startswith("SD3") else 0)
        given |= {"encoder_hidden_states": empty(batch, text, model.config.joint_attention_dim)}
        given |= {"pooled_projections": empty(batch, model.config.pooled_projection_dim)}
        if cls.startswith("SD3"):
            given["hidden_states"] = empty(batch, model.config.in_channels, height, width)
        else:
            tokens = (height // 2) * (width // 2)
            given |= {"hidden_states": empty(batch, tokens, model.config.in_channels)}
            given |= {"guidance": empty(batch)} if config.get("guidance_embeds") else {}
            given |= {"img_ids": empty(tokens, 3), "txt_ids": empty(text, 3)}
    flat = [one for value in given.values() for one in (value.values() if isinstance(value, dict) else [value])]
    return memory.peak_of(lambda: model(**given, return_dict=False), [*model.parameters(), *model.buffers(), *flat], device)


def _native(config: Mapping[str, Any], down: int) -> tuple[int, int]:
    side = config.get("sample_size") or 128
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return int(width) * down, int(height) * down


def _of_part(part: Part) -> tuple[int, int]:
    sizes = {name: prod(shape) for name, shape in part.shapes.items() if part.dtypes[name] not in QUANTIZED}
    return sum(sizes.values()), sum(size * BYTES.get(part.dtypes[name], 4) for name, size in sizes.items())


def _packed(part: Part) -> int:
    """Bytes of its quantized weights."""
    kinds = {name: part.dtypes[name] for name in part.shapes if part.dtypes[name] in QUANTIZED}
    return sum(stored_bytes(part.shapes[name], kind) for name, kind in kinds.items())


def _of_folder(folder: Path) -> tuple[int, int]:
    """Numbers and bytes of a part's weights: one file, shards, or one variant."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [path for path in files if "." not in path.stem] or files
    numbers, stored = 0, 0
    for header in map(read_header, plain):
        for name, shape in header.shapes.items():
            numbers += prod(shape)
            stored += prod(shape) * BYTES.get(header.dtypes[name], 4)
    return numbers, stored
