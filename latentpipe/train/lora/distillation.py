"""Guidance distillation: an adapter learns to predict in one pass what its base predicts in two, on the way of a few steps.

The target is the base's guided prediction at a fixed guidance (Meng et al., arXiv:2210.03142, section 3.1). A share of each batch
lies on the base's own guided path at the few steps that the adapter is drawn with, since noised pictures are not what it meets
there; the prediction that serves as target also moves that path on, so it costs nothing more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from latentpipe.lora.injection import wrappers
from latentpipe.train.lora.loss import Noised, NoiseSchedule


def step_times(scheduler: Any, steps: int) -> torch.Tensor:
    """The timesteps (S, falling) at which a host's scheduler calls its denoiser in so many steps."""
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps)
    return own.timesteps.detach().cpu().round().long().unique().flip(0)


@contextmanager
def base_alone(model: Any) -> Iterator[None]:
    """A denoiser without the adapter that trains on it, for the time of the block."""
    layers = [wrapper for _, wrapper in wrappers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def split(schedule: NoiseSchedule, noisy: torch.Tensor, predicted: torch.Tensor, times: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Clean latents and noise (both B C h w) that a prediction at timesteps (B) says noisy latents are made of."""
    a = schedule.alphas[times].view(-1, 1, 1, 1)
    if schedule.prediction == "v_prediction":
        return a.sqrt() * noisy - (1 - a).sqrt() * predicted, (1 - a).sqrt() * noisy + a.sqrt() * predicted
    return (noisy - (1 - a).sqrt() * predicted) / a.sqrt().clamp_min(1e-4), predicted


def mixed(schedule: NoiseSchedule, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Latents (B C h w) with the noise of timesteps (B)."""
    a = schedule.alphas[times].view(-1, 1, 1, 1)
    return a.sqrt() * clean + (1 - a).sqrt() * noise


@dataclass
class GuidedPaths:
    """Latents on their way from noise, one row each, at the steps that the adapter is drawn with; part of a checkpoint.

    times    timesteps of the steps (S), falling
    latents  where the rows are (R C h w)
    place    which step each row is at (R); S: at its end
    rows     number of the picture whose caption each row follows (R)
    texts    which of its captions (R)
    """

    times: torch.Tensor
    latents: torch.Tensor
    place: torch.Tensor
    rows: torch.Tensor
    texts: torch.Tensor

    @classmethod
    def begun(cls, times: torch.Tensor, count: int, shape: tuple[int, ...]) -> GuidedPaths:
        """`count` rows at their end, for latents of a shape (C h w)."""
        ended = torch.full((count,), len(times))
        return cls(times, torch.zeros(count, *shape), ended, torch.zeros_like(ended), torch.zeros_like(ended))

    def renew(
        self,
        choices: torch.Tensor,
        captions: list[tuple[str, ...]],
        clean: Callable[[torch.Tensor], torch.Tensor],
        schedule: NoiseSchedule,
        generator: torch.Generator,
    ) -> None:
        """Begin rows that are at their end with noise and the caption of a picture of `choices`.

        In the very first step all of them are: each then begins at another step, with a noised picture, so that a batch has all
        steps in it. `clean` gives latents (R C h w) of pictures (R).
        """
        ended = self.place >= len(self.times)
        drawn = choices[torch.randint(len(choices), (len(ended),), generator=generator)]
        picks = torch.rand(len(ended), generator=generator).tolist()
        begun = torch.randn(self.latents.shape, generator=generator)
        place = torch.zeros_like(self.place)
        if ended.all():
            place = torch.arange(len(ended)) % len(self.times)
            begun = mixed(schedule, clean(drawn), begun, self.times[place])
        texts = torch.tensor([int(pick * len(captions[row])) for row, pick in zip(drawn.tolist(), picks, strict=True)])
        self.latents = torch.where(ended.view(-1, 1, 1, 1), begun, self.latents)
        self.rows, self.texts = torch.where(ended, drawn, self.rows), torch.where(ended, texts, self.texts)
        self.place = torch.where(ended, place, self.place)

    def prompts(self, captions: list[tuple[str, ...]]) -> list[str]:
        """The caption that each row follows."""
        return [captions[row][text] for row, text in zip(self.rows.tolist(), self.texts.tolist(), strict=True)]

    def move(self, schedule: NoiseSchedule, guided: torch.Tensor) -> None:
        """One deterministic DDIM step (arXiv:2010.02502, eta 0) of every row along the guided prediction (R C h w)."""
        clean, noise = split(schedule, self.latents, guided, self.times[self.place])
        after = torch.cat([self.times, torch.zeros(1, dtype=self.times.dtype)])[self.place + 1]
        self.latents = mixed(schedule, clean, noise, after)
        self.place = self.place + 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its state as tensors of names that nothing else has."""
        return {f"guided_paths.{name}": getattr(self, name) for name in ("latents", "place", "rows", "texts")}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`."""
        for name in ("latents", "place", "rows", "texts"):
            setattr(self, name, tensors[f"guided_paths.{name}"].clone())


class GuidedTeacher:
    """One step's inputs and targets: the base's guided predictions on its own path and on noised pictures.

    predict(noisy, times, prompts)  what the denoiser predicts (B C h w), with the adapter as it is
    """

    def __init__(
        self, unet: Any, predict: Callable[..., torch.Tensor], schedule: NoiseSchedule, paths: GuidedPaths, guidance: float
    ) -> None:
        self.unet, self.predict, self.schedule = unet, predict, schedule
        self.paths, self.guidance = paths, guidance

    @torch.no_grad()
    def guided(self, noisy: torch.Tensor, times: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """The base's prediction under classifier-free guidance (B C h w, on the CPU)."""
        with base_alone(self.unet):
            both = self.predict(torch.cat([noisy] * 2), torch.cat([times] * 2), [""] * len(prompts) + prompts).float().cpu()
        without, asked = both.chunk(2)
        return without + self.guidance * (asked - without)

    def batch(self, noised: Noised, prompts: list[str], captions: list[tuple[str, ...]]) -> tuple[Noised, list[str]]:
        """Noised pictures with their prompts, and the rows of the paths, with guided targets; `move_on` ends the step."""
        paths, count = self.paths, len(self.paths.place)
        noisy = torch.cat([paths.latents, noised.noisy])
        times = torch.cat([paths.times[paths.place], noised.times]) if count else noised.times
        prompts = paths.prompts(captions) + prompts
        target = self.guided(noisy, times, prompts)
        self._ahead = target[:count]
        return Noised(noisy, target, times, torch.ones(len(times))), prompts

    def move_on(self) -> None:
        """The paths take their step; not before the pass with gradients, so that one that is broken off leaves them."""
        self.paths.move(self.schedule, self._ahead)
