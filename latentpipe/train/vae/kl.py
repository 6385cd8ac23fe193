"""The weight of the KL: schedules, free bits, and a controller that holds a rate. Plain values in, plain values out.

Conventions: KL is in nats inside, in bits for people (1 bit = ln 2 nats); a rate is for each latent value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, assert_never

import torch

from latentpipe.evaluate.metrics.posterior import NATS, kl_values

BetaSchedule = Literal["constant", "linear", "cosine", "cyclical"]


def beta_at(schedule: BetaSchedule, beta: float, step: int, steps: int, ramp: float = 0.5, cycles: int = 4) -> float:
    """Weight of the KL at `step` (0 .. steps - 1), between 0 and `beta`.

    constant   beta
    linear     from 0 to beta over the first `ramp` share of the steps, then beta (Bowman et al., arXiv:1511.06349)
    cosine     likewise, by half a cosine
    cyclical   `cycles` times: linear over the first `ramp` of a cycle, then beta until it ends (Fu et al.,
               arXiv:1903.10145; a cycle has ceil(steps / cycles) steps, here at least 2)
    """
    if not 0 <= ramp <= 1 or cycles < 1 or steps < 1:
        raise ValueError(f"Expected a ramp in [0, 1], cycles and steps of at least 1; given {ramp}, {cycles}, {steps}.")
    if schedule == "constant":
        return beta
    if schedule == "linear":
        return beta * _ramp(step / steps, ramp)
    if schedule == "cosine":
        return beta * 0.5 * (1 - math.cos(math.pi * _ramp(step / steps, ramp)))
    if schedule == "cyclical":
        period = max(2, math.ceil(steps / cycles))
        return beta * _ramp(step % period / period, ramp)
    assert_never(schedule)


def _ramp(share: float, ramp: float) -> float:
    return 1.0 if share >= ramp else share / ramp


def kl_channels(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(q(z|x) || N(0, I)) of posteriors (B C h w each) for each channel: C, nats for each latent value, at least fp32.

    The mean over pictures and positions; `per_pixel_value` turns their sum into the training loss.
    """
    return kl_values(mean, logvar).mean((0, 2, 3))


def with_free_bits(kl: torch.Tensor, free_bits: float, reduced: torch.Tensor | None = None) -> torch.Tensor:
    """``sum_c max(lambda, KL_c)``: a channel below lambda is not pushed down (Kingma et al., arXiv:1606.04934, on free bits).

    kl         C, from `kl_channels`: the groups of the paper are channels, its mean over the minibatch is over pictures
               and positions
    free_bits  lambda, in bits for each latent value of a channel; 0: nothing is free
    reduced    C: `kl` averaged over all processes, without gradient. It decides which channels count, so that the mean of
               the processes' gradients is that of one process with the whole batch; left out: `kl` decides

    Gradient: ``(KL_c > lambda) dKL_c``.
    """
    free = kl.new_tensor(free_bits * NATS)
    deciding = kl.detach() if reduced is None else reduced
    return torch.where(deciding > free, kl, free).sum()


def per_pixel_value(channel_sum: torch.Tensor, positions: int, pixel_values: int) -> torch.Tensor:
    """A sum over channels (from `kl_channels` or `with_free_bits`) in the units of the training loss.

    ``channel_sum * h w / (3 H W)``: nats of a picture's latents divided by the `pixel_values` of the picture, so that a
    weight means the same as on a KL that is summed over latents and divided by 3HW.
    """
    return channel_sum * (positions / pixel_values)


@dataclass
class BetaController:
    """Holds the KL at a target by turning beta, as a thermostat does: one `update` for each step.

    ``beta <- beta exp(gain (rate - target) / target)``, then clamped to [low, high]. Multiplying by the exponential of the
    constraint's error is GECO's update of its multiplier (Rezende and Viola, arXiv:1810.00597, algorithm 1), here with the
    KL as the constraint, as in ControlVAE (Shao et al., arXiv:2004.05988). The relative error counts as at most 1, so that
    beta rises no faster than it can fall again.

    target_bits   of KL for each latent value, > 0
    beta          where it starts; all that there is to save
    gain          per step; a beta that is wrong by a factor f is found after about ln(f) / gain steps
    """

    target_bits: float
    beta: float
    gain: float = 0.01
    low: float = 1e-8
    high: float = 1e4

    def __post_init__(self) -> None:
        if self.target_bits <= 0 or self.gain <= 0 or not 0 < self.low <= self.beta <= self.high:
            raise ValueError(f"Expected target_bits > 0, gain > 0 and 0 < low <= beta <= high; given {self}.")

    def update(self, rate_bits: float) -> float:
        """The next beta, from the measured rate in bits for each latent value (averaged over all processes)."""
        error = min(1.0, (rate_bits - self.target_bits) / self.target_bits)
        self.beta = min(self.high, max(self.low, self.beta * math.exp(self.gain * error)))
        return self.beta

    def state(self) -> float:
        """What a checkpoint holds."""
        return self.beta

    def restore(self, state: float) -> None:
        """Go on from `state()`."""
        self.beta = state
