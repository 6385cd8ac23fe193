"""Writers of GGUF files: with the package gguf for real weights; byte by byte, without it, for headers of any kind."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from written import Tensors

from latentpipe.utils.gguf_header import BLOCKS, TYPES, stored_bytes

NUMBERS = {name: number for number, (name, *_) in TYPES.items()}
PACKED = {"Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32}  # what the package writes


def quantized(tensors: Tensors, path: Path, kind: str, architecture: str = "flux") -> Path:
    """Tensors in a GGUF file by the package's writer: matrices of rows that fit in a type, all others in fp32."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in tensors.items():
        fits = value.ndim == 2 and value.shape[1] % BLOCKS[kind][0] == 0
        data = value.detach().float().contiguous().numpy()
        if fits and kind != "F32":
            data = gguf.quants.quantize(data, number)
        writer.add_tensor(name, data, raw_dtype=number if fits else gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(value: str | bytes) -> bytes:
    """A text as GGUF has it."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str, value: str | int) -> bytes:
    """An entry of metadata: a text, or a whole number of 32 bits."""
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    return text(key) + struct.pack("<II", 4, value)


def by_hand(
    tensors: Mapping[str, tuple[tuple[int, ...], str | int]],
    path: Path,
    metadata: Mapping[str, str | int] | None = None,
    data: Mapping[str, bytes] | None = None,
    **wrong: Any,
) -> Path:
    """A GGUF file of shapes and types, byte by byte; its data are zeros (a hole) where `data` names none.

    wrong  version, count (of tensors), keys, offsets (of tensors by name): what the header states instead
    """
    metadata = {"general.architecture": "flux"} if metadata is None else metadata
    head = b"GGUF" + struct.pack(
        "<IQQ", wrong.get("version", 3), wrong.get("count", len(tensors)), wrong.get("keys", len(metadata))
    )
    head += b"".join(entry(key, value) for key, value in metadata.items())
    offset, places = 0, {}
    for name, (shape, kind) in tensors.items():
        number = NUMBERS[kind] if isinstance(kind, str) else kind
        places[name] = offset
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", number, wrong.get("offsets", {}).get(name, offset))
        size = stored_bytes(shape, TYPES[number][0]) if number in TYPES else prod(shape)
        offset += -(-size // 32) * 32
    start = -(-len(head) // 32) * 32
    with open(path, "wb") as file:
        file.write(head)
        for name, content in (data or {}).items():
            file.seek(start + places[name])
            file.write(content)
        file.truncate(start + offset)
    return path


def shapes(tensors: Mapping[str, torch.Tensor], kind: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and types as `quantized` would write them."""
    return {
        name: (tuple(value.shape), kind if value.ndim == 2 and value.shape[1] % BLOCKS[kind][0] == 0 else "F32")
        for name, value in tensors.items()
    }
