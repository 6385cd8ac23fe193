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
    from latentpipe.compatibility.measure import Verdict
    from latentpipe.engine.engine import Engine, Finished, Replay, StepDone, replay
    from latentpipe.pipelines.latent_pipeline import LatentPipeline, Picture
    from latentpipe.pipelines.metadata.recipe import Recipe
    from latentpipe.pipelines.sampling import Settings
    from latentpipe.pipelines.swap import check_swap, swap_vae
    from latentpipe.train.latent_adapter import fit_adapter
    from latentpipe.utils.errors import UserError
    from latentpipe.vae.latent_space import LatentSpace
    from latentpipe.vae.stage import VAEStage

_HOME = {
    "Engine": "engine.engine",
    "Finished": "engine.engine",
    "LatentPipeline": "pipelines.latent_pipeline",
    "LatentSpace": "vae.latent_space",
    "Picture": "pipelines.latent_pipeline",
    "Recipe": "pipelines.metadata.recipe",
    "Replay": "engine.engine",
    "Settings": "pipelines.sampling",
    "StepDone": "engine.engine",
    "UserError": "utils.errors",
    "VAEStage": "vae.stage",
    "Verdict": "compatibility.measure",
    "check_swap": "pipelines.swap",
    "fit_adapter": "train.latent_adapter",
    "replay": "engine.engine",
    "swap_vae": "pipelines.swap",
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
