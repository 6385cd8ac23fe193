"""Hosts: what each diffusers pipeline family needs, and running any of them around one VAEStage.

The stage stands in for the host's VAE as an autoencoder of scaling_factor 1 and no shift (`VAEFacade`), so that
one inverse pair serves every path of every host: text-to-image, img2img and inpaint, encoding and decoding.
"""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch

from latentpipe.checkpoints.model_files import STABLE_DIFFUSION
from latentpipe.pipelines.facade import Facade, VAEFacade, behind, declared, facade_of, form, staged, with_factors
from latentpipe.utils.errors import UserError
from latentpipe.vae.latent_space import LatentSpace
from latentpipe.vae.protocol import Stage
from latentpipe.vae.stage import VAEStage


@dataclass(frozen=True)
class PipelineFamily:
    """A family of diffusers pipelines.

    name        as people say it
    text        class names: text-to-image, img2img ("" where there is none), inpaint
    denoiser    component that takes the latents
    shift       its own tail honours shift_factor (and needs one that is not None)
    statistics  its own tail honours latents_mean and latents_std, of four channels
    patch       side of the squares that are packed into one token, as its latents leave it; 1: B C h w
    listed      False where nobody has read its code: it reads its own VAE right, and others that declare the same
    bins        resizes after decoding unless use_resolution_binning=False
    plain       autoencoder classes whose outputs and config its own code can read
    """

    name: str
    text: str
    image: str = ""
    inpaint: str = ""
    denoiser: str = "transformer"
    shift: bool = False
    statistics: bool = False
    patch: int = 1
    bins: bool = False
    listed: bool = True
    plain: tuple[str, ...] = ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL")

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of its pipelines."""
        return tuple(name for name in (self.text, self.image, self.inpaint) if name)

    def honours(self, space: LatentSpace, vae: Any) -> str:
        """Empty when the host's own code reads this autoencoder and its normalization right, else the reason."""
        if type(vae).__name__ not in self.plain:
            return f"{self.name} cannot read the outputs of {type(vae).__name__} by itself"
        uniform = len(set(space.scale)) == len(set(space.shift)) == 1
        if self.statistics and space.channels == 4:
            return ""
        if not uniform:
            return f"{self.name} knows one factor for all channels; this VAE has one for each"
        if any(space.shift) and not self.shift:
            return f"{self.name} ignores the shift of {space.shift[0]:.4g} that this VAE needs"
        return ""


FAMILIES = (
    PipelineFamily(
        "Stable Diffusion 1/2",
        *STABLE_DIFFUSION,
        denoiser="unet",
    ),
    PipelineFamily(
        "Stable Diffusion XL",
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        denoiser="unet",
        statistics=True,
    ),
    PipelineFamily(
        "Stable Diffusion 3",
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        shift=True,
    ),
    PipelineFamily("FLUX.1", "FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", shift=True, patch=2),
    PipelineFamily("Sana", "SanaPipeline", bins=True, plain=("AutoencoderDC",)),
    PipelineFamily("Sana Sprint", "SanaSprintPipeline", "SanaSprintImg2ImgPipeline", bins=True, plain=("AutoencoderDC",)),
)
FAMILY_BY_CLASS = {name: host for host in FAMILIES for name in host.classes}


# Their denoisers take the picture's latents as the VAE gives them, without its factor
# (tests/pipelines/test_vae_calls.py reads them all).
RAW = frozenset(
    {
        "DreamLiteMobilePipeline",
        "DreamLitePipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionXLInstructPix2PixPipeline",
    }
)


def row(cls: type) -> PipelineFamily:
    """The row of a pipeline class; for one that is not listed, what its signatures say."""
    known = FAMILY_BY_CLASS.get(cls.__name__)
    if known is not None:
        return known
    unpacks = inspect.signature(getattr(cls, "_unpack_latents", lambda: None)).parameters
    return PipelineFamily(
        cls.__name__,
        cls.__name__,
        denoiser="unet" if "unet" in inspect.signature(cls).parameters else "transformer",
        patch=2 if [*unpacks] == ["latents", "height", "width", "vae_scale_factor"] else 1,
        bins="use_resolution_binning" in inspect.signature(cls.__call__).parameters,
        listed=False,
        plain=(),
    )


