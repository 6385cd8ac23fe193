"""The optimizer of every run: AdamW, or Muon for the matrices inside of the model and AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from latentpipe.train.config import Optimization
from latentpipe.utils.system import has_bf16_units

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of the quintic Newton-Schulz step, as torch.optim.Muon has them
ITERATIONS = 5
RMS = 0.2  # of an update of AdamW; Muon's are brought to it, so that both go with one learning rate
OUTER = ("conv_in.", "conv_out.", "embeddings.")  # first and last layers and tables, which are no maps between features


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but Muon for the parameters in `matrices`.

    Muon takes the momentum of a gradient as a matrix (convolutions flattened to output channels x the rest) and makes its
    singular values equal (Jordan 2024); updates are scaled to AdamW's usual size by 0.2 sqrt(max(rows, columns)) (Liu et
    al., arXiv:2502.16982). As torch.optim.Muon with adjust_lr_fn="match_rms_adamw", which takes matrices alone.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], matrices: Iterable[nn.Parameter], **options: Any) -> None:
        super().__init__(parameters, **options)
        self.matrices = {id(matrix) for matrix in matrices}
        self.dtype = torch.bfloat16 if has_bf16_units() else torch.float32

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update from the gradients in place."""
        held = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and id(parameter) in self.matrices:
                    self._step_matrix(parameter, parameter.grad, group["lr"], group["weight_decay"])
                    held.append((parameter, parameter.grad))
                    parameter.grad = None  # AdamW passes over parameters without one
        result = super().step(closure) if closure is not None else super().step()
        for parameter, gradient in held:
            parameter.grad = gradient
        return result

    def _step_matrix(self, parameter: nn.Parameter, gradient: torch.Tensor, rate: float, decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": torch.tensor(0.0), "momentum": torch.zeros_like(gradient)}  # AdamW asks each state for its step
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        update = gradient.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov's
        direction = orthogonal(update.to(self.dtype)).view_as(parameter)
        parameter.mul_(1 - rate * decay).add_(direction, alpha=-rate * RMS * math.sqrt(max(update.shape)))


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with singular values near 1 (0.7 to 1.2) and its singular vectors, by five Newton-Schulz steps."""
    a, b, c = COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


def new_optimizer(module: nn.Module, optim: Optimization) -> torch.optim.AdamW:
    """The optimizer that `optim` names, over the parameters of `module` that train, in its order."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in named]
    options: dict[str, Any] = {"lr": optim.learning_rate, "weight_decay": optim.weight_decay}
    if optim.optimizer == "adamw":
        fused = parameters[0].device.type in ("cpu", "cuda")  # one kernel for all weights
        return torch.optim.AdamW(parameters, **options, fused=fused)
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    inner = [p for name, p in named if p.ndim >= 2 and id(p) not in tables and not any(outer in name for outer in OUTER)]
    return MuonAdamW(parameters, inner, **options)
