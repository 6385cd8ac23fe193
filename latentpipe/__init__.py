"""latentpipe: latent diffusion around a VAE stage that can be trained, measured and swapped.

    from latentpipe import LatentPipeline

    picture, = LatentPipeline.from_pretrained()("red apple", seed=7)
    picture.save("apple.png")

images -> VAE -> latents -> [text encoder + UNet] -> latents -> VAE -> images
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentpipe.engine import Engine, Finished, Replay, StepDone, replay
    from latentpipe.errors import UserError
    from latentpipe.latents import LatentSpace
    from latentpipe.pipeline import LatentPipeline, Picture
    from latentpipe.recipe import Recipe
    from latentpipe.sampling import Settings
    from latentpipe.swap import check_swap, swap_vae
    from latentpipe.train.adapter import fit_adapter
    from latentpipe.vae import VAEStage
    from latentpipe.verdict import Verdict

_HOME = {
    "Engine": "engine",
    "Finished": "engine",
    "LatentPipeline": "pipeline",
    "LatentSpace": "latents",
    "Picture": "pipeline",
    "Recipe": "recipe",
    "Replay": "engine",
    "Settings": "sampling",
    "StepDone": "engine",
    "UserError": "errors",
    "VAEStage": "vae",
    "Verdict": "verdict",
    "check_swap": "swap",
    "fit_adapter": "train.adapter",
    "replay": "engine",
    "swap_vae": "swap",
}

__all__ = [
    "Engine",
    "Finished",
    "LatentPipeline",
    "LatentSpace",
    "Picture",
    "Recipe",
    "Replay",
    "Settings",
    "StepDone",
    "UserError",
    "VAEStage",
    "Verdict",
    "check_swap",
    "fit_adapter",
    "replay",
    "swap_vae",
]


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that the command line answers --help without torch."""
    if name in _HOME:
        return getattr(import_module(f"latentpipe.{_HOME[name]}"), name)
    raise AttributeError(f"module 'latentpipe' has no attribute {name!r}")
