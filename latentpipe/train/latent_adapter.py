"""Fit an adapter: closed forms first, then a small convolution; each rung is scored against its own upper bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from latentpipe.checkpoints.registry import find_model, name_of
from latentpipe.compatibility.latent_adapter import CANDIDATES, AdapterCard, Candidate, LatentAdapter, save_adapter
from latentpipe.evaluate.statistics import interval
from latentpipe.pipelines.swap import stage_of
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.images import psnr, to_bytes
from latentpipe.utils.io import free_name, own_home
from latentpipe.utils.progress import ProgressCallback
from latentpipe.vae.protocol import Stage

RIDGE = 1e-5  # of the mean diagonal of the Gram matrix


@dataclass(frozen=True)
class Score:
    """A rung on held-out pictures: PSNR in dB (mean, 95 % bootstrap interval), R^2 of the latents, parameters."""

    name: str
    psnr_db: float
    low: float
    high: float
    r2: float
    parameters: int


@dataclass(frozen=True)
class FitReport:
    """Every rung's score, the upper bound (decode of the target's own encode), and the rung that was chosen."""

    scores: list[Score]
    bound: Score
    chosen: Candidate
    fitted_on: int
    held_out: int
    pictures: str
    size_px: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"fitted on {counted(self.fitted_on, 'picture')} of {self.pictures}, scored on {self.held_out} "
            f"others, {self.size_px} px"
        ]
        lines.append(f"{'':2}{'rung':22}{'PSNR':>9}  {'95 % interval':18}{'R^2':>7}{'parameters':>12}")
        for score in [*self.scores, self.bound]:
            mark = "*" if score.name == self.chosen else " "
            interval = f"{score.low:.2f} to {score.high:.2f}"
            lines.append(f"{mark:2}{score.name:22}{score.psnr_db:6.2f} dB  {interval:18}{score.r2:7.3f}{score.parameters:12,}")
        lines.append(f"chosen: {self.chosen}, the smallest rung within the interval of the best")
        return "\n".join(lines)


@torch.no_grad()
def fit_adapter(
    source: Any,
    target: Any,
    images: torch.Tensor,
    pictures: str = "the pictures given",
    steps: int = 800,
    seed: int = 0,
    report: ProgressCallback | None = None,
) -> tuple[LatentAdapter, FitReport]:
    """The adapter from stage `source` to stage `target`, fitted and scored on images (N 3 H W, [-1, 1]).

    Every fifth picture is held out; UserError below ten pictures. Each rung minimizes the squared error of the target's
    latents: the linear ones by ridge regression in float64, the convolution by Adam on top of the 1x1 map. `report` is called
    before each rung, and in the steps of the convolution.
    """
    if len(images) < 10:
        raise UserError(f"{counted(len(images), 'picture')} are too few to fit an adapter and to score it; give at least 10.")
    if not target.decodes:
        raise UserError("The VAE to adapt to has no decoder; an adapter needs one.")
    held = torch.arange(len(images)) % 5 == 4
    x, y = _encode(source, images), _encode(target, images)
    shapes = [(stage.space.channels, stage.space.downscale) for stage in (source, target)]
    rungs = [rung for rung in CANDIDATES if rung != "per channel" or shapes[0] == shapes[1]]
    truth = to_bytes(images[held])

    def score(name: str, latents: torch.Tensor, parameters: int) -> tuple[Score, torch.Tensor]:
        values = psnr(to_bytes(_decode(target, latents)), truth).clamp_max(99.0)
        low, high = interval(values.numpy())
        r2 = 1 - (y[held] - latents).square().sum() / (y[held] - y[held].mean((0, 2, 3), keepdim=True)).square().sum()
        return Score(name, values.mean().item(), low, high, r2.item(), parameters), values

    scores: list[Score] = []
    fitted: dict[Candidate, LatentAdapter] = {}
    for done, rung in enumerate(rungs):
        if report is not None:
            report(done, len(rungs), f"fit: {rung}")
        adapter = LatentAdapter(shapes[0], shapes[1], rung)
        _solve(adapter, x[~held], y[~held])
        if rung == "convolution":
            with torch.enable_grad():
                _descend(adapter, x[~held], y[~held], steps, seed, report=report)
        fitted[rung] = adapter.eval()
        latents = torch.cat([adapter(part) for part in x[held].split(64)])
        scores.append(score(rung, latents, _free_parameters(adapter))[0])
    bound, _ = score("upper bound", y[held], 0)
    chosen = _smallest_within(rungs, scores)
    ladder = FitReport(scores, bound, chosen, int((~held).sum()), int(held.sum()), pictures, images.shape[-1])
    return fitted[chosen], ladder


def _smallest_within(rungs: list[Candidate], scores: list[Score]) -> Candidate:
    """The first rung whose mean lies within the interval of the best one."""
    best = max(scores, key=lambda score: score.psnr_db)
    return next(rung for rung, score in zip(rungs, scores, strict=True) if score.psnr_db >= best.low)


@torch.no_grad()
def _solve(adapter: LatentAdapter, x: torch.Tensor, y: torch.Tensor) -> None:
    """Fill the linear map: one gain and offset for each channel, or ridge regression over 1x1 or 3x3 positions."""
    x, y = adapter.fold(x), functional.pixel_unshuffle(y, adapter.up)
    edge = adapter.linear.kernel_size[0] // 2
    if adapter.rung == "per channel":
        one, other = (part.double().transpose(0, 1).flatten(1) for part in (x, y))
        mean_x, mean_y = one.mean(1), other.mean(1)
        centred = one - mean_x[:, None]
        gain = (centred * (other - mean_y[:, None])).sum(1) / centred.square().sum(1).clamp_min(1e-12)
        weight, bias = torch.diag(gain), mean_y - gain * mean_x
    else:
        weight, bias = _ridge(functional.pad(x, (edge,) * 4, mode="replicate") if edge else x, y, 2 * edge + 1)
    adapter.linear.weight.copy_(weight.view_as(adapter.linear.weight))
    adapter.linear.bias.copy_(bias)  # type: ignore[union-attr]


def _ridge(x: torch.Tensor, y: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (C' x C side side) and bias of the least-squares map, from sums over batches, in float64."""
    columns = x.shape[1] * side**2
    gram = torch.zeros(columns + 1, columns + 1, dtype=torch.float64)
    cross = torch.zeros(columns + 1, y.shape[1], dtype=torch.float64)
    for part, wanted in zip(x.split(32), y.split(32), strict=True):
        rows = functional.unfold(part.double(), side).transpose(1, 2).flatten(0, 1)
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
        gram += rows.T @ rows
        cross += rows.T @ wanted.double().permute(0, 2, 3, 1).flatten(0, 2)
    penalty = torch.full((columns + 1,), RIDGE * gram.diagonal()[:-1].mean().item(), dtype=torch.float64)
    penalty[-1] = 0  # the bias is free
    solution = torch.linalg.solve(gram + torch.diag(penalty), cross)
    return solution[:-1].T, solution[-1]


