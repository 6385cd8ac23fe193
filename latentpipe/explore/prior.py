"""Where latents are drawn from: N(0, I), or a mixture of Gaussians that is fitted to the latents of pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from latentpipe.explore.directions import components
from latentpipe.utils.errors import UserError
from latentpipe.utils.progress import ProgressCallback

KEPT = 32  # principal components that the mixture is fitted in
FLOOR = 1e-3  # added to its variances, of 1 in all
ROUNDS = 100


@dataclass(frozen=True)
class Prior:
    """A distribution over latents C h w: its name in words, and `draw`, one latent (C h w) from a generator."""

    name: str
    draw: Callable[[torch.Generator], torch.Tensor]

    def sample(self, n: int, seed: int = 0) -> torch.Tensor:
        """Latents n C h w; number i depends on ``seed + i`` alone, so more draws leave the first as they are."""
        if n < 1:
            raise UserError(f"{n} draws were asked for; expected 1 or more.")
        return torch.stack([self.draw(torch.Generator().manual_seed(seed + index)) for index in range(n)])


@dataclass(frozen=True)
class Mixture:
    """A mixture of K Gaussians in D dimensions, float64: weights K, means K D, factors K D D (covariance ``L L'``)."""

    weights: torch.Tensor
    means: torch.Tensor
    factors: torch.Tensor

    def log_density(self, rows: torch.Tensor) -> torch.Tensor:
        """Log density in nats of rows N D for each Gaussian with its weight, N K; logsumexp over K is the mixture's."""
        size = rows.shape[1]
        parts = []
        for weight, mean, factor in zip(self.weights, self.means, self.factors, strict=True):
            white = torch.linalg.solve_triangular(factor, (rows - mean).T, upper=False)
            parts.append(
                weight.log() - factor.diagonal().log().sum() - 0.5 * (white.square().sum(0) + size * math.log(2 * math.pi))
            )
        return torch.stack(parts, 1)


def normal(shape: tuple[int, int, int]) -> Prior:
    """N(0, I) over latents of this shape (C h w): what the KL term of a VAE draws its posteriors towards."""
    return Prior("N(0, I)", lambda generator: torch.randn(shape, generator=generator))


def aggregate(latents: torch.Tensor, k: int = 10, seed: int = 0, report: ProgressCallback | None = None) -> Prior:
    """The distribution of given latents (N C h w, samples of the posteriors): a mixture of `k` Gaussians.

    It is fitted in the first 32 principal components; the others are independent and normal with their variance. With k = 1 it
    is the Gaussian of the same mean and covariance. What a VAE was really decoded from differs from N(0, I) (Tomczak and
    Welling, arXiv:1705.07120); a density fitted afterwards draws better pictures (Ghosh et al., arXiv:1903.12436).
    UserError: too few pictures.
    """
    rows = latents.flatten(1).double()
    if len(rows) < max(2, 4 * k):
        raise UserError(f"A mixture of {k} Gaussians needs the latents of {max(2, 4 * k)} pictures and more; given {len(rows)}.")
    if report is not None:
        report(0, ROUNDS, "mixture")
    mean = rows.mean(0)
    axes, variances = components(rows)
    axes, variances = axes[variances > 1e-12], variances[variances > 1e-12]
    scales = variances.sqrt()
    kept = min(KEPT, len(axes))
    mixture = fit_mixture((rows - mean) @ axes[:kept].T / scales[:kept], k, seed, report)
    shape = latents.shape[1:]

    def draw(generator: torch.Generator) -> torch.Tensor:
        which = int(torch.multinomial(mixture.weights, 1, generator=generator))
        noise = torch.randn(len(axes), generator=generator, dtype=torch.float64)
        noise[:kept] = mixture.means[which] + mixture.factors[which] @ noise[:kept]
        return (mean + (noise * scales) @ axes).view(shape).float()

    return Prior(f"mixture of {k} Gaussians" if k > 1 else "Gaussian of the pictures", draw)


def fit_mixture(rows: torch.Tensor, k: int, seed: int = 0, report: ProgressCallback | None = None) -> Mixture:
    """Expectation maximization (Dempster, Laird and Rubin 1977) with full covariances on rows N D, from a seeded start.

    The start puts each row to the nearest of `k` rows that lie far apart (k-means++, Arthur and Vassilvitskii 2007). It ends
    where the mean log likelihood gains less than 1e-4, or after 100 rounds.
    """
    nearest = torch.cdist(rows, _seeds(rows, k, seed)).argmin(1)
    shares = torch.nn.functional.one_hot(nearest, k).to(rows)
    before = -math.inf
    for done in range(ROUNDS):
        mixture = _maximized(rows, shares)
        densities = mixture.log_density(rows)
        whole = densities.logsumexp(1, keepdim=True)
        shares = (densities - whole).exp()
        now = whole.mean().item()
        if report is not None:
            report(done + 1, ROUNDS, "mixture")
        if now - before < 1e-4:
            break
        before = now
    if report is not None:
        report(ROUNDS, ROUNDS, "mixture")
    return mixture


def _maximized(rows: torch.Tensor, shares: torch.Tensor) -> Mixture:
    """The mixture that is likeliest where row n belongs to Gaussian k with `shares` (N K); its variances get a floor."""
    totals = shares.sum(0).clamp_min(1e-8)
    means = shares.T @ rows / totals[:, None]
    floor = FLOOR * torch.eye(rows.shape[1], dtype=rows.dtype)
    factors = []
    for share, total, mean in zip(shares.T, totals, means, strict=True):
        centred = rows - mean
        factors.append(torch.linalg.cholesky((centred * share[:, None]).T @ centred / total + floor))
    return Mixture(totals / totals.sum(), means, torch.stack(factors))


def _seeds(rows: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    """`k` rows, each drawn with a chance that grows with the square of its distance from those before."""
    generator = torch.Generator().manual_seed(seed)
    chosen = rows[torch.randint(len(rows), (1,), generator=generator)]
    for _ in range(k - 1):
        distance = torch.cdist(rows, chosen).min(1).values.square().clamp_min(1e-12)
        chosen = torch.cat([chosen, rows[torch.multinomial(distance, 1, generator=generator)]])
    return chosen
