"""Redraw a part of a picture from a prompt: the rest is put back at every step, and keeps its bytes at the end.

picture -> encode -> latents, noised to each step, outside the mask + denoised latents inside -> decode -> over the picture
"""

from __future__ import annotations

import inspect
import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from latentpipe.data.image_set import encode
from latentpipe.explore.edit import canvas, composite, feathered, hole_of, latent_share, sized
from latentpipe.lora.prompt_tags import note_negative, partial_tags, split_tags
from latentpipe.pipelines import hosting, prompt_weighting
from latentpipe.pipelines.denoise import host_for, is_classic, redraws, size_unit
from latentpipe.pipelines.families import family_of
from latentpipe.pipelines.hosting import finish
from latentpipe.pipelines.latent_pipeline import LatentPipeline
from latentpipe.pipelines.sampling import GuidanceCallback, Settings, Step, check_settings
from latentpipe.utils.defaults import GUIDANCE, STEPS
from latentpipe.utils.errors import LatentpipeWarning, UserError
from latentpipe.utils.images import to_images, to_pixels
from latentpipe.utils.logging import quiet
from latentpipe.utils.progress import ProgressCallback
from latentpipe.utils.setting_names import takes_settings

LONGEST = 8  # sides at most so many times as long as the denoiser was trained at


@takes_settings
@torch.no_grad()
def inpaint(
    pipe: LatentPipeline,
    picture: Image.Image,
    mask: Image.Image,
    prompt: str = "",
    seed: int = 0,
    num_inference_steps: int = STEPS,
    guidance_scale: float = GUIDANCE,
    strength: float = 1.0,
    feather: int | None = None,
    negative_prompt: str = "",
    report: ProgressCallback | None = None,
) -> Image.Image:
    """A picture of any size, redrawn where a mask of its size is white; RGB, or RGBA for a picture with transparency.

    prompt    ``<lora:NAME:WEIGHT>`` in it switches on an installed adapter, as in `LatentPipeline.__call__`
    strength  1: from noise; less: from what the picture shows there (img2img)
    feather   pixels over which the new part fades into the old (`edit.feathered`)

    After each step the latents outside the mask are replaced by the picture's, noised to that step (RePaint, Lugmayr et al.,
    arXiv:2201.09865, equation 8, without resampling; with the same noise at every step, as diffusers does). Pixels outside the
    feathered mask are the picture's own bytes. A UNet that takes mask and masked picture draws by them as diffusers does. The
    denoiser sees the picture at about the area it was trained at; a larger one gets its new part enlarged, which a warning says.
    Other families draw by their own inpainting pipeline of diffusers, a FLUX.1 Fill by its own.
    UserError: families without one, settings out of range, and as for `edit.canvas` and `edit.hole_of`.
    """
    classic = _refuse_without(pipe)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; expected 0 to {2**32 - 1}.")
    (prompt, tagged), partial = split_tags(prompt), partial_tags(prompt)
    old = canvas(picture)
    hole = hole_of(mask, old.size)
    soft = feathered(hole, feather)
    size = draw_size(pipe, old.size)
    begin = sized(old, size)
    source = begin if strength != 1 or made_for_masks(pipe) or not classic else None
    settings = Settings(negative_prompt, num_inference_steps, guidance_scale, size=size, image=source, strength=strength)
    unit = size_unit(pipe.host, pipe.stage)
    settings = check_settings(settings, pipe.native_size, unit) if made_for_masks(pipe) else pipe.check(settings)
    _note(pipe, prompt, negative_prompt, size, old.size)
    with pipe.loras.more(tagged, partial):
        if not classic or made_for_masks(pipe):
            latents = (_by_mask if classic else _by_family)(pipe, hole.resize(size), prompt, seed, settings, report)
        else:
            known = encode(pipe.stage, to_images(begin))
            free = latent_share(soft, (known.shape[-2], known.shape[-1]))
            latents = _denoised(pipe, known, free, prompt, seed, settings, report)
        images = finish(pipe.host, pipe.stage.decode(latents), {"use_resolution_binning": False})
    new = to_pixels(images)[0].resize(old.size, Image.Resampling.LANCZOS)
    return composite(old, new, soft)


def _refuse_without(pipe: LatentPipeline) -> bool:
    """Whether a model is of Stable Diffusion 1/2; UserError for a family that has no way to redraw parts."""
    classic = is_classic(pipe.host)
    if not classic and not inpainting_class(pipe):
        raise UserError(f"{family_of(pipe.host).name} has no pipeline that redraws parts; choose a model of another family.")
    return classic


def _note(pipe: LatentPipeline, prompt: str, negative: str, drawn: tuple[int, int], size: tuple[int, int]) -> None:
    """A warning on a part that is enlarged, and on words that are not read."""
    if drawn[0] < size[0] or drawn[1] < size[1]:
        message = f"the new part is drawn at {drawn[0]} x {drawn[1]} pixels and enlarged to {size[0]} x {size[1]}"
        warnings.warn(LatentpipeWarning(message), stacklevel=3)
    if cut := pipe.truncated_text(prompt):
        warnings.warn(LatentpipeWarning(f"the prompt is longer than what the text encoder reads; cut: '{cut}'"), stacklevel=3)
    note_negative(negative)


