"""A stage in the place of a pipeline's VAE: an object of that VAE's class, with its weights, whose calls go through the stage.

Two of them. `staged`: raw values and the factors of the config, as the VAE itself has them, for pipelines whose own code reads
these right. `facade_of`: the latents themselves and factor 1, for the others, so that no pipeline can drop a factor.

Both are instances of the VAE's class, so a pipeline's questions about the class, its switches (tiling, slicing, fused
projections) and the hooks of accelerate and diffusers meet what they expect. The layers are shared with the VAE, the switches,
the hooks and the config are the facade's own.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from latentpipe.compatibility.latent_adapter import BridgedStage
from latentpipe.utils.errors import UserError
from latentpipe.vae.latent_space import LatentSpace
from latentpipe.vae.offload import HOOKED, unhooked
from latentpipe.vae.protocol import Stage
from latentpipe.vae.stage import NAMES, VAEStage


class Facade:
    """What `staged` and `facade_of` put before a VAE's class."""

    _stage: Any
    own: bool  # whether it is the VAE that its pipeline came with

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the autoencoder computes in."""
        return self._stage.dtype

    @property
    def device(self) -> torch.device:
        """Where the autoencoder's weights are."""
        return next(self.parameters()).device  # type: ignore[attr-defined]

    def _behind(self) -> Any:
        """The stage, with the switches as they are set here."""
        kept = (*HOOKED, "_stage", "own", *(("config", "_internal_dict") if isinstance(self, VAEFacade) else ()))
        set_here = {name: value for name, value in vars(self).items() if name not in kept}
        if isinstance(self._stage, VAEStage):
            vars(self._stage.vae).update(set_here)
        else:
            for half in (self._stage.encoder, self._stage.decoder):
                vars(half.vae).update({name: value for name, value in set_here.items() if name in SWITCHES})
        return self._stage


SWITCHES = ("use_tiling", "use_slicing")  # what two halves of different classes have in common


class Staged(Facade):
    """The VAE itself, as its pipeline knows it."""

    def encode(self, *args: Any, **options: Any) -> Any:
        """As the VAE's own `encode`."""
        return self._call("encode", args, options)

    def decode(self, *args: Any, **options: Any) -> Any:
        """As the VAE's own `decode`."""
        return self._call("decode", args, options)

    def _call(self, direction: Any, args: Any, options: Any) -> Any:
        stage = self._behind()
        given, more = _bound(getattr(stage.vae, direction), args, options)
        as_object = more.pop("return_dict", True)
        value, carrier = stage.call(direction, given, **more)
        if not as_object:
            return (value, *carrier.to_tuple()[1:]) if hasattr(carrier, "to_tuple") else (value,)
        if isinstance(carrier, torch.Tensor):
            from diffusers.models.autoencoders.vae import DecoderOutput

            return DecoderOutput(value)
        name = next(name for name in NAMES if hasattr(carrier, name))
        return carrier if getattr(carrier, name) is value else type(carrier)(**{**carrier, name: value})


