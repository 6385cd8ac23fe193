"""What a student decodes in mode distil: its teacher's latents, with noise, or as a denoiser predicts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from latentpipe.train.config import TrainVAE
from latentpipe.train.vae.denoiser_outputs import Predictor
from latentpipe.utils.images import psnr, to_bytes
from latentpipe.vae.stage import VAEStage

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Draw:
    """A step's draws for its whole batch: deviation of the latent noise (B), and timesteps (B) and prompts of a prediction."""

    strength: torch.Tensor
    times: torch.Tensor | None = None
    prompts: tuple[str, ...] = ()


class Lesson:
    """A teacher and what happens to its latents before the student decodes them."""

    def __init__(self, config: TrainVAE, stage: VAEStage, teacher: VAEStage, device: torch.device | str = "cpu") -> None:
        self.loss, self.stage, self.teacher = config.loss, stage, teacher.to(device)
        predicted = config.predicted.model is not None
        self.predictor = Predictor(config.predicted, stage.space.channels, device) if predicted else None

    def draw(self, captions: Sequence[tuple[str, ...]], generator: torch.Generator) -> Draw:
        """The draws of a step of pictures with these captions."""
        strength = self._strength(len(captions), generator)
        if self.predictor is None or not self.predictor.takes_part(generator):
            return Draw(strength)
        times = self.predictor.draws(len(captions), generator)
        return Draw(strength, times, tuple(self.predictor.prompts(list(captions), generator)))

    @torch.no_grad()
    def target(self, images: torch.Tensor) -> Pair:
        """Mean and standard deviation of the teacher's latents, in the student's raw units."""
        mean, std = self.teacher.posterior(as_taught(self.stage, self.teacher, images))
        space = self.stage.space
        return space.denormalize(mean.float()), std.float() / std.new_tensor(space.scale, dtype=torch.float32).view(1, -1, 1, 1)

    @torch.no_grad()
    def given(self, target: Pair, noise: torch.Tensor, draw: Draw, rows: slice = slice(None)) -> torch.Tensor:
        """Raw latents to decode for the pictures of `rows`; `noise` is standard normal, as large as they are."""
        space = self.stage.space
        if draw.times is not None:
            assert self.predictor is not None
            latents = space.normalize(target[0])
            found = self.predictor(latents, noise, draw.times[rows], list(draw.prompts[rows]))
            return space.denormalize(found)
        if not self.loss.latent_noise:
            return target[0]
        scale = target[0].new_tensor(space.scale, dtype=torch.float32).view(1, -1, 1, 1)
        return target[0] + draw.strength[rows].to(noise.device).view(-1, 1, 1, 1) * noise / scale

    def _strength(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Deviation of each picture's latent noise (B): 0 on half of the steps, else uniform up to loss.latent_noise."""
        most = self.loss.latent_noise
        if not most or torch.rand((), generator=generator).item() < 0.5:
            return torch.zeros(batch)
        return most * torch.rand(batch, generator=generator)


def as_taught(stage: VAEStage, teacher: VAEStage, images: torch.Tensor) -> torch.Tensor:
    """Images (B 3 H W) at the size that gives the teacher latents of the student's size: smaller where the student enlarges."""
    ratio = stage.space.downscale // teacher.space.downscale
    if ratio == 1:
        return images
    return functional.interpolate(images, size=images.shape[-1] // ratio, mode="bicubic", antialias=True).clamp(-1, 1)


@torch.no_grad()
def taught_psnr(stage: VAEStage, teacher: VAEStage, images: torch.Tensor) -> torch.Tensor:
    """PSNR (dB) of each picture (N 3 H W) from the teacher's latents through the student's decoder."""
    parts = images.split(64)
    rebuilt = [stage.decode(teacher.encode(as_taught(stage, teacher, part))).float().cpu() for part in parts]
    return psnr(to_bytes(images), to_bytes(torch.cat(rebuilt))).clamp_max(99.0)
