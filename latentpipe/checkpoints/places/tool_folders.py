"""Folders of other tools whose files are used where they lie: which there are (folders.yaml), and what lies in them.

Nothing is written there. Kinds: models, parts (denoisers and text encoders alone), vae, lora, embeddings, upscalers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentpipe.checkpoints.places.hub_cache import repositories
from latentpipe.checkpoints.places.invoke import PICKLES, SAFE, registered
from latentpipe.utils.errors import UserError
from latentpipe.utils.gguf_header import SUFFIX as GGUF
from latentpipe.utils.io import folders_once
from latentpipe.utils.reading import read_json, read_yaml

KINDS = ("models", "parts", "vae", "lora", "embeddings", "upscalers")
EXTRA = "extra_model_paths.yaml"

COMFYUI = {
    "checkpoints": "models",
    "diffusers": "models",
    "diffusion_models": "parts",
    "unet": "parts",
    "text_encoders": "parts",
    "clip": "parts",
    "vae": "vae",
    "loras": "lora",
    "embeddings": "embeddings",
    "upscale_models": "upscalers",
}
A1111 = {
    "models/Stable-diffusion": "models",
    "models/diffusers": "models",
    "models/Diffusers": "models",
    "models/text_encoder": "parts",
    "models/VAE": "vae",
    "models/Lora": "lora",
    "models/LyCORIS": "lora",
    "embeddings": "embeddings",
    "models/ESRGAN": "upscalers",
    "models/RealESRGAN": "upscalers",
    "models/SwinIR": "upscalers",
    "models/DAT": "upscalers",
    "models/ScuNET": "upscalers",
}
EXPECTED = {
    "comfyui": f"ComfyUI's folder (with models/checkpoints, ...), its models folder, or an {EXTRA}",
    "a1111": "the web UI's folder (with models/Stable-diffusion, ...)",
    "invokeai": "InvokeAI's root folder (with models/ and databases/)",
    "diffusers-cache": "a cache of huggingface_hub (with models--ORG--NAME folders)",
}


@dataclass(frozen=True)
class Import:
    """One line of folders.yaml: a tool, its folder, and what its names begin with."""

    tool: str
    path: Path
    label: str


@dataclass(frozen=True)
class Found:
    """A file, or a model's folder, of a tool."""

    kind: str
    name: str
    path: Path
    origin: str

    @property
    def opens(self) -> bool:
        """Whether it is a folder, safetensors or GGUF; a pickle is for `convert` alone."""
        return self.path.suffix in (*SAFE, GGUF) or self.path.is_dir()


def folders_file() -> Path:
    """$LATENTPIPE_HOME/folders.yaml, else latentpipe/folders.yaml in the user's folder of configs."""
    if os.environ.get("LATENTPIPE_HOME"):
        return Path(os.environ["LATENTPIPE_HOME"]) / "folders.yaml"
    configs = os.environ.get("XDG_CONFIG_HOME") or os.environ.get("APPDATA")
    try:
        return Path(configs or Path.home() / ".config") / "latentpipe" / "folders.yaml"
    except RuntimeError:  # a user without a home
        return Path(os.devnull) / "latentpipe" / "folders.yaml"


def imports() -> list[Import]:
    """What folders.yaml lists; nothing where there is no such file, UserError where it is damaged."""
    path = folders_file()
    if not path.is_file():
        return []
    rows = read_yaml(path, "a list of tools' folders") or []
    found: list[Import] = []
    for row in rows if isinstance(rows, list) else [rows]:
        fits = isinstance(row, dict) and set(row) == {"from", "path"} and row["from"] in EXPECTED and isinstance(row["path"], str)
        if not fits:
            raise UserError(
                f"{path}: {str(row)[:80]} is no entry; expected lines 'from' (one of {', '.join(EXPECTED)}) and 'path', "
                "as 'latentpipe import' writes them."
            )
        earlier = sum(one.tool == row["from"] for one in found)
        found.append(Import(row["from"], Path(row["path"]), row["from"] + (f"-{earlier + 1}" if earlier else "")))
    return found


def caches() -> list[Path]:
    """The hub caches that were imported."""
    return [one.path for one in imports() if one.tool == "diffusers-cache"]


def foreign(kind: str) -> dict[str, Path]:
    """Names and places of the tools' files of a kind that open ("models", "vae", "lora", ...): "comfyui/style/flat".

    What cannot be read now (a drive that is away, a damaged list of paths) has no names; `entries` says why.
    """
    found: dict[str, Path] = {}
    for one in imports():
        try:
            there = [entry for entry in entries(one) if entry.opens]
        except (UserError, OSError):
            continue
        if kind == "vae":  # a whole model stands for its VAE
            found |= {entry.name: entry.path / "vae" for entry in there if (entry.path / "model_index.json").is_file()}
        found |= {entry.name: entry.path for entry in there if entry.kind == kind}
    return found


def pickle_named(name: str) -> Path | None:
    """The tools' file of that name that `ls` lists and no verb but `convert` opens; None where there is none."""
    for one in imports():
        with suppress(UserError, OSError):
            for entry in entries(one):
                if entry.name == name and not entry.opens:
                    return entry.path
    return None


