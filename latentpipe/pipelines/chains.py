"""Two passes for one picture: hires fix (drawn small, enlarged as latents, drawn on), and a refiner that draws the last steps.

prompt -> latents -> enlarged latents -> img2img -> latents          hires
prompt -> latents after a share of the steps -> refiner -> latents   SDXL's refiner (Podell et al., arXiv:2307.01952, section 2.5)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from latentpipe.checkpoints.pipeline_io import hashes
from latentpipe.checkpoints.registry import find_model, name_of
from latentpipe.pipelines import families
from latentpipe.pipelines.conditioning import check_controls
from latentpipe.pipelines.denoise import denoise, native_size, size_unit
from latentpipe.pipelines.opening import check_arguments, host_from
from latentpipe.pipelines.sampling import OnStep, Settings, Step
from latentpipe.utils.errors import UserError
from latentpipe.utils.threads import run_in_thread
from latentpipe.vae.protocol import Stage

XL = families.FAMILY_BY_CLASS["StableDiffusionXLPipeline"]


@dataclass(frozen=True)
class Hires:
    """Draw at the size of the settings, enlarge the latents by `scale`, and draw the last `strength` of the steps anew."""

    scale: float = 2.0
    strength: float = 0.5


@dataclass(frozen=True, eq=False)
class Refiner:
    """A second Stable Diffusion XL model, which draws the steps after the share `at`.

    host    its diffusers pipeline, often a StableDiffusionXLImg2ImgPipeline without a first text encoder
    stage   of its own VAE
    """

    host: Any
    stage: Stage
    at: float = 0.8
    name: str = "(given)"
    hashes: Mapping[str, str] = field(default_factory=dict, repr=False)


def check_guides(host: Any, stage: Stage, settings: Settings) -> Settings:
    """The same settings; UserError for controls or a second pass that this model, or the other one, cannot draw with."""
    check_controls(host, settings.controls, settings.size or native_size(host, stage), settings.image is not None)
    hires, refiner = settings.hires, settings.refiner
    width, height = settings.size or (0, 0)
    wrong = ""
    if hires is not None and refiner is not None:
        wrong = "hires and a refiner are two second passes, which exclude each other; leave one out."
    elif hires is not None:
        unit = size_unit(host, stage)
        large = tuple(round(side * hires.scale) for side in (width, height))
        if not families.family_of(host).image:
            wrong = (
                f"{families.family_of(host).name} has no pipeline that begins from a picture, which hires needs; leave it out."
            )
        elif not 1 < hires.scale <= 8 or not 0 < hires.strength <= 1:
            has = f"hires has scale {hires.scale} and strength {hires.strength}"
            wrong = f"{has}; expected a scale over 1 to 8, a strength over 0 to 1."
        elif any(side % unit for side in large):
            wrong = f"hires makes {large[0]} x {large[1]} pixels; sides must be multiples of {unit}. Choose another scale."
        elif int(settings.num_inference_steps * hires.strength) < 1:
            wrong = f"{settings.num_inference_steps} steps at hires strength {hires.strength} run no step; raise one of them."
    elif refiner is not None:
        both = [families.family_of(one) for one in (host, refiner.host)]
        if both != [XL, XL]:
            wrong = (
                f"A refiner draws on after Stable Diffusion XL with another one; given were {both[0].name} and {both[1].name}."
            )
        elif refiner.stage.space != stage.space:
            difference = stage.space.difference(refiner.stage.space)
            wrong = f"Refiner '{refiner.name}' draws in another latent space: {difference} Choose its base."
        elif not 0 < refiner.at < 1:
            wrong = f"the refiner begins at {refiner.at}; expected a share of the steps over 0 and under 1."
        elif settings.image is not None or settings.controls:
            wrong = "A refiner follows a drawing from a prompt alone; leave the picture and the controls out."
    if wrong:
        raise UserError(wrong)
    return settings


def in_passes(
    host: Any, stage: Stage, prompts: Sequence[str], seeds: Sequence[int], settings: Settings, on_step: OnStep | None = None
) -> torch.Tensor:
    """As `denoise`, with the second pass that the settings ask for; one that is stopped in the first has none."""
    if settings.hires is None and settings.refiner is None:
        return denoise(host, stage, prompts, seeds, settings, on_step)
    stopped: list[bool] = []
    done = [0]

    def first(step: Step) -> bool:
        done[0] = step.step
        stopped[:] = [True] if on_step is not None and on_step(replace(step, steps=settings.all_steps)) else stopped
        return bool(stopped)

    def second(step: Step) -> bool:
        told = Step(before + step.step, settings.all_steps, step.latents)
        return bool(on_step is not None and on_step(told))

    latents = denoise(host, stage, prompts, seeds, settings, first)
    before = done[0]
    if stopped:
        return latents
    if settings.hires is not None:
        large = torch.nn.functional.interpolate(latents, scale_factor=settings.hires.scale, mode="bilinear")
        height, width = (side * stage.space.downscale for side in large.shape[-2:])
        again = replace(settings, size=(width, height), strength=settings.hires.strength, hires=None)
        return denoise(host, stage, prompts, seeds, again, second, begin=large)
    refiner = settings.refiner
    again = replace(settings, refiner=None, scheduler=None)
    return denoise(refiner.host, refiner.stage, prompts, seeds, again, second, begin=latents, denoising_start=refiner.at)


def open_refiner(model: str | Path, at: float = 0.8, device: str | None = None, dtype: str = "fp32") -> Refiner:
    """The model that draws the steps after the share `at`; opened as `LatentPipeline.from_pretrained` opens it."""
    device = check_arguments(model, None, None, device, dtype, "none")
    folder = find_model(model)
    host = run_in_thread(lambda: host_from(folder, device, dtype, "none", None))
    return Refiner(host, families.own_stage(host), at, name_of(folder), hashes(folder))
