"""Pictures that a VAE does not know: scores, a threshold with a stated false-alarm rate, and where in the picture it is.

Five parts, each higher for stranger pictures:
pixel    mean squared error of the reconstruction from the posterior's mean, over [-1, 1]
scales   the same after means over 2 x 2, 4 x 4 and 8 x 8 pixels, averaged: what is wrong in the large
local    the highest value of the heat map (`heatmap.error_map`): a small defect that the means drown
feature  squared distance between the features (emoji-words, `evaluate.features`) of picture and reconstruction
kl       KL(q(z|x) || N(0, I)) per latent value, in nats; ``mean^2 / 2`` where the VAE has no posterior
Each is taken as its logarithm, less its mean over normal pictures, in standard deviations of those; the score is the mean
of the parts. Reconstruction and KL are the two halves of the ELBO (Kingma and Welling, arXiv:1312.6114); An and Cho ("Variational
autoencoder based anomaly detection using reconstruction probability", 2015) score by the first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from latentpipe.data.image_set import BATCH_PX
from latentpipe.evaluate.metrics.features import LEAST_PX, Features, open_features
from latentpipe.evaluate.metrics.posterior import kl_values
from latentpipe.explore.anomaly import heatmap as heats
from latentpipe.explore.anomaly.conformal import binomial_interval, p_values, threshold
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import atomic_file, content_hash, read_json
from latentpipe.utils.progress import ProgressCallback
from latentpipe.vae.stage import VAEStage

PARTS = ("pixel", "scales", "local", "feature", "kl")
LEAST = 1e-12  # no logarithm of zero
LEAST_SD = 0.1  # of a logarithm: few pictures that happen to agree shall not make a tenth a sensation
VERSION = 1
BANK = "emoji bank, unseen"  # pictures are reduced as the bank's are, where these are normal


@dataclass(frozen=True)
class Scores:
    """Of N pictures: the parts (N each, in sd of normal pictures), total (N), conformal p-values (N), who is anomalous (N)."""

    parts: dict[str, np.ndarray]
    total: np.ndarray
    p: np.ndarray
    anomalous: np.ndarray


@dataclass(frozen=True)
class Detector:
    """What was learnt from normal pictures for one VAE at one size; `save` and `load` keep it as JSON.

    vae, features       content hashes of the weights; `side` in pixels
    mean, sd            of the logarithm of each part, over `fitted` pictures
    calibration         totals of other normal pictures, sorted; `threshold` is their conformal quantile for `false_alarms`
    alarms, checked     false alarms among normal pictures that neither of these saw, and how many they were
    level               of the heat map, which 1 % of normal pixels exceed
    """

    stage: VAEStage = field(repr=False, compare=False)
    vae: str
    features: str
    side: int
    normal: str
    false_alarms: float
    mean: dict[str, float]
    sd: dict[str, float]
    fitted: int
    calibration: tuple[float, ...] = field(repr=False)
    threshold: float
    level: float
    alarms: int = 0
    checked: int = 0

    def score(self, images: torch.Tensor, report: ProgressCallback | None = None) -> Scores:
        """Scores of images N 3 side side in [-1, 1]; UserError for another size."""
        return self.both(images, report)[0]

    def heat(self, images: torch.Tensor, report: ProgressCallback | None = None) -> torch.Tensor:
        """Heat maps N side side: smoothed squared error, in units of the level that 1 % of normal pixels exceed."""
        return self.both(images, report)[1]

    def both(self, images: torch.Tensor, report: ProgressCallback | None = None) -> tuple[Scores, torch.Tensor]:
        """Scores and heat maps by one pass through the VAE; arguments as for `score`."""
        if images.ndim != 4 or images.shape[1:] != (3, self.side, self.side) or not len(images):
            raise UserError(f"The detector takes images N 3 {self.side} {self.side}; given {tuple(images.shape)}.")
        raw, maps = measure(self.stage, images, report=report)
        parts, total = standardised(raw, self.mean, self.sd)
        return Scores(parts, total, p_values(self.calibration, total), total > self.threshold), maps / self.level

    def rate(self) -> tuple[float, float, float]:
        """The false-alarm rate measured on pictures that were kept aside, and its exact 95 % interval."""
        if not self.checked:
            return float("nan"), 0.0, 1.0
        return self.alarms / self.checked, *binomial_interval(self.alarms, self.checked)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        kept = [name for name in self.__dataclass_fields__ if name != "stage"]
        facts = {"version": VERSION} | {name: getattr(self, name) for name in kept}
        with atomic_file(path) as part:
            part.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")


def load(path: Path, stage: VAEStage) -> Detector:
    """A detector from its file, for the VAE that it was made with; UserError for another VAE or a file that is none."""
    facts = read_json(path)
    if facts.pop("version", None) != VERSION:
        raise UserError(f"{path} is no anomaly detector of version {VERSION}; write one with 'latentpipe anomaly --save FILE'.")
    wanted, names = digest_of(stage), set(Detector.__dataclass_fields__) - {"stage"}
    if set(facts) != names:
        raise UserError(f"{path}: expected the keys {', '.join(sorted(names))}; given {', '.join(sorted(facts))}.")
    if facts["vae"] != wanted:
        raise UserError(f"{path} was made with the VAE {facts['vae']:.16}; the one given is {wanted:.16}. Give that one.")
    if facts["features"] != _features().hash:
        raise UserError(f"{path} was made with another feature network ({facts['features']:.16}); make it again.")
    try:
        facts["calibration"] = tuple(float(value) for value in facts["calibration"])
        facts["mean"], facts["sd"] = ({name: float(facts[key][name]) for name in PARTS} for key in ("mean", "sd"))
        ok = threshold(facts["calibration"], facts["false_alarms"]) == facts["threshold"]
    except (TypeError, KeyError, ValueError, UserError):
        ok = False
    if not ok:
        raise UserError(f"{path} is damaged: its threshold is not that of its calibration scores. Make it again.")
    return Detector(stage=stage, **facts)


def calibrate(
    stage: VAEStage,
    normal: torch.Tensor,
    false_alarms: float = 0.05,
    name: str = "given",
    report: ProgressCallback | None = None,
    seed: int = 0,
) -> Detector:
    """Learn from normal images (N 3 S S, [-1, 1]) alone what is strange to this VAE.

    A fixed shuffle parts them: 1/4 for mean and sd of each part, 1/2 for the threshold (`conformal.threshold`), 1/4 to count
    false alarms on. The VAE should not have been trained on them: it returns what it knows too well.
    UserError: too few pictures for the rate, or not square.
    """
    n = len(normal)
    if normal.ndim != 4 or normal.shape[-1] != normal.shape[-2] or n < 8:
        raise UserError(f"Normal pictures are N 3 S S, 8 or more of them; given {tuple(normal.shape)}.")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    fit, chosen, kept = np.split(order, [n // 4, n // 4 + n // 2])
    threshold(np.zeros(len(chosen)), false_alarms)  # refuse before the work
    raw, maps = measure(stage, normal, report=report)
    logs = {part: np.log(values[fit] + LEAST) for part, values in raw.items()}
    mean = {part: float(values.mean()) for part, values in logs.items()}
    sd = {part: float(max(values.std(ddof=1), LEAST_SD)) for part, values in logs.items()}
    _, total = standardised(raw, mean, sd)
    limit = threshold(total[chosen], false_alarms)
    return Detector(
        stage=stage,
        vae=digest_of(stage),
        features=_features().hash,
        side=normal.shape[-1],
        normal=name,
        false_alarms=false_alarms,
        mean=mean,
        sd=sd,
        fitted=len(fit),
        calibration=tuple(np.sort(total[chosen]).tolist()),
        threshold=limit,
        level=float(max(np.quantile(maps[fit].numpy(), 0.99), LEAST)),
        alarms=int((total[kept] > limit).sum()),
        checked=len(kept),
    )


@torch.no_grad()
def measure(
    stage: VAEStage, images: torch.Tensor, parts: Sequence[str] = PARTS, report: ProgressCallback | None = None
) -> tuple[dict[str, np.ndarray], torch.Tensor]:
    """The raw parts that are asked for (N each) and the error maps (N H W, float32 on the CPU) of images N 3 H W in [-1, 1].

    UserError where the VAE has no decoder.
    """
    network = _features() if "feature" in parts else None
    at_once = max(1, BATCH_PX // 4 // (images.shape[-1] * images.shape[-2]))
    rows: dict[str, list[np.ndarray]] = {part: [] for part in parts}
    maps = []
    for first in range(0, len(images), at_once):
        given = images[first : first + at_once].to(stage.device, stage.dtype)
        mean, std = stage.posterior(given)
        rebuilt = stage.decode(mean).float().clamp(-1, 1).cpu()
        given, mean, std = given.float().cpu(), mean.float().cpu(), std.float().cpu()
        error = heats.error_map(given, rebuilt)
        kl = kl_values(mean, 2 * std.log()) if bool((std > 0).all()) else mean.square() / 2
        found: dict[str, Any] = {
            "pixel": (given - rebuilt).square().flatten(1).mean(1),
            "scales": _coarse(given - rebuilt),
            "local": error.flatten(1).amax(1),
            "kl": kl.flatten(1).mean(1),
        }
        if network is not None:
            found["feature"] = np.square(network(_large(given)) - network(_large(rebuilt))).sum(1)
        for part in parts:
            rows[part].append(np.asarray(found[part], np.float64))
        maps.append(error)
        if report is not None:
            report(min(first + at_once, len(images)), len(images), "rebuild")
    return {part: np.concatenate(values) for part, values in rows.items()}, torch.cat(maps)


def standardised(
    raw: dict[str, np.ndarray], mean: dict[str, float], sd: dict[str, float]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The parts in standard deviations of normal pictures, and their mean (N)."""
    parts = {part: (np.log(values + LEAST) - mean[part]) / sd[part] for part, values in raw.items()}
    return parts, np.mean(list(parts.values()), axis=0)


def digest_of(stage: VAEStage) -> str:
    """The content hash of a stage's weights as they are now, and of its normalization."""
    return content_hash(stage.vae.state_dict(), stage.space)


def _features() -> Features:
    return open_features("emoji-words")


def _large(images: torch.Tensor) -> torch.Tensor:
    """Images that the feature network takes: small ones are enlarged."""
    low = min(images.shape[-2:])
    return images if low >= LEAST_PX else F.interpolate(images, scale_factor=-(-LEAST_PX // low), mode="bilinear")


def _coarse(error: torch.Tensor) -> torch.Tensor:
    """Mean squared error after means over 2, 4 and 8 pixels, averaged (N); scales larger than the picture are left out."""
    scales = [scale for scale in (2, 4, 8) if scale <= min(error.shape[-2:])]
    return torch.stack([F.avg_pool2d(error, scale).square().flatten(1).mean(1) for scale in scales]).mean(0)
