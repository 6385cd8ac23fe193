"""Which file each part of a pipeline comes from: the model's own, other files that complete it, a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentpipe.checkpoints.registry import find_part
from latentpipe.checkpoints.single_file import configs as config_sets
from latentpipe.checkpoints.single_file import prediction
from latentpipe.checkpoints.single_file.configs import PASSIVE, Configs
from latentpipe.checkpoints.single_file.families import FAMILIES
from latentpipe.checkpoints.single_file.identify import Identity, identify
from latentpipe.checkpoints.single_file.parts import Part
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import is_gguf

OPTIONAL = {("StableDiffusion3", "text_encoder_3")}  # diffusers draws without


@dataclass(frozen=True)
class Stated:
    """What a person says about a file that it does not say itself.

    family      name of a family, where the shapes fit several
    prediction  "epsilon", "v" or "v-zsnr", over what the file says
    config      a diffusers folder with the configs of an odd model; its weights fill in what the file lacks
    parts       files (or diffusers folders), or names of installed ones, that complete the file: a VAE, text encoders
    """

    family: str | None = None
    prediction: str | None = None
    config: Path | None = None
    parts: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Opened:
    """A file whose parts are found: what it is, the configs, and where each component's weights lie (a part, or a folder)."""

    identity: Identity
    configs: Configs
    sources: dict[str, Part | Path]
    without: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The file."""
        return self.identity.path

    def config(self, component: str) -> dict[str, Any]:
        """The config of a component's network."""
        return self.configs.networks[component]


def open_file(path: Path, stated: Stated | None = None) -> Opened:
    """A file with all parts of its pipeline found, by headers alone; UserError where it does not open, or a part is missing."""
    stated = stated or Stated()
    found = identify(path, stated.family, stated.config is not None)
    if found.why:
        raise UserError(found.why + _hint(found))
    if stated.prediction is not None:
        found = replace(found, prediction=prediction.stated(stated.prediction))
        if found.family and FAMILIES[found.family].configs in ("sd3", "flux"):
            raise UserError(
                f"{path} is a model of {FAMILIES[found.family].title}, which matches flows; leave the prediction out."
            )
    configs = (
        config_sets.configs_in_folder(stated.config, found) if stated.config is not None else config_sets.bundled_configs(found)
    )
    return _complete(found, configs, stated)


def completing(opened: Opened, stated: Stated) -> dict[str, Path]:
    """The components of a file that stated parts complete, each with its file or folder."""
    places = {name: source.path if isinstance(source, Part) else source.parent for name, source in opened.sources.items()}
    given = [find_part(path) for path in stated.parts]
    return {name: place for name, place in places.items() if place in given and place != opened.path}


def _hint(found: Identity) -> str:
    """What to do with a file that is no model."""
    return {
        "lora": " Give it with --lora.",
        "vae": " Give it with --vae, or with --parts beside the file of a denoiser.",
        "text encoder": " Give it with --parts beside the file of a denoiser.",
        "text encoders": " Give it with --parts beside the file of a denoiser.",
    }.get(found.role, "")


def _complete(found: Identity, configs: Configs, stated: Stated) -> Opened:
    pools: list[Mapping[str, Part]] = [found.parts]
    folders: list[Path] = [stated.config] if stated.config is not None else []
    for path in map(find_part, stated.parts):
        if path.is_dir():
            folders.append(path)
        else:
            pools.append(_parts_of(path))
    sources: dict[str, Part | Path] = {}
    missing, without = [], []
    for component, source in configs.index.items():
        if not isinstance(source, list) or not source or not source[0] or component in PASSIVE:
            continue
        place = _place(component, configs, pools, folders)
        if place is not None:
            sources[component] = place
        elif any(configs.pipeline.startswith(family) and component == name for family, name in OPTIONAL):
            without.append(component)
        else:
            missing.append(component)
    if missing:
        raise UserError(_missing(found, configs, [*sources], missing, pools, folders))
    return Opened(found, configs, sources, tuple(without))


def _parts_of(path: Path) -> Mapping[str, Part]:
    """The parts of a file that completes another."""
    found = identify(path)
    if is_gguf(path) and found.role == "transformer":
        raise UserError(f"{path} holds a transformer in GGUF; give it with --model, and what completes it with --parts.")
    unread = found.quantization in ("nf4", "fp4", "quantized") or is_gguf(path)
    if not found.parts or found.role in ("lora", "embedding") or unread:
        raise UserError(found.why or f"{path} holds no part of a model.")
    return found.parts


def _place(component: str, configs: Configs, pools: Sequence[Mapping[str, Part]], folders: Sequence[Path]) -> Part | Path | None:
    """The first place that holds a component: files in their order, then folders."""
    wanted = configs.slots(component)
    width = configs.networks[component].get("hidden_size")
    for pool in pools:
        for slot, part in pool.items():
            if slot in wanted or (slot == "clip" and width is not None and width == _width(part)):
                return part
    return next((folder / component for folder in folders if any((folder / component).glob("*.safetensors"))), None)


def _width(part: Part) -> int:
    return next((shape[-1] for name, shape in part.shapes.items() if name.endswith("token_embedding.weight")), 0)


def _missing(
    found: Identity,
    configs: Configs,
    there: Sequence[str],
    missing: Sequence[str],
    pools: Sequence[Mapping[str, Part]],
    folders: Sequence[Path],
) -> str:
    """What is missing, and where it was looked for."""
    looked = [str(found.path), *(str(part.path) for pool in pools[1:] for part in list(pool.values())[:1])]
    looked += [f"{folder}/{name}" for folder in folders for name in missing]
    title = FAMILIES[found.family].title if found.family else configs.pipeline
    return (
        f"{found.path} holds the {' and '.join(there) or 'nothing'} of a {title} model; missing: {', '.join(missing)}. "
        f"Looked for in {', '.join(looked)}. Name files or diffusers folders that hold them with --parts."
    )
