"""Train the denoiser: cached latents + captions -> UNet and text encoder, jointly, on v-prediction."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentpipe.checkpoints.components import built_to_train
from latentpipe.checkpoints.pipeline_io import load_pipeline, save_pipeline
from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import load_vae
from latentpipe.data.latent_cache import LatentCache
from latentpipe.data.sharded_latents import ShardedLatents, open_latents
from latentpipe.pipelines.latent_pipeline import LatentPipeline
from latentpipe.pipelines.vocabulary import listed
from latentpipe.train import loop, picture_changes
from latentpipe.train.config import Diffusion, TrainDenoiser, UNetShape, config_from
from latentpipe.train.distributed import DistributedContext, nothing
from latentpipe.train.losses import l2, velocity_target
from latentpipe.train.progress import TrainingLog
from latentpipe.train.run_dir import prepare_run_dir, refuse_other_shape, usable
from latentpipe.train.text_encoder import build_text_encoder, token_ids, train_tokenizer, with_vocabulary
from latentpipe.train.weighted_order import weighted_indices
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.images import sheet
from latentpipe.utils.io import atomic_file
from latentpipe.utils.logging import quiet
from latentpipe.vae.memory import available

MOST_TEXTS = 200_000  # pictures whose captions a vocabulary is made of
SCORED = 8  # batches that two averages are compared on


def train_denoiser(config: TrainDenoiser | str | Path | Mapping[str, Any]) -> Path:
    """Run `latentpipe train-denoiser`: returns the folder of a complete StableDiffusionPipeline (fp16 safetensors).

    In several processes (``accelerate launch -m latentpipe train-denoiser ...``) each computes its share of every batch, with the
    gradients of one process that computes all of it.

    config  a `TrainDenoiser`, the path of its YAML file, or a mapping with its keys; UserError lists every problem of it
    """
    return _trained(config_from(config, TrainDenoiser))


def _trained(config: TrainDenoiser) -> Path:
    team = DistributedContext()
    if team.is_first:
        usable(config.run)
    torch.manual_seed(config.run.seed)
    vae_folder = find_model(config.data.vae, "vae")
    cache = open_latents(config.data.cache, vae_folder)
    rows = cache.captioned()
    if not len(rows):
        raise UserError(
            f"{config.data.cache}: none of its {counted(len(cache), 'picture')} has a caption; "
            "add 'text' to metadata.jsonl, or a file NAME.txt beside each picture, and encode them again."
        )
    vae = load_vae(vae_folder)
    tokenizer, text_encoder, unet = _build(config, cache, vae)
    scheduler = build_scheduler(config.diffusion)
    with prepare_run_dir(config, config.run) if team.is_first else nullcontext(nothing) as record:
        if team.is_first:
            record = picture_changes.follow(config.run, config.data.cache, cache.roll(), record)
            print(f"Training on {len(rows)} captioned pictures of {config.data.cache}")
        team.wait()
        both = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).to(team.device)
        training = DenoiserTraining(config, team, cache, rows, both, tokenizer, training_alphas(scheduler))
        prompts = list(config.sample_prompts) or [cache.captions[row][0] for row in rows[:8].tolist()]

        def sample(step: int, log: TrainingLog) -> dict[str, float]:
            pipe = LatentPipeline(_pipeline(vae, text_encoder, tokenizer, unet, scheduler))
            both.eval()
            pictures = [pipe(prompt, seed=index)[0].image for index, prompt in enumerate(prompts)]
            both.train()
            log.sheet(step, "samples", sheet(pictures, 8, prompts))
            return {}

        chooses = training.score if config.optim.ema_decay_slow is not None else None
        parts = config.optim.accumulate
        loop.fit(both, config.optim, config.run, training.step, sample, team, parts=parts, begun=record, score=chooses)
        both.eval().cpu()
        if team.is_first:
            _finish(config, _pipeline(vae, text_encoder, tokenizer, unet, scheduler), cache)
        team.wait()
        return config.run.out


class DenoiserTraining:
    """One step's latents and captions through the denoiser: the same draws in every process, each computing its own rows."""

    def __init__(
        self,
        config: TrainDenoiser,
        team: DistributedContext,
        cache: LatentCache | ShardedLatents,
        rows: torch.Tensor,
        both: nn.ModuleDict,
        tokenizer: Any,
        alphas: torch.Tensor,
    ) -> None:
        self.config, self.team, self.cache, self.rows = config, team, cache, rows
        self.both, self.tokenizer, self.alphas = both, tokenizer, alphas
        self.shares = team.shards(config.optim.batch_size, config.optim.accumulate)
        weights = cache.weights(config.data.weights) if config.data.weights else None
        self.chances = None if weights is None else tuple(weights[row] for row in rows.tolist())

    def step(self, step: int, generator: torch.Generator) -> DenoiserStep:
        """The step's pictures, and everything random in it: the same draws in every process, of its own rows alone read."""
        chosen, dropout = self._chosen(step), self.config.diffusion.caption_dropout
        latents = self.cache.sample(chosen, generator, slice(self.shares[0].start, self.shares[-1].stop))
        prompts = pick_captions([self.cache.captions[row] for row in chosen.tolist()], dropout, generator)
        times = stratified_times(len(chosen), len(self.alphas), self.config.diffusion.noisy_share, generator)
        noise = torch.randn((len(chosen), *latents.shape[1:]), generator=generator)
        return DenoiserStep(self, latents, prompts, times, noise)

    @torch.no_grad()
    def score(self) -> float:
        """The loss on the same pictures, times and noise each time: those of steps that no run reaches."""
        self.both.eval()
        numbers = range(2**40, 2**40 + SCORED)
        steps = [self.step(number, loop.generator_for(self.config.run.seed, number)) for number in numbers]
        values = [step.losses(part)["v"] for step in steps for part in range(len(self.shares))]
        self.both.train()
        return self.team.mean(torch.stack(values).mean()).item()

    def _chosen(self, step: int) -> torch.Tensor:
        batch, seed = self.config.optim.batch_size, self.config.run.seed
        if self.chances is None:
            return self.rows[loop.batch_indices(len(self.rows), batch, seed, step)]
        return self.rows[weighted_indices(self.chances, batch, seed, step)]


