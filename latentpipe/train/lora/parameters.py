"""The parts of a host that an adapter is trained on: which layers, their new parameters, and the proof that the base stays."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from latentpipe.lora.adapter import COMPONENTS, Lora
from latentpipe.lora.injection import inject, layers_of, wrappers
from latentpipe.lora.target_modules import PREFIX, TEXT, leaves, select, select_all
from latentpipe.pipelines import families
from latentpipe.train.config import AdapterShape, TrainLora
from latentpipe.train.lora.flow import ASKED, asked_of
from latentpipe.utils.errors import LatentpipeWarning, UserError, counted
from latentpipe.utils.io import content_hash

NAME = "train"  # of the adapter, while it trains
CLASSIC = families.FAMILIES[:2]  # whose UNets and text encoders train here: Stable Diffusion 1, 2 and XL


@dataclass(frozen=True)
class Plan:
    """The layers that get an adapter.

    models  the touched components by name
    paths   of their layers
    ranks   of those layers that rank_pattern names
    """

    models: dict[str, nn.Module]
    paths: dict[str, list[str]]
    ranks: dict[str, dict[str, int]]

    @property
    def denoises(self) -> bool:
        """Whether it is trained on the denoising loss: some layer is in the denoiser or a text encoder."""
        return any(name != "vae" for name in self.paths)

    @property
    def reads(self) -> bool:
        """Whether a text encoder trains."""
        return any(name in TEXT for name in self.paths)

    @property
    def decodes(self) -> bool:
        """Whether the VAE's decoder trains."""
        return "vae" in self.paths


def choose_trained(config: TrainLora, host: Any) -> Plan:
    """The plan of a config for a host; UserError for sites that match nothing or cannot be trained here."""
    shape = config.adapter
    components = {name: model for name in COMPONENTS if isinstance(model := getattr(host, name, None), nn.Module)}
    paths = select_all(components, shape.sites)
    encoder = [path for path in paths.get("vae", ()) if path.startswith("encoder.") or path == "quant_conv"]
    if encoder:
        raise UserError(
            f"adapter.sites {', '.join(shape.sites)} reach the VAE's encoder ({encoder[0]}), which would make a new latent space "
            "that this denoiser does not know; give vae.decoder, or train a VAE with 'latentpipe train-vae'."
        )
    models = {name: components[name] for name in paths}
    plan = Plan(models, paths, _ranks(shape, models, paths))
    family = families.family_of(host)
    if plan.denoises and ((family not in CLASSIC and asked_of(host) is None) or type(host).__name__ != family.text):
        raise UserError(
            f"The model is a {type(host).__name__}; train-lora trains the denoisers and text encoders of "
            f"{' and '.join(family.text for family in CLASSIC)}, the transformers of {', '.join(ASKED)}, and the VAE's decoder "
            "(vae.decoder) of any model."
        )
    if plan.reads and family not in CLASSIC:
        raise UserError(f"The text encoders of {family.name} do not train here; give adapter.sites of its transformer alone.")
    if plan.decodes and not (config.loss.l1 or config.loss.l2):
        raise UserError(
            "loss.l1 and loss.l2 are both 0, and the VAE's decoder learns from nothing else; give one of them a weight."
        )
    if config.prior.train is not None and not plan.denoises:
        raise UserError("prior keeps a denoiser's pictures, but adapter.sites reach the VAE alone; leave prior out.")
    _note_large_ranks(shape, plan)
    return plan


