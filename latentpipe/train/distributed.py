"""The processes of a run, over accelerate: one, or several that `accelerate launch -m latentpipe train-vae ...` started."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from latentpipe.utils.errors import UserError

PATIENCE = timedelta(days=2)  # that processes wait for the first one, which may encode a whole set; accelerate's are 10 minutes
BUCKET = 2**24  # numbers that are sent at once


class DistributedContext:
    """All processes of a run; each computes an equal share of every step's pictures.

    rank, world  this process's number and how many there are
    device       where this process computes
    """

    def __init__(self) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        handlers = [DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=PATIENCE)]
        self._accelerator: Any = Accelerator(mixed_precision="no", kwargs_handlers=handlers, cpu=not torch.cuda.is_available())
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes the logs, the checkpoints and the model."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module on this process's device; with several processes, one whose backward pass averages the gradients."""
        return self._accelerator.prepare_model(module)

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over the processes of a tensor that each has, detached; the tensor itself where there is one process."""
        if self.world == 1:
            return tensor.detach()
        return self._accelerator.reduce(tensor.detach().contiguous().clone(), "mean")

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the mean over the processes in place of each gradient: of a network that is not wrapped, after its last part.

        Parameters without a gradient have none in any process, since all compute the same graph.
        """
        if self.world == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        while gradients:
            count = size = 0
            while count < len(gradients) and (not count or size + gradients[count].numel() <= BUCKET):
                size, count = size + gradients[count].numel(), count + 1
            bucket, gradients = gradients[:count], gradients[count:]
            flat = self._accelerator.reduce(torch.cat([gradient.reshape(-1) for gradient in bucket]), "mean")
            for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def largest(self, value: int) -> int:
        """The largest of the numbers that the processes have."""
        if self.world == 1:
            return value
        return int(self._accelerator.gather(torch.tensor([value], device=self.device)).max())

    def wait(self) -> None:
        """Until every process is here."""
        self._accelerator.wait_for_everyone()

    def shards(self, n: int, microbatches: int = 1) -> list[slice]:
        """This process's rows of a batch of `n`, in `microbatches`; UserError where they do not come out even."""
        if n % (self.world * microbatches):
            raise UserError(
                f"optim.batch_size is {n}; expected a multiple of {self.world * microbatches} "
                f"({self.world} processes x {microbatches} parts), so that every share is equal."
            )
        size = n // (self.world * microbatches)
        first = self.rank * size * microbatches
        return [slice(first + part * size, first + (part + 1) * size) for part in range(microbatches)]

    @contextmanager
    def gathering(self, module: nn.Module, last: bool) -> Iterator[None]:
        """A forward pass whose gradients are averaged over the processes only if it is the last part of a step."""
        if last:
            yield
        else:
            with self._accelerator.no_sync(module):
                yield


def nothing() -> None:
    """What the processes beside the first one write."""


def refuse_several(verb: str) -> None:
    """UserError where a verb that runs in one process was launched in several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{verb} runs in one process; start it with 'latentpipe {verb}' instead of 'accelerate launch'.")
