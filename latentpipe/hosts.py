"""Hosts: what each diffusers pipeline family needs, and running any of them around one VAEStage.

The stage stands in for the host's VAE as an autoencoder of scaling_factor 1 and no shift (`Canonical`), so that
one inverse pair serves every path of every host: text-to-image, img2img and inpaint, encoding and decoding.
"""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from latentpipe.errors import UserError
from latentpipe.latents import LatentSpace
from latentpipe.vae import VAEStage


@dataclass(frozen=True)
class Host:
    """A family of diffusers pipelines.

    name        as people say it
    text        class names: text-to-image, img2img ("" where there is none), inpaint
    denoiser    component that takes the latents
    shift       its own tail honours shift_factor (and needs one that is not None)
    statistics  its own tail honours latents_mean and latents_std, of four channels
    patch       side of the squares that are packed into one token, as its latents leave it; 1: B C h w
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


HOSTS = (
    Host(
        "Stable Diffusion 1/2",
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        denoiser="unet",
    ),
    Host(
        "Stable Diffusion XL",
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        denoiser="unet",
        statistics=True,
    ),
    Host(
        "Stable Diffusion 3",
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        shift=True,
    ),
    Host("FLUX.1", "FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", shift=True, patch=2),
    Host("Sana", "SanaPipeline", bins=True, plain=("AutoencoderDC",)),
    Host("Sana Sprint", "SanaSprintPipeline", "SanaSprintImg2ImgPipeline", bins=True, plain=("AutoencoderDC",)),
)
BY_CLASS = {name: host for host in HOSTS for name in host.classes}


def host_of(pipe: Any) -> Host:
    """The row of a pipeline's class; an unknown class gets one that takes latents B C h w, checked when it has run."""
    name = type(pipe).__name__
    known = BY_CLASS.get(name)
    if known is not None:
        return known
    if getattr(pipe, "vae", None) is None:
        raise UserError(f"{name} has no VAE; expected one of {', '.join(BY_CLASS)}, or another pipeline with a `vae`.")
    denoiser = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    return Host(name, name, denoiser=denoiser, plain=())


def misreads(pipe: Any, stage: VAEStage) -> str:
    """Empty when a pipeline's own code encodes and decodes this stage's VAE right, else the reason.

    Beside what its family honours: in diffusers 0.42 SD3 inpaint decodes without the shift, and SDXL inpaint encodes
    without the statistics.
    """
    host = host_of(pipe)
    space, name = stage.space, type(pipe).__name__
    if name == host.inpaint and host.shift and any(space.shift) and host.patch == 1:
        return f"{name} decodes without the shift of {space.shift[0]:.4g}"
    if name == host.inpaint and host.statistics and (any(space.shift) or len(set(space.scale)) > 1):
        return f"{name} encodes without the statistics of each channel"
    return host.honours(space, stage.vae)


def takes(pipe: Any) -> tuple[int, int]:
    """Channels and downscale of the latents that a pipeline's denoiser was built for."""
    host = host_of(pipe)
    config = getattr(pipe, host.denoiser).config
    # in_channels also counts the mask and the masked picture of an inpainting UNet
    channels = config.get("out_channels") or config.in_channels
    return channels // host.patch**2, pipe.vae_scale_factor