@dataclass(frozen=True)
class DenoiserStep:
    """One step of a `DenoiserTraining` (`loop.TrainingStep`): latents of this process's rows, and the draws of all rows."""

    training: DenoiserTraining
    latents: torch.Tensor
    prompts: list[str]
    times: torch.Tensor
    noise: torch.Tensor

    def losses(self, part: int) -> loop.Losses:
        """The loss of one part of this process's share."""
        training, rows = self.training, self.training.shares[part]
        device, first = training.team.device, training.shares[0].start
        own, noise, times = self.latents[rows.start - first : rows.stop - first], self.noise[rows], self.times[rows]
        a = training.alphas[times].view(-1, 1, 1, 1)
        noisy = a.sqrt() * own + (1 - a).sqrt() * noise
        ids = token_ids(training.tokenizer, self.prompts[rows]).to(device)
        with loop.fast_forward(training.config.run, device):
            states = training.both["text_encoder"](ids)[0]
            velocity = training.both["unet"](noisy.to(device), times.to(device), states, return_dict=False)[0]
        return {"v": l2(velocity_target(own, noise, training.alphas[times]).to(device), velocity.float())}

    def after_backward(self) -> loop.Figures:
        """The gradients of all processes become their mean."""
        self.training.team.average(self.training.both.parameters())
        return {}