def _ranks(shape: AdapterShape, models: Mapping[str, nn.Module], paths: Mapping[str, list[str]]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {name: {} for name in paths}
    for pattern, rank in shape.rank_pattern.items():
        named = {name: set(select(name, model, [pattern])) & set(paths[name]) for name, model in models.items()}
        if not any(named.values()):
            raise UserError(f"adapter.rank_pattern '{pattern}' matches none of the layers that adapter.sites choose.")
        for name, chosen in named.items():
            found[name] |= dict.fromkeys(sorted(chosen), rank)
    return found


def _note_large_ranks(shape: AdapterShape, plan: Plan) -> None:
    """A warning on layers whose full rank is smaller than the adapter's."""
    small: list[str] = []
    for name, model in plan.models.items():
        modules = leaves(model)
        for path in plan.paths[name]:
            weight: torch.Tensor = modules[path].weight  # type: ignore[assignment]
            full, rank = min(weight.shape[0], weight[0].numel()), plan.ranks[name].get(path, shape.rank)
            if rank > full:
                small.append(f"{name}.{path} ({full})")
    if small:
        layers = counted(len(small), "layer")
        message = f"the rank is larger than the full rank of {layers}, such as {small[0]}: parameters without use"
        warnings.warn(LatentpipeWarning(message), stacklevel=4)


def inject_trainable(config: TrainLora, plan: Plan) -> nn.ParameterDict:
    """Put the new layers in; returns their parameters alone, which is what the optimizer and the checkpoints hold."""
    shape = config.adapter
    torch.manual_seed(config.run.seed)  # the same beginning, whatever was drawn before
    kept: dict[str, nn.Parameter] = {}
    for name, model in plan.models.items():
        dora = shape.kind == "dora"
        alpha = shape.alpha or float(shape.rank)
        inject(model, plan.paths[name], NAME, shape.rank, alpha, dora=dora, rslora=shape.rslora, ranks=plan.ranks[name])
        found = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
        kept |= {f"{name}/{key.replace('.', '/')}": parameter for key, parameter in found.items()}
    return nn.ParameterDict(kept)


@torch.no_grad()
def begin_from(lora: Lora, plan: Plan) -> None:
    """Fill the new layers with those of an earlier adapter; UserError where layers, kinds or ranks differ."""
    problems: list[str] = []
    for name in sorted(set(plan.models) | set(lora.parts)):
        old = lora.parts.get(name, {})
        own = layers_of(plan.models[name], NAME) if name in plan.models else {}
        problems += [f"{name}.{path} is in one of them alone" for path in sorted(set(old) ^ set(own))]
        for path in sorted(set(old) & set(own)):
            mine = {key: tuple(value.shape) for key, value in own[path].tensors.items()}
            theirs = {key: tuple(value.shape) for key, value in old[path].tensors.items()}
            if mine != theirs:
                problems.append(f"{name}.{path} is {_words(old[path])} there and {_words(own[path])} here")
    if problems:
        raise UserError(
            f"run.warm_start {lora.name} has other layers than this run ({problems[0]}"
            + (f"; and {len(problems) - 1} more" if len(problems) > 1 else "")
            + "). Give adapter the same sites, kind and ranks."
        )
    for name, model in plan.models.items():
        for path, wrapper in wrappers(model):
            layer = lora.parts[name][path.removeprefix(PREFIX)]
            for key, value in layer.tensors.items():
                held = getattr(wrapper, key)["lora"].weight
                # the change as a whole is taken over: another scale here is made up for in B
                factor = layer.scale / wrapper.scaling["lora"] if key == "lora_B" else 1.0
                held.copy_(value.to(held.device, torch.float32) * factor)


def _words(layer: Any) -> str:
    return f"{'dora' if layer.dora else layer.kind} of rank {layer.rank}"


def base_hashes(plan: Plan) -> dict[str, str]:
    """The content hash of the frozen weights of every touched component, whether or not the adapter is in it."""
    return {name: content_hash(_base(model)) for name, model in plan.models.items()}


def _base(model: nn.Module) -> dict[str, torch.Tensor]:
    own = {id(parameter) for _, wrapper in wrappers(model) for key, parameter in wrapper.named_parameters() if not _is_base(key)}
    tensors = {key: value for key, value in model.state_dict(keep_vars=True).items() if id(value) not in own}
    return {key.replace(".base_layer", ""): value for key, value in tensors.items()}


def _is_base(key: str) -> bool:
    return key.startswith("base_layer.")


def refuse_changed_base(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """UserError where a base's weights are not the very same after the run; nothing is written then."""
    changed = [name for name in before if before[name] != after.get(name)]
    if changed:
        raise UserError(
            f"The base's {' and '.join(changed)} changed while the adapter was trained (another sha256 than before), so the "
            "adapter would not fit the model; nothing was written. Train again on an unchanged model."
        )
