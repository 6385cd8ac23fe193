"""What a VAE's file does not say, measured on probe images: the groups of its norms and the scale of its latents."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from latentpipe.checkpoints.instantiate import build
from latentpipe.utils.errors import LatentpipeWarning, UserError, short
from latentpipe.vae.latent_space import PUBLISHED, LatentSpace, downscale_of
from latentpipe.vae.probe_images import probe_images
from latentpipe.vae.stage import VAEStage

Config = Mapping[str, Any]
Tensors = Mapping[str, torch.Tensor]

LDM_GROUPS = 32  # every autoencoder of the LDM family: Normalize in ldm/modules/diffusionmodules/model.py
REBUILT = 0.25  # share of the probes' variance that a working autoencoder's error stays below
CLEAR = 0.65  # the best candidate's error against the second's
ALONE = math.log(1.3)  # how far from 1 the normalized std may lie where a published space has no neighbour
PROBES = 16


def norm_groups(config: Config, tensors: Tensors, path: Path) -> int:
    """The number of groups of an AutoencoderKL's norms: 32 where that rebuilds the probes, else what clearly does best.

    UserError asks where 32 does not divide the widths and no other number stands out.
    """
    widths = math.gcd(*config["block_out_channels"])
    errors: dict[int, float] = {}
    if widths % LDM_GROUPS == 0:
        errors[LDM_GROUPS] = _rebuild_error(config, tensors, path, LDM_GROUPS)
        if errors[LDM_GROUPS] < REBUILT:
            return LDM_GROUPS
    for groups in range(1, min(widths, 128) + 1):
        if widths % groups == 0 and groups not in errors:
            errors[groups] = _rebuild_error(config, tensors, path, groups)
    best, *others = sorted(errors, key=lambda groups: errors[groups])
    if errors[best] < REBUILT and (not others or errors[best] < CLEAR * errors[others[0]]):
        _note(
            f"{path.name} does not say how many groups its norms have; {best} rebuilds the probe images best "
            f"(error {errors[best]:.3f} of their variance, next {errors[others[0]]:.3f})."
            if others
            else f"{path.name}: its norms can have 1 group only."
        )
        return best
    if widths % LDM_GROUPS == 0:
        return LDM_GROUPS
    raise UserError(
        f"{path} does not say how many groups its norms have, and none of {', '.join(map(str, sorted(errors)))} clearly rebuilds "
        f"a picture: state it, latentpipe convert {path} --out FOLDER --norm-groups N."
    )


def space_of(config: Config, tensors: Tensors, path: Path) -> tuple[float, float]:
    """Scaling and shift factor of a VAE that declares none: those of the one published space that fits its latents.

    LDM's rule (scale by the std of all components together) decides; UserError asks where none or several fit.
    """
    channels, downscale = int(config["latent_channels"]), downscale_of(config)
    mean, std = _statistics(config, tensors, path)
    normalized = {
        name: std * space.scale[0]
        for name, space in PUBLISHED.items()
        if (space.channels, space.downscale) == (channels, downscale)
    }
    shown = "; ".join(f"{name} would give std {value:.2f}" for name, value in normalized.items())
    fits = [name for name, value in normalized.items() if abs(math.log(value)) < _reach(name, normalized)]
    if len(fits) != 1:
        raise UserError(
            f"{path} declares no scaling factor, and no published space of {channels} channels at 1/{downscale} size clearly "
            f"fits its latents (mean {short(mean)}, std {short(std)} on {PROBES} probe images{'; ' if shown else ''}{shown}): "
            f"state it, latentpipe convert {path} --out FOLDER --scaling-factor X [--shift-factor Y]; 1/std is "
            f"{short(1 / std, 4)}."
        )
    space = PUBLISHED[fits[0]]
    _note(
        f"{path.name} declares no scaling factor; measured on {PROBES} probe images its latents have std {short(std)}, "
        f"which fits {fits[0]}: {space.scale[0]:g}, shift {space.shift[0]:g} ({shown})."
    )
    return space.scale[0], space.shift[0]


def check_normalized(config: Config, tensors: Tensors, path: Path) -> None:
    """Note where latents that should be normalized by training have a std outside 0.3 to 3 on the probes."""
    _, std = _statistics(config, tensors, path)
    if not 0.3 <= std <= 3:
        _note(
            f"{path.name}: latents of its family are normalized by training (factor 1), but these have std {short(std)} "
            "on the probe images; state a factor with 'latentpipe convert --scaling-factor' if pictures come out wrong."
        )


def _reach(name: str, normalized: Mapping[str, float]) -> float:
    """How far from 0 the log of the normalized std may lie: almost half way to the nearest other published space."""
    gaps = [abs(math.log(normalized[name] / value)) for other, value in normalized.items() if other != name]
    return min([ALONE, *(0.45 * gap for gap in gaps)])


@torch.no_grad()
def _statistics(config: Config, tensors: Tensors, path: Path) -> tuple[float, float]:
    """Mean and std of all components of the raw latents of the probes; the posterior's own variance counts."""
    vae = build(config, tensors, path)
    stage, side = _stage(vae, config), _side(config, 128)
    pairs = [stage.raw_posterior(part) for part in probe_images(PROBES, side).split(4)]
    mean, std = (torch.cat([pair[index] for pair in pairs]).double() for index in range(2))
    found = float(mean.mean()), float((mean.var(correction=0) + std.square().mean()).sqrt())
    if not all(map(math.isfinite, found)) or found[1] == 0:
        raise UserError(
            f"{path}: its encoder gives no usable latents (mean {short(found[0])}, std {short(found[1])}); the file is broken."
        )
    return found


@torch.no_grad()
def _rebuild_error(config: Config, tensors: Tensors, path: Path, groups: int) -> float:
    """Mean squared error of rebuilt probes, as a share of the probes' variance; inf where it is not finite."""
    stage = _stage(build({**config, "norm_num_groups": groups}, tensors, path), config)
    images = probe_images(8, _side(config, 64))
    error = float((stage.decode(stage.encode(images)) - images).square().mean() / images.var())
    return error if math.isfinite(error) else math.inf


def _stage(vae: Any, config: Config) -> VAEStage:
    c = int(config["latent_channels"])
    return VAEStage(vae, LatentSpace(c, downscale_of(config), (1.0,) * c, (0.0,) * c))


def _side(config: Config, least: int) -> int:
    """A side that the VAE takes, at least `least` pixels and four latents."""
    downscale = downscale_of(config)
    return downscale * max(4, -(-least // downscale))


def _note(text: str) -> None:
    warnings.warn(text, LatentpipeWarning, stacklevel=2)
