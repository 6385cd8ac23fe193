"""What a file of weights looks like, from its header alone and without torch: a phrase for lists, no decision."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from latentpipe.utils.errors import UserError
from latentpipe.utils.gguf_header import read_gguf
from latentpipe.utils.io import is_gguf
from latentpipe.utils.reading import MOST_HEADER, parse_object, read_json

CONTEXT = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL refiner", 2048: "SDXL"}
CROSS = re.compile(r"(attn2[._]to_k(\.lora_down|\.lora\.down|\.lora_A(\.default)?|_lora\.down)?\.weight)$")
MARKS = (
    (re.compile(r"(^|[._])double_blocks[._]|(^|\.)single_transformer_blocks[._]|lora_transformer_single"), "FLUX.1"),
    (re.compile(r"(^|\.)joint_blocks\."), "SD3"),
)
Shapes = Mapping[str, tuple[int, ...]]


def family(path: Path) -> str:
    """ "SDXL", "FLUX.1, GGUF Q8_0", ... of a file of weights or a model's folder; "?" where its header does not tell."""
    try:
        if path.is_dir():
            index = path / "model_index.json"
            config = read_json(index if index.is_file() else path / "config.json")
            return str(config.get("_class_name") or "?")[:60]
        if is_gguf(path):
            packed = read_gguf(path)
            return f"{_of_shapes(packed.shapes)}, GGUF {packed.quantization}"
        return _of_shapes(_shapes(path))
    except (UserError, OSError, ValueError):
        return "damaged"


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return sum(one.stat().st_size for one in files)


def _shapes(path: Path) -> Shapes:
    """Names and shapes in a safetensors header; ValueError where it is none."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= MOST_HEADER:
            raise ValueError("no header")
        header = parse_object(file.read(length).decode("utf-8"), MOST_HEADER)
    return {
        name: tuple(one["shape"])
        for name, one in header.items()
        if isinstance(one, dict) and isinstance(one.get("shape"), list) and name != "__metadata__"
    }


def _of_shapes(shapes: Shapes) -> str:
    if {"clip_l", "clip_g"} <= set(shapes):
        return "SDXL"
    for mark, name in MARKS:
        if any(mark.search(key) for key in shapes):
            return name
    if any(".label_emb." in key or key.startswith("label_emb.") for key in shapes) and not _width(shapes):
        return "SDXL"
    known = CONTEXT.get(_width(shapes) or 0)
    if known:
        return known
    channels = [shape[1] for key, shape in shapes.items() if key.endswith("decoder.conv_in.weight") and len(shape) == 4]
    if channels:
        return f"{channels[0]} channels"
    widths = {shape[-1] for key, shape in shapes.items() if key == "emb_params" or re.fullmatch(r"<.*>|\*|clip_[lg]", key)}
    return CONTEXT.get(widths.pop(), "?") if len(widths) == 1 else "?"


def _width(shapes: Shapes) -> int | None:
    """The width of the text that a denoiser, or an adapter on one, reads."""
    found = {shape[1] for key, shape in shapes.items() if CROSS.search(key) and len(shape) >= 2}
    return max(found) if found else None
