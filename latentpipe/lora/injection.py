"""Modules wrapped in peft's layers, and unwrapped again: the wrapped module is never written to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from latentpipe.lora.adapter import LoraLayer
from latentpipe.lora.target_modules import PREFIX, base_layer_of

KEY = "lora"  # what peft calls the one adapter of a wrapper; several adapters on a module are wrappers around wrappers
_NAMES = {
    "lora": ("lora_A", "lora_B", "lora_magnitude_vector"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
}


def attach(model: nn.Module, layers: Mapping[str, LoraLayer], name: str, weight: float | Mapping[str, float] = 1.0) -> None:
    """Wrap the modules of a component in peft layers with these tensors (frozen); `weight` may differ by path.

    Several adapters may lie on one module: their changes add up. Shapes have been checked before (`matching.fit`).
    """
    for path, layer in layers.items():
        factor = weight if isinstance(weight, (int, float)) else weight[path]
        if layer.dora and not factor:
            continue  # off; peft's layer would still set the lengths of the rows
        _replace(model, path, filled(submodule(model, path), layer, name, float(factor)))


def inject(
    model: nn.Module,
    paths: Sequence[str],
    name: str,
    rank: int,
    alpha: float,
    *,
    dora: bool = False,
    rslora: bool = False,
    ranks: Mapping[str, int] | None = None,
) -> None:
    """Wrap modules in new layers that change nothing yet and train; everything else of the model is frozen.

    ranks  of single paths; their alpha keeps the same ratio to the rank
    """
    model.requires_grad_(False)
    for path in paths:
        own = (ranks or {}).get(path, rank)
        wrapper = _wrapper(submodule(model, path), "lora", _config("lora", own, dora, rslora), own, alpha * own / rank)
        wrapper.latentpipe_name = name
        _replace(model, path, wrapper)


def filled(base: nn.Module, layer: LoraLayer, name: str, weight: float = 1.0) -> nn.Module:
    """A module wrapped in one peft layer with these tensors, frozen, in the dtype of its weights."""
    effective = "hada_t1" in layer.tensors or "lokr_t2" in layer.tensors
    config = _config(layer.kind, layer.rank, layer.dora, layer.rslora, effective)
    trains = [parameter.requires_grad for parameter in base.parameters()]
    with torch.random.fork_rng(devices=[]):  # peft draws values that are replaced below
        wrapper = _wrapper(base, layer.kind, config, layer.rank, layer.alpha)
    weights: Any = base_layer_of(base).weight
    tensors = {key: value.to(weights.device, weights.dtype) for key, value in layer.tensors.items()}
    if layer.kind == "lora":
        square = weights.ndim == 4
        wrapper.lora_A[KEY].weight = nn.Parameter(tensors["lora_A"].reshape(-1, *weights.shape[1:]))
        up = tensors["lora_B"].flatten(1)
        wrapper.lora_B[KEY].weight = nn.Parameter(up[:, :, None, None] if square else up)
        if layer.dora:
            magnitude = tensors["lora_magnitude_vector"].flatten()
            wrapper.lora_magnitude_vector[KEY].weight = nn.Parameter(magnitude[None, :, None, None] if square else magnitude)
    else:
        for key in _NAMES[layer.kind]:
            getattr(wrapper, key).clear()
            if key in tensors:
                getattr(wrapper, key)[KEY] = nn.Parameter(tensors[key])
    wrapper.scaling[KEY] = layer.scale * weight
    wrapper.latentpipe_name, wrapper.latentpipe_trains = name, trains
    for parameter in wrapper.parameters():
        parameter.requires_grad_(False)
    return wrapper.train(base.training)


def layers_of(model: nn.Module, name: str) -> dict[str, LoraLayer]:
    """The layers that are attached under a name, as they stand (a copy, on the CPU)."""
    found: dict[str, LoraLayer] = {}
    for path, wrapper in wrappers(model):
        if wrapper.latentpipe_name == name:
            found[path.removeprefix(PREFIX)] = _read(wrapper)
    return found


def detach(model: nn.Module, name: str | None = None) -> None:
    """Unwrap the modules of one adapter (None: of all); those modules are the very same objects as before.

    They train again where they did before `attach`: torch rounds in another order where no weight does.
    """
    for path in {path for path, _ in wrappers(model)}:
        chain = list(_chain(submodule(model, path)))
        kept = [] if name is None else [wrapper for wrapper in chain if wrapper.latentpipe_name != name]
        inner = base_layer_of(chain[-1])
        if not kept:
            for parameter, trains in zip(inner.parameters(), getattr(chain[-1], "latentpipe_trains", ()), strict=False):
                parameter.requires_grad_(trains)
        for wrapper in reversed(kept):
            wrapper.base_layer = inner
            inner = wrapper
        _replace(model, path, inner)


def wrappers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Path and wrapper of every layer that `attach` or `inject` put there, the outermost of a module first."""
    outer = [(path, module) for path, module in model.named_modules() if _is_ours(module)]
    for path, module in outer:
        if not path.endswith("base_layer"):
            yield from ((path, wrapper) for wrapper in _chain(module))


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module of a path, whether or not the model's own paths begin with ``text_model.``."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return model.get_submodule(PREFIX + path)


def _is_ours(module: nn.Module) -> bool:
    return hasattr(module, "latentpipe_name")


def _chain(module: nn.Module) -> Iterator[Any]:
    while _is_ours(module):
        yield module
        module = module.base_layer  # type: ignore[assignment]


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    old = submodule(model, path)
    parent, _, attribute = path.rpartition(".")
    owner = submodule(model, parent) if parent else model
    if getattr(owner, attribute, None) is not old:  # a path of one name, below text_model
        owner = model.get_submodule(PREFIX.rstrip("."))
    setattr(owner, attribute, module)


@lru_cache(maxsize=64)
def _config(kind: str, rank: int, dora: bool = False, rslora: bool = False, effective: bool = False) -> Any:
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    if kind == "lora":
        return LoraConfig(r=rank, use_dora=dora, use_rslora=rslora)
    return (LoHaConfig if kind == "loha" else LoKrConfig)(r=rank, use_effective_conv2d=effective)


def _wrapper(base: nn.Module, kind: str, config: Any, rank: int, alpha: float) -> Any:
    from peft.tuners.loha import layer as loha
    from peft.tuners.lokr import layer as lokr
    from peft.tuners.lora import layer as lora

    inner = base_layer_of(base)
    name = "Conv2d" if isinstance(inner, nn.Conv2d) else "Linear"
    if kind == "lora":
        wrapper = getattr(lora, name)(inner, KEY, config=config, r=rank, lora_alpha=alpha)
    else:
        wrapper = getattr({"loha": loha, "lokr": lokr}[kind], name)(inner, KEY, config=config, r=rank, alpha=alpha)
    wrapper.base_layer = base  # peft reads a convolution's settings from the module itself, not from a wrapper
    return wrapper


def _read(wrapper: Any) -> LoraLayer:
    kind = next(kind for kind, names in _NAMES.items() if hasattr(wrapper, names[0]))
    tensors: dict[str, torch.Tensor] = {}
    for key in _NAMES[kind]:
        held = getattr(wrapper, key)
        if KEY in held:
            value = held[KEY].weight if kind == "lora" else held[KEY]
            tensors[key] = value.detach().cpu().clone()
    rslora = bool(kind == "lora" and wrapper.use_rslora[KEY])
    alpha = wrapper.lora_alpha[KEY] if kind == "lora" else wrapper.alpha[KEY]
    return LoraLayer(kind, tensors, wrapper.r[KEY], float(alpha), rslora)  # type: ignore[arg-type]
