"""LoRA files: read in every layout there is, written in peft's, diffusers' and kohya's; true alpha, nothing dropped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from latentpipe.checkpoints.embedding import Embedding, as_tensors, assembled
from latentpipe.checkpoints.pickles.unpickle import unpickled
from latentpipe.checkpoints.tensor_source import PICKLES
from latentpipe.lora.adapter import COMPONENTS, Lora, LoraLayer
from latentpipe.lora.metadata import card, stated_base, trigger_words
from latentpipe.lora.state_dict import cloneofsimo
from latentpipe.lora.state_dict.keys import PEFT, Base, KeyResolver, flat, in_file, kohya_stem, take_apart
from latentpipe.lora.state_dict.kohya import to_kohya
from latentpipe.lora.state_dict.layers import LayerMetadata, build_layer
from latentpipe.lora.state_dict.peft_config import ADAPTER_KEY, pack, read_configs
from latentpipe.utils.errors import LatentpipeWarning, UserError
from latentpipe.utils.io import atomic_file, check_file, is_safetensors, printable, read_header, read_json, read_tensors
from latentpipe.utils.reading import MOST_HEADER, parse_json, parse_object

__all__ = ["card", "read_lora", "stated_base", "trigger_words", "write_lora"]

Layout = Literal["peft", "diffusers", "kohya"]
Roles = dict[str, tuple[str, torch.Tensor]]  # key and tensor by role
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYERS = "latentpipe.layers"  # what the keys and tensors of a layout do not give back, by the stem of its keys
COMPONENT = "latentpipe.component"  # of keys that name none
BUNDLED = re.compile(
    r"bundle_emb\.(.+?)(?:\.(clip_[lg]|emb_params|string_to_param.*|\*|<[^<>]*>))?"
)  # A1111's, beside the layers
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OURS = (ADAPTER_KEY, LAYERS, COMPONENT, "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


def read_lora(path: Path, base: Base | None = None, pickles: bool = False) -> Lora:
    """An adapter from a safetensors file or a peft folder; the layout is known by its keys.

    base     module paths by component (without ``text_model.``) of the model that it shall go on; kohya's names are resolved
             among them, else by a table of known names. Layers of other paths are kept: the report says what does not match
    pickles  also .bin, .pt, .pth and .ckpt, weights alone (for `convert`)

    Where no alpha is given it is the rank. Keys of no layer are in `Lora.unread`. UserError for a file without an adapter, a
    truncated one, a pickle, values that are not finite, factors that do not fit, half a layer, one module named twice.
    """
    path = Path(path)
    tensors, metadata = _open(path, pickles)
    bundled = {key: tensors.pop(key) for key in list(tensors) if BUNDLED.fullmatch(key)}
    try:
        lora = _assemble(tensors, metadata, base)
        lora = dataclasses.replace(lora, embeddings=_embeddings(bundled))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not lora.parts:
        shown = ", ".join(list(tensors)[:3]) or "nothing"
        raise UserError(f"{path}: holds no LoRA, LoHa or LoKr layer; given {len(tensors)} tensors ({shown}, ...).")
    if any(key.startswith(PEFT) for key in tensors) and not read_configs(metadata) and LAYERS not in metadata:
        warnings.warn(f"{path}: no {CONFIG} lies beside it, so alpha is taken to be the rank.", LatentpipeWarning, stacklevel=2)
    stem = printable(path.name if path.is_dir() else path.stem)
    return dataclasses.replace(lora, name=stem)


def write_lora(
    lora: Lora, path: Path, to: Layout = "diffusers", dtype: str | None = None, metadata: Mapping[str, str] | None = None
) -> str:
    """Write one safetensors file, atomically, and return the `Lora.hash` that `read_lora` will find in it.

    to        "diffusers": ``unet.path.lora_A.weight``, as `load_lora_weights` takes it, alpha in its metadata;
              "kohya": ``lora_unet_path.lora_down.weight`` with ``.alpha`` such that alpha / rank is the scale;
              "peft": ``base_model.model.path.lora_A.weight``, after the component where there are several
    dtype     "fp32", "fp16" or "bf16"; None keeps what the tensors have
    metadata  added to that of the LoRA itself (`card`)
    """
    path = Path(path)
    if to not in ("peft", "diffusers", "kohya"):
        raise UserError(f"No LoRA layout '{to}'; expected peft, diffusers or kohya.")
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: a LoRA is written as a safetensors file; give it that ending.")
    if not any(True for _ in lora.layers()):
        raise UserError(f"LoRA '{lora.name}' holds no layer, so there is nothing to write to {path}.")
    lora = _cast(dataclasses.replace(lora, metadata={**lora.metadata, **(metadata or {})}), dtype)
    stems = _stems(lora, to)
    if len(set(stems.values())) < len(stems):
        raise UserError(f"LoRA '{lora.name}': two of its modules have the same name in kohya's layout; write another one.")
    tensors: dict[str, torch.Tensor] = {}
    for component, place, layer in lora.layers():
        ends = to_kohya(layer) if to == "kohya" else {_peft_end(name): value for name, value in layer.tensors.items()}
        tensors |= {f"{stems[component, place]}.{end}": value.detach().cpu().clone().contiguous() for end, value in ends.items()}
    own = {name: value for name, value in lora.metadata.items() if name not in _OURS}
    own = {name: value for name, value in own.items() if not name.startswith(("unet:", "text_encoder:"))} | {"format": "pt"}
    if to != "kohya":
        own[ADAPTER_KEY] = pack(lora.parts)
    if to == "peft" and len(lora.parts) == 1:
        own[COMPONENT] = next(iter(lora.parts))
    _say(lora, to, path)
    metadata = _completed(lora, stems, tensors, own)
    for one in lora.embeddings:
        tensors |= {f"bundle_emb.{one.name}.{key}": value.cpu().clone().contiguous() for key, value in as_tensors(one).items()}
    _save(tensors, metadata, path)
    return lora.hash


def _open(path: Path, pickles: bool) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise UserError(f"{path}: a folder without {CONFIG}; expected a peft adapter, or give the safetensors file itself.")
        config = read_json(path / CONFIG)
        return read_tensors(path / WEIGHTS), dict(read_header(path / WEIGHTS).metadata) | {ADAPTER_KEY: json.dumps(config)}
    if path.suffix not in PICKLES or is_safetensors(path):  # judged by its first bytes, not by its name
        return read_tensors(path), dict(read_header(path).metadata)
    check_file(path)
    if not pickles:
        raise UserError(
            f"{path}: a {path.suffix} file is a pickle, which can run code when it is opened; "
            f"turn it into safetensors once: latentpipe lora convert {path} --out FILE.safetensors."
        )
    with unpickled(path) as found:
        tensors = read_tensors(found.path)
    if found.listed:
        return cloneofsimo.from_list([tensors[str(at)] for at in range(found.names)], str(path)), {}
    return tensors, {}


def _assemble(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], base: Base | None) -> Lora:
    """Tensors by a file's keys as an adapter."""
    exact = _exact(metadata)
    if cloneofsimo.is_ancestral(list(tensors)):
        modules, unread = cloneofsimo.rename(tensors, base)
        stems: dict[tuple[str, str], str] = {}
    else:
        modules, stems, unread = _grouped(tensors, exact, base, metadata.get(COMPONENT, ""))
    configs = read_configs(metadata)
    parts: dict[str, dict[str, LoraLayer]] = defaultdict(dict)
    for (component, path), roles in modules.items():
        config = configs.get(component) or configs.get("")
        says = config.told(path) if config else LayerMetadata(rank=_whole_number(metadata.get("ss_network_dim")))
        known = exact.get(stems.get((component, path), ""), {})
        layer = build_layer(f"{component}.{path}", {role: tensor for role, (_, tensor) in roles.items()}, says, known)
        if layer is None:
            unread += [key for key, _ in roles.values()]
        else:
            parts[component][path] = layer
    ordered = {component: parts[component] for component in COMPONENTS if component in parts}
    return Lora(ordered, metadata=dict(metadata), unread=tuple(unread))


