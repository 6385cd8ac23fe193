"""The health of a VAE: how much each latent channel says, whether the decoder listens, how far the aggregate is from the prior.

Everything is in the VAE's own (raw) units, because its KL is to N(0, I) in those. One pass over the pictures; only the mutual
information and the use of channels keep a few of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from latentpipe.evaluate.metrics import posterior
from latentpipe.evaluate.metrics.posterior import NATS
from latentpipe.evaluate.metrics.spectrum import Patches, high_energy
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.images import psnr, to_bytes
from latentpipe.vae.stage import VAEStage

ACTIVE_VARIANCE = 0.01  # of a posterior mean: Burda et al., arXiv:1509.00519, section 5.3
SIGMA_EDGES = tuple(10 ** (exponent / 4) for exponent in range(-16, 5))  # 1e-4 .. 10; the outer bins are open
INFORMATION_PICTURES, INFORMATION_POSITIONS = 512, 16  # N^2 pairs for each latent value
ABLATION_DECODES = 512  # pictures times channels that are decoded with one channel at zero
EQUAL_DB = 99.0  # what equal pictures count as


@dataclass(frozen=True)
class Health:
    """What `measure` found on `n` pictures. Tuples have one entry for each of C channels; None: it does not apply.

    shape             of a picture's latents: C, h, w
    kl_bits           KL(q(z|x) || N(0, 1)) for each latent value of a channel; None without a posterior (as sigma, mutual_*)
    mean_variance     variance of the posterior mean over pictures and positions; active: more than ACTIVE_VARIANCE
    mean, std, skewness, kurtosis   of the aggregate posterior q(z), over pictures and positions (excess kurtosis)
    sigma             mean posterior std; sigma_histogram: shares of all latent values between SIGMA_EDGES, C at once
    mutual_bits       I(x; z) of one latent value, mean over positions: at most `mutual_cap_bits` = log2 of the pictures used.
                      Their sum bounds that of all latents from above (they repeat each other)
    marginal_gap_bits  KL - I on the same values: KL(q(z) || N(0, 1)) of one latent value (Hoffman and Johnson, 2016); too large
                      where I is near its cap
    gaussian_gap_bits  KL(q(z) || N(0, 1)) of a channel, of the Gaussian with the aggregate's moments: a lower bound
    high_frequency    energy of the reconstruction above half the Nyquist frequency / that of the pictures
    psnr_mode_db, psnr_sample_db    pictures against the decoded mode, and a decoded sample
    psnr_zeroed_db    with one channel of the (normalized) latents at 0, on `ablated` pictures; use_db: what that costs
    rms               root mean squared error of the reconstruction of the mode, in [-1, 1] units
    patch_variances   the C largest eigenvalues of the covariance of the pictures' patches, as large as one latent position
                      sees: what a linear VAE would encode ([-1, 1] units, squared)
    """

    n: int
    shape: tuple[int, int, int]
    mean_variance: tuple[float, ...]
    active: tuple[bool, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skewness: tuple[float, ...]
    kurtosis: tuple[float, ...]
    gaussian_gap_bits: tuple[float, ...]
    kl_bits: tuple[float, ...] | None = None
    sigma: tuple[float, ...] | None = None
    sigma_histogram: tuple[float, ...] | None = None
    mutual_bits: tuple[float, ...] | None = None
    marginal_gap_bits: tuple[float, ...] | None = None
    mutual_cap_bits: float | None = None
    high_frequency: float | None = None
    psnr_mode_db: float | None = None
    psnr_sample_db: float | None = None
    psnr_zeroed_db: tuple[float, ...] | None = None
    use_db: tuple[float, ...] | None = None
    ablated: int = 0
    rms: float | None = None
    patch_variances: tuple[float, ...] | None = None

    @property
    def active_share(self) -> float:
        """Active channels / channels."""
        return sum(self.active) / len(self.active)

    @property
    def kl_nats(self) -> tuple[float, ...] | None:
        """`kl_bits` in nats."""
        return None if self.kl_bits is None else tuple(value * NATS for value in self.kl_bits)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        derived = {"active_share": self.active_share, "kl_nats": self.kl_nats, "sigma_edges": SIGMA_EDGES}
        return asdict(self) | derived

    def __str__(self) -> str:
        c, h, w = self.shape
        heads = {"KL bits": "kl_bits", "I bits": "mutual_bits", "gap bits": "marginal_gap_bits", "var mean": "mean_variance"}
        heads |= {"sigma": "sigma", "mean": "mean", "std": "std", "skew": "skewness", "kurtosis": "kurtosis", "use dB": "use_db"}
        columns = {head: getattr(self, name) for head, name in heads.items() if getattr(self, name) is not None}
        lines = [f"{counted(self.n, 'picture')}, latents {c} x {h} x {w}; {sum(self.active)} of {counted(c, 'channel')} active"]
        lines += ["channel" + "".join(f"{head:>10}" for head in columns)]
        for index in range(c):
            cells = "".join(f"{values[index]:10.3g}" for values in columns.values())
            lines.append(f"{index:7}{cells}" + ("" if self.active[index] else "  inactive"))
        lines += [f"{name:52}{value}" for name, value in self._figures().items() if value is not None]
        if self.kl_bits is None:
            lines.append("this autoencoder has no posterior: KL, mutual information and sigma do not apply")
        return "\n".join(lines)

    def _figures(self) -> dict[str, str | None]:
        """What concerns all channels, in words."""

        def shown(value: float | None, unit: str) -> str | None:
            return None if value is None else f"{value:.3f} {unit}".rstrip()

        return {
            "KL of a latent value, mean": shown(sum(self.kl_bits) / len(self.kl_bits) if self.kl_bits else None, "bits"),
            "mutual information can show at most": shown(self.mutual_cap_bits, "bits; near that, the gap shown is too large"),
            "sigma of the latent values": _shares(self.sigma_histogram),
            "PSNR of the mode": shown(self.psnr_mode_db, "dB"),
            "PSNR of a sample": shown(self.psnr_sample_db, "dB"),
            "energy above half Nyquist, rebuilt / pictures": shown(self.high_frequency, ""),
        }


def _shares(histogram: tuple[float, ...] | None) -> str | None:
    """The histogram by decades, as 'from-to: share'."""
    if histogram is None:
        return None
    decades = [(SIGMA_EDGES[at], sum(histogram[at : at + 4])) for at in range(0, len(histogram), 4)]
    return ", ".join(f"{low:g}-{low * 10:g}: {share:.1%}" for low, share in decades if share)


@torch.no_grad()
def measure(stage: VAEStage, batches: Iterable[torch.Tensor], seed: int = 0) -> Health:
    """The health of a VAE on images (each B 3 H W, [-1, 1]); UserError where there are none. `seed` is that of the samples."""
    generator = torch.Generator().manual_seed(seed)
    moments, seen = posterior.Moments(), _Seen(stage, generator)
    for images in batches:
        mean, std = (value.float().cpu() for value in stage.raw_posterior(images))
        moments.add(mean, std)
        seen.add(images.float().cpu(), mean, std)
    if not seen.n:
        raise UserError("There is no picture to measure the VAE on; expected at least one batch of images, B 3 H W.")
    found = moments.result()
    gap = posterior.gaussian_gap(found["mean"], found["std"]) / NATS
    aggregate: dict[str, Any] = {name: tuple(values.tolist()) for name, values in found.items()}
    return Health(
        n=seen.n,
        shape=seen.shape,
        active=tuple((found["mean_variance"] > ACTIVE_VARIANCE).tolist()),
        gaussian_gap_bits=tuple(gap.tolist()),
        **aggregate,
        **seen.posterior_figures(),
        **seen.picture_figures(),
    )


class _Seen:
    """What `measure` sums over batches, beside the moments."""

    def __init__(self, stage: VAEStage, generator: torch.Generator) -> None:
        c = stage.space.channels
        self.stage, self.generator = stage, generator
        self.n = self.values = 0  # pictures; latent values of a channel
        self.shape = (c, 0, 0)
        self.kl, self.sigma = torch.zeros(c, dtype=torch.float64), torch.zeros(c, dtype=torch.float64)
        self.histogram = torch.zeros(len(SIGMA_EDGES) - 1, dtype=torch.float64)
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.where = torch.rand(2, INFORMATION_POSITIONS, generator=generator)  # as shares of height and width
        self.is_random = False
        self.scores: dict[str, list[torch.Tensor]] = {"mode": [], "sample": [], "whole": [], "zeroed": []}
        self.energy = torch.zeros(2, dtype=torch.float64)
        self.squared: list[torch.Tensor] = []
        self.patches = Patches(stage.space.downscale)

    def add(self, images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Take in images (B 3 H W) and their raw posteriors (B C h w), all on the CPU in fp32."""
        self.shape = (mean.shape[1], mean.shape[2], mean.shape[3])
        self.is_random = self.is_random or bool(std.any())
        if self.is_random:
            self._add_posterior(mean, std)
        if self.stage.decodes:
            self._add_pictures(images, mean, std)
        self.n += len(images)

    def _add_posterior(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        self.kl += posterior.kl_values(mean, 2 * std.log()).double().sum((0, 2, 3))
        self.sigma += std.double().sum((0, 2, 3))
        self.values += std[:, 0].numel()
        inside = std.clamp(SIGMA_EDGES[0] * 1.0001, SIGMA_EDGES[-1] * 0.9999)
        self.histogram += torch.histogram(inside.flatten().double(), torch.tensor(SIGMA_EDGES, dtype=torch.float64)).hist
        rows, columns = (self.where * torch.tensor(mean.shape[2:])[:, None]).long()
        left = INFORMATION_PICTURES - self.n
        if left > 0:
            self.kept.append((mean[:left, :, rows, columns], std[:left, :, rows, columns]))

    def _add_pictures(self, images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> None:
        latents = self.stage.space.normalize(mean)
        truth, rebuilt = to_bytes(images), self._decoded(latents)
        self.scores["mode"].append(_psnr(rebuilt, truth))
        if self.is_random:
            noise = torch.randn(mean.shape, generator=self.generator)
            sampled = self._decoded(self.stage.space.normalize(mean + std * noise))
            self.scores["sample"].append(_psnr(sampled, truth))
        self.energy += torch.stack([high_energy(values) for values in (rebuilt, images)])
        self.squared.append((rebuilt - images).double().square().mean((1, 2, 3)))
        self.patches.add(images)
        left = max(1, ABLATION_DECODES // mean.shape[1]) - self.n
        if left > 0:
            self.scores["whole"].append(_psnr(rebuilt[:left], truth[:left]))
            each = [self._without(c, latents[:left], truth[:left]) for c in range(mean.shape[1])]
            self.scores["zeroed"].append(torch.stack(each))

    def _without(self, channel: int, latents: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        zeroed = latents.clone()
        zeroed[:, channel] = 0
        return _psnr(self._decoded(zeroed), truth)

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        return self.stage.decode(latents.to(self.stage.device)).float().cpu().clamp(-1, 1)

    def posterior_figures(self) -> dict[str, Any]:
        """The figures that need a posterior: none for an autoencoder without."""
        if not self.is_random:
            return {}
        mean, std = (torch.cat(parts) for parts in zip(*self.kept, strict=True))  # N C P
        n, c, positions = mean.shape
        information = posterior.mutual_information(mean.flatten(1), std.flatten(1), self.generator)
        information = information.view(c, positions).mean(1)
        kl = posterior.kl_values(mean, 2 * std.log()).double().mean((0, 2))
        return {
            "kl_bits": tuple((self.kl / self.values / NATS).tolist()),
            "sigma": tuple((self.sigma / self.values).tolist()),
            "sigma_histogram": tuple((self.histogram / self.histogram.sum()).tolist()),
            "mutual_bits": tuple((information / NATS).tolist()),
            "marginal_gap_bits": tuple(((kl - information) / NATS).tolist()),
            "mutual_cap_bits": math.log2(n),
        }

    def picture_figures(self) -> dict[str, Any]:
        """The figures that need a decoder: none for an encoder alone."""
        if not self.stage.decodes:
            return {}
        whole, zeroed = torch.cat(self.scores["whole"]), torch.cat(self.scores["zeroed"], 1).mean(1)
        rebuilt, pictures = self.energy.tolist()
        return {
            "psnr_mode_db": torch.cat(self.scores["mode"]).mean().item(),
            "psnr_sample_db": torch.cat(self.scores["sample"]).mean().item() if self.scores["sample"] else None,
            "psnr_zeroed_db": tuple(zeroed.tolist()),
            "use_db": tuple((whole.mean() - zeroed).tolist()),
            "ablated": len(whole),
            "high_frequency": rebuilt / pictures if pictures > 0 else None,
            "rms": torch.cat(self.squared).mean().sqrt().item(),
            "patch_variances": self.patches.largest(self.shape[0]),
        }


def _psnr(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of images (B 3 H W) against uint8 pixels, for each picture: B."""
    return psnr(to_bytes(images), truth).clamp_max(EQUAL_DB)


@torch.no_grad()
def watch(mean: torch.Tensor, logvar: torch.Tensor) -> dict[str, float]:
    """The cheap part of `measure` on the raw posteriors (B C h w) of one training batch, for the log every few steps."""
    mean, logvar = mean.float(), logvar.float()
    variance = mean.transpose(0, 1).flatten(1).var(1, correction=0)
    return {
        "kl_bits_per_latent": posterior.kl_values(mean, logvar).mean().item() / NATS,
        "active_share": (variance > ACTIVE_VARIANCE).float().mean().item(),
        "sigma_mean": (logvar / 2).exp().mean().item(),
    }


def gradient_shares(losses: Mapping[str, torch.Tensor], last: nn.Parameter) -> dict[str, float]:
    """Each loss term's share of the gradient at `last` (the decoder's last weight): norms, divided by their sum.

    The graph is kept, so the training step can go on with the same losses; a term that does not reach `last` has 0.
    """
    norms = {}
    for name, loss in losses.items():
        gradient = torch.autograd.grad(loss, last, retain_graph=True, allow_unused=True)[0] if loss.requires_grad else None
        norms[name] = 0.0 if gradient is None else gradient.float().norm().item()
    total = sum(norms.values())
    return {name: norm / total if total > 0 else 0.0 for name, norm in norms.items()}
