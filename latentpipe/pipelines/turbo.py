"""Few steps: the adapter that was distilled from a model, found among the installed ones by the model's hashes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentpipe.checkpoints.registry import available
from latentpipe.lora.metadata import BASE, SAMPLE
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import is_safetensors, read_header
from latentpipe.utils.reading import parse_json

NEEDED = {"num_inference_steps", "guidance_scale"}  # what a distilled adapter's file says of the settings that it is drawn with


def find_turbo(model: str, hashes: Mapping[str, str]) -> Path:
    """The installed LoRA that was distilled from the denoiser of these hashes; UserError where there is none.

    model  what the model is called
    """
    found = [path for path in available("lora").values() if _is_distilled(path, hashes.get("unet"))]
    if found:
        return found[0]
    raise UserError(
        f"No LoRA that is installed was distilled from model {model}, so it cannot be drawn with turbo; leave turbo out, or make "
        f"one: latentpipe distil {model} --pictures FOLDER."
    )


def _is_distilled(path: Path, unet: str | None) -> bool:
    """Whether a file says that it is drawn with other settings, and that it was made from this denoiser."""
    with suppress(UserError, OSError, ValueError):
        if unet and is_safetensors(path):
            metadata = read_header(path).metadata
            settings: Any = parse_json(metadata.get(SAMPLE, "{}"))
            base: Any = parse_json(metadata.get(BASE, "{}"))
            return isinstance(settings, dict) and settings.keys() >= NEEDED and base.get("unet") == unet
    return False
