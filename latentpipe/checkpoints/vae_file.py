"""Open a VAE from any file: which class its shapes tell, its tensors under diffusers' names, its config complete."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentpipe.checkpoints import ldm_keys, taesd_keys
from latentpipe.checkpoints.components import check_config
from latentpipe.checkpoints.identify import carries_adapter, looks_like
from latentpipe.checkpoints.infer_config import check_normalized, norm_groups, space_of
from latentpipe.checkpoints.instantiate import AUTOENCODERS, build
from latentpipe.checkpoints.tensor_source import Source, open_source
from latentpipe.utils.errors import UserError, counted
from latentpipe.vae.latent_space import LatentSpace, downscale_of

FLOATS = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}
PREFIXES = ("", "first_stage_model.", "vae.")  # of a VAE's tensors: alone, in an LDM checkpoint, in other checkpoints
IMAGE_INPUTS = ("encoder.conv_in.weight", "encoder.conv_in.conv.weight", "encoder.layers.0.weight")


@dataclass(frozen=True)
class StatedConfig:
    """What a person states about a VAE whose file does not say it; None: unknown."""

    factor: float | None = None
    shift: float | None = None
    downscale: int | None = None
    groups: int | None = None

    def __post_init__(self) -> None:
        for name, value, low in (
            ("scaling-factor", self.factor, 0),
            ("shift-factor", self.shift, -math.inf),
            ("downscale", self.downscale, 0),
            ("norm-groups", self.groups, 0),
        ):
            if value is not None and not (math.isfinite(value) and value > low):
                raise UserError(f"--{name} is {value}; expected a finite number{' greater than 0' if low == 0 else ''}.")


@dataclass(frozen=True)
class VAEFile:
    """A VAE of any file: the path that messages name, its complete config, its tensors (diffusers names, as stored)."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def space(self) -> LatentSpace:
        """Channels, downscale and normalization of its latents."""
        return LatentSpace.from_config(self.config)

    def build(self) -> Any:
        """The autoencoder, in eval mode and fp32; UserError where the tensors do not fit the config."""
        return build(self.config, self.tensors, self.path)


_measured: dict[tuple[Any, ...], dict[str, Any]] = {}  # completed configs, by file and what was given


def open_vae_file(path: Path, given: StatedConfig | None = None) -> VAEFile:
    """A diffusers folder or a safetensors file as a VAEFile. What the file does not say is measured, or asked for."""
    return resolve(open_source(path), given or StatedConfig())


def space_of_file(path: Path) -> LatentSpace:
    """Channels and downscale of a VAE's latents by its config or the shapes in its header: no weight is read.

    Factors that the file does not state are 1 here.
    """
    source = open_source(path)
    config, _ = _identify(source, StatedConfig())
    return _space({**config, "scaling_factor": config.get("scaling_factor") or 1.0}, source.path)


def resolve(source: Source, given: StatedConfig) -> VAEFile:
    """As `open_vae_file`, of a Source."""
    config, names = _identify(source, given)
    _check_header(source, names)
    stored = source.read(names.values())
    tensors = {own: ldm_keys.as_linear(own, stored[name]) for own, name in names.items()}
    stamps = [(str(path.resolve()), path.stat().st_mtime_ns, path.stat().st_size) for path in source.files]
    key = (*stamps, str(config), given)
    if key not in _measured:
        _measured[key] = _complete(config, tensors, given, source.path)
    return VAEFile(source.path, dict(_measured[key]), tensors)


