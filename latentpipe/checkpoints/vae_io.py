"""VAEs: open, save, hash. Safetensors only; where they live is in `registry`, their layouts are in `vae_file`."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from latentpipe.checkpoints import vae_file as formats
from latentpipe.checkpoints.config_ranges import check_network_config, check_space
from latentpipe.checkpoints.single_file.vae import with_family
from latentpipe.checkpoints.tensor_source import CARD_FILE
from latentpipe.checkpoints.vae_file import StatedConfig, VAEFile
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import atomic_folder, content_hash
from latentpipe.utils.logging import quiet
from latentpipe.vae.latent_space import LatentSpace

PREVIEW_FILE = "latent_rgb.json"


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
    The other arguments state what a file does not; left out, it is measured on probe images (a warning says so) or asked
    for (UserError). A factor that is given wins over the file's.
    """
    given = StatedConfig(scaling_factor, shift_factor, downscale, norm_groups)
    with quiet():
        found = formats.open_vae_file(Path(path), given if scaling_factor else with_family(Path(path), given))
    check_space(found.space.scale, found.space.shift, Path(path))
    check_network_config(found.config, Path(path))
    return found


def declared_space(path: Path) -> LatentSpace:
    """Channels and downscale of a VAE's latents, from its config or header alone; factors that it does not state are 1."""
    return formats.space_of_file(Path(path))


def load_vae(path: Path, dtype: torch.dtype = torch.float32, **given: Any) -> Any:
    """An autoencoder (a diffusers class, or one of the same methods) from a folder or a file, strictly, in eval mode.

    path   a diffusers folder, or a safetensors file with diffusers', LDM's (also within a checkpoint) or TAESD's keys
    given  what a file does not state, and wins over it: scaling_factor, shift_factor, downscale (picture side / latent side),
           norm_groups; left out, it is measured on probe images, which a warning says

    UserError where the file is no VAE, its tensors do not fit its config, or a value can neither be read nor measured.
    """
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
