"""Prompts to latents through a host: which pipeline class, which arguments, and the step callback of each family."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from latentpipe.pipelines import conditioning, families, hosting, prompt_weighting
from latentpipe.pipelines.sampling import SCHEDULER_OPTIONS, SCHEDULERS, GuidanceCallback, OnStep, Settings, Step
from latentpipe.utils import cancellation
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import flatten
from latentpipe.utils.logging import quiet
from latentpipe.vae.protocol import Stage


def denoise(
    host: Any,
    stage: Stage,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    on_step: OnStep | None = None,
    begin: torch.Tensor | None = None,
    denoising_start: float | None = None,
) -> torch.Tensor:
    """Prompts to latents (B C h w) through the host; noise comes from one CPU generator for each seed.

    `stage` encodes the picture that img2img begins from; `begin` are latents in its place, and `denoising_start` the share of
    the steps that they have behind them. `settings` are checked and have a size.
    """
    assert settings.size is not None
    width, height = settings.size
    if begin is not None and settings.image is None:
        settings = replace(settings, image=Image.new("RGB", (1, 1)))  # chooses img2img; the latents are what it begins from
    twin = host_for(host, stage, settings)
    if begin is not None and hasattr(twin, "image_processor"):
        twin.image_processor.register_to_config(vae_latent_channels=stage.space.channels)  # else it resizes latents as images
    arguments: dict[str, Any] = {
        "num_inference_steps": settings.num_inference_steps,
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        "output_type": "latent",
    }
    wanted = inspect.signature(type(twin).__call__).parameters
    if settings.image is not None:
        picture = _resized(settings.image, width, height) if begin is None else begin
        arguments |= {"image": picture, "strength": settings.strength}
    if denoising_start is not None:
        arguments |= {"denoising_start": denoising_start}
    elif settings.refiner is not None:
        arguments |= {"denoising_end": settings.refiner.at}
    if settings.image is None or "height" in wanted:
        arguments |= {"width": width, "height": height}
    arguments |= conditioning.arguments_of(type(twin), settings.controls, (width, height), len(prompts))
    if "use_resolution_binning" in wanted:
        arguments["use_resolution_binning"] = False  # the size asked for is the size drawn
    if "intermediate_timesteps" in wanted and settings.num_inference_steps != 2:
        arguments["intermediate_timesteps"] = None  # Sana Sprint's default is for two steps
    run = _guided if is_classic(host) and not settings.controls else _plain
    with (
        conditioning.prompted_by_pictures(twin, settings.controls),
        cancellation.interruptible(getattr(twin, families.denoiser(host))),
    ):
        latents, stopped = run(twin, prompts, settings, on_step, arguments)
    return latents if stopped else hosting.unpack(twin, latents, height, width)


@torch.no_grad()
def probe_step(host: Any, stage: Stage, prompt: str, seed: int) -> torch.Tensor:
    """What one denoising step makes of seeded noise at the smallest size, to see whether weights matter (B C h w)."""
    side = size_unit(host, stage)
    if not redraws(host) or not is_classic(host):
        return denoise(host, stage, [prompt], [seed], Settings(num_inference_steps=1, guidance_scale=1.0, size=(side, side)))
    with quiet():
        states, _ = prompt_weighting.encode(host, [prompt], False, "")
    shape = (1, host.unet.config.in_channels, *[side // stage.space.downscale] * 2)
    noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).to(host.unet.device, host.unet.dtype)
    return host.unet(noise, 500, states, return_dict=False)[0]


def is_classic(host: Any) -> bool:
    """Whether a host is of Stable Diffusion 1 or 2, whose guidance can be switched step by step."""
    return families.family_of(host) is families.FAMILIES[0]


def redraws(host: Any) -> str:
    """Empty where a host's denoiser takes noise alone; else what it was made for, in words.

    A UNet that also reads a mask and a masked picture has 9 input channels for 4 latent ones, FLUX.1 Fill 384 for 64;
    `explore.inpaint` draws with both.
    """
    config = getattr(host, families.denoiser(host)).config
    taken, drawn = config.get("in_channels") or 0, config.get("out_channels") or 0
    if not drawn or taken <= drawn:
        return ""
    kind = "UNet" if families.denoiser(host) == "unet" else "transformer"
    if (taken, drawn) in ((9, 4), (384, 64)):
        return f"redraws parts of pictures (its {kind} takes {taken} channels: noise, a mask and the masked picture)"
    return f"does not draw from a prompt alone (its {kind} takes {taken} channels, of which {drawn} are noise)"


def native_size(host: Any, stage: Any = None) -> tuple[int, int]:
    """Width and height, in pixels of the stage's decoder (None: the host's own), that a host's denoiser was trained at."""
    config = getattr(host, families.denoiser(host)).config
    sample = config.get("sample_size") or getattr(host, "default_sample_size", 128)
    height, width = sample if isinstance(sample, (tuple, list)) else (sample, sample)
    factor = stage.space.downscale if stage is not None else host.vae_scale_factor
    return width * factor, height * factor


