"""Latents as a denoiser leaves them, for a decoder that is to draw from those.

A latent of a picture is noised to a small timestep and predicted clean in one step: what comes back has the denoiser's
blotches, and the picture is known all the same.
"""

from __future__ import annotations

from typing import Any

import torch

from latentpipe.checkpoints.pipeline_io import load_pipeline
from latentpipe.checkpoints.registry import find_model
from latentpipe.train.config import Predicted
from latentpipe.train.denoiser import pick_captions, training_alphas
from latentpipe.train.text_encoder import token_ids
from latentpipe.utils.errors import UserError


class Predictor:
    """The denoiser of a model, frozen; of the kind that ``train-denoiser`` makes (one text encoder, v-prediction)."""

    def __init__(self, config: Predicted, channels: int, device: torch.device | str = "cpu") -> None:
        assert config.model is not None
        pipe: Any = load_pipeline(find_model(config.model))
        unet, scheduler = getattr(pipe, "unet", None), pipe.scheduler
        if unet is None or getattr(pipe, "text_encoder_2", None) is not None or getattr(pipe, "text_encoder", None) is None:
            raise UserError(
                f"predicted.model {config.model} is not one UNet with one text encoder, as train-denoiser makes them."
            )
        if scheduler.config.prediction_type != "v_prediction":
            raise UserError(f"predicted.model {config.model} predicts {scheduler.config.prediction_type}; expected v_prediction.")
        if unet.config.in_channels != channels:
            raise UserError(
                f"predicted.model {config.model} draws latents of {unet.config.in_channels} channels, this decoder takes "
                f"{channels}; give a denoiser of the teacher's latents."
            )
        self.share, self.times = config.share, config.times
        self.alphas = training_alphas(scheduler)
        if self.times > len(self.alphas):
            raise UserError(f"predicted.times is {self.times}; this model has {len(self.alphas)} timesteps.")
        self.tokenizer = pipe.tokenizer
        self.unet = unet.requires_grad_(False).eval().to(device)
        self.text = pipe.text_encoder.requires_grad_(False).eval().to(device)

    def takes_part(self, generator: torch.Generator) -> bool:
        """Whether a step's latents are predicted ones."""
        return torch.rand((), generator=generator).item() < self.share

    def draws(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """A timestep for each picture (B), uniform below `times`."""
        return torch.randint(0, self.times, (batch,), generator=generator)

    def prompts(self, captions: list[tuple[str, ...]], generator: torch.Generator) -> list[str]:
        """One caption for each picture; empty where it has none."""
        return pick_captions([texts or ("",) for texts in captions], 0.0, generator)

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Normalized latents (B C h w), noised to `times` (B), as the denoiser predicts them: ``sqrt(a) x - sqrt(1 - a) v``."""
        a = self.alphas.to(latents.device)[times.to(latents.device)].view(-1, 1, 1, 1)
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        states = self.text(token_ids(self.tokenizer, prompts).to(latents.device))[0]
        velocity = self.unet(noisy, times.to(latents.device), states, return_dict=False)[0].float()
        return a.sqrt() * noisy - (1 - a).sqrt() * velocity
