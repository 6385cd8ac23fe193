"""From a config and its tensors to an autoencoder, strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from latentpipe.checkpoints.components import built_within, telling
from latentpipe.utils.io import load_strictly
from latentpipe.utils.logging import quiet

AUTOENCODERS = (
    "AutoencoderKL",
    "AutoencoderTiny",
    "AutoencoderDC",
    "AsymmetricAutoencoderKL",
    "ConsistencyDecoderVAE",
    "TinyVAE",
)
FACTORS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def build(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], path: Path) -> Any:
    """The autoencoder that `config` describes with the weights `tensors`, in eval mode and fp32.

    UserError where the config describes none, or where a tensor is missing, extra, misshapen or not finite.
    """
    name = config["_class_name"]
    import diffusers

    from latentpipe.vae.tiny import TinyVAE

    kind = TinyVAE if name == "TinyVAE" else getattr(diffusers, name)
    with telling(path, name), quiet():  # diffusers tells of keys that it does not know
        vae = built_within(lambda: kind.from_config(dict(config)), sum(map(torch.numel, tensors.values())), len(tensors))
    load_strictly(vae, tensors, path)
    # classes without a shift_factor drop it; the latent space is read from the config
    vae.register_to_config(**{key: config[key] for key in FACTORS if key in config})
    return vae.eval()
