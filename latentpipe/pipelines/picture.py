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
from latentpipe.pipelines.families import denoiser as denoiser_of
from latentpipe.pipelines.metadata import recipe as recipes
from latentpipe.pipelines.metadata.guides import Controlled, SecondPass
from latentpipe.pipelines.sampling import Settings
from latentpipe.utils.errors import expect
from latentpipe.utils.images import to_pixels
from latentpipe.utils.io import free_name, printable
from latentpipe.vae.offload import device_of


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
    """What a recipe keeps of what was stated on a model's single file, by a person or by a YAML file beside it.

    None where that changed nothing, and for a folder.
    """
    if not model.is_file():
        return None
    stated = stated or Stated()
    opened = open_file(model, stated)
    predicts = opened.identity.prediction if stated.config is None else None  # whose scheduler counts
    kept = recipes.StatedModel(
        family=stated.family,
        prediction=stated.prediction or (predicts.beside if predicts else "") or None,  # type: ignore[arg-type]  # checked when opened
        config=None if stated.config is None else _name(stated.config),
        parts={component: _name(place) for component, place in completing(opened, stated).items()},
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
    denoiser = getattr(pipe.host, denoiser_of(pipe.host))
    used = pipe.embeddings.used(prompt, settings.negative_prompt)
    hashes = {f"lora:{name}": pipe.loras.fuser.loaded[name].hash for name in pipe.loras.weights}
    hashes |= {f"control:{at}": one.digest for at, one in enumerate(settings.controls)}
    if settings.refiner is not None:
        hashes |= {f"refiner:{part}": digest for part, digest in settings.refiner.hashes.items()}
    hashes |= {f"embedding:{name}": one.hash for name, one in used.items()}
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
        controls=[
            Controlled(name=one.name, kind=one.kind, sha256=recipes.pixel_hash(one.image), weight=one.weight, steps=one.steps)
            for one in settings.controls
        ],
        second_pass=_second_pass(settings),
        stopped_after=stopped,
        loras={name: dict(weight) if isinstance(weight, Mapping) else weight for name, weight in pipe.loras.weights.items()},
        lora_method=pipe.loras.fuser.method,
        lora_fused=pipe.loras.fuser.fused,
        embeddings=list(used),
        hashes={**pipe.hashes, **hashes},
        machine=recipes.this_machine(
            str(device_of(denoiser)), str(denoiser.dtype).removeprefix("torch."), torch.get_num_threads()
        ),
    )


def _second_pass(settings: Settings) -> SecondPass | None:
    if settings.hires is not None:
        return SecondPass(scale=settings.hires.scale, strength=settings.hires.strength)
    if settings.refiner is not None:
        return SecondPass(refiner=settings.refiner.name, at=settings.refiner.at)
    return None


def preview_by(linear: Mapping[str, list], latents: torch.Tensor, side: int) -> Image.Image:
    """Latents (C h w) as a quick picture of `side` pixels, by a VAE's linear map to RGB: `factors` (C 3) and `bias` (3)."""
    colours = torch.einsum("chw,cr->rhw", latents.float().cpu(), torch.tensor(linear["factors"]))
    colours += torch.tensor(linear["bias"]).view(3, 1, 1)
    return to_pixels(colours[None])[0].resize((side, side), Image.Resampling.BICUBIC)


def free_path(folder: Path, prompt: str, seed: int) -> Path:
    """A file name from prompt and seed that does not exist yet."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "picture"
    return free_name(folder / f"{slug}-{seed}.png")