def _grouped(
    tensors: Mapping[str, torch.Tensor], exact: Mapping[str, Any], base: Base | None, default: str
) -> tuple[dict[tuple[str, str], Roles], dict[tuple[str, str], str], list[str]]:
    """Roles by component and path, the stem that each was named by, and the keys of no layer."""
    apart = {key: take_apart(key) for key in tensors}
    names = KeyResolver([found[0] for found in apart.values() if found], base, default)
    modules: dict[tuple[str, str], Roles] = defaultdict(dict)
    stems: dict[tuple[str, str], str] = {}
    for key, found in apart.items():
        if found is None:
            continue
        stem, role = found
        place = _named(stem, exact.get(stem, {})) or names.resolve(stem)
        stems.setdefault(place, stem)
        if role in modules[place] or stems[place] != stem:
            other = modules[place].get(role, next(iter(modules[place].values())))[0]
            raise UserError(f"it names the module {'.'.join(place)} twice, as {other} and as {key}; keep one of them.")
        modules[place][role] = (key, tensors[key])
    return modules, stems, [key for key, found in apart.items() if found is None]


def _embeddings(bundled: Mapping[str, torch.Tensor]) -> tuple[Embedding, ...]:
    """The textual inversions that lie beside the layers, as A1111 bundles them: ``bundle_emb.NAME.KEY``."""
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, value in bundled.items():
        match = BUNDLED.fullmatch(key)
        assert match is not None
        found[match[1]][match[2] or "*"] = value
    return tuple(assembled(tensors, printable(name), f"its embedding '{name}'") for name, tensors in found.items())


