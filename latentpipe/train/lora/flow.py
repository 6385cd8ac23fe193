"""Adapters on the transformers of Stable Diffusion 3, FLUX.1, Sana and PixArt: what each is asked, and flow matching.

Losses as diffusers' training scripts state them (examples/dreambooth/train_dreambooth_lora_sd3.py, _flux.py, _sana.py with
weighting_scheme "none"; PixArt's own script trains on the noise alone, the first half of its channels):

    noisy = (1 - sigma) * latents + sigma * noise        target = noise - latents
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from latentpipe.pipelines import families
from latentpipe.train.config import LoraLoss
from latentpipe.train.denoiser import stratified_times
from latentpipe.train.lora.loss import Noised, NoiseSchedule, noised
from latentpipe.train.lora.prompts import KEPT
from latentpipe.utils.errors import UserError
from latentpipe.utils.logging import quiet

GUIDANCE = 3.5  # that a guidance-distilled FLUX.1 is told, as its script does
Text = dict[str, torch.Tensor]


@dataclass(frozen=True)
class FlowSchedule:
    """The straight path from latents to noise: timesteps and sigmas (T), from the clean end to the noisy one."""

    times: torch.Tensor
    sigmas: torch.Tensor
    term: str = "flow"

    @classmethod
    def of(cls, scheduler: Any) -> FlowSchedule:
        """The training schedule of a host; UserError where it does not draw by flow matching."""
        made = type(scheduler).from_config(scheduler.config) if hasattr(scheduler, "config") else scheduler
        if not hasattr(made, "sigmas") or "FlowMatch" not in type(made).__name__:
            raise UserError(
                f"This model's scheduler is a {type(scheduler).__name__}; train-lora needs one of flow matching here."
            )
        n = made.config.num_train_timesteps
        return cls(made.timesteps.float().flip(0).cpu(), made.sigmas[:n].float().flip(0).cpu())


def flow_noised(latents: torch.Tensor, schedule: FlowSchedule, loss: LoraLoss, generator: torch.Generator) -> Noised:
    """Latents (B C h w) on their way to noise at random timesteps, and the direction of that way; `loss` as for `noised`."""
    at = stratified_times(len(latents), len(schedule.times), loss.noisy_share, generator)
    noise = torch.randn(latents.shape, generator=generator)
    if loss.noise_offset:
        noise = noise + loss.noise_offset * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
    sigma = schedule.sigmas[at].view(-1, 1, 1, 1)
    noisy = (1 - sigma) * latents + sigma * noise
    return Noised(noisy, noise - latents, schedule.times[at], torch.ones(len(latents)))


def noised_by(latents: torch.Tensor, schedule: Any, loss: LoraLoss, generator: torch.Generator) -> Noised:
    """As `flow_noised` on a straight path, as `noised` on a schedule with cumulative alphas."""
    return (flow_noised if isinstance(schedule, FlowSchedule) else noised)(latents, schedule, loss, generator)


def _ask_sd3(host: Any, noisy: torch.Tensor, times: torch.Tensor, text: Text) -> torch.Tensor:
    states, pooled = text["states"], text["pooled"]
    return host.transformer(noisy, states, pooled, times, return_dict=False)[0]


def _ask_flux(host: Any, noisy: torch.Tensor, times: torch.Tensor, text: Text) -> torch.Tensor:
    n, c, h, w = noisy.shape
    packed = host._pack_latents(noisy, n, c, h, w)
    ids = host._prepare_latent_image_ids(n, h // 2, w // 2, noisy.device, noisy.dtype)
    told = host.transformer.config.guidance_embeds
    predicted = host.transformer(
        hidden_states=packed, encoder_hidden_states=text["states"], pooled_projections=text["pooled"], timestep=times / 1000,
        guidance=torch.full((n,), GUIDANCE, device=noisy.device) if told else None, img_ids=ids,
        txt_ids=torch.zeros(text["states"].shape[1], 3, device=noisy.device, dtype=noisy.dtype), return_dict=False,
    )[0]  # fmt: skip
    side = host.vae_scale_factor
    return host._unpack_latents(predicted, h * side, w * side, side)


def _ask_sana(host: Any, noisy: torch.Tensor, times: torch.Tensor, text: Text) -> torch.Tensor:
    return host.transformer(
        noisy, encoder_hidden_states=text["states"], encoder_attention_mask=text["mask"], timestep=times, return_dict=False
    )[0]


def _ask_pixart(host: Any, noisy: torch.Tensor, times: torch.Tensor, text: Text) -> torch.Tensor:
    n, c, h, w = noisy.shape
    conditions: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if host.transformer.use_additional_conditions:
        side = host.vae_scale_factor
        conditions["resolution"] = torch.tensor([[h * side, w * side]]).repeat(n, 1).to(noisy)
        conditions["aspect_ratio"] = torch.tensor([[h / w]]).repeat(n, 1).to(noisy)
    predicted = host.transformer(
        noisy, encoder_hidden_states=text["states"], encoder_attention_mask=text["mask"], timestep=times,
        added_cond_kwargs=conditions, return_dict=False,
    )[0]  # fmt: skip
    return predicted[:, :c]  # the rest is the variance that it learned


def _of(*names: str) -> Callable[[Any], Text]:
    """Picks parts of what a host's `encode_prompt` returns, by their place; "" is left out."""

    def pick(encoded: Any) -> Text:
        return {name: encoded[place] for place, name in enumerate(names) if name}

    return pick


