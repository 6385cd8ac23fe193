"""From a config and its tensors to an autoencoder, strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from latentpipe.errors import UserError
from latentpipe.files import load_strictly

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

    from latentpipe.formats.tiny import TinyVAE

    kind = TinyVAE if name == "TinyVAE" else getattr(diffusers, name)
    try:
        vae = kind.from_config(dict(config))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whatever a constructor raises on nonsense
        reason = str(error).strip().splitlines()[0][:200].rstrip(".") if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: its config does not describe a working {name} ({reason}).") from None
    load_strictly(vae, tensors, path)
    # classes without a shift_factor drop it; the latent space is read from the config
    vae.register_to_config(**{key: config[key] for key in FACTORS if key in config})
    return vae.eval()
