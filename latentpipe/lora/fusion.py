"""Several adapters on one model: weights set, swapped and taken off; the base's own tensors are kept and put back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version

from latentpipe.lora import matching
from latentpipe.lora.adapter import Lora
from latentpipe.lora.delta import delta
from latentpipe.lora.injection import attach, detach, wrappers
from latentpipe.lora.merge import Weight, covers, merge, weight_at
from latentpipe.lora.target_modules import leaves
from latentpipe.utils.defaults import LORA_LIMIT as LIMIT
from latentpipe.utils.errors import UserError

MOST_CHANGE = 10.0  # ||dW|| / ||W|| at weight 1; adapters in use are below 1


class LoraFuser:
    """The adapters of one model.

    components  the networks by name ("unet", "text_encoder", "vae", ...); their weights change while adapters are on
    loaded      adapters by name, whether they are on or not
    weights     of those that are on

    "fused" (the default): each weight becomes W + sum of dW_i(w_i), so that drawing costs what it costs without adapters; the
    base's tensors themselves are kept and put back. "unfused": the modules are wrapped in peft layers.
    """

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self.components = dict(components)
        self.loaded: dict[str, Lora] = {}
        self.weights: dict[str, Weight] = {}
        self.fused = True
        self.method = "sum"
        self._active: list[tuple[Lora, Weight]] = []
        self._kept: dict[tuple[str, str], torch.Tensor] = {}
        self._leaves: dict[str, dict[str, Any]] = {name: leaves(model) for name, model in components.items()}

    def load(self, lora: Lora, partial: bool = False) -> matching.MatchReport:
        """Check an adapter against the model and keep it under its name; nothing is switched on yet.

        It takes the place of one of its name that is off. UserError where it does not fit (in part: unless `partial`), or one
        of its name is on.
        """
        if lora.name in self.weights:
            raise UserError(f"Two LoRA files have the name '{lora.name}'; give one of them another name.")
        for component, model in self.components.items():
            if foreign(model):
                raise UserError(f"{component} has adapters on it that are not ours; take them off first (unload_lora_weights).")
        kept, left_out = matching.fit(lora, self.components, partial)
        with self.adapters_disabled():
            parts = matching.describe(kept, lora, self.components)
        for component, part in parts.items():
            if not part.change <= MOST_CHANGE:  # also where it is not a number
                raise UserError(
                    f"LoRA '{lora.name}' would change the weights of the {component} by {part.change:.0%} of their size; "
                    f"more than {MOST_CHANGE:.0%} is no adapter but damage. Fetch it again, or see 'latentpipe lora inspect'."
                )
        self.loaded[lora.name] = kept
        return matching.MatchReport(lora.name, parts, left_out)

    def set(self, weights: Mapping[str, Weight], fuse: bool = True, method: str = "sum") -> None:
        """Switch on exactly these adapters with these weights; the others go off. At an error everything stays as it was.

        A weight is a number, or numbers by component and by blocks of it ("unet", "unet.down_blocks.0"; the longest name
        that a layer's begins with counts, layers that no name covers are left alone).
        method   "sum": the weighted sum of the changes, exactly; else one of `latentpipe.lora.merge.METHODS`
        """
        for name, weight in weights.items():
            self._check(name, weight)
        active: list[tuple[Lora, Weight]] = [(self.loaded[name], weight) for name, weight in weights.items()]
        if method != "sum" and active:
            active = [(merge([lora for lora, _ in active], [weight for _, weight in active], method), 1.0)]
        self._switch(active, fuse or not active)
        self.weights, self.method = dict(weights), method if active else "sum"

    def clear(self) -> None:
        """Switch every adapter off; the base is what it was, to the byte."""
        self.set({})

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Every adapter is off inside."""
        before = self._active, self.fused
        self._switch([], True)
        try:
            yield
        finally:
            self._switch(*before)

    def _check(self, name: str, weight: Weight) -> None:
        """UserError for a name that is not loaded, and for a weight that is no sane number or names nothing."""
        if name not in self.loaded:
            raise UserError(f"No LoRA '{name}' is loaded; loaded: {', '.join(self.loaded) or 'none'}.")
        for place, value in weight.items() if isinstance(weight, Mapping) else [("", weight)]:
            if not isinstance(value, (int, float)) or not math.isfinite(value) or abs(value) > LIMIT:
                raise UserError(f"The weight of LoRA '{name}' is {value}; expected a number from {-LIMIT:g} to {LIMIT:g}.")
            if place and not any(covers(place, component, path) for component, path, _ in self.loaded[name].layers()):
                raise UserError(
                    f"LoRA '{name}' has no layer in '{place}'; it has layers in {', '.join(self.loaded[name].parts)}."
                )

    def _switch(self, active: list[tuple[Lora, Weight]], fuse: bool) -> None:
        """Off with what is on, on with these; at any error what was on is on again."""
        before = self._active, self.fused
        changed = self._fused(active) if fuse else {}
        if not fuse:
            _refuse_dora(active)
        try:
            self._put(active, fuse, changed)
        except BaseException:
            self._put(*before, self._fused(before[0]) if before[1] else {})
            raise

    def _put(self, active: list[tuple[Lora, Weight]], fuse: bool, changed: dict[tuple[str, str], torch.Tensor]) -> None:
        self._restore()
        self._active, self.fused = active, fuse  # first, so that what is begun can be taken back
        for place, value in changed.items():
            self._kept[place] = self._write(place, value)
        for lora, amount in [] if fuse else active:
            for component, layers in lora.parts.items():
                factors = {path: weight_at(amount, component, path) for path in layers}
                attach(self.components[component], layers, lora.name, factors)

    def _write(self, place: tuple[str, str], value: torch.Tensor) -> torch.Tensor:
        """Put a tensor in a weight's place; returns the one that was there."""
        weight = self._leaves[place[0]][place[1]].weight
        before = weight.data
        weight.data = value
        increment_version(weight)  # else copies made of the old values (of a VAE in a wider dtype) would be used on
        return before

    @torch.no_grad()
    def _fused(self, active: list[tuple[Lora, Weight]]) -> dict[tuple[str, str], torch.Tensor]:
        """The new weights by component and path; UserError where one is not finite."""
        sums: dict[tuple[str, str], torch.Tensor] = {}
        for lora, weight in active:
            for component, path, layer in lora.layers():
                scale = weight_at(weight, component, path)
                if scale:
                    base = self._base(component, path)
                    change = delta(layer, base, scale)
                    sums[component, path] = sums[component, path] + change if (component, path) in sums else change
        found: dict[tuple[str, str], torch.Tensor] = {}
        for place, change in sums.items():
            base = self._base(*place)
            found[place] = (base.float() + change).to(base.dtype)
            if not torch.isfinite(found[place]).all():
                raise UserError(
                    f"With these weights {'.'.join(place)} is not finite in {str(base.dtype).removeprefix('torch.')}; lower them."
                )
        return found

    def _base(self, component: str, path: str) -> torch.Tensor:
        """The base's own weight, whatever is on it now."""
        weight, kept = self._leaves[component][path].weight, self._kept.get((component, path))
        return weight.data if kept is None else kept.to(weight.device, weight.dtype)  # the model may have been moved

    def _restore(self) -> None:
        for place in list(self._kept):
            self._write(place, self._base(*place))  # the very same tensor, unless the model was moved
            del self._kept[place]
        if not self.fused:
            for lora, _ in self._active:
                for component in lora.parts:
                    detach(self.components[component], lora.name)


def _refuse_dora(active: list[tuple[Lora, Weight]]) -> None:
    """DoRA's change depends on the whole weight: unfused it would take another adapter's change for the base's own."""
    with_dora = [lora for lora, _ in active if any(layer.dora for _, _, layer in lora.layers())]
    if with_dora and len(active) > 1:
        raise UserError(f"The DoRA '{with_dora[0].name}' can be mixed with others only fused; leave fuse on.")


def foreign(model: nn.Module) -> bool:
    """Whether adapters are on a component that were not put there by us."""
    ours = {id(wrapper) for _, wrapper in wrappers(model)}
    return any(hasattr(module, "base_layer") and id(module) not in ours for module in model.modules())