@dataclass(frozen=True)
class Asked:
    """How a family is trained: one pass of its transformer, its prompts' parts, and whether its path is straight."""

    ask: Callable[[Any, torch.Tensor, torch.Tensor, Text], torch.Tensor]
    parts: Callable[[Any], Text]
    guided: bool = True  # encode_prompt takes do_classifier_free_guidance
    more_prompts: tuple[str, ...] = ()
    flow: bool = True


ASKED = {
    "Stable Diffusion 3": Asked(_ask_sd3, _of("states", "", "pooled"), more_prompts=("prompt_2", "prompt_3")),
    "FLUX.1": Asked(_ask_flux, _of("states", "pooled"), guided=False, more_prompts=("prompt_2",)),
    "Sana": Asked(_ask_sana, _of("states", "mask")),
    "PixArt-alpha": Asked(_ask_pixart, _of("states", "mask"), flow=False),
    "PixArt-Sigma": Asked(_ask_pixart, _of("states", "mask"), flow=False),
}


def asked_of(host: Any) -> Asked | None:
    """How a host's transformer is trained; None for a UNet, and where train-lora knows no way."""
    return ASKED.get(families.family_of(host).name)


@torch.no_grad()
def encode_prompts(host: Any, prompts: list[str]) -> Text:
    """What a transformer is told of prompts, by the host's own encoding: states (B length width), pooled states or a mask."""
    asked = ASKED[families.family_of(host).name]
    more: dict[str, Any] = dict.fromkeys(asked.more_prompts)
    if asked.guided:
        more["do_classifier_free_guidance"] = False
    with quiet():
        return asked.parts(host.encode_prompt(prompts, device=host.device, num_images_per_prompt=1, **more))


class TransformerTraining:
    """A host's transformer as it is trained: its schedule, and a pass on noisy latents with prompts.

    The states of each prompt are computed once, each prompt by itself, so that they do not depend on the batch it came in.
    """

    def __init__(self, host: Any) -> None:
        self.host, self.asked = host, ASKED[families.family_of(host).name]
        self.schedule: Any = (FlowSchedule if self.asked.flow else NoiseSchedule).of(host.scheduler)
        self.kept: dict[str, Text] = {}

    def __call__(self, noisy: torch.Tensor, times: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """What it predicts (B C h w) of noisy latents (B C h w) at timesteps (B)."""
        if len(self.kept) + len(prompts) > KEPT:
            self.kept.clear()
        for prompt in prompts:
            if prompt not in self.kept:
                self.kept[prompt] = encode_prompts(self.host, [prompt])
        one = [self.kept[prompt] for prompt in prompts]
        text = {name: torch.cat([each[name] for each in one]) for name in one[0]}
        return self.asked.ask(self.host, noisy, times, text)
