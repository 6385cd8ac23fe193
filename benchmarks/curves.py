"""Training curves of a run: python benchmarks/curves.py VAE_LOG DENOISER_LOG OUT.png (needs matplotlib)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def series(path: Path, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one figure in a log.jsonl."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    chosen = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in chosen], [value for _, value in chosen]


def smooth(values: list[float], weight: float = 0.97) -> list[float]:
    """Exponential moving average with bias correction."""
    mean, out = 0.0, []
    for index, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**index))
    return out


def main(vae_log: Path, denoiser_log: Path, out: Path) -> None:
    """Validation PSNR of the VAE and smoothed loss of the denoiser, side by side."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(*series(vae_log, "validation_psnr_db"), marker="o", markersize=3)
    left.set(title="VAE: validation PSNR (dB)", xlabel="step")
    steps, values = series(denoiser_log, "v")
    right.plot(steps, values, linewidth=0.3, alpha=0.4)
    right.plot(steps, smooth(values))
    right.set(title="denoiser: v-loss", xlabel="step", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
