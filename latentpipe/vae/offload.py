"""Where an autoencoder computes, in which dtype, and a copy of it, whatever hooks of accelerate and diffusers are on it.

Three kinds of hooks move or cast weights around each call: accelerate's on the whole model (model offload), accelerate's on
every layer (sequential offload; the weights lie on the meta device in between) and diffusers' on every layer (group offload,
layerwise casting; the weights lie in a storage dtype in between).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def device_of(model: Any) -> torch.device:
    """Where the model computes: a hook's execution device, else where its weights lie."""
    for module in model.modules():
        found = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if found is not None:
            return torch.device(found)
        registry = getattr(module, "_diffusers_hook", None)
        group = registry.get_hook("group_offloading") if registry is not None else None
        if group is not None:
            return torch.device(group.config.onload_device)
    return next(model.parameters()).device


def dtype_of(model: Any) -> torch.dtype:
    """The dtype that the model computes in: a casting hook's, else that of its weights."""
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        casting = registry.get_hook("layerwise_casting") if registry is not None else None
        if casting is not None:
            return casting.compute_dtype
    return next(model.parameters()).dtype


def in_layers(model: Any) -> bool:
    """Whether hooks move or cast the weights of single layers, so that no weight may be read without its layer's call."""
    return any(
        hasattr(module, "_diffusers_hook") or hasattr(module, "_hf_hook") for module in model.modules() if module is not model
    )


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """The state dict, with the weights that hooks keep elsewhere."""
    state = model.state_dict()
    if all(tensor.device.type != "meta" for tensor in state.values()):
        return state
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    found = get_state_dict_offloaded_model(model)
    return {name: found.get(name, tensor) for name, tensor in state.items()}


HOOKED = ("_hf_hook", "_old_forward", "forward")  # what accelerate sets on a module


def unhooked(model: Any) -> Any:
    """The same layers in an object with attributes of its own, without accelerate's hook on the whole model."""
    twin = object.__new__(type(model))
    vars(twin).update({name: value for name, value in vars(model).items() if name not in HOOKED})
    for name in ("_modules", "_parameters", "_buffers"):
        vars(twin)[name] = dict(vars(model)[name])
    return twin


def copied(model: Any, dtype: torch.dtype) -> Any:
    """A copy in another dtype that computes where the model does, without its hooks; it takes no gradient."""
    with torch.inference_mode(False), torch.no_grad():
        if in_layers(model):
            twin = type(model).from_config(model.config)
            twin.load_state_dict(weights_of(model))
            twin.train(model.training)
        else:
            twin = copy.deepcopy(unhooked(model))
        return nn.Module.to(twin, device_of(model), dtype).requires_grad_(False)