def entries(one: Import) -> list[Found]:
    """All that lies in a tool's folders, by kind and name; UserError where they cannot be read."""
    if not one.path.exists():
        raise UserError(f"{one.path} ({one.tool}) is not there; see {folders_file()}.")
    if one.tool == "diffusers-cache":
        return list(_of_cache(one))
    named = registered(one.path) if one.tool == "invokeai" else []
    found = [Found(kind, f"{one.label}/{name}", path, one.label) for kind, name, path in named]
    known = {entry.path for entry in found}
    taken = {entry.name for entry in found}
    for kind, root in roots(one.tool, one.path):
        for path in _files(root):
            if path in known or (path.suffix == GGUF and kind not in ("models", "parts")):
                continue
            known.add(path)
            relative = path.relative_to(root).as_posix()
            stem = relative if path.is_dir() else relative.removesuffix(path.suffix)
            choices = (stem, relative, f"{root.name}/{relative}", path.as_posix().lstrip("/"))
            name = next(text for text in (f"{one.label}/{choice}" for choice in choices) if text not in taken)
            taken.add(name)
            own = "vae" if kind == "models" and stem.endswith(".vae") else kind  # a VAE beside its model, as A1111 has them
            found.append(Found(own, name, path, one.label))
    return sorted(found, key=lambda entry: (KINDS.index(entry.kind), entry.name))


def roots(tool: str, path: Path) -> list[tuple[str, Path]]:
    """Kind and place of each of a tool's folders that there is; UserError where its own list of them is damaged."""
    if tool == "comfyui":
        places = list(_comfyui(path))
    elif tool == "a1111":
        places = [(kind, path / name) for name, kind in A1111.items()]
    else:
        places = []
    found: list[tuple[str, Path]] = []
    for kind, place in places:
        if place.is_dir() and not any(place.samefile(other) for _, other in found):
            found.append((kind, place))
    return found


def _comfyui(path: Path) -> Iterator[tuple[str, Path]]:
    if path.is_file():
        yield from _extra(path)
        return
    models = path / "models" if (path / "models").is_dir() else path
    yield from ((kind, models / name) for name, kind in COMFYUI.items())
    if (path / EXTRA).is_file():
        yield from _extra(path / EXTRA)


def _extra(path: Path) -> Iterator[tuple[str, Path]]:
    """The folders of an extra_model_paths.yaml: sections of types, each with one path or one a line, below a base_path."""
    sections = read_yaml(path, "ComfyUI's list of paths")
    if not isinstance(sections, dict):
        raise UserError(f"{path}: expected sections of paths, as ComfyUI's {EXTRA} has them.")
    for name, section in sections.items():
        if section is None:
            continue
        if not isinstance(section, dict):
            raise UserError(f"{path}: the section {str(name)[:40]} holds {str(section)[:40]!r}; expected types and paths.")
        base = Path(os.path.normpath(path.parent / _expanded(str(section.get("base_path") or ""))))
        for kind, lines in section.items():
            if kind in COMFYUI and isinstance(lines, str):
                yield from ((COMFYUI[kind], base / _expanded(line.strip())) for line in lines.splitlines() if line.strip())


def _expanded(text: str) -> Path:
    return Path(os.path.expanduser(os.path.expandvars(text)))


def _files(root: Path) -> Iterator[Path]:
    """Weights and models' folders below a folder; links to folders are followed, each folder once; hidden ones are passed by."""
    for at, folders, names in folders_once(root):
        if "model_index.json" in names:
            folders.clear()
            yield at
            continue
        yield from (at / name for name in names if _holds_weights(name))


def _holds_weights(name: str) -> bool:
    return not name.startswith(".") and name.endswith((*SAFE, *PICKLES, GGUF))


def _of_cache(one: Import) -> Iterator[Found]:
    """Models, VAEs and LoRA of a hub cache, by their ids; those of other libraries are passed by."""
    for name, snapshot in repositories(one.path).items():
        try:
            config = read_json(snapshot / "config.json") if (snapshot / "config.json").is_file() else {}
        except UserError:
            continue
        if (snapshot / "model_index.json").is_file():
            yield Found("models", name, snapshot, one.label)
        elif str(config.get("_class_name", "")).startswith("Autoencoder"):
            yield Found("vae", name, snapshot, one.label)
        elif (snapshot / "pytorch_lora_weights.safetensors").is_file():
            yield Found("lora", name, snapshot / "pytorch_lora_weights.safetensors", one.label)


def counted_by_kind(found: Iterable[Found]) -> Mapping[str, int]:
    """How many there are of each kind."""
    kinds = [entry.kind for entry in found]
    return {kind: kinds.count(kind) for kind in KINDS if kind in kinds}


def as_rows(known: Iterable[Import]) -> list[dict[str, Any]]:
    """What folders.yaml holds of them."""
    return [{"from": one.tool, "path": str(one.path)} for one in known]
