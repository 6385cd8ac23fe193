"""Everything that a run's next step depends on, into checkpoints and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from latentpipe.train import checkpoint
from latentpipe.train.config import Optimization, Run
from latentpipe.train.optimizer import new_optimizer
from latentpipe.train.spike_guard import SpikeGuard
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import atomic_file, read_tensors

BEST_FILE = "best.safetensors"
Result = TypeVar("Result")


class Stateful(Protocol):
    """What else a checkpoint holds: a discriminator, a controller."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its state as tensors of names that nothing else has."""

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`; other entries are left alone."""


@dataclass
class State:
    """The model, its average and its optimizer, the guard, the loss scale of fp16, and the best validation figure so far.

    misses  validation figures in a row that were no better
    validated  the last step whose sheets and validation figures were made
    whole   False in the middle of an update
    refused the figures of the last step that was not taken
    slow    a second average with another decay, where one is wanted
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMAModel
    scaler: torch.amp.GradScaler
    extras: tuple[Stateful, ...] = ()
    guard: SpikeGuard = field(default_factory=SpikeGuard)
    best: float | None = None
    misses: int = 0
    validated: int = 0
    whole: bool = True
    refused: str = ""
    slow: EMAModel | None = None

    @classmethod
    def new(cls, module: nn.Module, optim: Optimization, run: Run, extras: tuple[Stateful, ...] = ()) -> State:
        """The state before the first step; UserError where nothing trains."""
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not parameters:
            raise UserError("Nothing trains: every parameter of the model is frozen.")
        optimizer = new_optimizer(module, optim)
        scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=run.precision == "fp16")
        slow = None if optim.ema_decay_slow is None else _average(parameters, optim.ema_decay_slow)
        return cls(module, optimizer, _average(parameters, optim.ema_decay), scaler, extras, slow=slow)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that train."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    @property
    def trained(self) -> list[str]:
        """Their names; EMA and optimizer are stored in this order."""
        return [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    def snapshot(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and figures of a checkpoint."""
        tensors = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        tensors |= {f"ema.{index}": value for index, value in enumerate(self.ema.shadow_params)}
        if self.slow is not None:
            tensors |= {f"slow.{index}": value for index, value in enumerate(self.slow.shadow_params)}
        tensors |= checkpoint.optimizer_tensors(self.optimizer)
        for extra in self.extras:
            tensors |= extra.tensors()
        figures: dict[str, Any] = {"ema_steps": self.ema.optimization_step, "guard": self.guard.state()}
        figures |= {"scaler": self.scaler.state_dict(), "best": self.best, "misses": self.misses}
        return tensors, figures | {"validated": self.validated, "trained": self.trained}

    def save(self, work: Path, step: int) -> None:
        """Write a checkpoint; UserError where the disk does not take it (the ones before are kept)."""
        tensors, figures = self.snapshot()
        try:
            checkpoint.save(work, step, tensors, figures)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"The checkpoint of step {step} could not be written to {work} ({error}). The ones before it are kept: "
                "free some space, then go on with --run.resume."
            ) from None

    def resume(self, work: Path) -> int:
        """Go on from the newest checkpoint; returns its step, 0 where there is none."""
        found = checkpoint.newest(work)
        if found is None:
            return 0
        self._refuse_another(work, *found)
        try:
            self.restore(*found)
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"The checkpoint in {work} is of another model: {reason}") from None
        return int(found[1]["step"])

    def _refuse_another(self, work: Path, tensors: dict[str, torch.Tensor], figures: dict[str, Any]) -> None:
        """UserError where the checkpoint is of another model, of other parts, or has another discriminator or controller."""
        own = {f"module.{name}": value.shape for name, value in self.module.state_dict().items()}
        other = [name for name in own if name not in tensors or tensors[name].shape != own[name]]
        other += [name for name in tensors if name.startswith("module.") and name not in own]
        if other:
            raise UserError(f"The checkpoint in {work} is of another model: {other[0].removeprefix('module.')} differs.")
        if figures.get("trained") != self.trained:
            raise UserError(
                f"The checkpoint in {work} is of a run that trained other parts. Go on with its mode and parts, or begin a new "
                "run from its result with --run.warm-start."
            )
        extra = {name for extra in self.extras for name in extra.tensors()}
        for prefix, option in (("critic.net.", "adversarial.weight"), ("rate.", "loss.target_bits")):
            here, there = (any(name.startswith(prefix) for name in names) for names in (extra, tensors))
            if here != there:
                raise UserError(
                    f"The checkpoint in {work} is of a run {'without' if here else 'with'} {option}; go on with the same, or "
                    "begin a new run from its result with --run.warm-start."
                )

    def restore(self, tensors: dict[str, torch.Tensor], figures: dict[str, Any]) -> None:
        """The inverse of `snapshot`."""
        weights = {name.removeprefix("module."): value for name, value in tensors.items() if name.startswith("module.")}
        self.module.load_state_dict(weights)
        checkpoint.restore_optimizer(self.optimizer, tensors)
        for name, average in (("ema", self.ema), ("slow", self.slow)):
            if average is None:
                continue
            found = name if f"{name}.0" in tensors else "ema"  # a run that gets its second average late begins it from the first
            shadows = enumerate(average.shadow_params)
            average.shadow_params = [tensors[f"{found}.{index}"].clone().to(shadow.device) for index, shadow in shadows]
            average.optimization_step = figures["ema_steps"]
        for extra in self.extras:
            extra.restore(tensors)
        self.guard.restore(figures["guard"])
        if figures["scaler"]:
            self.scaler.load_state_dict(figures["scaler"])
        self.best, self.misses = figures["best"], figures["misses"]
        self.validated = figures.get("validated", figures.get("step", 0))  # earlier versions saved after it

    def average(self) -> None:
        """Take a step's weights into the averages."""
        self.ema.step(self.parameters)
        if self.slow is not None:
            self.slow.step(self.parameters)

    def with_ema(self, call: Callable[[], Result], average: EMAModel | None = None) -> Result:
        """Call with the averaged weights in place: those of `average`, else of the first."""
        chosen = average or self.ema
        chosen.store(self.parameters)
        chosen.copy_to(self.parameters)
        try:
            return call()
        finally:
            chosen.restore(self.parameters)

    def scores(self, score: Callable[[], float]) -> dict[str, float]:
        """`score` with each of the averages in place: "ema_loss" and, where there are two, "slow_ema_loss"."""
        averages = {"ema_loss": self.ema} | ({} if self.slow is None else {"slow_ema_loss": self.slow})
        return {name: self.with_ema(score, average) for name, average in averages.items()}

    def settle(self, best_in: Path | None, score: Callable[[], float] | None, told: bool = True) -> None:
        """At the end: give the model its average, the best one kept, or the one with the lower score, which is told."""
        if best_in is not None:
            self.take_best(best_in)
        scores = self.take_lower(score) if score is not None else ""
        if scores and told:
            print(scores)
        self.ema.copy_to(self.parameters)

    def take_lower(self, score: Callable[[], float]) -> str:
        """Make the average the one of the two whose score is lower; returns both scores as a sentence."""
        found = self.scores(score)
        if self.slow is not None and found["slow_ema_loss"] < found["ema_loss"]:
            self.ema.shadow_params = [value.clone() for value in self.slow.shadow_params]
        return ", ".join(f"{name} {value:.5f}" for name, value in found.items())

    def note(self, figure: float, work: Path, writes: bool) -> None:
        """Take in a validation figure (higher is better); the averaged weights of the best are kept beside the log."""
        if self.best is not None and figure <= self.best:
            self.misses += 1
            return
        self.best, self.misses = figure, 0
        if writes:
            with atomic_file(work / BEST_FILE) as part:
                save_file({f"{index}": value for index, value in enumerate(self.ema.shadow_params)}, part)

    def take_best(self, work: Path) -> None:
        """Make the averaged weights those of the best validation figure."""
        if (work / BEST_FILE).is_file():
            found = read_tensors(work / BEST_FILE)
            self.ema.shadow_params = [found[str(index)].to(old.device) for index, old in enumerate(self.ema.shadow_params)]


def _average(parameters: list[nn.Parameter], decay: float) -> EMAModel:
    return EMAModel(parameters, decay=decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=True)