def family_of(pipe: Any) -> PipelineFamily:
    """The row of a pipeline; an unknown class gets one from its signatures, checked when it has run."""
    name = type(pipe).__name__
    if getattr(pipe, "vae", None) is None:
        given = f"'{pipe}', of type str," if isinstance(pipe, str) else name
        raise UserError(
            f"{given} has no VAE; expected a diffusers pipeline of {', '.join(family.name for family in FAMILIES)}, or another "
            "with a `vae`; LatentPipeline.from_pretrained opens a model by its name."
        )
    return row(type(pipe))


def unsupported_reason(cls: type, stage: Stage, own: Any) -> str:
    """Empty when the code of a pipeline class encodes and decodes this stage's VAE right, else the reason; `own`: the VAE it has.

    Beside what its family honours: in diffusers 0.42 SD3 inpaint decodes without the shift, and SDXL inpaint encodes
    without the statistics.
    """
    host, name = row(cls), cls.__name__
    if not isinstance(stage, VAEStage):
        return f"{name} knows one VAE, and this is two halves of different ones"
    space = stage.space
    if name == host.inpaint and host.shift and any(space.shift) and host.patch == 1:
        return f"{name} decodes without the shift of {space.shift[0]:.4g}"
    if name == host.inpaint and host.statistics and (any(space.shift) or len(set(space.scale)) > 1):
        return f"{name} encodes without the statistics of each channel"
    if host.listed:
        return host.honours(space, stage.vae)
    if type(own) is not type(stage.vae) and not (isinstance(own, Facade) and isinstance(own, type(stage.vae))):
        return f"{name} is known to read the VAE that it has, and not a {type(stage.vae).__name__}"
    foreign = isinstance(own, VAEFacade) and not own.own
    if foreign or space != declared(stage.vae) or form(stage.vae) != form(behind(own).vae):
        return f"{name} is known to read the factors that its own VAE declares, and not those of this one"
    return ""


def expected_latents(pipe: Any) -> tuple[int, int]:
    """Channels and downscale of the latents that a pipeline's denoiser was built for."""
    host = family_of(pipe)
    config = getattr(getattr(pipe, host.denoiser, None), "config", {})
    # inputs also count a mask, a masked picture or a control picture, outputs a learned variance
    counts = [int(config[name]) for name in ("in_channels", "out_channels") if config.get(name)]
    if not counts:
        raise UserError(f"{host.name} has no {host.denoiser} that says how many channels it takes; expected in_channels.")
    return min(counts) // host.patch**2, pipe.vae_scale_factor if host.listed else behind(pipe.vae).space.downscale


def rebuild(pipe: Any, cls: type | None = None, **parts: Any) -> Any:
    """A pipeline of `pipe`'s class (or `cls`) with its components and flags, some replaced; `pipe` is left as it was.

    Built anew because a pipeline keeps values that it derived from its VAE (vae_scale_factor, image_processor).
    The scheduler is a copy; configs that a constructor rewrites in place are put back.
    """
    cls = cls or type(pipe)
    components = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler), **parts}
    wanted = inspect.signature(cls).parameters
    flags = {name: pipe.config[name] for name in wanted if name in pipe.config and name not in components}
    if "add_watermarker" in wanted:
        flags["add_watermarker"] = getattr(pipe, "watermark", None) is not None
    if components.get("safety_checker") is None and "requires_safety_checker" in wanted:
        flags["requires_safety_checker"] = False  # else it advises at every build
    before = {name: part._internal_dict for name, part in components.items() if hasattr(part, "_internal_dict")}
    try:
        new = cls(**{name: part for name, part in components.items() if name in wanted}, **flags)
    finally:
        for name, config in before.items():
            if components[name] is not parts.get(name):
                components[name]._internal_dict = config
    if "requires_safety_checker" in flags and "requires_safety_checker" in pipe.config:
        new.register_to_config(requires_safety_checker=pipe.config["requires_safety_checker"])
    if isinstance(new.vae, VAEFacade) and not new.vae.own:
        new.save_pretrained = new.vae.save_pretrained  # diffusers would write a folder without a VAE
    new.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return new


