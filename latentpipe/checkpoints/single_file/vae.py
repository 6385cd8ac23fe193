"""The VAE within a single file of a whole model: its family states the factor that the file does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from latentpipe.checkpoints.single_file.families import FAMILIES
from latentpipe.checkpoints.single_file.identify import identify
from latentpipe.checkpoints.single_file.tokenizers import DATA
from latentpipe.checkpoints.tensor_source import CONFIG_KEY
from latentpipe.checkpoints.vae_file import StatedConfig
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import is_safetensors
from latentpipe.utils.reading import read_json


def with_family(path: Path, given: StatedConfig) -> StatedConfig:
    """What is given of a VAE, with the factor, shift and groups of the family where the file holds a whole model."""
    if not path.is_file() or not is_safetensors(path):
        return given
    try:
        found = identify(path)
    except UserError:
        return given  # the reader of VAEs says what is wrong
    if found.family is None or "vae" not in found.parts or CONFIG_KEY in found.metadata:
        return given
    config = read_json(DATA / f"{FAMILIES[found.family].configs}.json")["vae"]
    shift = given.shift if given.shift is not None else config.get("shift_factor")
    return replace(given, factor=config["scaling_factor"], shift=shift, groups=given.groups or config["norm_num_groups"])