def _descend(
    adapter: LatentAdapter,
    x: torch.Tensor,
    y: torch.Tensor,
    steps: int,
    seed: int,
    batch: int = 32,
    report: ProgressCallback | None = None,
) -> None:
    """Train the convolution on the squared error, Adam with a cosine decay; the last layer begins at zero."""
    generator = torch.Generator().manual_seed(seed)
    assert adapter.curve is not None
    weight, bias, *last = adapter.curve.parameters()
    with torch.no_grad():
        bound = weight[0].numel() ** -0.5
        for tensor in (weight, bias):
            tensor.uniform_(-bound, bound, generator=generator)
        for tensor in last:
            tensor.zero_()
    x, y = adapter.fold(x), functional.pixel_unshuffle(y, adapter.up)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if report is not None:
            report(step, steps, "fit: convolution, step")
        chosen = torch.randint(len(x), (min(batch, len(x)),), generator=generator)
        loss = functional.mse_loss(adapter.mapped(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _free_parameters(adapter: LatentAdapter) -> int:
    if adapter.rung == "per channel":
        return 2 * adapter.linear.out_channels
    return sum(parameter.numel() for parameter in adapter.parameters())


def _encode(stage: Stage, images: torch.Tensor) -> torch.Tensor:
    return _batched(stage.encode, images)


def _decode(stage: Stage, latents: torch.Tensor) -> torch.Tensor:
    return _batched(stage.decode, latents)


def _batched(function: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, size: int = 16) -> torch.Tensor:
    return torch.cat([function(part).float().cpu() for part in batch.split(size)])


def fit_and_save(
    source: str | Path,
    to: str | Path,
    images: torch.Tensor,
    pictures: str,
    out: Path | None = None,
    report: ProgressCallback | None = None,
) -> tuple[FitReport, Path]:
    """Fit an adapter on images (N 3 H W, [-1, 1]) and write it; the scores of its ladder, and the file.

    pictures  what they are, in words, for the card
    out       the file; None: in the user's adapters folder, under a name that says from where to where
    """
    folder = None if out is not None else own_home() / "adapters"  # said now where there is none, not after the work
    first, second = stage_of(source), stage_of(to)
    adapter, ladder = fit_adapter(first, second, images, pictures, report=report)
    names = [name_of(find_model(name, "vae"), "vae").replace("/", "-") for name in (source, to)]
    assert first.digest is not None
    assert second.digest is not None
    path = out or free_name((folder or own_home()) / f"{names[0]}-to-{names[1]}-{second.digest[:8]}.safetensors")
    card = AdapterCard(first.digest, second.digest, adapter.source, adapter.target, adapter.rung, ladder.as_dict())
    save_adapter(adapter, card, path)
    return ladder, path