class Canonical(nn.Module):
    """A stage in the place of a host's VAE: its raw values are the latents, so no host can drop a factor.

    It has what diffusers pipelines read of an autoencoder: config, dtype, device, encode and decode.
    """

    def __init__(self, stage: Any) -> None:
        super().__init__()
        from diffusers.configuration_utils import FrozenDict

        self.stage = stage
        levels = (1,) * (1 + round(math.log2(stage.space.downscale)))  # hosts count them to get the downscale
        self.config = FrozenDict(
            latent_channels=stage.space.channels,
            block_out_channels=levels,
            encoder_block_out_channels=levels,
            scaling_factor=1.0,
            shift_factor=0.0,
            latents_mean=None,
            latents_std=None,
            force_upcast=False,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the autoencoder's weights."""
        return self.stage.dtype

    @property
    def device(self) -> torch.device:
        """Where the autoencoder's weights are."""
        return self.stage.device

    def encode(self, images: torch.Tensor, return_dict: bool = True) -> Any:
        """Images to an object with `latent_dist` and `latent`, both in latents."""
        return _Encoded(self.stage, images)

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """UserError: it has no file."""
        raise UserError(
            "This pipeline's VAE stands behind a facade that stock diffusers cannot open; save it with 'latentpipe swap --out', "
            "which folds the normalization in, or keep the pipeline and the VAE apart."
        )

    def decode(self, latents: torch.Tensor, return_dict: bool = True, generator: Any = None, **_: Any) -> Any:
        """Latents to images."""
        from diffusers.models.autoencoders.vae import DecoderOutput

        images = self.stage.decode(latents)
        return DecoderOutput(images) if return_dict else (images,)


class _Encoded:
    """The output of an encoder, and its own `latent_dist`: `sample` and `mode` give latents."""

    def __init__(self, stage: Any, images: torch.Tensor) -> None:
        self._stage, self._images = stage, images
        self.latent_dist = self

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        return self._stage.encode(self._images, generator or torch.default_generator)

    def mode(self) -> torch.Tensor:
        return self._stage.encode(self._images)

    latent = property(mode)


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
    if isinstance(new.vae, Canonical):
        new.save_pretrained = new.vae.save_pretrained  # diffusers would write a folder without a VAE
    new.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return new


def hosted(pipe: Any, stage: Any = None, cls: type | None = None) -> Any:
    """The pipeline rebuilt around a stage (default: its own VAE): all its tasks use that stage's one inverse pair."""
    return rebuild(pipe, cls, vae=Canonical(stage or VAEStage(pipe.vae)))


def unpack(pipe: Any, latents: torch.Tensor, height: int | None = None, width: int | None = None) -> torch.Tensor:
    """Latents as a host returns them to B C h w; `height` and `width` of the picture in pixels, None: the host's default."""
    host, (channels, downscale) = host_of(pipe), takes(pipe)
    if host.patch > 1 and latents.ndim == 3:
        side = pipe.default_sample_size * downscale
        latents = pipe._unpack_latents(latents, height or side, width or side, downscale)
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise UserError(
            f"{type(pipe).__name__} returns latents of shape {tuple(latents.shape)}; expected (B, {channels}, h, w). "
            f"This family needs a row of its own in latentpipe.hosts.HOSTS; known are: {', '.join(h.name for h in HOSTS)}."
        )
    return latents


@torch.no_grad()
def draw(pipe: Any, stage: Any = None, **call: Any) -> torch.Tensor:
    """Call a host with `call` and decode its latents by a stage (default: its own VAE): images, B 3 H W, [-1, 1].

    What the host does after decoding is done here too: Sana's resize, SD's safety checker, SDXL's watermark.
    """
    stage = stage or VAEStage(pipe.vae)
    returned = hosted(pipe, stage)(**call, output_type="latent", return_dict=False)[0]
    images = stage.decode(unpack(pipe, returned, call.get("height"), call.get("width")))
    return finish(pipe, images, call)


def finish(pipe: Any, images: torch.Tensor, call: dict[str, Any]) -> torch.Tensor:
    """What the host's own tail does to decoded images (B 3 H W)."""
    if host_of(pipe).bins and call.get("use_resolution_binning", True):
        defaults = inspect.signature(type(pipe).__call__).parameters
        width, height = (call.get(name, defaults[name].default) for name in ("width", "height"))
        images = pipe.image_processor.resize_and_crop_tensor(images, width, height)
    if getattr(pipe, "watermark", None) is not None:
        images = pipe.watermark.apply_watermark(images)
    if getattr(pipe, "safety_checker", None) is not None:
        images, _ = pipe.run_safety_checker(images, images.device, images.dtype)
    return images
