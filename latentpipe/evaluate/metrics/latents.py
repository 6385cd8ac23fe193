"""What the latents of a VAE are like: their moments, their rate, and what happens to pictures when they are warped,
interpolated, or encoded and decoded over and over.

images B 3 H W in [-1, 1], on the CPU;  latents B C h w, normalized;  everything here is deterministic
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from latentpipe.evaluate.metrics.posterior import NATS, kl_values
from latentpipe.evaluate.protocol import Protocol, round_images
from latentpipe.utils.images import bytes_to_images, psnr
from latentpipe.vae.stage import VAEStage

TOP_DB = 100.0  # stands for equal pictures, whose PSNR is infinite
CYCLES = (1, 2, 5, 10)
MOMENTS = ("mean", "std", "skewness", "excess kurtosis")
RESAMPLES = 200  # of pictures, for a standard error
ROWS = 256  # of a block of distances
AREA = 4 * 256 * 256  # pixels of a batch
MOST = 16  # pictures of a batch

Warp = Callable[[torch.Tensor], torch.Tensor]


def decibels(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """PSNR in dB (B) of uint8 pictures B 3 H W, range 255, at most TOP_DB."""
    return psnr(first, second).clamp_max(TOP_DB)


def draw_latents(mean: torch.Tensor, std: torch.Tensor, protocol: Protocol, seeds: Sequence[int]) -> torch.Tensor:
    """Latents from posteriors (B C h w each): the mode, or ``mean + std * noise`` with a seed for each picture.

    One seed for each picture makes a sample independent of how the pictures are batched.
    """
    if protocol.posterior == "mode":
        return mean
    noise = [torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return mean + std * torch.stack(noise).to(mean)


@dataclass(frozen=True)
class Reconstruction:
    """What a VAE made of one batch.

    images      B 3 H W, float32 on the CPU, not clamped
    latents     B C h w, what was decoded
    normalized, raw  mean and standard deviation of the posteriors (B C h w each), as latents and in the VAE's own units
    """

    images: torch.Tensor
    latents: torch.Tensor
    normalized: tuple[torch.Tensor, torch.Tensor]
    raw: tuple[torch.Tensor, torch.Tensor]


def rebuild_batch(stage: VAEStage, images: torch.Tensor, protocol: Protocol, seeds: Sequence[int]) -> Reconstruction:
    """One batch encoded and decoded, by the one road that all figures share; `seeds` as for `draw_latents`.

    Always contiguous (NCHW): oneDNN sums in another order for channels_last, the layout of a picture's file, and the last
    bits of a figure would depend on how the same pixels were read.
    """
    raw_mean, raw_std = stage.raw_posterior(images.contiguous())
    mean = stage.space.normalize(raw_mean)
    std = raw_std * mean.new_tensor(stage.space.scale).view(1, -1, 1, 1)
    latents = draw_latents(mean, std, protocol, seeds)
    return Reconstruction(stage.decode(latents).float().cpu(), latents, (mean, std), (raw_mean, raw_std))


def batch_of(height: int, width: int) -> int:
    """How many pictures of that size in pixels are encoded at once."""
    return max(1, min(MOST, AREA // (height * width)))


def rate_bits(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """KL(q(z|x) || N(0, 1)) in bits for each channel, B C: sums over positions; posteriors B C h w, std > 0."""
    return kl_values(mean.double(), 2 * std.double().log()).sum((2, 3)) / NATS


def powers(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """First four raw moments of each picture's latents, B 4 C, exact over the posterior (nothing is sampled).

    Of N(m, s^2): ``m``, ``m^2 + s^2``, ``m^3 + 3 m s^2``, ``m^4 + 6 m^2 s^2 + 3 s^4``; then the mean over positions.
    """
    m, v = mean.double(), std.double().square()
    return torch.stack([part.mean((2, 3)) for part in (m, m**2 + v, m**3 + 3 * m * v, m**4 + 6 * m**2 * v + 3 * v**2)], 1)


def statistics(moments: np.ndarray, seed: int = 0) -> dict[str, list[float]]:
    """Mean, std, skewness and excess kurtosis for each channel, with standard errors, from `powers` of N pictures (N 4 C).

    The picture is the unit: standard errors are the spread over RESAMPLES resamples of pictures (Efron 1979), because the
    positions of one picture are not independent. NaN for the error of a single picture.
    """
    n = len(moments)
    random = np.random.default_rng(seed)
    weights = np.stack([np.bincount(random.integers(0, n, n), minlength=n) for _ in range(RESAMPLES)]) / n
    drawn = [shape_of(sample) for sample in np.einsum("rn,nkc->rkc", weights, moments)]
    found = shape_of(moments.mean(0))
    result: dict[str, list[float]] = {}
    for index, name in enumerate(MOMENTS):
        result[f"{name} per channel"] = found[index].tolist()
        error = np.std([sample[index] for sample in drawn], axis=0) if n > 1 else np.full(len(found[index]), math.nan)
        result[f"standard error of {name} per channel"] = error.tolist()
    return result


def shape_of(moments: np.ndarray) -> np.ndarray:
    """Mean, std, skewness and excess kurtosis (4 C) from raw moments (4 C); the last two are 0 for a constant channel."""
    first, second, third, fourth = moments
    variance = (second - first**2).clip(0)
    spread = np.where(variance > 1e-12 * (1 + first**2), variance, np.inf)
    skewness = (third - 3 * first * second + 2 * first**3) / spread**1.5
    kurtosis = (fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4) / spread**2 - 3
    return np.stack([first, np.sqrt(variance), skewness, np.where(np.isinf(spread), 0.0, kurtosis)])


def cycles(stage: VAEStage, images: torch.Tensor, protocol: Protocol, seeds: Sequence[int]) -> dict[str, list[float]]:
    """PSNR (dB, B each) against the first picture after 1, 2, 5 and 10 rounds of encoding and decoding.

    Between two rounds the picture is rounded to uint8, as by a person who saves and opens it.
    """
    first = round_images(images, "nearest")
    now, found = images.contiguous(), {}
    for cycle in range(1, CYCLES[-1] + 1):
        latents = draw_latents(*stage.posterior(now), protocol, [seed + cycle - 1 for seed in seeds])
        saved = protocol.to_bytes(stage.decode(latents)).cpu()
        now = bytes_to_images(saved)
        if cycle in CYCLES:
            found[f"PSNR after {cycle} cycle{'s' if cycle > 1 else ''}"] = decibels(saved, first).tolist()
    return found


def half(x: torch.Tensor) -> torch.Tensor:
    """B C H W at half the size: bilinear, align_corners False, which is the mean of 2 x 2 values; sides are even."""
    return torch.nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)


def quarter_turn(x: torch.Tensor) -> torch.Tensor:
    """B C H W turned by 90 degrees."""
    return torch.rot90(x, 1, (2, 3))


WARPS: dict[str, Warp] = {"half size": half, "quarter turn": quarter_turn}


def equivariance(stage: VAEStage, images: torch.Tensor, protocol: Protocol) -> dict[str, list[float]]:
    """How far warping the latents is from warping the picture (EQ-VAE, arXiv:2502.09509), for half size and a quarter turn.

    equivariance PSNR   ``D(warp E(x))`` against ``warp x``, dB
    equivariance error  ``|E(warp x) - warp E(x)| / |E(warp x)|`` in latents, Euclidean norms over a picture

    B values each; E gives the posterior's mode. Half size is left out where a side of the latents is odd.
    """
    latents, _ = stage.posterior(images)
    found: dict[str, list[float]] = {}
    for name, warp in WARPS.items():
        if warp is half and (latents.shape[-1] % 2 or latents.shape[-2] % 2):
            continue
        target, warped = warp(images), warp(latents)
        rebuilt = protocol.to_bytes(stage.decode(warped)).cpu()
        found[f"equivariance PSNR ({name})"] = decibels(rebuilt, round_images(target, "nearest")).tolist()
        again, _ = stage.posterior(target)
        error = (again - warped).flatten(1).float().norm(dim=1) / again.flatten(1).float().norm(dim=1).clamp_min(1e-12)
        found[f"equivariance error ({name})"] = error.tolist()
    return found


def nearest(latents: torch.Tensor) -> torch.Tensor:
    """The index of each row's nearest other row (N), Euclidean, of N D in any float dtype, N >= 2; in blocks of rows."""
    n = len(latents)
    lengths = torch.cat([part.float().square().sum(1) for part in latents.split(ROWS)])
    found = torch.empty(n, dtype=torch.long)
    for top in range(0, n, ROWS):
        rows = latents[top : top + ROWS].float()
        least = torch.full((len(rows),), math.inf)
        best = torch.zeros(len(rows), dtype=torch.long)
        for left in range(0, n, ROWS):
            columns = latents[left : left + ROWS].float()
            distance = lengths[top : top + ROWS, None] + lengths[None, left : left + ROWS] - 2 * rows @ columns.T
            if left == top:
                distance.fill_diagonal_(math.inf)
            value, index = distance.min(1)
            nearer = value < least
            least, best = torch.where(nearer, value, least), torch.where(nearer, index + left, best)
        found[top : top + ROWS] = best
    return found


def slerp(first: torch.Tensor, second: torch.Tensor, share: float = 0.5) -> torch.Tensor:
    """Spherical interpolation between the latents (B C h w) of two pictures each (Shoemake, 1985); lerp where they are parallel.

    ``sin((1 - t) w) / sin w a + sin(t w) / sin w b``, w the angle between a and b, each taken as one vector.
    """
    a, b = first.flatten(1).float(), second.flatten(1).float()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)
    angle = cosine.double().arccos()
    # parallel: no angle; opposite: no single arc
    flat = angle.sin() < 1e-4
    sine = torch.where(flat, 1.0, angle.sin())
    left = torch.where(flat, 1 - share, ((1 - share) * angle).sin() / sine)
    right = torch.where(flat, share, (share * angle).sin() / sine)
    return (left.float()[:, None] * a + right.float()[:, None] * b).reshape(first.shape)