def hosted(pipe: Any, stage: Stage | None = None, cls: type | None = None) -> Any:
    """The pipeline rebuilt around a stage (default: its own VAE), as its own class or another: it draws what stock draws."""
    family_of(pipe)
    return rebuild(pipe, cls, vae=facade(cls or type(pipe), stage or behind(pipe.vae), pipe.vae))


def facade(cls: type, stage: Stage, own: Any) -> Any:
    """A stage as the VAE of a pipeline class: in raw units where its code reads these right, else in latents.

    own  the VAE that the pipeline has. UserError where the pipeline can be right neither way.
    """
    if not unsupported_reason(cls, stage, own):
        own_stage = stage.decoding
        return staged(own_stage, with_factors(own_stage.vae, stage.space, row(cls)))
    return normalized(cls, stage, own)


def normalized(cls: type, stage: Stage, own: Any) -> Any:
    """A stage as the VAE of a pipeline class, in latents."""
    if cls.__name__ in RAW:
        raise UserError(
            f"{cls.__name__} gives its denoiser the raw values of the picture, without the factor of the VAE, and "
            f"{unsupported_reason(cls, stage, own) or 'here they are normalized'}. Use its own VAE, or one that declares "
            "the same factors."
        )
    mine = isinstance(stage, VAEStage) and [*stage.vae.children()] == [*own.children()] and getattr(own, "own", True)
    return facade_of(stage, mine)


def unpack(pipe: Any, latents: torch.Tensor, height: int | None = None, width: int | None = None) -> torch.Tensor:
    """Latents as a host returns them to B C h w; `height` and `width` of the picture in pixels, None: the host's default."""
    host, (channels, downscale) = family_of(pipe), expected_latents(pipe)
    if host.patch > 1 and latents.ndim == 3:
        side = pipe.default_sample_size * downscale
        height, width = height or side, width or side
        tokens = math.prod(int(each) // (downscale * host.patch) for each in (height, width))
        if latents.shape[1] != tokens:
            raise UserError(
                f"{type(pipe).__name__} returns {latents.shape[1]} tokens, and a picture of {width} x {height} pixels has "
                f"{tokens}; give the height and width that it draws in."
            )
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise UserError(
            f"{type(pipe).__name__} returns latents of shape {tuple(latents.shape)}; expected (B, {channels}, h, w). "
            f"This family needs a row of its own in latentpipe.pipelines.families.FAMILIES; known are: "
            f"{', '.join(h.name for h in FAMILIES)}."
        )
    return latents


@torch.no_grad()
def draw(pipe: Any, stage: Stage | None = None, **call: Any) -> torch.Tensor:
    """Call a host with `call` and decode its latents by a stage (default: its own VAE): images, B 3 H W, [-1, 1].

    What the host does after decoding is done here too: Sana's resize, SD's safety checker, SDXL's watermark.
    """
    stage = stage or behind(pipe.vae)
    returned = hosted(pipe, stage)(**call, output_type="latent", return_dict=False)[0]
    latents = unpack(pipe, returned, call.get("height"), call.get("width"))
    images = stage.decode(latents.to(stage.dtype))  # Sana returns wider ones than it decodes
    return finish(pipe, images, call)


def finish(pipe: Any, images: torch.Tensor, call: dict[str, Any]) -> torch.Tensor:
    """What the host's own tail does to decoded images (B 3 H W)."""
    if family_of(pipe).bins and call.get("use_resolution_binning", True):
        defaults = inspect.signature(type(pipe).__call__).parameters
        width, height = (call.get(name, defaults[name].default) for name in ("width", "height"))
        images = pipe.image_processor.resize_and_crop_tensor(images, width, height)
    if getattr(pipe, "watermark", None) is not None:
        images = pipe.watermark.apply_watermark(images)
    if getattr(pipe, "safety_checker", None) is not None:
        images, _ = pipe.run_safety_checker(images, images.device, images.dtype)
    return images