def size_unit(host: Any, stage: Any = None) -> int:
    """The number that both sides of a picture of the stage's decoder (None: the host's own) must be multiples of."""
    factor = stage.space.downscale if stage is not None else host.vae_scale_factor
    config = getattr(host, families.denoiser(host)).config
    if families.denoiser(host) == "unet":
        # Halving inside the UNet needs whole numbers too; the host itself asks for multiples of 8.
        return math.lcm(8, factor * 2 ** (len(config.block_out_channels) - 1))
    return factor * max(families.facts(type(host)).patch, config.get("patch_size") or 1)


def check_host(host: Any) -> None:
    """UserError where `host` is no diffusers pipeline with a VAE, but a name, a network or something else."""
    if not hasattr(host, "components") or families.autoencoder(host) is None:
        given = f"'{host}'" if isinstance(host, str) else type(host).__name__
        raise UserError(
            f"LatentPipeline was given {given}; expected a diffusers pipeline with a VAE. "
            "LatentPipeline.from_pretrained opens a model by name or folder."
        )


def check_family(host: Any, settings: Settings) -> None:
    """UserError for settings that a host's family cannot follow."""
    family = families.family_of(host)
    wanted = inspect.signature(type(host).__call__).parameters
    wrong = ""
    if what := redraws(host):
        to_do = "use 'latentpipe inpaint PICTURE --mask MASK'" if "mask" in what else "choose another model"
        wrong = f"This model {what}; {to_do}."
    elif settings.image is not None and not family.image:
        wrong = f"{family.name} has no pipeline that begins from a picture; leave the picture out."
    elif settings.guidance_interval != (0.0, 1.0) and not is_classic(host):
        wrong = f"{family.name} cannot switch its guidance step by step; leave guidance_interval out."
    elif settings.guidance_interval != (0.0, 1.0) and settings.controls:
        wrong = "Guidance cannot be switched step by step beside controls; leave guidance_interval out."
    elif settings.scheduler and families.denoiser(host) != "unet":
        wrong = f"{family.name} draws by flow matching with its own scheduler; leave the scheduler out."
    elif settings.negative_prompt and ("true_cfg_scale" in wanted or "negative_prompt" not in wanted):
        wrong = f"{family.name} has its guidance built in and takes no negative prompt; leave it out."
    if wrong:
        raise UserError(wrong)


