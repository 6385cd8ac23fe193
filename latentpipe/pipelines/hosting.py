"""A diffusers pipeline around a stage: rebuilt, called, its latents unpacked and decoded; what was lent is left as it was."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from typing import Any

import torch

from latentpipe.pipelines import families
from latentpipe.pipelines.facade import VAEFacade, facade_of, staged, with_factors
from latentpipe.pipelines.families import RAW, expected_latents, facts, family_of, row, unsupported_reason
from latentpipe.pipelines.family_table import FAMILIES, OUT_OF_SCOPE
from latentpipe.utils.errors import LatentpipeWarning, UserError
from latentpipe.vae.protocol import Stage
from latentpipe.vae.stage import VAEStage


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
    if "pag_applied_layers" in wanted:
        flags["pag_applied_layers"] = pipe.pag_applied_layers
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
    vae = families.autoencoder(new)
    if isinstance(vae, VAEFacade) and not vae.own:
        new.save_pretrained = vae.save_pretrained  # diffusers would write a folder without a VAE
    new.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return new


def hosted(pipe: Any, stage: Stage | None = None, cls: type | None = None) -> Any:
    """The pipeline rebuilt around a stage (default: its own VAE), as its own class or another: it draws what stock draws."""
    family_of(pipe)
    return put_in(pipe, facade(cls or type(pipe), stage or families.own_stage(pipe), families.autoencoder(pipe)), cls)


def put_in(pipe: Any, vae: Any, cls: type | None = None, **parts: Any) -> Any:
    """As `rebuild`, with another autoencoder in its place, which families name differently."""
    return rebuild(pipe, cls, **{facts(type(pipe)).autoencoder: vae}, **parts)


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
    if isinstance(own, torch.nn.Module) and getattr(own, "bn", None) is not None:
        raise UserError(
            f"{cls.__name__} normalizes latents by the statistics inside its VAE: "
            f"{unsupported_reason(cls, stage, own) or 'it can take the VAE as it is alone'}."
        )
    mine = isinstance(stage, VAEStage) and [*stage.vae.children()] == [*own.children()] and getattr(own, "own", True)
    return facade_of(stage, mine)


def in_latents(cls: type, stage: Stage, own: Any) -> Any:
    """A stage as the VAE of a pipeline class whose latents are asked for: what it does not read itself the stage does."""
    return facade(cls, stage, own) if getattr(stage.space, "patch", 1) > 1 or row(cls).raw else normalized(cls, stage, own)


def unpack(pipe: Any, latents: torch.Tensor, height: int | None = None, width: int | None = None) -> torch.Tensor:
    """Latents as a host returns them to B C h w; `height` and `width` of the picture in pixels, None: the host's default."""
    patch, (channels, downscale) = facts(type(pipe)).patch, expected_latents(pipe)
    if latents.ndim == 3:
        side = pipe.default_sample_size * pipe.vae_scale_factor
        height, width = height or side, width or side
        sides = [int(each) // (downscale * patch) for each in (height, width)]
        tokens = math.prod(sides)
        if latents.shape[1] != tokens:
            raise UserError(
                f"{type(pipe).__name__} returns {latents.shape[1]} tokens, and a picture of {width} x {height} pixels has "
                f"{tokens}; give the height and width that it draws in."
            )
        if patch > 1:
            latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
        else:
            latents = latents.transpose(1, 2).unflatten(2, sides)
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise UserError(
            f"{type(pipe).__name__} returns latents of shape {tuple(latents.shape)}; expected (B, {channels}, h, w). "
            f"This family needs a row of its own in latentpipe.pipelines.family_table.FAMILIES; known are: "
            f"{', '.join(h.name for h in FAMILIES)}."
        )
    return latents


@torch.no_grad()
def draw(pipe: Any, stage: Stage | None = None, **call: Any) -> torch.Tensor:
    """Call a host with `call` and decode its latents by a stage (default: its own VAE): images, B 3 H W, [-1, 1].

    What the host does after decoding is done here too: Sana's resize, SD's safety checker, SDXL's watermark.
    """
    family, own = family_of(pipe), families.own_stage(pipe)
    if not family.listed or family.gives_raw:
        given, options = measured(pipe, call)
        if not isinstance(families.autoencoder(hosted(pipe)), VAEFacade):
            if stage is None:  # not to latents and back, which rounds
                return finish(pipe, own.call("decode", given, **options)[0], call)
            given = own.space.normalize(given)
        stage = stage or own
        return finish(pipe, stage.decode(given.to(stage.dtype), **options), call)
    stage = stage or own
    returned = hosted(pipe, stage)(**call, output_type="latent", return_dict=False)[0]
    latents = unpack(pipe, returned, call.get("height"), call.get("width"))
    images = stage.decode(latents.to(stage.dtype))  # Sana returns wider ones than it decodes
    return finish(pipe, images, call)


def measured(pipe: Any, call: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """What a pipeline gives its own VAE to decode while it runs (raw values, B C h w), and the options of that call.

    Whatever layout its latents have, these are the raw values of one picture tensor; where they are none, a UserError says so.
    """
    name, own = type(pipe).__name__, families.own_stage(pipe)
    host, seen, given = hosted(pipe), [], {}
    vae = families.autoencoder(host)

    def decode(raw: torch.Tensor, *_: Any, return_dict: bool = True, **options: Any) -> Any:
        seen.append(raw)
        given.update(options)
        sides = [side * own.space.downscale // own.space.patch for side in raw.shape[-2:]]
        images = torch.zeros(len(raw), 3, *sides, dtype=raw.dtype, device=raw.device)
        return DecoderOutput(images) if return_dict else (images,)

    from diffusers.models.autoencoders.vae import DecoderOutput

    vars(vae)["decode"] = decode
    host(**call, output_type="pt")
    channels = own.space.channels // own.space.patch**2
    if len(seen) != 1 or seen[0].ndim != 4 or seen[0].shape[1] != channels:
        shapes = ", ".join(str(tuple(each.shape)) for each in seen) or "nothing"
        raise UserError(
            f"{name} is in no family that this release knows, and the measurement failed: it gave its VAE {shapes} to decode; "
            f"expected one tensor of shape (B, {channels}, h, w). A family is declared in latentpipe.pipelines.family_table."
        )
    if not family_of(pipe).listed:
        _say_tried(name, tuple(seen[0].shape))
    return seen[0], given


def _say_tried(name: str, shape: tuple[int, ...]) -> None:
    reason = f" ({OUT_OF_SCOPE[name]})" if name in OUT_OF_SCOPE else ""
    told = f"{name} is in no family that this release knows{reason}; it was tried: it decodes raw latents of shape {shape}"
    warnings.warn(told, LatentpipeWarning, stacklevel=4)


def finish(pipe: Any, images: torch.Tensor, call: dict[str, Any]) -> torch.Tensor:
    """What the host's own tail does to decoded images (B 3 H W)."""
    if facts(type(pipe)).bins and call.get("use_resolution_binning", True):
        defaults = inspect.signature(type(pipe).__call__).parameters
        width, height = (call.get(name, defaults[name].default) for name in ("width", "height"))
        images = pipe.image_processor.resize_and_crop_tensor(images, width, height)
    if getattr(pipe, "watermark", None) is not None:
        images = pipe.watermark.apply_watermark(images)
    if getattr(pipe, "safety_checker", None) is not None:
        images, _ = pipe.run_safety_checker(images, images.device, images.dtype)
    return images
