"""Does an adapter belong to this model, and what does it change? Shapes decide; metadata only explains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from latentpipe.lora.adapter import Lora, LoraLayer
from latentpipe.lora.delta import delta, delta_shape
from latentpipe.lora.target_modules import leaves
from latentpipe.utils.errors import UserError, counted, short

SHOWN = 3
PARTLY = "--lora-partial, <lora:NAME:WEIGHT:partial> or, in Python, partial=True"
_WITH_KERNEL = ("lora_A", "hada_t1", "hada_t2", "lokr_t2", "lokr_w2")


@dataclass(frozen=True)
class Part:
    """What an adapter does to one component.

    matched     layers that were found, of `layers` in the file
    ranks       smallest and largest; alphas likewise
    parameters  of the adapter; `share`: relative to the component's own
    change      ||dW|| / ||W|| over the matched layers together, at weight 1
    output_delta  how far one denoising step, or one encode or decode, moves, relative (root mean square); None: not tried
    """

    matched: int
    layers: int
    ranks: tuple[int, int]
    alphas: tuple[float, float]
    kinds: tuple[str, ...]
    parameters: int
    share: float
    change: float
    output_delta: float | None = None


@dataclass(frozen=True)
class MatchReport:
    """What attaching an adapter came to, by component; `left_out` names what was not attached and why."""

    name: str
    parts: dict[str, Part]
    left_out: tuple[str, ...] = ()
    base_checked: bool = False
    verdict: Any = None

    def __str__(self) -> str:
        lines = []
        for component, part in self.parts.items():
            moved = (
                ""
                if part.output_delta is None
                else f", moves one {'encode or decode' if component == 'vae' else 'step'} "
                f"by {short(100 * part.output_delta, 2)} %"
            )
            lines.append(
                f"{self.name}: {component} {part.matched} of {counted(part.layers, 'layer')}, {'/'.join(part.kinds)} "
                f"rank {_range(part.ranks)}, alpha {_range(part.alphas)}, "
                f"{part.parameters:,} parameters ({part.share:.1%} of the base), "
                f"changes its weights by {short(100 * part.change, 2)} %{moved}"
            )
        lines += [f"{self.name}: left out: {reason}" for reason in self.left_out]
        if not self.base_checked:
            lines.append(f"{self.name}: its base is not known (by the file, or of this model): only the shapes say that it fits")
        return "\n".join([*lines, *([str(self.verdict)] if self.verdict else [])])


def fit(lora: Lora, components: Mapping[str, nn.Module], partial: bool = False) -> tuple[Lora, tuple[str, ...]]:
    """The part of an adapter that lies on these components, and what is left out.

    UserError where nothing fits, or (unless `partial`) where not everything does.
    """
    kept: dict[str, dict[str, LoraLayer]] = {}
    left: list[str] = [_unread(key) for key in lora.unread]
    total = 0
    for component, layers in lora.parts.items():
        modules = leaves(components[component]) if component in components else {}
        for path, layer in layers.items():
            total += 1
            problem = _problem(component, path, layer, modules, components)
            if problem:
                left.append(problem)
            else:
                kept.setdefault(component, {})[path] = layer
    matched = sum(map(len, kept.values()))
    shown = "; ".join(left[:SHOWN]) + (f"; and {len(left) - SHOWN} more" if len(left) > SHOWN else "")
    if not matched:
        raise UserError(
            f"LoRA '{lora.name}' does not belong to this model: none of its {counted(total, 'layer')} fits ({shown})."
            f"{_made_for(lora)} Choose one that was trained for this model."
        )
    if left and not partial:
        raise UserError(
            f"LoRA '{lora.name}' fits in part only: {matched} of {counted(total, 'layer')} and {len(lora.unread)} other keys "
            f"({shown})."
            f"{_made_for(lora)} To attach that part alone, allow it: {PARTLY}."
        )
    return replace(lora, parts=kept), tuple(left)


@torch.no_grad()
def describe(lora: Lora, whole: Lora, components: Mapping[str, nn.Module]) -> dict[str, Part]:
    """The figures of an adapter (its matching part) on its components; `whole` is the file's content."""
    found: dict[str, Part] = {}
    for component, layers in lora.parts.items():
        modules = leaves(components[component])
        squares = [0.0, 0.0]
        for path, layer in layers.items():
            weight: torch.Tensor = modules[path].weight  # type: ignore[assignment]
            try:
                squares[0] += delta(layer, weight).square().sum().item()
            except (RuntimeError, ValueError, IndexError, KeyError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"LoRA '{lora.name}': the tensors of {component}.{path} do not fit together ({reason})."
                ) from None
            squares[1] += weight.float().square().sum().item()
        ranks, alphas = [layer.rank for layer in layers.values()], [layer.alpha for layer in layers.values()]
        size = sum(layer.parameters for layer in layers.values())
        own = sum(parameter.numel() for parameter in components[component].parameters())
        kinds = tuple(sorted({"dora" if layer.dora else layer.kind for layer in layers.values()}))
        found[component] = Part(
            len(layers),
            len(whole.parts[component]),
            (min(ranks), max(ranks)),
            (min(alphas), max(alphas)),
            kinds,
            size,
            size / own,
            (squares[0] / max(squares[1], 1e-30)) ** 0.5,
        )
    return found


def _problem(component: str, path: str, layer: LoraLayer, modules: Mapping[str, nn.Module], components: Mapping[str, Any]) -> str:
    if component not in components:
        return f"this model has no {component}"
    if path not in modules:
        return f"{component} has no layer {path}"
    weight: torch.Tensor = modules[path].weight  # type: ignore[assignment]
    shape = (weight.shape[0], weight[0].numel())
    try:
        given = delta_shape(layer)
    except (KeyError, IndexError):
        return f"the tensors of {component}.{path} are not those of a {layer.kind} layer"
    if given != shape:
        return f"{component}.{path} is {shape[0]} x {shape[1]} here and {given[0]} x {given[1]} in the file"
    for name, tensor in layer.tensors.items():
        if name in _WITH_KERNEL and tensor.ndim > 2:
            own, kernel = tuple(weight.shape[2:]) or (1, 1), tuple(tensor.shape[2:])
            if kernel != own:
                return f"{component}.{path} has a {own[0]} x {own[1]} kernel here and one of {kernel} in the file"
    return ""


def _unread(key: str) -> str:
    """Why a key of a file belongs to no layer."""
    if key.endswith(".bias") and "lora_B" in key:
        return (
            f"key {key} is a bias that was trained with the adapter (peft's lora_bias), and only weights are changed here, since "
            "most layers of a denoiser have no bias to put it in: train without lora_bias, or load the file with peft"
        )
    return f"key {key} is of no known kind"


def _made_for(lora: Lora) -> str:
    names = ("modelspec.architecture", "ss_base_model_version", "latentpipe.base_model")
    said = next((lora.metadata[name] for name in names if lora.metadata.get(name)), "")
    return f" The file says that it is for {said[:80]}." if said else ""


def _range(ends: tuple[float, float]) -> str:
    low, high = ends
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
