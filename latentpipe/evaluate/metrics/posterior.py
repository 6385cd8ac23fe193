"""Closed forms about diagonal Gaussian posteriors, each one function with its source. Everything in nats.

mean, std, logvar   B C h w, in the VAE's own (raw) units; the prior is N(0, 1) for each latent value
"""

from __future__ import annotations

import math

import torch

NATS = math.log(2)  # in one bit


def kl_values(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of each latent value, B C h w, in fp32 (fp64 where given).

    ``0.5 (mu^2 + sigma^2 - 1 - ln sigma^2)`` (Kingma and Welling, arXiv:1312.6114, appendix B).
    """
    wide = torch.promote_types(mean.dtype, torch.float32)
    mean, logvar = mean.to(wide), logvar.to(wide)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def mutual_information(mean: torch.Tensor, std: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """I(x; z) of each scalar latent with the pictures at hand, in nats: ``E_q(z|x) [ln q(z|x) - ln q(z)]``, mean over x.

    mean, std  N U: posteriors of N pictures for U latents (std > 0); returns U, fp64
    ``q(z) = 1/N sum_n q(z|x_n)`` by log-mean-exp over those pictures (Hoffman and Johnson, "ELBO surgery", 2016), one
    sample of each posterior. It cannot exceed ln N, however much the latent says.
    """
    mean, std = mean.double(), std.double()
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
    n = len(mean)
    found = []
    for m, s, e in zip(mean.T, std.T, noise.T, strict=True):
        z = m + s * e
        log_joint = -0.5 * ((z[:, None] - m) / s).square() - s.log()  # sample, posterior; without the constant
        own = -0.5 * e.square() - s.log()
        found.append((own - (log_joint.logsumexp(1) - math.log(n))).mean())
    return torch.stack(found)


class Moments:
    """Streamed mean, std, skewness and excess kurtosis of the aggregate posterior ``q(z) = E_x q(z|x)``, for each channel.

    Nothing is sampled: with posteriors N(m, s^2) the raw moments of the mixture are the means of ``m``, ``m^2 + s^2``,
    ``m^3 + 3 m s^2`` and ``m^4 + 6 m^2 s^2 + 3 s^4``. Also the variance of the posterior means alone.
    """

    def __init__(self) -> None:
        self.count = 0
        self.origin = torch.empty(0)  # C; sums are about it, so that a far mean costs no digits
        self.sums = torch.empty(0)  # 5 C

    def add(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Take in posteriors, B C h w each (std 0: points)."""
        m, v = (value.double().movedim(1, 0).flatten(1).cpu() for value in (mean, std.double().square()))
        if not self.count:
            self.origin, self.sums = m.mean(1), torch.zeros(5, len(m), dtype=m.dtype)
        m = m - self.origin[:, None]
        parts = (m, m**2 + v, m**3 + 3 * m * v, m**4 + 6 * m**2 * v + 3 * v**2, m**2)
        self.sums += torch.stack([part.sum(1) for part in parts])
        self.count += m.shape[1]

    def result(self) -> dict[str, torch.Tensor]:
        """mean, std, skewness, kurtosis (excess; 0 for a Gaussian, and where a channel is constant), mean_variance: C each."""
        first, second, third, fourth, of_means = self.sums / self.count
        variance = (second - first**2).clamp_min(0)
        # a channel that is constant up to rounding has no shape
        spread = torch.where(variance > 1e-12 * (1 + self.origin**2), variance, torch.inf)
        skewness = (third - 3 * first * second + 2 * first**3) / spread**1.5
        kurtosis = (fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4) / spread**2 - 3
        return {
            "mean": self.origin + first,
            "std": variance.sqrt(),
            "skewness": skewness,
            "kurtosis": torch.where(spread.isinf(), 0.0, kurtosis),
            "mean_variance": (of_means - first**2).clamp_min(0),
        }


def gaussian_gap(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """KL to N(0, 1) of the Gaussian with an aggregate's moments, in nats: C, C to C.

    A lower bound of KL(q(z) || N(0, 1)), to which the aggregate's distance from a Gaussian adds exactly (ln of the ratio
    of two Gaussians is quadratic, so its mean needs no more than the moments).
    """
    return kl_values(mean, 2 * std.clamp_min(1e-12).log())
