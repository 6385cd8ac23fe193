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
    from latentpipe.checkpoints.registry import find_model
    from latentpipe.checkpoints.vae_io import load_vae
    from latentpipe.compatibility.measure import Verdict
    from latentpipe.data.latent_cache import encode_folder
    from latentpipe.data.shards import EncodedShards, encode_shards
    from latentpipe.engine.engine import Engine, Finished, StepDone
    from latentpipe.engine.replay import Replay, replay
    from latentpipe.evaluate.compare_vaes import compare_vaes
    from latentpipe.evaluate.comparison import Comparison
    from latentpipe.evaluate.diagnosis import Diagnosis, diagnose_vae
    from latentpipe.evaluate.reconstruction import evaluate_vae
    from latentpipe.evaluate.results import Evaluation
    from latentpipe.pipelines.latent_pipeline import LatentPipeline, Picture
    from latentpipe.pipelines.metadata.recipe import Recipe
    from latentpipe.pipelines.sampling import Settings
    from latentpipe.pipelines.swap import check_swap, swap_vae
    from latentpipe.train.denoiser import train_denoiser
    from latentpipe.train.latent_adapter import fit_adapter
    from latentpipe.train.lora.train import train_lora
    from latentpipe.train.vae.train import train_vae
    from latentpipe.utils.errors import UserError
    from latentpipe.vae.latent_space import LatentSpace
    from latentpipe.vae.protocol import Stage
    from latentpipe.vae.stage import VAEStage

_HOME = {
    "Comparison": "evaluate.comparison",
    "Diagnosis": "evaluate.diagnosis",
    "EncodedShards": "data.shards",
    "Engine": "engine.engine",
    "Evaluation": "evaluate.results",
    "Finished": "engine.engine",
    "LatentPipeline": "pipelines.latent_pipeline",
    "LatentSpace": "vae.latent_space",
    "Picture": "pipelines.latent_pipeline",
    "Recipe": "pipelines.metadata.recipe",
    "Replay": "engine.replay",
    "Settings": "pipelines.sampling",
    "Stage": "vae.protocol",
    "StepDone": "engine.engine",
    "UserError": "utils.errors",
    "VAEStage": "vae.stage",
    "Verdict": "compatibility.measure",
    "check_swap": "pipelines.swap",
    "compare_vaes": "evaluate.compare_vaes",
    "diagnose_vae": "evaluate.diagnosis",
    "encode_folder": "data.latent_cache",
    "encode_shards": "data.shards",
    "evaluate_vae": "evaluate.reconstruction",
    "find_model": "checkpoints.registry",
    "fit_adapter": "train.latent_adapter",
    "load_vae": "checkpoints.vae_io",
    "replay": "engine.replay",
    "swap_vae": "pipelines.swap",
    "train_denoiser": "train.denoiser",
    "train_lora": "train.lora.train",
    "train_vae": "train.vae.train",
}

__all__ = [
    "Comparison",
    "Diagnosis",
    "EncodedShards",
    "Engine",
    "Evaluation",
    "Finished",
    "LatentPipeline",
    "LatentSpace",
    "Picture",
    "Recipe",
    "Replay",
    "Settings",
    "Stage",
    "StepDone",
    "UserError",
    "VAEStage",
    "Verdict",
    "check_swap",
    "compare_vaes",
    "diagnose_vae",
    "encode_folder",
    "encode_shards",
    "evaluate_vae",
    "find_model",
    "fit_adapter",
    "load_vae",
    "replay",
    "swap_vae",
    "train_denoiser",
    "train_lora",
    "train_vae",
]


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that the command line answers --help without torch."""
    if name in _HOME:
        return getattr(import_module(f"latentpipe.{_HOME[name]}"), name)
    raise AttributeError(f"module 'latentpipe' has no attribute {name!r}")
