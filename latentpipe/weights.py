"""Where VAEs live: find, open, save, hash. Safetensors only."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from latentpipe.errors import UserError
from latentpipe.files import atomic_folder, content_hash, load_strictly, read_json, read_tensors
from latentpipe.latents import LatentSpace

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AsymmetricAutoencoderKL")
VAE_FILE = "diffusion_pytorch_model.safetensors"
CARD_FILE = "card.json"
PREVIEW_FILE = "latent_rgb.json"


def home() -> Path:
    """People's own files: $LATENTPIPE_HOME, else latentpipe/ in the user's data folder; holds models/, vae/, lora/."""
    if os.environ.get("LATENTPIPE_HOME"):
        return Path(os.environ["LATENTPIPE_HOME"])
    data = os.environ.get("XDG_DATA_HOME") or os.environ.get("LOCALAPPDATA")
    return Path(data or Path.home() / ".local" / "share") / "latentpipe"


def shipped() -> Path:
    """The folder of the weights that ship with the project: in the wheel, or in a checkout."""
    here = Path(__file__).parent
    return here / "embedded" if (here / "embedded").is_dir() else here.parent / "weights"


def available(kind: str = "models") -> dict[str, Path]:
    """Names and folders of all `kind` ("models" or "vae"): the shipped ones, then people's own."""
    index = "model_index.json" if kind == "models" else "config.json"
    found: dict[str, Path] = {}
    for root in (shipped(), home() / "models"):
        for path in sorted(root.glob("*/model_index.json")):
            found[path.parent.name] = path.parent if kind == "models" else path.parent / "vae"
    for root in (shipped() / kind, home() / kind):
        found |= {path.parent.name: path.parent for path in sorted(root.glob(f"*/{index}"))}
    return found


def find_model(name: str | Path, kind: str = "models") -> Path:
    """The folder that a name or a path means; UserError lists the names there are."""
    known = available(kind)
    if str(name) in known:
        return known[str(name)]
    if Path(name).is_dir():
        return Path(name).resolve()
    raise UserError(f"No {kind.removesuffix('s')} '{name}': neither a folder nor one of {', '.join(known) or 'none installed'}.")


def load_vae(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A diffusers autoencoder from its folder (config.json and safetensors), strictly, in eval mode."""
    import diffusers

    folder = Path(folder)
    config = read_json(folder / "config.json")
    name = config.get("_class_name")
    if name not in AUTOENCODERS:
        raise UserError(f"{folder}/config.json: _class_name is {name!r}; expected one of {', '.join(AUTOENCODERS)}.")
    tensors = read_tensors(folder / VAE_FILE)
    vae = getattr(diffusers, name).from_config(config)
    load_strictly(vae, tensors, folder / VAE_FILE)
    return torch.nn.Module.to(vae, dtype).eval()


def vae_hash(folder: Path) -> str:
    """The content hash of a VAE folder: its weights as they lie in the file, and its normalization."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    return content_hash(read_tensors(folder / VAE_FILE), LatentSpace.from_config(config))


def save_vae(vae: Any, folder: Path, card: Mapping[str, Any], preview: Any = None) -> str:
    """Write a VAE folder in fp16 with its card, atomically; return the content hash.

    It opens with ``AutoencoderKL.from_pretrained(folder)``; `preview` is the linear latent-to-RGB map.
    """
    half = torch.nn.Module.half(copy.deepcopy(vae))
    digest = content_hash(half.state_dict(), LatentSpace.of(vae))
    with atomic_folder(folder) as part:
        half.save_pretrained(part, safe_serialization=True)
        (part / CARD_FILE).write_text(json.dumps({**card, "content_hash": digest}, indent=2) + "\n")
        if preview is not None:
            (part / PREVIEW_FILE).write_text(json.dumps(preview) + "\n")
    return digest


def name_of(folder: Path, kind: str = "models") -> str:
    """The name under which `find_model` finds a folder; a folder elsewhere has its own name."""
    known = {path.resolve(): name for name, path in available(kind).items()}
    return known.get(folder.resolve(), folder.name)


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