def _guided(twin: Any, prompts: Sequence[str], settings: Settings, on_step: OnStep | None, arguments: dict[str, Any]) -> Any:
    """Run Stable Diffusion 1/2 with guidance in its interval only."""
    guided = settings.guidance_scale > 1
    with quiet():  # what is cut from a long prompt is said once, with the recipe
        positive, negative = prompt_weighting.encode(twin, prompts, guided, settings.negative_prompt)
    guide = GuidanceCallback(settings, positive, negative, settings.steps_to_run, on_step)
    try:
        latents = twin(
            **guide.start(),
            callback_on_step_end=guide,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
            **arguments,
        ).images
    except cancellation.PassStopped:
        if guide.last is None or not cancellation.keeps():
            raise
        return guide.estimate, True
    return (guide.estimate, True) if guide.stopped else (latents, False)


def _plain(twin: Any, prompts: Sequence[str], settings: Settings, on_step: OnStep | None, arguments: dict[str, Any]) -> Any:
    """Run any other family with its own prompt encoding and guidance."""
    last: list[Step] = []
    ended: list[bool] = []
    width, height = settings.size or native_size(twin)

    def watch(host: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents = hosting.unpack(host, tensors["latents"], height, width)
        conditioning.weigh_pictures(host, settings.controls, step + 1, settings.steps_to_run)
        last[:] = [Step(step + 1, settings.steps_to_run, latents)]
        if on_step is not None and on_step(last[0]) and step + 1 < settings.steps_to_run:
            host._interrupt = True
            ended.append(True)
        return {}

    wanted = inspect.signature(type(twin).__call__).parameters
    if "callback_on_step_end" in wanted:
        arguments["callback_on_step_end"] = watch
    elif "callback" in wanted:  # T2I-Adapters: told, and not stopped between steps
        arguments["callback"] = lambda step, timestep, latents: watch(twin, step, timestep, {"latents": latents}) and None
    conditioning.weigh_pictures(twin, settings.controls, 0, settings.steps_to_run)
    try:
        with quiet():
            arguments |= _texts(twin, prompts, settings)
            latents = twin(guidance_scale=settings.guidance_scale, **arguments).images
    except cancellation.PassStopped:
        if not last or not cancellation.keeps():
            raise
        return last[0].latents, True
    return (last[0].latents, True) if ended else (latents, False)


def _texts(twin: Any, prompts: Sequence[str], settings: Settings) -> dict[str, Any]:
    """What a pipeline is told to draw: prompts, or for Stable Diffusion 1/2 their embeddings, with weights of words."""
    if is_classic(twin):
        guided = settings.guidance_scale > 1
        positive, negative = prompt_weighting.encode(twin, prompts, guided, settings.negative_prompt)
        return {"prompt_embeds": positive} | ({} if negative is None else {"negative_prompt_embeds": negative})
    against = {"negative_prompt": [settings.negative_prompt] * len(prompts)} if settings.negative_prompt else {}
    return {"prompt": list(prompts), **against}


def host_for(host: Any, stage: Stage, settings: Settings, cls: type | None = None) -> Any:
    """The host, or its img2img twin (or one of `cls`), around the stage; with a fresh scheduler: the lent one keeps its state."""
    import diffusers

    parts = {}
    name = SCHEDULERS[settings.scheduler] if settings.scheduler else type(host.scheduler).__name__
    if families.denoiser(host) == "unet":
        parts["scheduler"] = getattr(diffusers, name).from_config(host.scheduler.config, **SCHEDULER_OPTIONS.get(name, {}))
    family = families.family_of(host)  # the folder of an img2img or inpainting pipeline draws from a prompt as well
    parts |= conditioning.parts_of(settings.controls, getattr(host, families.denoiser(host)))
    named = conditioning.class_of(host, settings.controls, settings.image is not None) or (
        family.text if settings.image is None else family.image
    )
    cls = cls or getattr(diffusers, named, None)
    twin = hosting.put_in(host, hosting.in_latents(cls or type(host), stage, families.autoencoder(host)), cls, **parts)
    twin.set_progress_bar_config(disable=True)
    return twin


def _resized(picture: Image.Image, width: int, height: int) -> Image.Image:
    return flatten(picture).resize((width, height), Image.Resampling.LANCZOS)