def made_for_masks(pipe: LatentPipeline) -> bool:
    """Whether a model's UNet takes a mask and the masked picture beside the noise."""
    return "mask" in redraws(pipe.host)


def inpainting_class(pipe: LatentPipeline) -> str:
    """The pipeline class of diffusers that redraws parts with a model of this family; "" where there is none."""
    family = family_of(pipe.host)
    if made_for_masks(pipe):
        return next((name for name in family.more if name.endswith("FillPipeline")), family.inpaint)
    return family.inpaint


def _by_family(
    pipe: LatentPipeline, hole: Image.Image, prompt: str, seed: int, settings: Settings, report: ProgressCallback | None
) -> torch.Tensor:
    """Latents (1 C h w) by the family's own inpainting pipeline, or that of a model which was made for masks."""
    import diffusers

    twin = host_for(pipe.host, pipe.stage, replace(settings, image=None), getattr(diffusers, inpainting_class(pipe)))
    wanted = inspect.signature(type(twin).__call__).parameters
    assert settings.size is not None
    width, height = settings.size

    def watch(host: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if report is not None:
            report(step + 1, settings.steps_to_run, "draw")
        return {}

    given: dict[str, Any] = {"negative_prompt": settings.negative_prompt} if settings.negative_prompt else {}
    if "strength" in wanted and not made_for_masks(pipe):
        given["strength"] = settings.strength
    latents = twin(
        prompt=prompt, image=settings.image, mask_image=hole, width=width, height=height, guidance_scale=settings.guidance_scale,
        num_inference_steps=settings.num_inference_steps, generator=torch.Generator("cpu").manual_seed(seed),
        output_type="latent", callback_on_step_end=watch, return_dict=False, **given,
    )[0]  # fmt: skip
    return hosting.unpack(twin, latents, height, width)


def draw_size(pipe: LatentPipeline, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height to draw a picture of `size` at: its shape, about the area that the denoiser was trained at."""
    unit, native = size_unit(pipe.host, pipe.stage), pipe.native_size
    factor = math.sqrt(native[0] * native[1] / (size[0] * size[1]))
    most = LONGEST * max(native) // unit
    width, height = (min(most, max(1, round(side * factor / unit))) * unit for side in size)
    return width, height


def _by_mask(
    pipe: LatentPipeline, hole: Image.Image, prompt: str, seed: int, settings: Settings, report: ProgressCallback | None
) -> torch.Tensor:
    """Latents (1 C h w) by a UNet that was trained to redraw the white part of `hole`, as diffusers' own pipeline asks it."""
    from diffusers import StableDiffusionInpaintPipeline

    twin = host_for(pipe.host, pipe.stage, replace(settings, image=None), StableDiffusionInpaintPipeline)
    guide = _guide(twin, prompt, settings, report)
    assert settings.size is not None
    return twin(
        **guide.start(), image=settings.image, mask_image=hole, strength=settings.strength, width=settings.size[0],
        height=settings.size[1], callback_on_step_end=guide, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        num_inference_steps=settings.num_inference_steps, output_type="latent",
        generator=torch.Generator("cpu").manual_seed(seed),
    ).images  # fmt: skip


def _guide(twin: Any, prompt: str, settings: Settings, report: ProgressCallback | None) -> GuidanceCallback:
    """What steers each step of a pipeline by a prompt and tells how far it is."""
    with quiet():
        positive, none = prompt_weighting.encode(twin, [prompt], settings.guidance_scale > 1, settings.negative_prompt)
    total = settings.steps_to_run

    def watch(step: Step) -> None:
        if report is not None:
            report(step.step, total, "draw")

    return GuidanceCallback(settings, positive, none, total, watch)


def _denoised(
    pipe: LatentPipeline,
    known: torch.Tensor,
    free: torch.Tensor,
    prompt: str,
    seed: int,
    settings: Settings,
    report: ProgressCallback | None,
) -> torch.Tensor:
    """Latents (1 C h w) drawn where `free` (1 1 h w) is above 0; elsewhere they are `known`, exactly."""
    twin = host_for(pipe.host, pipe.stage, settings)
    guide = _guide(twin, prompt, settings, report)
    total = settings.steps_to_run
    place = {"device": twin.device, "dtype": twin.unet.dtype}
    known, inside = known.to(**place), (free > 0).to(twin.device)
    noise = torch.randn(known.shape, generator=torch.Generator("cpu").manual_seed(seed)).to(**place)

    def put_back(host: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        changed = guide(host, step, timestep, tensors)
        times = host.scheduler.timesteps
        after = len(times) - total + step + 1
        outside = known if after >= len(times) else host.scheduler.add_noise(known, noise, times[after : after + 1])
        return changed | {"latents": torch.where(inside, tensors["latents"], outside.to(known))}

    assert settings.size is not None
    begin: dict[str, Any] = {"latents": noise, "width": settings.size[0], "height": settings.size[1]}
    if settings.image is not None:
        begin = {"image": settings.image, "strength": settings.strength}
    return twin(
        **guide.start(), **begin, callback_on_step_end=put_back,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], num_inference_steps=settings.num_inference_steps,
        generator=[torch.Generator("cpu").manual_seed(seed)], output_type="latent",
    ).images  # fmt: skip
