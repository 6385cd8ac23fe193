"""Where a VAE's tensors come from: a diffusers folder, a safetensors file or (to convert only) a pickle, opened lazily."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentpipe.checkpoints.pickles.unpickle import unpickled
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import SUFFIXES, Header, is_gguf, is_safetensors, read_header, read_json, read_tensors
from latentpipe.utils.reading import parse_object

VAE_FILE = "diffusion_pytorch_model.safetensors"
CARD_FILE = "card.json"
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
CONFIG_KEY = "latentpipe.config"  # in the metadata of a safetensors file: the VAE's config.json
VARIANT = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.([a-z]\w*))?(?:-\d+-of-\d+)?(?:\.([a-z]\w*))?\.safetensors")

ReadTensors = Callable[[Iterable[str]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Source:
    """Tensors by the names of their file, not read yet.

    path     what a message names
    files    the files that the tensors lie in
    shapes   of each tensor; dtypes likewise ("F16", or as torch names it)
    config   the content of config.json, or of our own metadata; None where there is none
    read     names to tensors
    folder   the diffusers folder, where it is one
    """

    path: Path
    files: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    read: ReadTensors
    config: dict[str, Any] | None = None
    folder: Path | None = None


def open_source(path: Path, pickles: bool = False) -> Source:
    """A folder or a file as a Source; UserError where it is none. Pickles are read for `convert` only, weights alone."""
    path = Path(path)
    if path.is_dir():
        return _folder(path, pickles)
    if not path.is_file() or is_safetensors(path) or is_gguf(path):  # judged by its first bytes, not by its name
        return _file(path)
    if path.suffix in PICKLES or (pickles and path.suffix not in SUFFIXES):
        if not pickles:
            raise UserError(
                f"{path}: a {path.suffix} file is a pickle, which can run code when it is opened; "
                f"turn it into safetensors once: latentpipe convert {path} --out FOLDER."
            )
        return _in_memory(path, read_pickle(path))
    return _file(path)


def pair(first: Source, second: Source) -> Source:
    """The two halves of a tiny autoencoder as one Source, named as ComfyUI names them: taesd_encoder., taesd_decoder."""
    halves = {"taesd_encoder.": first, "taesd_decoder.": second}
    if "0.weight" not in first.shapes:  # the decoder's index 0 is a clamp without weights
        halves = {"taesd_encoder.": second, "taesd_decoder.": first}
    encoder, decoder = halves.values()
    if "0.weight" not in encoder.shapes or "0.weight" in decoder.shapes or "1.weight" not in decoder.shapes:
        raise UserError(
            f"{first.path} and {second.path} are not the encoder and the decoder of a tiny autoencoder; "
            "expected layers named 0.weight, ... in one file and 1.weight, ... in the other."
        )

    def read(names: Iterable[str]) -> dict[str, torch.Tensor]:
        names = list(names)
        found: dict[str, torch.Tensor] = {}
        for prefix, half in halves.items():
            own = half.read([name.removeprefix(prefix) for name in names if name.startswith(prefix)])
            found |= {prefix + name: value for name, value in own.items()}
        return found

    return Source(
        encoder.path,
        encoder.files + decoder.files,
        {prefix + name: shape for prefix, half in halves.items() for name, shape in half.shapes.items()},
        {prefix + name: dtype for prefix, half in halves.items() for name, dtype in half.dtypes.items()},
        read,
    )


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a torch file, on the CPU, read by a process of its own without running code; ``state_dict`` is unwrapped."""
    with unpickled(path) as found:
        if found.listed:
            raise UserError(f"{path}: holds no named tensors but a list of {found.names:,}; expected the weights of a VAE.")
        return read_tensors(found.path)


def _in_memory(path: Path, tensors: dict[str, torch.Tensor], **known: Any) -> Source:
    return Source(
        path,
        (path,),
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
        lambda names: {name: tensors[name] for name in names},
        **known,
    )


def _file(path: Path) -> Source:
    header = read_header(path)
    config = None
    if CONFIG_KEY in header.metadata:
        try:
            config = parse_object(header.metadata[CONFIG_KEY])
        except ValueError as error:
            raise UserError(f"{path}: its metadata's {CONFIG_KEY} is no JSON object ({error}); convert the VAE again.") from None
    return Source(path, (path,), header.shapes, header.dtypes, lambda names: read_tensors(path, names), config)


def _folder(folder: Path, pickles: bool) -> Source:
    config = read_json(folder / "config.json")
    files = weight_files(folder)
    torch_file = folder / "diffusion_pytorch_model.bin"
    if pickles and not files[0].is_file() and torch_file.is_file():
        return _in_memory(torch_file, read_pickle(torch_file), config=config, folder=folder)
    headers = {file: read_header(file) for file in files}
    return Source(
        files[0] if len(files) == 1 else folder,
        files,
        _merged(headers, "shapes"),
        _merged(headers, "dtypes"),
        lambda names: _read_shards(headers, names),
        config,
        folder,
    )


def weight_files(folder: Path, name: str = VAE_FILE) -> tuple[Path, ...]:
    """The plain file `name`; else the shards that an index names; else the one variant there is (``.fp16.safetensors``)."""
    stem = name.removesuffix(".safetensors")
    plain = folder / name
    if plain.exists():
        return (plain,)
    for index in sorted(folder.glob(f"{stem}*.index*.json"), key=lambda path: len(path.name)):
        listed = read_json(index).get("weight_map")
        shards = sorted({str(shard) for shard in listed.values()}) if isinstance(listed, dict) else []
        if not shards or any(Path(shard).name != shard for shard in shards):
            raise UserError(f"{index}: names no weight files of its own folder; expected a weight_map.")
        return tuple(folder / shard for shard in shards)
    variants = [path for path in sorted(folder.glob(f"{stem}.*.safetensors")) if "-of-" not in path.name]
    if len(variants) > 1:
        raise UserError(f"{folder} holds {' and '.join(path.name for path in variants)}; keep one of them, or rename it {name}.")
    return tuple(variants) or (plain,)


def offline(folder: Path) -> dict[str, Any]:
    """How ``from_pretrained`` reads a part's folder: its own files, safetensors, of the variant ("fp16") that alone is there."""
    found = {name[1] or name[2] for path in folder.glob("*.safetensors") if (name := VARIANT.fullmatch(path.name))}
    return {"variant": found.pop() if len(found) == 1 else None, "local_files_only": True, "use_safetensors": True}


def _merged(headers: dict[Path, Header], part: str) -> dict[str, Any]:
    return {name: value for header in headers.values() for name, value in getattr(header, part).items()}


def _read_shards(headers: dict[Path, Header], names: Iterable[str]) -> dict[str, torch.Tensor]:
    wanted = list(names)
    found: dict[str, torch.Tensor] = {}
    for file, header in headers.items():
        found |= read_tensors(file, [name for name in wanted if name in header.shapes])
    return found