def _exact(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    try:
        stored = parse_object(metadata.get(LAYERS, "{}"))
    except ValueError:
        stored = {"": None}
    if not all(isinstance(value, dict) for value in stored.values()):
        raise UserError(f"its metadata's {LAYERS} is no JSON object of layers; convert the LoRA again.")
    return stored


def _named(stem: str, known: Mapping[str, Any]) -> tuple[str, str] | None:
    """Component and path that our metadata gives a stem, where they make that stem."""
    component, path = known.get("component"), known.get("path")
    if component in COMPONENTS and isinstance(path, str) and flat(stem).endswith(flat(in_file(component, path))):
        return component, path
    return None


def _stems(lora: Lora, to: Layout) -> dict[tuple[str, str], str]:
    """What the keys of each module begin with."""
    several = len(lora.parts) > 1
    two = bool({"text_encoder_2", "text_encoder_3"} & ({*lora.parts} | {*stated_base(lora)}))
    stems = {}
    for component, path, _ in lora.layers():
        if to == "kohya":
            stem = kohya_stem(component, path, two)
        elif to == "peft":
            stem = (f"{component}." if several else "") + PEFT + in_file(component, path)
        else:
            stem = f"{component}.{in_file(component, path)}"
        stems[component, path] = stem
    return stems


def _peft_end(name: str) -> str:
    return f"{name}.weight" if name in ("lora_A", "lora_B") else name


def _cast(lora: Lora, dtype: str | None) -> Lora:
    if dtype is None:
        return lora
    if dtype not in DTYPES:
        raise UserError(f"No dtype '{dtype}' for a LoRA file; expected {', '.join(DTYPES)}.")

    def changed(where: str, layer: LoraLayer) -> LoraLayer:
        tensors = {name: value.to(DTYPES[dtype]) for name, value in layer.tensors.items()}
        if not all(torch.isfinite(value).all() for value in tensors.values()):
            raise UserError(f"{where} holds values beyond the range of {dtype}; write it in fp32 or bf16.")
        return dataclasses.replace(layer, tensors=tensors)

    parts = {
        component: {path: changed(f"{component}.{path}", layer) for path, layer in layers.items()}
        for component, layers in lora.parts.items()
    }
    return dataclasses.replace(lora, parts=parts)


def _completed(
    lora: Lora, stems: Mapping[tuple[str, str], str], tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]
) -> dict[str, str]:
    """The metadata with an entry in `LAYERS` for each layer that the rest of the file would not give back exactly."""
    back = {(component, path): layer for component, path, layer in _assemble(tensors, metadata, None).layers()}
    entries: dict[str, dict[str, Any]] = {}
    for component, path, layer in lora.layers():
        read = back.get((component, path))
        same = read is not None and set(read.tensors) == set(layer.tensors)
        if read and same and (read.rank, read.alpha, read.rslora) == (layer.rank, layer.alpha, layer.rslora):
            continue
        entry: dict[str, Any] = {"rank": layer.rank, "alpha": float(layer.alpha), "rslora": layer.rslora}
        if read is None:
            entry |= {"component": component, "path": path}
        if not same:
            entry["whole"] = True
        entries[stems[component, path]] = entry
    if entries:
        metadata = metadata | {LAYERS: json.dumps(entries, sort_keys=True)}
    if _assemble(tensors, metadata, None).hash != lora.hash:
        raise UserError(f"LoRA '{lora.name}' cannot be written so that it reads back the same; write another layout.")
    return metadata


def _say(lora: Lora, to: Layout, path: Path) -> None:
    """What other programs cannot do with such a file, though we can."""
    for component, layers in lora.parts.items():
        kinds = {layer.kind for layer in layers.values()}
        if to == "diffusers" and ("loha" in kinds or len(kinds) > 1):
            text = f"{component} has {' and '.join(sorted(kinds))} layers, which diffusers does not load from one file; we do"
        elif to != "kohya" and len({layer.dora for layer in layers.values() if layer.kind == "lora"}) > 1:
            text = f"only some layers of {component} are DoRA, which peft and diffusers cannot tell apart; we do"
        else:
            continue
        warnings.warn(f"{path}: {text}.", LatentpipeWarning, stacklevel=3)


def _whole_number(text: str | None) -> int | None:
    return (int(text) or None) if text and text.isdecimal() and len(text) < 7 else None


def _save(tensors: dict[str, torch.Tensor], metadata: dict[str, str], path: Path) -> None:
    """safetensors writes metadata in no fixed order; here the header is sorted, so that the same LoRA is the same file."""
    from safetensors.torch import save

    data = save(tensors)
    start = 8 + int.from_bytes(data[:8], "little")
    if "modelspec.sai_model_spec" in metadata:  # ModelSpec: sha256 of all bytes after the header
        metadata = metadata | {"modelspec.hash_sha256": "0x" + hashlib.sha256(data[start:]).hexdigest()}
    header = {"__metadata__": dict(sorted(metadata.items()))} | parse_json(data[8:start].decode(), most=MOST_HEADER)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(data)[start:])
