"""Tensors of a GGUF file, mapped; quantized weights stay as they are, and diffusers' layers compute with them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from latentpipe.checkpoints.single_file.tables import StateDict
from latentpipe.utils.errors import UserError
from latentpipe.utils.gguf_header import BLOCKS, FLOATS, TYPES, read_gguf
from latentpipe.vae.precision import all_finite

NUMBERS = {name: number for number, (name, *_) in TYPES.items()}
# First bytes of the fp16 scales within a block.
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def need_package(path: Path) -> None:
    """UserError where the package that knows the quantized types is not installed."""
    if find_spec("gguf") is None:
        raise UserError(
            f"{path} holds quantized weights in GGUF, which need the package gguf; install it: pip install 'latentpipe[gguf]'."
        )


def read_gguf_tensors(path: Path, names: Iterable[str]) -> StateDict:
    """Tensors of a GGUF file: plain floats as torch's, quantized ones as diffusers' GGUFParameter (rows of bytes); those of
    one dimension are made floats. UserError as in `read_gguf`, and without the package gguf where it is needed.
    """
    names = list(names)
    found = read_gguf(path)
    quantized = {name for name in names if found.types[name] not in FLOATS}
    if quantized:
        need_package(path)
    whole = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    tensors: StateDict = {}
    for name in names:
        first, count = found.places[name]
        data, shape, kind = whole[first : first + count], found.shapes[name], found.types[name]
        if name in quantized:
            value = _packed(data, shape, kind)
            tensors[name] = value if len(shape) > 1 else unpacked(value)
        else:
            tensors[name] = data.view(PLAIN[kind]).reshape(shape)
    return tensors


def _packed(data: torch.Tensor, shape: tuple[int, ...], kind: str) -> torch.Tensor:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFParameter

    values, size = BLOCKS[kind]
    rows = data.reshape(*shape[:-1], shape[-1] // values * size)
    return GGUFParameter(rows, quant_type=gguf.GGMLQuantizationType(NUMBERS[kind]))


def is_packed(value: Any) -> bool:
    """Whether a tensor is a quantized one: rows of bytes."""
    return hasattr(value, "quant_type")


def full_shape(value: torch.Tensor) -> torch.Size:
    """The shape of the values that a tensor stands for."""
    return torch.Size(getattr(value, "quant_shape", value.shape))


def unpacked(value: torch.Tensor) -> torch.Tensor:
    """The values of a quantized tensor by diffusers' own code (fp16 or fp32); any other as it is."""
    if not is_packed(value):
        return value
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    plain: torch.Tensor = dequantize_gguf_tensor(value)
    return plain


def finite_scales(value: torch.Tensor) -> bool:
    """Whether the scales of a quantized tensor, and so its values, are finite."""
    rows: Any = value
    kind = rows.quant_type.name
    blocks = rows.as_tensor().reshape(-1, BLOCKS[kind][1])
    return all(all_finite(blocks[:, at : at + 2].contiguous().view(torch.float16)) for at in SCALES[kind])


def as_stored(tensors: Mapping[str, torch.Tensor]) -> StateDict:
    """What a content hash is taken over: quantized tensors as their bytes, each with its type behind its name."""
    found: StateDict = {}
    for name, value in tensors.items():
        rows: Any = value
        found |= {f"{name}:{rows.quant_type.name}": rows.as_tensor()} if is_packed(value) else {name: value}
    return found


def holds_packed(network: Any) -> bool:
    """Whether a network computes with quantized weights."""
    return isinstance(network, torch.nn.Module) and any(is_packed(value) for value in network.parameters())


def refuse_packed(network: Any, what: str, asked: str) -> None:
    """UserError where a network computes with quantized weights, and something needs plain ones."""
    if holds_packed(network):
        raise UserError(f"{what} is quantized (GGUF), and {asked}; take the model in safetensors or in fp16 or bf16.")


def linear_alone(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> StateDict:
    """Tensors of a network with those unpacked that are no weights of a linear layer: nothing else computes with them."""
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: value if name in linear else unpacked(value) for name, value in tensors.items()}


def build_packed(cls: Any, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """A transformer of diffusers with quantized weights, which computes in `dtype`, by diffusers' own loader of GGUF.

    tensors  complete, under diffusers' names
    """
    from diffusers import GGUFQuantizationConfig

    with TemporaryDirectory(prefix="latentpipe-") as room:
        (Path(room) / "config.json").write_text(json.dumps({**config, "_class_name": cls.__name__}))
        return cls.from_single_file(
            dict(tensors),
            config=room,
            quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            torch_dtype=dtype,
            local_files_only=True,
        )