def _identify(source: Source, given: StatedConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """The config that the file states or its shapes tell, and our name -> the file's name for each tensor."""
    where = source.folder or source.path
    if carries_adapter(source.shapes):
        raise UserError(f"{where} looks like {looks_like(source.shapes)}.")
    if source.folder:
        config = source.config or {}
        if config.get("_class_name") not in AUTOENCODERS:
            name = config.get("_class_name")
            raise UserError(f"{where}/config.json: _class_name is {name!r}; expected one of {', '.join(AUTOENCODERS)}.")
        check_config(config, f"{where}/config.json")
        return dict(config), _renamed({name: ldm_keys.modern(name) for name in source.shapes}, source.path)
    for prefix in PREFIXES:
        own = {name.removeprefix(prefix): name for name in source.shapes if name.startswith(prefix)}
        own = {name: full for name, full in own.items() if not name.startswith(ldm_keys.IGNORED)}
        found = _vocabulary({name: source.shapes[full] for name, full in own.items()}, source, given)
        if found:
            config, names = found
            return config, {mine: own[name] for mine, name in names.items()}
    raise UserError(f"{where} is no VAE that opens here; it looks like {looks_like(source.shapes)}.")


def _vocabulary(shapes: ldm_keys.Shapes, source: Source, given: StatedConfig) -> tuple[dict[str, Any], dict[str, str]] | None:
    """Config and our name -> name, for names without prefix; None where they are no VAE's."""
    names: dict[str, str] = {}
    if ldm_keys.is_ldm(shapes):
        table = ldm_keys.key_table(shapes)
        names = _renamed({name: table.get(name, name) for name in shapes}, source.path)
    elif ldm_keys.is_diffusers(shapes):
        names = _renamed({name: ldm_keys.modern(name) for name in shapes}, source.path)
    stated = source.config
    if stated is not None and (names or stated.get("_class_name") != "AutoencoderKL"):
        if stated.get("_class_name") not in AUTOENCODERS:
            raise UserError(
                f"{source.path}: its metadata names the class {stated.get('_class_name')!r}; expected one of "
                f"{', '.join(AUTOENCODERS)}."
            )
        check_config(stated, f"{source.path}: the config in its metadata")
        return dict(stated), names or {name: name for name in shapes}
    if names:
        own = {mine: tuple(shapes[name]) for mine, name in names.items()}
        own = {name: shape[:2] if ".attentions." in name else shape for name, shape in own.items()}
        try:
            return ldm_keys.ldm_config(own), names
        except (KeyError, IndexError) as error:
            reason = f"has no {error.args[0]}" if isinstance(error, KeyError) else "has tensors of another rank"
            raise UserError(f"{source.path} is not a complete AutoencoderKL: it {reason}.") from None
    names = taesd_keys.own_names(shapes)
    if names:
        own = {mine: shapes[name] for mine, name in names.items()}
        return taesd_keys.taesd_config(own, given.downscale, source.path), names
    return None


def _renamed(ours: Mapping[str, str], path: Path) -> dict[str, str]:
    """Our name -> the file's; UserError where the file has one tensor under two names."""
    names = {mine: name for name, mine in ours.items()}
    if len(names) != len(ours):
        twice = next(name for name, mine in ours.items() if names[mine] != name)
        raise UserError(f"{path}: {twice} and {names[ours[twice]]} are the same tensor of a VAE; the file mixes two formats.")
    return names


def _check_header(source: Source, names: Mapping[str, str]) -> None:
    """UserError on dtypes that are no floats and on pictures of other than 3 channels, before any data is read."""
    for own, name in names.items():
        if source.dtypes[name] not in FLOATS and not own.endswith("num_batches_tracked"):
            raise UserError(
                f"{source.path}: {name} is stored as {source.dtypes[name]}; expected a float of 16 to 64 bits "
                "(quantized and complex weights are not read)."
            )
    for own in IMAGE_INPUTS:
        shape = source.shapes.get(names.get(own, ""), ())
        if len(shape) == 4 and shape[1] != 3:
            raise UserError(f"{source.path} encodes pictures of {counted(shape[1], 'channel')}; images here have 3.")


def _complete(config: dict[str, Any], tensors: dict[str, torch.Tensor], given: StatedConfig, path: Path) -> dict[str, Any]:
    """`config` with what was given, and with what the file leaves open as measured."""
    _space({**config, "scaling_factor": 1.0 if config.get("scaling_factor") is None else config["scaling_factor"]}, path)
    if config["_class_name"] == "AutoencoderKL" and (given.groups or "norm_num_groups" not in config):
        config = {**config, "norm_num_groups": given.groups or norm_groups(config, tensors, path)}
    if given.downscale is not None and given.downscale != downscale_of(config):
        raise UserError(f"{path} reduces a picture's side {downscale_of(config)} times; downscale {given.downscale} was given.")
    tiny = config["_class_name"] in ("AutoencoderTiny", "TinyVAE")
    if given.factor is not None:
        config = {
            **config,
            "scaling_factor": given.factor,
            "shift_factor": given.shift,
            "latents_mean": None,
            "latents_std": None,
        }
    elif config.get("scaling_factor") is None and not tiny:
        if given.shift is not None:
            raise UserError(f"{path} declares no scaling factor, and only a shift factor was given; state both.")
        factor, shift = space_of(config, tensors, path)
        config = {**config, "scaling_factor": factor, "shift_factor": shift or None}
    elif given.shift is not None:
        config = {**config, "shift_factor": given.shift, "latents_mean": None, "latents_std": None}
    if tiny:
        if config.get("scaling_factor") is None:
            check_normalized(config, tensors, path)
        config = {"shift_factor": 0.0, **config, "scaling_factor": config.get("scaling_factor") or 1.0}
    _space(config, path)
    return config


def _space(config: dict[str, Any], path: Path) -> LatentSpace:
    """The space that a config from a file declares; UserError where its values are no numbers."""
    try:
        return LatentSpace.from_config(config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its config declares no latent space ({str(error).rstrip('.')}).") from None
