"""Where VAEs live: find, open, save, hash. Safetensors only; the formats are in `formats`."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from latentpipe.errors import UserError
from latentpipe.files import atomic_folder, content_hash, home
from latentpipe.formats import opening as formats
from latentpipe.formats.opening import Given, VAEFile
from latentpipe.formats.source import CARD_FILE as CARD_FILE
from latentpipe.formats.source import VAE_FILE as VAE_FILE
from latentpipe.latents import LatentSpace
from latentpipe.ranges import check_network_config, check_space

PREVIEW_FILE = "latent_rgb.json"


def shipped() -> Path:
    """The folder of the weights that ship with the project: in the wheel, or in a checkout."""
    here = Path(__file__).parent
    return here / "embedded" if (here / "embedded").is_dir() else here.parent / "weights"


def available(kind: str = "models") -> dict[str, Path]:
    """Names and places of all `kind` ("models", "vae" or "lora"): the shipped ones, then people's own.

    A model is a folder; a VAE is a folder or a safetensors file named by its stem (by its whole name where a folder has that);
    a LoRA is a safetensors file.
    """
    if kind == "lora":
        roots = (shipped() / kind, home() / kind)
        return {path.stem: path for root in roots for path in sorted(root.glob("*.safetensors"))}
    index = "model_index.json" if kind == "models" else "config.json"
    found: dict[str, Path] = {}
    shown = "[!.]*"  # a folder that is being written has a hidden name
    for root in (shipped(), home() / "models"):
        for path in sorted(root.glob(f"{shown}/model_index.json")):
            found[path.parent.name] = path.parent if kind == "models" else path.parent / "vae"
    for root in (shipped() / kind, home() / kind):
        found |= {path.parent.name: path.parent for path in sorted(root.glob(f"{shown}/{index}"))}
        for path in sorted(root.glob("*.safetensors")) if kind == "vae" else ():
            found[path.name if (root / path.stem).is_dir() else path.stem] = path
    return found


def find_model(name: str | Path, kind: str = "models") -> Path:
    """The folder (or a VAE's single file) that a name or a path means; UserError lists the names there are."""
    if not str(name).strip():
        raise UserError(f"The {kind.removesuffix('s')} has an empty name; give a name ('latentpipe ls'), a folder or a file.")
    known = available(kind)
    if str(name) in known:
        if f"{name}.safetensors" in known:
            raise UserError(f"{kind} '{name}' is both {known[str(name)]} and {known[f'{name}.safetensors']}; rename one of them.")
        return known[str(name)]
    path = Path(name)
    if kind == "vae" and (path / "model_index.json").is_file() and (path / "vae").is_dir():
        return (path / "vae").resolve()  # a whole model stands for its VAE
    if path.is_dir() or (kind == "vae" and path.is_file()):
        return path.resolve()
    kinds = "neither a folder nor a file nor" if kind == "vae" else "neither a folder nor"
    raise UserError(f"No {kind.removesuffix('s')} '{name}': {kinds} one of {', '.join(known) or 'none installed'}.")


def open_vae(
    path: Path,
    *,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    downscale: int | None = None,
    norm_groups: int | None = None,
) -> VAEFile:
    """A VAE's complete config, space and tensors, without building it.

    path  a diffusers folder, or a safetensors file with diffusers', LDM's (also within a checkpoint) or TAESD's keys
    The other arguments state what a file does not; left out, it is measured on probe images (a Note says so) or asked
    for (UserError). A factor that is given wins over the file's.
    """
    with quiet():
        found = formats.open_vae(Path(path), Given(scaling_factor, shift_factor, downscale, norm_groups))
    check_space(found.space.scale, found.space.shift, Path(path))
    check_network_config(found.config, Path(path))
    return found


def declared_space(path: Path) -> LatentSpace:
    """Channels and downscale of a VAE's latents, from its config or header alone; factors that it does not state are 1."""
    return formats.declared_space(Path(path))


def load_vae(path: Path, dtype: torch.dtype = torch.float32, **given: Any) -> Any:
    """An autoencoder from a folder or a file, strictly, in eval mode; arguments as for `open_vae`."""
    vae = open_vae(path, **given)
    with quiet():
        return torch.nn.Module.to(vae.build(), dtype)


def vae_hash(path: Path, **given: Any) -> str:
    """The content hash of a VAE: its weights as stored, by their diffusers names, and its normalization.

    The same for the same weights in a folder, in an LDM file and inside a checkpoint. Arguments as for `open_vae`.
    """
    vae = open_vae(path, **given)
    return content_hash(vae.tensors, vae.space)


def save_vae(vae: Any, folder: Path, card: Mapping[str, Any], preview: Any = None) -> str:
    """Write a VAE folder in fp16 with its card, atomically; return the content hash.

    It opens with ``AutoencoderKL.from_pretrained(folder)``; `preview` is the linear latent-to-RGB map.
    """
    refuse_wrapped(vae, "The VAE")
    half = torch.nn.Module.half(copy.deepcopy(vae))
    digest = content_hash(half.state_dict(), LatentSpace.of(vae))
    with atomic_folder(folder) as part:
        half.save_pretrained(part, safe_serialization=True)
        (part / CARD_FILE).write_text(json.dumps({**card, "content_hash": digest}, indent=2) + "\n")
        if preview is not None:
            (part / PREVIEW_FILE).write_text(json.dumps(preview) + "\n")
    return digest


def refuse_wrapped(model: torch.nn.Module, what: str) -> None:
    """UserError where adapters are wrapped around a network: its weights would be written under names that nothing reads."""
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise UserError(
            f"{what} has adapters attached and was not saved; take them off, or fuse them (set_lora with fuse), first."
        )


def name_of(folder: Path, kind: str = "models") -> str:
    """The name under which `find_model` finds a folder or file; one elsewhere has its own name."""
    known = {path.resolve(): name for name, path in available(kind).items()}
    return known.get(folder.resolve(), folder.stem if folder.is_file() else folder.name)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and advice of diffusers and transformers (torchvision is missing, ...) from the user."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [
        (module, module.get_verbosity(), module.is_progress_bar_enabled()) for module in (diffusers_logging, transformers_logging)
    ]
    for module, _, _ in before:
        module.set_verbosity_error()
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, level, bars in before:
            module.set_verbosity(level)
            if bars:
                module.enable_progress_bar()
