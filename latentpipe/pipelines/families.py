"""Hosts: what each diffusers pipeline family needs, and running any of them around one VAEStage.

The stage stands in for the host's VAE as an autoencoder of scaling_factor 1 and no shift (`VAEFacade`), so that
one inverse pair serves every path of every host: text-to-image, img2img and inpaint, encoding and decoding.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, replace
from typing import Any

from latentpipe.pipelines.facade import Facade, VAEFacade, behind, declared, form
from latentpipe.pipelines.family_table import FAMILIES, FAMILY_BY_CLASS, PipelineFamily
from latentpipe.utils.errors import UserError
from latentpipe.vae.latent_space import LatentSpace
from latentpipe.vae.protocol import Stage
from latentpipe.vae.stage import VAEStage


@dataclass(frozen=True)
class Facts:
    """What the signatures of a pipeline class say.

    denoiser     component that takes the latents
    autoencoder  component that encodes and decodes
    patch        side of the squares that are packed into one token, as its latents leave it; 1: B C h w, or one token a place
    bins         resizes after decoding unless use_resolution_binning=False
    """

    denoiser: str
    autoencoder: str
    patch: int
    bins: bool


def facts(cls: type) -> Facts:
    """The facts of a pipeline class, read from its signatures."""
    return _facts(cls)


@functools.cache
def _facts(cls: Any) -> Facts:
    parts = inspect.signature(cls).parameters
    unpacks = inspect.signature(getattr(cls, "_unpack_latents", lambda: None)).parameters
    return Facts(
        "unet" if "unet" in parts else "transformer",
        "movq" if "movq" in parts else "vae",
        2 if [*unpacks] == ["latents", "height", "width", "vae_scale_factor"] else 1,
        "use_resolution_binning" in inspect.signature(cls.__call__).parameters,
    )


def honours(family: PipelineFamily, space: LatentSpace, vae: Any) -> str:
    """Empty when the family's own code reads this autoencoder and its normalization right, else the reason."""
    if type(vae).__name__ not in family.plain:
        return f"{family.name} cannot read the outputs of {type(vae).__name__} by itself"
    if space.patch > 1:
        return "" if declared(vae) == space else f"{family.name} knows the statistics that are weights of the VAE alone"
    uniform = len(set(space.scale)) == len(set(space.shift)) == 1
    if family.raw:
        plain = uniform and (space.scale[0], space.shift[0]) == (1.0, 0.0)
        return "" if plain else f"{family.name} takes raw values, without the factor {space.scale[0]:.4g} of this VAE"
    if family.statistics and space.channels == 4:
        return ""
    if not uniform:
        return f"{family.name} knows one factor for all channels; this VAE has one for each"
    if any(space.shift) and not family.shift:
        return f"{family.name} ignores the shift of {space.shift[0]:.4g} that this VAE needs"
    return ""


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
    return known or PipelineFamily(cls.__name__, cls.__name__, listed=False, plain=(), source=cls)


def denoiser(pipe: Any) -> str:
    """The name of the component that takes the latents."""
    return facts(type(pipe)).denoiser


def autoencoder(pipe: Any) -> Any:
    """The component of a pipeline that encodes and decodes; None where it has none."""
    return getattr(pipe, facts(type(pipe)).autoencoder if hasattr(pipe, "components") else "vae", None)


def family_of(pipe: Any) -> PipelineFamily:
    """The row of a pipeline; an unknown class gets one from its signatures, checked when it has run."""
    name = type(pipe).__name__
    if autoencoder(pipe) is None:
        given = f"'{pipe}', of type str," if isinstance(pipe, str) else name
        raise UserError(
            f"{given} has no VAE; expected a diffusers pipeline of {', '.join(family.name for family in FAMILIES)}, or another "
            "with a `vae`; LatentPipeline.from_pretrained opens a model by its name."
        )
    return row(type(pipe))


def own_stage(pipe: Any) -> VAEStage:
    """The stage of a pipeline's own autoencoder, its latents as the denoiser takes them."""
    return stage_behind(type(pipe), autoencoder(pipe))


def stage_behind(cls: type, vae: Any) -> VAEStage:
    """The stage of an autoencoder as a pipeline class takes it."""
    stage: VAEStage = behind(vae)
    if not row(cls).raw or isinstance(vae, VAEFacade):
        return stage
    c = stage.space.channels
    space = replace(stage.space, scale=(1.0,) * c, shift=(0.0,) * c, factor=1.0, deviation=())
    return VAEStage(stage.vae, space, stage.digest, stage.memory.tile)


def unsupported_reason(cls: type, stage: Stage, own: Any) -> str:
    """Empty where the code of a pipeline class encodes and decodes this stage's VAE right, else the reason; `own`: its VAE.

    Beside what its family honours: in diffusers 0.42 SD3 inpaint decodes without the shift, and SDXL inpaint encodes
    without the statistics.
    """
    host, name = row(cls), cls.__name__
    if not isinstance(stage, VAEStage):
        return f"{name} knows one VAE, and this is two halves of different ones"
    space = stage.space
    if name in WITHOUT_SHIFT and any(space.shift):
        return f"{name} decodes without the shift of {space.shift[0]:.4g}"
    if name in WITHOUT_STATISTICS and (any(space.shift) or len(set(space.scale)) > 1):
        return f"{name} encodes or decodes without the statistics of each channel"
    if host.listed and name not in RAW:
        return honours(host, space, stage.vae)
    if type(own) is not type(stage.vae) and not (isinstance(own, Facade) and isinstance(own, type(stage.vae))):
        return f"{name} is known to read the VAE that it has, and not a {type(stage.vae).__name__}"
    foreign = isinstance(own, VAEFacade) and not own.own
    if foreign or space != declared(stage.vae) or form(stage.vae) != form(behind(own).vae):
        return f"{name} is known to read the factors that its own VAE declares, and not those of this one"
    return ""


# In diffusers 0.42 these are wrong about what the rest of their family reads (tests/pipelines/test_vae_calls.py).
WITHOUT_SHIFT = frozenset({"StableDiffusion3InpaintPipeline"})
WITHOUT_STATISTICS = frozenset(
    {
        "StableDiffusionXLAdapterPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLControlNetUnionInpaintPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLPAGInpaintPipeline",
    }
)


def expected_latents(pipe: Any) -> tuple[int, int]:
    """Channels and downscale of the latents that a pipeline's denoiser was built for."""
    host = family_of(pipe)
    part = denoiser(pipe)
    config = getattr(getattr(pipe, part, None), "config", {})
    # inputs also count a mask, a masked picture or a control picture, outputs a learned variance
    counts = [int(config[name]) for name in ("in_channels", "out_channels") if config.get(name)]
    if not counts:
        raise UserError(f"{host.name} has no {part} that says how many channels it takes; expected in_channels.")
    space = behind(autoencoder(pipe)).space
    return min(counts) // facts(type(pipe)).patch ** 2, space.downscale
