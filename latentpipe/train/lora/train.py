"""Train an adapter: on the denoising loss for the UNet and the text encoders, on pixels for the VAE's decoder, or on both."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from latentpipe.checkpoints.pipeline_io import load_pipeline
from latentpipe.checkpoints.registry import find_lora, find_model, vae_of
from latentpipe.data.image_folder import read_index
from latentpipe.lora.state_dict.io import read_lora
from latentpipe.pipelines.denoise import denoise, native_size, redraws, size_unit
from latentpipe.pipelines.families import denoiser
from latentpipe.pipelines.hosting import finish as finish_pictures
from latentpipe.pipelines.sampling import Settings, check_settings
from latentpipe.train import loop, losses, picture_changes
from latentpipe.train.config import TrainLora, config_from
from latentpipe.train.denoiser import pick_captions
from latentpipe.train.distributed import DistributedContext, nothing
from latentpipe.train.lora.data import LoraPictures, held_out, note_long_captions, open_pictures, roll_of
from latentpipe.train.lora.distillation import GuidedPaths, GuidedTeacher, step_times
from latentpipe.train.lora.export import begin_file, export_lora, usable_file
from latentpipe.train.lora.flow import TransformerTraining, asked_of
from latentpipe.train.lora.flow import noised_by as noised
from latentpipe.train.lora.loss import DrawnPictures, NoiseSchedule
from latentpipe.train.lora.parameters import Plan, base_hashes, begin_from, choose_trained, inject_trainable
from latentpipe.train.lora.prompts import Prompts
from latentpipe.train.progress import TrainingLog
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.images import bytes_to_images, sheet, to_pixels
from latentpipe.vae.stage import VAEStage

SHOWN = 8  # prompts or pictures on a sheet, and pictures in a row of it


def train_lora(config: TrainLora | str | Path | Mapping[str, Any]) -> Path:
    """Run `latentpipe train-lora`: returns the LoRA file (diffusers' keys, fp16 safetensors, with its card as metadata).

    In several processes (``accelerate launch -m latentpipe train-lora ...``) each computes its share of every batch, with the
    gradients of one process that computes all of it. The base is frozen, which is proved by its hash; only the adapter's
    parameters are in the optimizer and the checkpoints.

    config  a `TrainLora`, the path of its YAML file, or a mapping with its keys; UserError lists every problem of it
    """
    return _trained(config_from(config, TrainLora))


def _trained(config: TrainLora) -> Path:
    team = DistributedContext()
    if team.is_first:
        usable_file(config)
    torch.manual_seed(config.run.seed)
    folder = find_model(config.model)
    host = load_pipeline(folder)
    plan = choose_trained(config, host)
    if plan.denoises and (what := redraws(host)):
        raise UserError(f"model {config.model}: it {what}; train the adapter on the model that it was made from.")
    if plan.decodes and config.data.train is None:
        raise UserError("vae.decoder is trained on pixels, which latents alone have not; give data.train in place of data.cache.")
    earlier = None if config.run.warm_start is None else read_lora(find_lora(config.run.warm_start))
    size_px = _size(config, host, plan)
    roll = roll_of(config.data, vae_of(folder))
    if config.prior.train is not None:
        read_index(config.prior.train, config.prior.caption_column)
    with begin_file(config) if team.is_first else nullcontext(nothing) as record:
        if team.is_first:
            record = picture_changes.follow(config.run, config.data.source, roll, record)
        team.wait()
        pictures, prior = _pictures(config, host, folder, plan, size_px, team)
        host.to(team.device)
        training = LoraTraining(config, host, plan, pictures, prior, team)
        draws = config.run.sample_every_steps < config.optim.steps
        plain = training.draw() if draws else {}  # the base's own, before there is an adapter
        before = base_hashes(plan)
        adapter = inject_trainable(config, plan)
        training.trained = list(adapter.parameters())
        if earlier is not None:
            begin_from(earlier, plan)
        if team.is_first:
            layers = sum(map(len, plan.paths.values()))
            count = sum(parameter.numel() for parameter in adapter.parameters())
            what = f"{counted(layers, 'layer')} of {', '.join(plan.paths)}, with {counted(len(pictures.rows), 'picture')}"
            print(f"Training {count:,} parameters on {what}")

        def sample(step: int, log: TrainingLog) -> dict[str, float]:
            for name, drawn in training.draw().items():
                pairs = [picture for pair in zip(plain[name], drawn, strict=True) for picture in pair]
                labels = [label for text in training.prompts for label in (f"base: {text}", text)] if name == "samples" else None
                log.sheet(step, name, sheet(pairs, SHOWN, labels))
            return {}

        training.settings = drawn_with(config)
        way: dict[str, Any] = {"extras": training.extras, "parts": config.optim.accumulate, "begun": record}
        steps = loop.fit(adapter, config.optim, config.run, training.step, sample, team, **way)
        if team.is_first:
            export_lora(config, folder, plan, pictures, before, steps)
        team.wait()
        return config.run.out


class LoraTraining:
    """One step's losses of an adapter in its host, and the pictures on its sheets.

    trained  the parameters whose gradients the processes average
    """

    def __init__(
        self,
        config: TrainLora,
        host: Any,
        plan: Plan,
        pictures: LoraPictures,
        prior: LoraPictures | None,
        team: DistributedContext,
    ) -> None:
        self.config, self.host, self.plan, self.team = config, host, plan, team
        self.shares = team.shards(config.optim.batch_size, config.optim.accumulate)
        self.trained: list[torch.nn.Parameter] = []
        self.pictures, self.prior = pictures, prior
        self.device: torch.device = host.device
        self.stage = VAEStage(host.vae, tile=None)
        self.settings = Settings()
        host.vae.train(plan.decodes)  # a training VAE is computed once, as it is
        if config.run.gradient_checkpointing:
            _check_points(host, plan)
        self.prompts: list[str] = list(config.sample_prompts)
        if plan.denoises:
            self.transformer = TransformerTraining(host) if asked_of(host) is not None else None
            self.schedule = self.transformer.schedule if self.transformer else NoiseSchedule.of(host.scheduler)
            self.text = Prompts(host, plan.reads, pictures.cache.size_px)
            self.prompts = self.prompts or [texts[0] for texts in pictures.captions_of(pictures.rows[:SHOWN])]
        self.teacher = self._teacher() if config.distillation.guidance is not None else None
        self.extras = () if self.teacher is None else (self.teacher.paths,)

    def step(self, step: int, generator: torch.Generator) -> LoraStep:
        """The step's pictures, and everything random in it: the same draws in every process."""
        main = self._drawn(self.pictures, step, generator)
        return LoraStep(self, main, None if self.prior is None else self._drawn(self.prior, step, generator))

    def draw(self) -> dict[str, list[Image.Image]]:
        """Pictures by the name of their sheet: "samples" of the prompts, "rebuilt" of the first training pictures."""
        found: dict[str, list[Image.Image]] = {}
        side = self.pictures.cache.size_px
        if self.plan.denoises:
            found["samples"] = [self._picture(text, index, side) for index, text in enumerate(self.prompts)]
        if self.plan.decodes:
            with torch.no_grad():
                means = self.pictures.cache.means(self.pictures.rows[:SHOWN])
                found["rebuilt"] = to_pixels(self.stage.decode(means.to(self.device)).float().cpu())
        return found

    @torch.no_grad()
    def _picture(self, prompt: str, seed: int, side: int) -> Image.Image:
        settings = check_settings(replace(self.settings, size=(side, side)), (side, side), size_unit(self.host))
        images = self.stage.decode(denoise(self.host, self.stage, [prompt], [seed], settings))
        return to_pixels(finish_pictures(self.host, images, {}))[0]

    def _chosen(self, pictures: LoraPictures, step: int) -> torch.Tensor:
        batch, seed = self.config.optim.batch_size, self.config.run.seed
        return pictures.rows[loop.batch_indices(len(pictures.rows), batch, seed, step)]

    def _drawn(self, pictures: LoraPictures, step: int, generator: torch.Generator) -> DrawnPictures:
        """The pictures of a step, and all that is random about them; where a teacher says the targets, those of it."""
        chosen = self._chosen(pictures, step)
        latents = pictures.cache.sample(chosen, generator)
        if not self.plan.denoises:
            return DrawnPictures(chosen, latents)
        rest = chosen
        if self.teacher is not None:  # its paths are the other part of the batch
            rest = chosen[: len(chosen) - len(self.teacher.paths.place)]
        prompts = pick_captions(pictures.captions_of(rest), self.config.loss.caption_dropout, generator)
        batch = noised(latents[: len(rest)], self.schedule, self.config.loss, generator)
        if self.teacher is not None:  # every process computes all targets, since all keep the same paths
            self.teacher.paths.renew(pictures.rows, pictures.captions, self.pictures.cache.means, self.schedule, generator)
            batch, prompts = self.teacher.batch(batch, prompts, pictures.captions)
        return DrawnPictures(chosen, latents, prompts, batch)

    def denoising(self, drawn: DrawnPictures, rows: slice) -> torch.Tensor:
        """The loss of some rows' predictions."""
        assert drawn.noised is not None
        batch = drawn.noised.rows(rows)
        return batch.loss(self._predicted(batch.noisy, batch.times, drawn.prompts[rows]))

    def _predicted(self, noisy: torch.Tensor, times: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        with loop.fast_forward(self.config.run, self.device):
            if self.transformer is not None:
                return self.transformer(noisy.to(self.device), times.to(self.device), prompts)
            states, added = self.text(prompts)
            return self.host.unet(
                noisy.to(self.device), times.to(self.device), states, added_cond_kwargs=added, return_dict=False
            )[0]

    def _teacher(self) -> GuidedTeacher:
        """The base under guidance; UserError where the adapter reaches more than the denoiser."""
        distillation = self.config.distillation
        if set(self.plan.paths) != {"unet"}:
            raise UserError(
                f"distillation.guidance trains the denoiser alone, and adapter.sites reach {', '.join(self.plan.paths)}; "
                "give unet.all."
            )
        assert distillation.guidance is not None
        count = round(distillation.path_share * self.config.optim.batch_size)
        paths = GuidedPaths.begun(step_times(self.host.scheduler, distillation.steps), count, self.pictures.cache.shape)
        return GuidedTeacher(self.host.unet, self._predicted, self.schedule, paths, distillation.guidance)

    def pixel_errors(self, latents: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Weighted error of the decoded latents to the pictures; the latents are the frozen encoder's."""
        assert self.pictures.pixels is not None
        images = bytes_to_images(self.pictures.pixels[chosen]).to(self.device)
        with loop.fast_forward(self.config.run, self.device):
            rebuilt = self.stage.decode(latents.to(self.device)).float()
        weights = self.config.loss
        return weights.l1 * losses.l1(images, rebuilt) + weights.l2 * losses.l2(images, rebuilt)


@dataclass(frozen=True)
class LoraStep:
    """One step of a `LoraTraining` (`loop.TrainingStep`), of the pictures and of the prior's."""

    training: LoraTraining
    main: DrawnPictures
    prior: DrawnPictures | None

    def losses(self, part: int) -> loop.Losses:
        """The terms of one part of this process's share: "noise", "v" or "flow" (what the host predicts), "prior", "pixel"."""
        training, rows = self.training, self.training.shares[part]
        terms: loop.Losses = {}
        if training.plan.denoises:
            terms[training.schedule.term] = training.denoising(self.main, rows)
        if self.prior is not None:
            terms["prior"] = training.config.prior.weight * training.denoising(self.prior, rows)
        if training.plan.decodes:
            terms["pixel"] = training.pixel_errors(self.main.latents[rows], self.main.chosen[rows])
        return terms

    def after_backward(self) -> loop.Figures:
        """The gradients of all processes become their mean, and a teacher's paths move on."""
        self.training.team.average(self.training.trained)
        if self.training.teacher is not None:
            self.training.teacher.move_on()
        return {}


def drawn_with(config: TrainLora) -> Settings:
    """The settings that an adapter is drawn with: few steps without guidance where it was distilled for them."""
    if config.distillation.guidance is None:
        return Settings()
    return Settings(num_inference_steps=config.distillation.steps, guidance_scale=1.0)


def _check_points(host: Any, plan: Plan) -> None:
    """Switch on gradient checkpointing in the networks that gradients pass through."""
    try:
        for model in [getattr(host, denoiser(host))] * plan.denoises + [host.vae] * plan.decodes:
            model.enable_gradient_checkpointing()
    except ValueError as error:
        raise UserError(f"run.gradient_checkpointing: {error}") from None


def _pictures(
    config: TrainLora, host: Any, folder: Path, plan: Plan, size_px: int, team: DistributedContext
) -> tuple[LoraPictures, LoraPictures | None]:
    """The training pictures, and the prior's where there is one."""
    held, vae, work = held_out(config.data.exclude), vae_of(folder), config.run.work
    data = config.data
    pictures = open_pictures(
        data.source,
        vae,
        size_px,
        work,
        held_out=held,
        trigger=data.trigger,
        captioned=plan.denoises,
        pixels=plan.decodes,
        column=data.caption_column,
        team=team,
    )
    again = config.prior.train
    column = config.prior.caption_column
    prior = None if again is None else open_pictures(again, vae, size_px, work, held_out=held, column=column, team=team)
    if plan.denoises and team.is_first and asked_of(host) is None:
        note_long_captions(host.tokenizer, pictures.captions)
    return pictures, prior


def _size(config: TrainLora, host: Any, plan: Plan) -> int:
    """The side of the training pictures in pixels; UserError where the model cannot take it."""
    if plan.decodes and not VAEStage(host.vae).decodes:
        raise UserError("This model's VAE is an encoder alone; vae.decoder has nothing to train.")
    size_px = config.data.size_px or min(native_size(host))
    unit = size_unit(host) if plan.denoises else host.vae_scale_factor
    if size_px % unit:
        raise UserError(f"data.size_px is {size_px}; this model needs a multiple of {unit}.")
    return size_px