def _bound(method: Any, args: Any, options: Any) -> tuple[Any, dict[str, Any]]:
    """The first argument of a call, and the further ones by name."""
    signature = inspect.signature(method)
    named = dict(signature.bind(*args, **options).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named.pop(next(iter(named))), named


class VAEFacade(Facade):
    """An autoencoder of scaling_factor 1 and no shift: its raw values are the latents."""

    def encode(self, images: torch.Tensor, return_dict: bool = True) -> Any:
        """Images to an object with `latent_dist`, `latents` and `latent`, all in latents."""
        encoded = Encoded(self._behind(), images)
        return encoded if return_dict else (encoded,)

    def decode(self, latents: torch.Tensor, *_: Any, return_dict: bool = True, **options: Any) -> Any:
        """Latents to images; `options` as the VAE's own decode takes them."""
        from diffusers.models.autoencoders.vae import DecoderOutput

        stage = self._behind()
        more = {}
        if isinstance(stage, VAEStage):
            known = inspect.signature(stage.vae.decode).parameters
            more = {name: value for name, value in options.items() if name in known and value is not None}
        images = stage.decode(latents, **more)
        return DecoderOutput(images) if return_dict else (images,)

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """The VAE itself where it is the pipeline's own; else UserError: it has no file that stock diffusers could read right."""
        if not self.own:
            raise UserError(
                "This pipeline's VAE stands behind a facade that stock diffusers cannot open; save it with 'latentpipe swap "
                "--out', which folds the normalization in, or keep the pipeline and the VAE apart."
            )
        self._behind().vae.save_pretrained(*args, **options)


IMAGE_CHANNELS = 3


class Encoded:
    """The output of an encoder, and its own `latent_dist`: `sample` and `mode` give latents.

    Latents in place of images are given back: diffusers' older img2img pipelines know latents by having 4 channels, and would
    encode those of 8.
    """

    def __init__(self, stage: Stage, images: torch.Tensor) -> None:
        self._stage, self._images = stage, images
        self._passes = images.shape[1] == stage.space.channels != IMAGE_CHANNELS
        self.latent_dist = self

    def __getitem__(self, index: int) -> Any:
        return (self,)[index]

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """A sample of the posterior, B C h w."""
        return self._images if self._passes else self._stage.encode(self._images, generator or torch.default_generator)

    def mode(self) -> torch.Tensor:
        """The mode of the posterior, B C h w."""
        return self._images if self._passes else self._stage.encode(self._images)

    latent = latents = property(mode)


_classes: dict[tuple[type, type], type] = {}


def staged(stage: VAEStage, vae: Any = None) -> Any:
    """A stage in the place of its VAE, in raw units; `vae`: the same weights with the config that the pipeline is to read."""
    vae = stage.vae if vae is None else vae
    return _build(Staged, vae, _apart(stage, vae), True)


def facade_of(stage: Stage, own: bool = False) -> Any:
    """A stage (or two halves of one) as a VAE whose raw values are the latents; `own`: of the VAE that the pipeline came with."""
    if isinstance(stage, VAEStage):
        facade = _build(VAEFacade, stage.vae, _apart(stage), own)
    elif isinstance(stage, BridgedStage):
        stage = BridgedStage(_apart(stage.encoder), stage.adapter, _apart(stage.decoder))
        facade = _build(VAEFacade, stage.decoder.vae, stage, False)
        vars(facade)["_modules"] = {**facade._modules, "_halves": stage}  # both move with it
    else:
        raise UserError(f"{type(stage).__name__} has no VAE that a pipeline could call; expected a VAEStage or a BridgedStage.")
    levels = (1,) * (1 + round(math.log2(stage.space.downscale)))  # pipelines count them to get the downscale
    facts: dict[str, Any] = {"latent_channels": stage.space.channels, "scaling_factor": 1.0, "shift_factor": 0.0}
    facts |= {"latents_mean": None, "latents_std": None, "force_upcast": False}
    facts |= {"block_out_channels": levels, "encoder_block_out_channels": levels}
    _configure(facade, facts)
    return facade


def _configure(facade: Any, facts: Mapping[str, Any]) -> None:
    from diffusers.configuration_utils import FrozenDict

    config = FrozenDict({**facade.config, **facts})
    vars(facade)["_internal_dict" if "_internal_dict" in vars(facade) else "config"] = config


def _apart(stage: VAEStage, vae: Any = None) -> VAEStage:
    """A stage of its own around the same layers, so that switches of a facade change nothing that was lent."""
    inner = unhooked(stage.vae if vae is None else vae)
    return VAEStage(inner, stage.space, stage.digest, stage.memory.tile)


def _build(kind: type, vae: Any, stage: Stage, own: bool) -> Any:
    inner = stage.decoding.vae
    facade: Any = object.__new__(_class(kind, type(vae)))
    hook = {"_hf_hook": vars(vae)["_hf_hook"]} if "_hf_hook" in vars(vae) else {}
    vars(facade).update({**vars(inner), **hook, "_stage": stage, "own": own})
    return facade


def _signed(method: Any, like: Any) -> Any:
    """A method with the signature of another, which diffusers reads before it calls."""

    @functools.wraps(like)
    def wrapper(self: Any, *args: Any, **options: Any) -> Any:
        return method(self, *args, **options)

    return wrapper


def _class(kind: type, base: type) -> type:
    """`base` with the methods of a facade first, under the name of `base`, by which diffusers saves and asks."""
    if (kind, base) not in _classes:
        from diffusers.utils.accelerate_utils import apply_forward_hook

        hooked = {name: apply_forward_hook(getattr(kind, name)) for name in ("encode", "decode")}
        if kind is VAEFacade and hasattr(base, "save_pretrained"):
            hooked["save_pretrained"] = _signed(kind.save_pretrained, base.save_pretrained)  # type: ignore[attr-defined]
        named = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        _classes[kind, base] = type(base.__name__, (kind, base), hooked | named)
    return _classes[kind, base]


def behind(vae: Any) -> Any:
    """The stage behind a facade; a new one around any other autoencoder. UserError where it is none of pictures."""
    if isinstance(vae, VAEFacade):
        return vae._behind()
    if isinstance(vae, Staged):  # its config may have been changed since
        stage = vae._behind()
        return VAEStage(stage.vae, digest=stage.digest, tile=stage.memory.tile)
    if not isinstance(vae, nn.Module) or not hasattr(vae, "config"):
        raise UserError(f"{type(vae).__name__} is no VAE; expected a name, a path, a diffusers autoencoder or a VAEStage.")
    return VAEStage(vae)


def form(vae: Any) -> tuple[bool, bool, bool]:
    """Which factors a config declares."""
    shift = vae.config.get("shift_factor")
    return vae.config.get("latents_mean") is not None, shift is None, bool(shift)


def declared(vae: Any) -> LatentSpace | None:
    """The space that an autoencoder's config declares; None where it declares none."""
    try:
        return LatentSpace.of(vae)
    except ValueError:
        return None


def with_factors(vae: Any, space: LatentSpace, host: Any) -> Any:
    """The same weights with their normalization in the config fields that this host (a row of `families`) reads."""
    if host.raw or space.patch > 1:  # its code reads no factor, or those that are weights
        return vae
    config = vae.config
    statistics = config.get("latents_mean") is not None and config.get("latents_std") is not None
    shift = config.get("shift_factor")
    read = host.statistics if statistics else (shift is not None) if host.shift else not shift
    if (read or not host.listed) and declared(vae) == space:
        return vae
    uniform = len(set(space.scale)) == len(set(space.shift)) == 1
    if uniform and (host.shift or not any(space.shift)):
        factors: dict[str, Any] = {
            "scaling_factor": space.scale[0],
            "shift_factor": space.shift[0] if host.shift or space.shift[0] else None,
            "latents_mean": None,
            "latents_std": None,
        }
    else:
        factors = {
            "scaling_factor": 1.0,
            "shift_factor": None,
            "latents_mean": list(space.shift),
            "latents_std": [1 / value for value in space.scale],
        }
    twin = copy.copy(vae)  # shares the weights; only its config is its own
    twin.register_to_config(**factors)
    return twin
