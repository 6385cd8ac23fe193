"""A picture that was drawn: what made it, what is to be said about it, and its file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from latentpipe.checkpoints.single_file.gather import Stated, completing, open_file
from latentpipe.pipelines.families import family_of
from latentpipe.pipelines.metadata import recipe as recipes
from latentpipe.pipelines.sampling import Settings
from latentpipe.utils.errors import expect
from latentpipe.utils.io import free_name, printable


@dataclass(frozen=True)
class Picture:
    """A picture and the recipe that makes it again; `notes` are sentences on what the model could not make use of."""

    image: Image.Image
    recipe: recipes.Recipe
    notes: tuple[str, ...] = ()

    def save(self, path: str | Path) -> Path:
        """Write a file that carries the recipe: .png, .webp (both without loss) or .jpg; UserError for other endings."""
        expect("path", path, (str, Path), "the path of a file to write")
        recipes.save(self.image, Path(path), self.recipe)
        return Path(path)


def stated_in_recipe(model: Path, stated: Stated | None) -> recipes.StatedModel | None:
    """What a recipe keeps of what was stated on a model's single file; None where that changed nothing, and for a folder."""
    if stated is None or not model.is_file():
        return None
    config = None if stated.config is None else _name(stated.config)
    parts = completing(open_file(model, stated), stated) if stated.parts else {}
    kept = recipes.StatedModel(
        family=stated.family,
        prediction=stated.prediction,  # type: ignore[arg-type]  # opening the file refuses any other
        config=config,
        parts={component: _name(place) for component, place in parts.items()},
    )
    return None if kept == recipes.StatedModel() else kept


def _name(place: Path) -> str:
    return printable(Path(place).resolve().name)[:200]


def recipe_of(pipe: Any, prompt: str, seed: int, n: int, settings: Settings, stopped: int | None) -> recipes.Recipe:
    """The recipe of the first of `n` pictures that a LatentPipeline draws with these settings; `stopped` after so many steps."""
    source = None
    if settings.image is not None:
        source = recipes.Source(sha256=recipes.pixel_hash(settings.image), strength=settings.strength)
    assert settings.size is not None
    denoiser = getattr(pipe.host, family_of(pipe.host).denoiser)
    return recipes.Recipe(
        prompt=prompt,
        negative=settings.negative_prompt,
        seed=seed,
        steps=settings.num_inference_steps,
        guidance=settings.guidance_scale,
        guidance_interval=settings.guidance_interval,
        scheduler=settings.scheduler or type(pipe.host.scheduler).__name__,
        width=settings.size[0],
        height=settings.size[1],
        batch_size=n,
        model=pipe.name,
        stated=pipe.stated,
        vae=pipe.vae_name,
        adapter=pipe.adapter_name,
        source=source,
        stopped_after=stopped,
        loras={name: dict(weight) if isinstance(weight, Mapping) else weight for name, weight in pipe.loras.weights.items()},
        lora_method=pipe.loras.fuser.method,
        lora_fused=pipe.loras.fuser.fused,
        hashes={**pipe.hashes, **{f"lora:{name}": pipe.loras.fuser.loaded[name].hash for name in pipe.loras.weights}},
        machine=recipes.this_machine(str(pipe.host.device), str(denoiser.dtype).removeprefix("torch."), torch.get_num_threads()),
    )


def free_path(folder: Path, prompt: str, seed: int) -> Path:
    """A file name from prompt and seed that does not exist yet."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "picture"
    return free_name(folder / f"{slug}-{seed}.png")
