"""Hosts: what each diffusers pipeline family needs, and running any of them around one VAEStage.

The stage stands in for the host's VAE as an autoencoder of scaling_factor 1 and no shift (`VAEFacade`), so that
one inverse pair serves every path of every host: text-to-image, img2img and inpaint, encoding and decoding.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from latentpipe.checkpoints.model_files import STABLE_DIFFUSION
from latentpipe.pipelines.facade import Facade, VAEFacade, behind, declared, form
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
