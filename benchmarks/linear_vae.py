"""Where a linear VAE collapses, against theory: python benchmarks/linear_vae.py [OUT.png] (needs matplotlib).

Data x (D) has covariance S with eigenvalues l_i; the decoder is x = W z + noise of variance s^2, the prior N(0, I), the
posterior N(V x, diag(d)), the loss ``|x - W z|^2 / (2 s^2) + beta KL``. Its optimum is that of probabilistic PCA (Lucas et
al., "Don't blame the ELBO!", arXiv:1911.02469) with noise beta s^2 in place of s^2:

    given W with orthogonal columns w_i along the eigenvectors, the best posterior has d_i = 1 / (1 + w_i^2 / (beta s^2)),
    V x = d_i w_i . x / (beta s^2); the loss then falls in w_i^2 until w_i^2 = max(0, l_i - beta s^2).

So mode i has, while beta s^2 < l_i: variance of the posterior mean 1 - beta s^2 / l_i, sigma^2 = beta s^2 / l_i and
KL = ln(l_i / (beta s^2)) / 2; and it collapses, all three at their prior values, where beta s^2 >= l_i.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from latentpipe.evaluate.health import ACTIVE_VARIANCE
from latentpipe.train.vae.kl import kl_channels, with_free_bits

EIGENVALUES = (4.0, 2.0, 1.0, 0.5, 0.06, 0.03)
NOISE = 0.1  # s^2
LATENTS = 4
FREE_BITS = 0.25  # for each latent
COLOURS = ("#0b3c5d", "#1d7a8c", "#d9822b", "#b3261e")


@dataclass(frozen=True)
class Trained:
    """A linear VAE after training: for each latent, largest first, the variance of the posterior mean, KL in nats, sigma^2."""

    variance: list[float]
    kl: list[float]
    sigma2: list[float]

    @property
    def active(self) -> int:
        """Latents whose posterior mean varies by more than ACTIVE_VARIANCE."""
        return sum(value > ACTIVE_VARIANCE for value in self.variance)


def data(n: int = 64, seed: int = 0) -> torch.Tensor:
    """`n` points (n D, fp64) with mean 0 and exactly the covariance of EIGENVALUES, along random axes."""
    generator = torch.Generator().manual_seed(seed)
    d = len(EIGENVALUES)
    axes = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    points = torch.randn(n, d, generator=generator, dtype=torch.float64)
    left = torch.linalg.svd(points - points.mean(0), full_matrices=False).U  # columns of mean 0 and norm 1
    return left * math.sqrt(n) * torch.tensor(EIGENVALUES, dtype=torch.float64).sqrt() @ axes.T


def train(x: torch.Tensor, beta: float, free_bits: float = 0.0, steps: int = 10, seed: int = 0) -> Trained:
    """Minimize the loss on `x` (n D) by L-BFGS, with the expectation over z in closed form: nothing is sampled.

    Free bits put kinks into the loss, at which L-BFGS may stop short of the optimum.
    """
    generator = torch.Generator().manual_seed(seed)
    d = x.shape[1]
    encoder, decoder = ((0.3 * torch.randn(d, LATENTS, generator=generator, dtype=x.dtype)).requires_grad_() for _ in range(2))
    logvar = torch.zeros(LATENTS, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([encoder, decoder, logvar], max_iter=20, line_search_fn="strong_wolfe", tolerance_change=0)

    def parts() -> tuple[torch.Tensor, torch.Tensor]:
        mean = x @ encoder
        error = (x - mean @ decoder.T).square().sum(1).mean() + (logvar.exp() * decoder.square().sum(0)).sum()
        shape = (*mean.shape, 1, 1)
        return error / (2 * NOISE), kl_channels(mean.view(shape), logvar.expand_as(mean).reshape(shape))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        reconstruction, kl = parts()
        loss = reconstruction + beta * with_free_bits(kl, free_bits)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    variance = (x @ encoder.detach()).var(0, correction=0)
    order = variance.argsort(descending=True)
    kl, sigma2 = parts()[1].detach(), logvar.detach().exp()
    return Trained(*(values[order].tolist() for values in (variance, kl, sigma2)))


def collapse_beta(x: torch.Tensor, mode: int, low: float, high: float, halvings: int = 8) -> float:
    """The beta at which fewer than `mode` + 1 latents stay active, by bisection on ln(beta) between `low` and `high`."""
    for _ in range(halvings):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if train(x, middle).active > mode else (low, middle)
    return math.sqrt(low * high)


def main(out: Path) -> None:
    """Sweep beta with and without free bits, print measured against predicted, draw variance, KL and active latents."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit("The plot needs matplotlib: pip install matplotlib, then run this again.") from None
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    x = data()
    predicted = [value / NOISE for value in EIGENVALUES[:LATENTS]]
    for mode, theory in enumerate(predicted):
        found = collapse_beta(x, mode, 0.1, 400)
        print(f"eigenvalue {EIGENVALUES[mode]:g}: collapses at beta {theory:.2f} in theory, {found:.2f} measured")
    betas = [10 ** (-0.5 + index / 14) for index in range(36)]
    plain, freed = ([train(x, beta, bits) for beta in betas] for bits in (0.0, FREE_BITS))
    print(f"active at beta {betas[-1]:.0f}: {plain[-1].active} of {LATENTS}; with {FREE_BITS} free bits {freed[-1].active}")
    draw(out, betas, plain, freed, predicted)


