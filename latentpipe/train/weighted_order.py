"""Which samples a step sees where they have weights."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from latentpipe.train.loop import generator_for


def weighted_indices(weights: tuple[float, ...], batch_size: int, seed: int, step: int) -> torch.Tensor:
    """As `batch_indices`, each sample as often as its weight says.

    In an epoch a sample of the greatest weight comes once, one of half of it in every second epoch, in turns that differ
    from sample to sample (systematic sampling over a new order each time).
    """
    size = max(1, math.ceil(sum(weights) / max(weights)))
    parts: list[torch.Tensor] = []
    position, missing = step * batch_size, batch_size
    while missing:
        epoch, offset = divmod(position, size)
        taken = _weighted_order(weights, size, seed, epoch)[offset : offset + missing]
        parts.append(taken)
        position, missing = position + len(taken), missing - len(taken)
    return torch.cat(parts)


@lru_cache(maxsize=2)
def _weighted_order(weights: tuple[float, ...], size: int, seed: int, epoch: int) -> torch.Tensor:
    generator = generator_for(seed + 104_729, epoch)
    order = torch.randperm(len(weights), generator=generator)
    ends = torch.tensor(weights, dtype=torch.float64)[order].cumsum(0)
    places = (torch.arange(size) + torch.rand((), generator=generator, dtype=torch.float64)) / size * ends[-1]
    chosen = torch.searchsorted(ends, places, right=True).clamp_max(len(weights) - 1)
    return order[chosen][torch.randperm(size, generator=generator)]