def build_scheduler(diffusion: Diffusion) -> Any:
    """DPM-Solver++ on a scaled-linear schedule rescaled to zero terminal SNR, v-prediction, trailing spacing."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        beta_start=diffusion.beta_start,
        beta_end=diffusion.beta_end,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def training_alphas(scheduler: Any) -> torch.Tensor:
    """Cumulative alphas (T) that the denoiser is trained on; the last is exactly zero.

    DPM-Solver keeps a tiny value in its last place so that it can divide by it.
    """
    alphas = scheduler.alphas_cumprod.clone().float()
    alphas[-1] = 0.0
    return alphas


def stratified_times(batch: int, total: int, noisy_share: float, generator: torch.Generator) -> torch.Tensor:
    """Timesteps 0 .. total-1, spread evenly over the batch (less gradient noise than independent draws).

    A share `noisy_share` lies in the noisiest quarter of the schedule, uniform inside and outside of it; 0.25 is
    uniform throughout.
    """
    offset = torch.rand((), generator=generator)
    spread = (torch.arange(batch) / batch + offset) % 1
    calm = 1 - noisy_share
    place = torch.where(spread < calm, spread / max(calm, 1e-9) * 0.75, 0.75 + (spread - calm) / max(noisy_share, 1e-9) * 0.25)
    return (place * total).long().clamp_max(total - 1)[torch.randperm(batch, generator=generator)]


def pick_captions(choices: list[tuple[str, ...]], dropout: float, generator: torch.Generator) -> list[str]:
    """One caption for each picture, at random among its own; empty for a share `dropout`."""
    draws = torch.rand(len(choices), 2, generator=generator).tolist()
    return ["" if drop < dropout else texts[int(pick * len(texts))] for texts, (drop, pick) in zip(choices, draws, strict=True)]


def _build(config: TrainDenoiser, cache: LatentCache | ShardedLatents, vae: Any) -> tuple[Any, Any, Any]:
    """Tokenizer, text encoder and UNet: new ones, or those of the model to warm-start from."""
    step = -(-len(cache) // MOST_TEXTS)  # of more captions every second, third, ... is as good for a vocabulary
    captions = sorted({caption for texts in islice(cache.captions, 0, None, step) for caption in texts})
    if config.run.warm_start:
        old = load_pipeline(find_model(config.run.warm_start))
        unet = {"block_out_channels": config.unet.blocks, "in_channels": cache.shape[0]}
        unet |= {"layers_per_block": config.unet.layers_per_block, "norm_num_groups": config.unet.norm_groups}
        text = {"hidden_size": config.text.width, "num_hidden_layers": config.text.layers}
        text |= {"num_attention_heads": config.text.heads, "max_position_embeddings": config.text.length}
        refuse_other_shape(config.run.warm_start, old.unet.config, unet)
        refuse_other_shape(config.run.warm_start, old.text_encoder.config.to_dict(), text)
        if not config.text.new_vocabulary:
            return old.tokenizer, old.text_encoder.train(), old.unet.train()
        tokenizer = train_tokenizer(captions, config.text)
        return tokenizer, with_vocabulary(old.text_encoder, old.tokenizer, tokenizer, config.text).train(), old.unet.train()
    tokenizer = train_tokenizer(captions, config.text)
    free = available(torch.device("cpu"))
    text_encoder = built_to_train(lambda: build_text_encoder(tokenizer, config.text), free)
    return tokenizer, text_encoder, built_to_train(lambda: build_unet(config.unet, cache, config.text.width), free)


def build_unet(shape: UNetShape, cache: LatentCache | ShardedLatents, text_width: int) -> Any:
    """A UNet2DConditionModel of this shape for the cache's latents, with random weights."""
    from diffusers import UNet2DConditionModel

    channels, side = cache.shape[0], cache.shape[-1]
    levels = len(shape.blocks)
    if side % 2 ** (levels - 1):
        raise UserError(f"Latents of side {side} cannot be halved {levels - 1} times; give unet.blocks fewer levels.")
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=shape.blocks,
        layers_per_block=shape.layers_per_block,
        norm_num_groups=shape.norm_groups,
        cross_attention_dim=text_width,
        # diffusers reads this argument as the number of heads (its historical name)
        attention_head_dim=tuple(width // shape.heads_dim for width in shape.blocks),
        down_block_types=tuple("CrossAttnDownBlock2D" if text else "DownBlock2D" for text in shape.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if text else "UpBlock2D" for text in reversed(shape.attention)),
    )


def _pipeline(vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any) -> Any:
    with quiet():
        from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _finish(config: TrainDenoiser, pipe: Any, cache: LatentCache | ShardedLatents) -> None:
    token_ids(pipe.tokenizer, [""])  # its file also says how it was used last: as in a step, whether or not this process took one
    card = {
        "pictures": len(cache),
        "size_px": cache.size_px,
        "steps": config.optim.steps,
        "batch_size": config.optim.batch_size,
        "prediction_type": "v_prediction",
        "zero_terminal_snr": True,
        "vae_hash": cache.vae_hash,
        "words": listed(text for texts in cache.captions for text in texts),
    }
    save_pipeline(pipe, config.run.out, card, find_model(config.data.vae, "vae"))
    with atomic_file(config.run.work / "result.json") as part:
        part.write_text(json.dumps(card, indent=2))
    print(f"Model: {config.run.out}")
