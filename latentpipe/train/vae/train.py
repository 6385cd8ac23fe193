"""Train the VAE: images -> (reconstruction, posterior) -> losses; then write down the normalization of what it became."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from latentpipe.data.image_folder import read_pictures
from latentpipe.data.streaming import PictureStream
from latentpipe.evaluate import health
from latentpipe.evaluate.diagnosis import alarms
from latentpipe.train import loop, picture_changes
from latentpipe.train.config import TrainVAE, config_from
from latentpipe.train.distributed import DistributedContext, nothing
from latentpipe.train.progress import TrainingLog
from latentpipe.train.run_dir import prepare_run_dir, usable
from latentpipe.train.vae import export, trainable
from latentpipe.train.vae.adversarial import last_layer
from latentpipe.train.vae.augment import CropParams, draw_crop
from latentpipe.train.vae.distillation import Lesson, taught_psnr
from latentpipe.train.vae.equivariance import SCALES, Warp, draw_warp
from latentpipe.train.vae.microbatch import parts_that_fit
from latentpipe.train.vae.model import build_vae, open_teacher, training_space
from latentpipe.train.vae.objective import Objective
from latentpipe.train.vae.training_pass import TrainingPass, rounded
from latentpipe.utils.errors import LatentpipeWarning, UserError
from latentpipe.utils.images import bytes_to_images, psnr, resized, sheet, to_bytes, to_pixels
from latentpipe.utils.io import printable
from latentpipe.vae.stage import VAEStage

SHARES_EVERY = 50  # steps between the shares of the terms in the last layer's gradient
VALIDATED = 2000  # pictures at most, which are kept in memory
WATCHED = 64  # pictures whose latents are looked at with every sheet


def train_vae(config: TrainVAE | str | Path | Mapping[str, Any]) -> Path:
    """Run `latentpipe train-vae`: returns the folder of the finished VAE (a diffusers autoencoder, fp16 safetensors).

    In several processes (``accelerate launch -m latentpipe train-vae ...``) each computes its share of every batch, with the
    gradients of one process that computes all of it.

    config  a `TrainVAE`, the path of its YAML file, or a mapping with its keys; UserError lists every problem of it
    """
    return _trained(config_from(config, TrainVAE))


def _trained(config: TrainVAE) -> Path:
    team = DistributedContext()
    if team.is_first:
        usable(config.run)
    torch.manual_seed(config.run.seed)
    teacher = open_teacher(config)
    vae = build_vae(config, teacher)
    trainable.choose_stages(vae, config.mode, config.parts)
    stage = VAEStage(vae, training_space(vae, config), tile=None)
    _check_size(config, stage)
    with prepare_run_dir(config, config.run) if team.is_first else nullcontext(nothing) as record:
        if team.is_first:
            print(trainable.table(vae))
        team.wait()
        return _train(config, team, stage, teacher, record)


def _train(
    config: TrainVAE, team: DistributedContext, stage: VAEStage, teacher: VAEStage | None, record: Callable[[], None]
) -> Path:
    """The run itself, in folders that are its own; `record` is called once it has begun."""
    pictures = PictureStream(config.data.train, config.data.read_size_px, team.world)
    held = _validation(config)
    if team.is_first:
        print(f"Training on {printable(str(config.data.train))}: {pictures.report()}")
        names = [item.path.relative_to(config.data.train).as_posix() for item in pictures.items]
        record = picture_changes.follow(config.run, config.data.train, names, record)
    stage.to(team.device)
    objective = Objective(config, stage.vae, team)
    parts = parts_that_fit(config, stage, team)
    training = VAETraining(config, team, stage, teacher, pictures, objective, parts)
    watched = held if held is not None else export.first_pictures(pictures, config.crops.size_px, WATCHED)

    def sample(step: int, log: TrainingLog) -> dict[str, float]:
        stage.eval()
        found = _figures(config, stage, watched, held is not None, step, log)
        if teacher is not None and held is not None:
            found["teacher_psnr_db"] = taught_psnr(stage, teacher, held).mean().item()
        stage.train()
        return found

    steps = loop.fit(
        stage.vae,
        config.optim,
        config.run,
        training.step,
        sample,
        team,
        extras=(objective,),
        parts=len(training.shards),
        patience=config.run.patience,
        begun=record,
    )
    stage.eval()
    if team.is_first:
        export.export_vae(config, stage, pictures, held, steps, teacher)
    team.wait()
    return config.run.out


class VAETraining:
    """One step's pictures through the stage: the same draws in every process, each computing its own rows."""

    def __init__(
        self,
        config: TrainVAE,
        team: DistributedContext,
        stage: VAEStage,
        teacher: VAEStage | None,
        pictures: PictureStream,
        objective: Objective,
        parts: int,
    ) -> None:
        self.config, self.team, self.stage, self.pictures, self.objective = config, team, stage, pictures, objective
        self.lesson = None if teacher is None else Lesson(config, stage, teacher, team.device)
        trains = any(parameter.requires_grad for parameter in stage.vae.decoder.parameters() if parameter.ndim == 4)
        self.last = last_layer(stage.vae) if trains else None
        self.shards = team.shards(config.optim.batch_size, parts)
        forward = TrainingPass(stage, rounds=config.loss.rate > 0)
        self.wrapped = team.wrap(torch.compile(forward) if config.run.compile else forward)  # type: ignore[arg-type]

    def step(self, step: int, generator: torch.Generator) -> VAEStep:
        """The step's pictures, and everything random in it."""
        config = self.config
        chosen, following = (self._chosen(at) for at in (step, step + 1))
        cut = draw_crop(len(chosen), config.data.read_size_px, config.crops, generator)
        warp = self._warp(generator, cut.size_px)
        c, side = self.stage.space.channels, cut.size_px // self.stage.space.downscale
        noise = self._noise((len(chosen), c, side, side), generator)
        drawn = None if self.lesson is None else self.lesson.draw(self._captions(chosen), generator)
        mine = slice(self.shards[0].start, self.shards[-1].stop)
        pixels = self.pictures.batch(chosen[mine].tolist(), following[mine].tolist())
        return VAEStep(self, step, cut, warp, noise, drawn, pixels)

    def _chosen(self, step: int) -> torch.Tensor:
        return loop.batch_indices(len(self.pictures), self.config.optim.batch_size, self.config.run.seed, step)

    def _captions(self, chosen: torch.Tensor) -> list[tuple[str, ...]]:
        return [self.pictures.items[index].captions for index in chosen.tolist()]

    def _noise(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Standard normal, of a posterior; a codec's is uniform, as wide as its step."""
        loss = self.config.loss
        if loss.rate:
            return loss.step * (torch.rand(*shape, generator=generator) - 0.5)
        return torch.randn(*shape, generator=generator)

    def _warp(self, generator: torch.Generator, size_px: int) -> Warp | None:
        loss = self.config.loss
        if torch.rand((), generator=generator).item() >= loss.equivariance:
            return None
        scales = SCALES if "scale" in loss.warps else (0.5,) if "half" in loss.warps else (1.0,)
        downscale = self.stage.space.downscale
        return draw_warp(generator, size_px, downscale, scales, "rotate" in loss.warps, "flip" in loss.warps)

    def forward(
        self, images: torch.Tensor, warp: Warp | None, noise: torch.Tensor, given: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        """A `TrainingPass` in this process's wrapper; UserError where torch.compile was asked for and does not work."""
        try:
            return self.wrapped(images, warp=warp, noise=noise, given=given)
        except Exception as error:
            if not self.config.run.compile or isinstance(error, UserError):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"run.compile: torch.compile does not work here ({reason[:200]}); leave the option out.") from None


@dataclass
class VAEStep:
    """One step of a `VAETraining` (`loop.TrainingStep`): the same draws in every process, each with its own rows.

    cut     of the pictures;  warp: of pictures and latents, on some steps
    noise   of the posterior's samples, all rows;  drawn: what the lesson drew
    pixels  of this process's rows
    seen    pictures and reconstructions that the discriminator learns from
    """

    training: VAETraining
    number: int
    cut: CropParams
    warp: Warp | None
    noise: torch.Tensor
    drawn: Any
    pixels: Any
    seen: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    figures: loop.Figures = field(default_factory=dict)

    def losses(self, part: int) -> loop.Losses:
        """The terms of one part of this process's share."""
        training, objective, config, device = (
            self.training,
            self.training.objective,
            self.training.config,
            self.training.team.device,
        )
        rows, last = training.shards[part], part == len(training.shards) - 1
        first = training.shards[0].start
        images = self.cut.apply(self.pixels[rows.start - first : rows.stop - first].to(device), rows)
        noise = self.noise[rows].to(device)
        with training.team.gathering(training.wrapped, last), loop.fast_forward(config.run, device):
            target = given = None
            if training.lesson is not None and self.drawn is not None:
                target = training.lesson.target(images)
                given = training.lesson.given(target, noise, self.drawn, rows)
            rebuilt, posterior = training.forward(images, self.warp, noise, given)
        wanted = self.warp(images) if self.warp is not None else images
        noisy = rounded(posterior, noise) if config.loss.rate else None
        losses = objective(wanted, rebuilt, posterior, self.number, self.warp is not None, target, noisy)
        if last and self.number % SHARES_EVERY == 0 and training.last is not None:
            shares = health.gradient_shares(losses, training.last)
            self.figures |= {f"share.{name}": share for name, share in shares.items()}
        if objective.discriminator_active(self.number) and self.warp is None:
            self.seen.append((wanted, rebuilt.detach().float()))
        return losses

    def after_backward(self) -> loop.Figures:
        """The discriminator and the controller learn."""
        seen = self.seen
        pair = (torch.cat([one for one, _ in seen]), torch.cat([other for _, other in seen])) if seen else None
        return self.figures | self.training.objective.end_step(self.number, pair)


@torch.no_grad()
def reconstruct(stage: VAEStage, images: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Images through the mode of their posterior and back, on the CPU."""
    return torch.cat([stage.decode(stage.encode(part)).float().cpu() for part in images.split(batch)])


def _figures(
    config: TrainVAE, stage: VAEStage, images: torch.Tensor, validates: bool, step: int, log: TrainingLog
) -> loop.Figures:
    """The sheet, the latents' health with its alarms, and the validation figure."""
    rebuilt = reconstruct(stage, images)
    pairs = zip(to_pixels(images[:16]), to_pixels(rebuilt[:16]), strict=True)
    log.sheet(step, "rebuilt", sheet([picture for pair in pairs for picture in pair], 8))
    found = health.measure(stage, images[:WATCHED].split(32))
    for alarm in alarms(found, {f"loss.{name}": value for name, value in config.loss.model_dump().items()}):
        log.warn(step, alarm)
    figures = {"health.active_share": found.active_share}
    # of the raw values, before any normalization is folded in
    figures["health.prior_gap_bits"] = sum(found.gaussian_gap_bits) / len(found.gaussian_gap_bits)
    if found.kl_bits is not None:
        figures["health.kl_bits"] = sum(found.kl_bits) / len(found.kl_bits)
    if found.high_frequency is not None:
        figures["health.high_frequency"] = found.high_frequency
    if validates:
        figures["validation_psnr_db"] = psnr(to_bytes(images), to_bytes(rebuilt)).mean().item()
    return figures


def _check_size(config: TrainVAE, stage: VAEStage) -> None:
    unit = stage.space.downscale
    cut = config.crops.cut_px
    if cut is not None and (cut % unit or cut > config.crops.size_px):
        raise UserError(
            f"crops.cut_px is {cut}; this model needs a multiple of {unit} that is at most crops.size_px "
            f"({config.crops.size_px})."
        )
    if config.crops.size_px % unit or config.crops.size_px > config.data.read_size_px:
        raise UserError(
            f"crops.size_px is {config.crops.size_px}; this model needs a multiple of {unit} "
            f"that is at most data.read_size_px ({config.data.read_size_px})."
        )


def _validation(config: TrainVAE) -> torch.Tensor | None:
    """The validation pictures as images (N 3 H W) of the crops' size."""
    if config.data.validation is None:
        return None
    pictures = read_pictures(config.data.validation, config.data.read_size_px, VALIDATED)
    if len(pictures.names) + len(pictures.skipped) == VALIDATED:
        warnings.warn(LatentpipeWarning(f"{config.data.validation}: the first {VALIDATED:,} pictures are used"), stacklevel=2)
    if pictures.skipped:
        warnings.warn(LatentpipeWarning(f"{config.data.validation}: {pictures.report()}"), stacklevel=2)
    return bytes_to_images(torch.from_numpy(resized(pictures.pixels, config.crops.size_px)).permute(0, 3, 1, 2))