def draw(out: Path, betas: list[float], plain: list[Trained], freed: list[Trained], predicted: list[float]) -> None:
    """The picture: points are trained, lines are theory, dashed lines the predicted collapse of each mode."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.3), layout="constrained", sharex=True)
    point = {"marker": "o", "linestyle": "", "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.6}
    fine = [betas[0] * (betas[-1] / betas[0]) ** (index / 600) for index in range(601)]
    for mode, (colour, threshold) in enumerate(zip(COLOURS, predicted, strict=True)):
        variance = [max(0.0, 1 - beta / threshold) for beta in fine]
        bits = [0.5 * math.log2(max(1.0, threshold / beta)) for beta in fine]
        axes[0].plot(fine, variance, color=colour, linewidth=1.6)
        axes[1].plot(fine, bits, color=colour, linewidth=1.6, label=f"mode {mode + 1}, eigenvalue {EIGENVALUES[mode]:g}")
        axes[0].plot(betas, [run.variance[mode] for run in plain], color=colour, **point)
        axes[1].plot(betas, [run.kl[mode] / math.log(2) for run in plain], color=colour, **point)
        for axis in axes:
            axis.axvline(threshold, color=colour, linestyle=(0, (4, 3)), linewidth=0.9, alpha=0.7, zorder=0)
    axes[2].step(fine, [sum(beta < threshold for threshold in predicted) for beta in fine], color="#555555", linewidth=1.6)
    axes[2].plot(betas, [run.active for run in plain], color="#555555", label="plain KL", **point)
    axes[2].plot(
        betas, [run.active for run in freed], color="#3a7d34", label=f"{FREE_BITS} free bits", **(point | {"marker": "D"})
    )
    axes[0].set(title="variance of the posterior mean", ylim=(-0.03, 1.03))
    axes[1].set(title="KL, bits for each latent", ylim=(-0.1, 3.6))
    axes[2].set(title=f"active latents of {LATENTS} (variance above {ACTIVE_VARIANCE:g})", ylim=(-0.13, LATENTS + 0.13))
    axes[2].set_yticks(range(LATENTS + 1))
    for axis in axes:
        axis.set(xscale="log", xlabel="beta", xlim=(betas[0], betas[-1] * 1.05))
        axis.set_xticks([1, 5, 10, 20, 40, 100], ["1", "5", "10", "20", "40", "100"])
        axis.tick_params(which="minor", bottom=False)
        axis.grid(alpha=0.2, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(fontsize=9, loc="upper right", framealpha=1, edgecolor="white")
    axes[2].legend(fontsize=9, loc="center left", framealpha=1, edgecolor="white")
    figure.suptitle("A linear VAE: points are trained, lines are theory, dashed lines the predicted collapse of each mode")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "collapse" / "linear.png")
