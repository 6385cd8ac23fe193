"""The loss of an adapter on a denoiser: the host's own schedule and prediction type, noised latents and their weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from latentpipe.train.config import LoraLoss
from latentpipe.train.denoiser import stratified_times
from latentpipe.train.losses import velocity_target
from latentpipe.utils.errors import UserError

Prediction = Literal["epsilon", "v_prediction"]
TERMS: dict[Prediction, str] = {"epsilon": "noise", "v_prediction": "v"}


@dataclass(frozen=True)
class NoiseSchedule:
    """What a host's denoiser was trained on.

    alphas      cumulative alphas (T), from nearly 1 to nearly 0
    prediction  what it predicts
    """

    alphas: torch.Tensor
    prediction: Prediction

    @property
    def term(self) -> str:
        """The name of its loss."""
        return TERMS[self.prediction]

    @classmethod
    def of(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule of a host; UserError where it is not one of noise or velocity prediction with cumulative alphas."""
        prediction = scheduler.config.get("prediction_type")
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if prediction not in TERMS or alphas is None:
            raise UserError(
                f"This model's scheduler is a {type(scheduler).__name__} with prediction_type {prediction}; train-lora needs "
                f"one of {' or '.join(TERMS)} with cumulative alphas."
            )
        alphas = alphas.detach().clone().float().cpu()
        if scheduler.config.get("rescale_betas_zero_snr"):
            alphas[-1] = 0.0  # some solvers keep a tiny value there, so that they can divide by it
        return cls(alphas, prediction)


@dataclass(frozen=True)
class Noised:
    """A batch to denoise: noisy latents and their targets (B C h w), timesteps and weights (B)."""

    noisy: torch.Tensor
    target: torch.Tensor
    times: torch.Tensor
    weights: torch.Tensor

    def rows(self, mine: slice) -> Noised:
        """Some of them."""
        return Noised(self.noisy[mine], self.target[mine], self.times[mine], self.weights[mine])

    def loss(self, predicted: torch.Tensor) -> torch.Tensor:
        """Weighted mean over pictures of the mean squared error of each."""
        errors = (predicted.float() - self.target.to(predicted.device)).square().flatten(1).mean(1)
        return (self.weights.to(errors.device) * errors).mean()


@dataclass(frozen=True)
class DrawnPictures:
    """A step's rows, their latents, and, of a denoiser, their prompts and noise."""

    chosen: torch.Tensor
    latents: torch.Tensor
    prompts: list[str] = field(default_factory=list)
    noised: Noised | None = None


def noised(latents: torch.Tensor, schedule: NoiseSchedule, loss: LoraLoss, generator: torch.Generator) -> Noised:
    """Latents (B C h w) with noise of random timesteps; all draws come from `generator`, so that a run can be resumed."""
    times = stratified_times(len(latents), len(schedule.alphas), loss.noisy_share, generator)
    noise = torch.randn(latents.shape, generator=generator)
    if loss.noise_offset:
        noise = noise + loss.noise_offset * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
    alphas = schedule.alphas[times]
    a = alphas.view(-1, 1, 1, 1)
    target = velocity_target(latents, noise, alphas) if schedule.prediction == "v_prediction" else noise
    weights = snr_weights(alphas, loss.min_snr_gamma, schedule.prediction)
    return Noised(a.sqrt() * latents + (1 - a).sqrt() * noise, target, times, weights)


def snr_weights(alphas: torch.Tensor, gamma: float | None, prediction: Prediction) -> torch.Tensor:
    """Weights of the squared error at cumulative alphas (B); all 1 where gamma is None.

    min-SNR (Hang et al., arXiv:2303.09556, section 3.4) weights the error of the clean latents by min(SNR, gamma), SNR =
    a / (1 - a). The error of the noise is SNR times that one and the error of v is SNR + 1 times it, so the weights here are
    min(SNR, gamma) / SNR and min(SNR, gamma) / (SNR + 1). At SNR 0 they are 1 and 0, their limits.
    """
    if gamma is None:
        return torch.ones_like(alphas)
    rest = 1 - alphas
    if prediction == "v_prediction":
        # both sides times 1 - a: min(a, gamma (1 - a)), since (SNR + 1)(1 - a) = 1
        return torch.minimum(alphas, gamma * rest)
    return torch.minimum(torch.ones_like(alphas), gamma * rest / alphas.clamp_min(torch.finfo(alphas.dtype).tiny))
