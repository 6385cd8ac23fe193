"""Prompts to what a Stable Diffusion UNet is conditioned on, by the host's own prompt encoding."""

from __future__ import annotations

from typing import Any

import torch

from latentpipe.pipelines import families
from latentpipe.utils.logging import quiet

KEPT = 2048  # prompts whose states are kept in memory


class Prompts:
    """A host's text encoders.

    trains   whether gradients reach them; otherwise the states of each prompt are computed once, each prompt by itself, so that
             they do not depend on the batch it came in (and a resumed run goes on exactly)
    size_px  side of the training pictures, which Stable Diffusion XL is told
    """

    def __init__(self, host: Any, trains: bool, size_px: int) -> None:
        self.host, self.trains, self.size_px = host, trains, size_px
        self.large = families.family_of(host) is families.FAMILIES[1]
        self.kept: dict[str, tuple[torch.Tensor, ...]] = {}

    def __call__(self, prompts: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        """States (B length width), and the UNet's `added_cond_kwargs` where it takes any."""
        if self.trains:
            encoded = self._encode(prompts)
        else:
            parts = [self._of(prompt) for prompt in prompts]
            encoded = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        if not self.large:
            return encoded[0], None
        return encoded[0], {"text_embeds": encoded[1], "time_ids": self._sizes(len(prompts), encoded[1])}

    @torch.no_grad()
    def _of(self, prompt: str) -> tuple[torch.Tensor, ...]:
        if prompt not in self.kept:
            if len(self.kept) >= KEPT:
                self.kept.clear()
            self.kept[prompt] = self._encode([prompt])
        return self.kept[prompt]

    def _encode(self, prompts: list[str]) -> tuple[torch.Tensor, ...]:
        """States of shape (B, length, width), with pooled states (B, width) for Stable Diffusion XL."""
        with quiet():  # what is cut from long captions is said once, before the run
            encoded = self.host.encode_prompt(
                prompts, device=self.host.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        if not self.large:
            return (encoded[0],)
        states, pooled = encoded[0], encoded[2]
        if self.host.config.get("force_zeros_for_empty_prompt"):  # what it is given in place of no negative prompt
            said = torch.tensor([float(bool(prompt)) for prompt in prompts], device=states.device, dtype=states.dtype)
            states, pooled = states * said[:, None, None], pooled * said[:, None]
        return states, pooled

    def _sizes(self, batch: int, pooled: torch.Tensor) -> torch.Tensor:
        """Size, corner and target size of the pictures as Stable Diffusion XL takes them, B x 6."""
        size, width = (self.size_px, self.size_px), self.host.text_encoder_2.config.projection_dim
        ids = self.host._get_add_time_ids(size, (0, 0), size, torch.float32, text_encoder_projection_dim=width)
        return ids.to(pooled.device).repeat(batch, 1)
