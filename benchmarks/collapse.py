"""Posterior collapse on demand, and its cures: python benchmarks/collapse.py [--steps 400] [--seeds 0 1]

On the emoji set (latentpipe emoji --out data/emoji) a small VAE is trained with a beta that is too high, and again, with nothing
else changed, with free bits and with a cyclical beta. Active units (channels whose posterior mean has a variance above 0.01 over
pictures and positions), KL and PSNR are those of the validation pictures; the prior gap (KL of the aggregate posterior, as a
Gaussian, to N(0, I)) is that of the last sheet, in the units of training. Writes benchmarks/collapse/emoji.{json,png}.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from latentpipe.checkpoints.vae_io import load_vae
from latentpipe.data.image_folder import read_pictures
from latentpipe.evaluate.diagnosis import alarms
from latentpipe.evaluate.health import measure
from latentpipe.evaluate.statistics import interval, paired
from latentpipe.train.config import TrainVAE
from latentpipe.train.vae.train import reconstruct, train_vae
from latentpipe.utils.images import psnr, to_bytes, to_images
from latentpipe.vae.stage import VAEStage

HERE = Path(__file__).parent / "collapse"
BETA = 64.0
RUNS: dict[str, dict[str, Any]] = {
    "beta 64": {"kl": BETA},
    "beta 64, 0.25 free bits": {"kl": BETA, "free_bits": 0.25},
    "beta 64, cyclical": {"kl": BETA, "schedule": "cyclical", "cycles": 4, "ramp": 0.9},
    "beta 0.1": {"kl": 0.1},
}


def config_of(root: Path, data: Path, loss: dict, seed: int, steps: int) -> TrainVAE:
    """One run: 8 channels at 1/4 size, L2 only, whole pictures of 32 pixels."""
    return TrainVAE.model_validate(
        {
            "data": {"train": data / "train", "validation": data / "validation", "read_size_px": 32},
            "run": {"out": root / "vae", "work": root / "work", "seed": seed, "sample_every_steps": max(1, steps // 8)},
            "optim": {"steps": steps, "batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 30, "ema_decay": 0.98},
            "model": {"channels": 8, "blocks": (16, 32, 64)},
            "loss": {"l1": 0.0, "l2": 1.0, "equivariance": 0.0, **loss},
            "crops": {"size_px": 32, "whole": 1.0},
        }
    )


def run(data: Path, loss: dict, seed: int, steps: int) -> dict:
    """Train and measure what was saved."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder), data, loss, seed, steps)
        train_vae(config)
        rows = [json.loads(line) for line in (config.run.work / "log.jsonl").read_text().splitlines()]
        stage = VAEStage(load_vae(config.run.out))
    images = to_images(read_pictures(data / "validation", 32).pixels)
    health = measure(stage, images.split(50))
    values = psnr(to_bytes(images), to_bytes(reconstruct(stage, images)))
    low, high = interval(values.numpy())
    gaps = [row["health.prior_gap_bits"] for row in rows if "health.prior_gap_bits" in row]  # before the latents were normalized
    return {
        "seed": seed,
        "active_share": health.active_share,
        "mean_variance": health.mean_variance,
        "kl_bits": health.kl_bits,
        "prior_gap_bits": gaps[-1],
        "psnr_db": [values.mean().item(), low, high],
        "values": [round(value, 3) for value in values.tolist()],
        "n": len(images),
        "alarms": alarms(health, {f"loss.{name}": value for name, value in config.loss.model_dump().items()}),
        "curve": [[row["step"], row["health.active_share"]] for row in rows if "health.active_share" in row],
    }


def table(results: dict) -> str:
    """The figures of the saved VAEs, mean over seeds."""
    lines = [f"{'run':26}{'active units':>14}{'KL, bits a latent':>20}{'prior gap, bits':>18}{'validation PSNR':>34}"]
    for name, runs in results.items():
        active = ", ".join(f"{found['active_share']:.0%}" for found in runs)
        kl = sum(sum(found["kl_bits"]) / 8 for found in runs) / len(runs)
        gap = sum(found["prior_gap_bits"] for found in runs) / len(runs)
        scores = ", ".join(f"{found['psnr_db'][0]:.2f}" for found in runs)
        lines.append(f"{name:26}{active:>14}{kl:20.3f}{gap:18.3f}{scores:>31} dB")
    first, *others = results
    for name in others:
        pairs = zip(results[name], results[first], strict=True)
        apart = [paired(mine["values"], collapsed["values"]) for mine, collapsed in pairs]
        shown = "; ".join(f"{mean:+.2f} ({low:+.2f} to {high:+.2f})" for mean, low, high in apart)
        lines.append(f"PSNR of '{name}' minus '{first}', paired, 95 %, by seed: {shown} dB")
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Active units over the steps, KL of each channel, PSNR."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = ["#b8291d", "#2d7f2a", "#0f5f8c", "#777777"]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for index, ((name, runs), colour) in enumerate(zip(results.items(), colours, strict=True)):
        for number, found in enumerate(runs):
            steps, shares = zip(*found["curve"], strict=True)
            left.plot(steps, [100 * share for share in shares], color=colour, alpha=0.85, label=None if number else name)
            bits = sorted(found["kl_bits"], reverse=True)
            middle.plot(range(1, 9), bits, "o-", markersize=4, color=colour, alpha=0.85)
            mean, low, high = found["psnr_db"]
            place = index + 0.18 * (number - (len(runs) - 1) / 2)
            right.errorbar(place, mean, [[mean - low], [high - mean]], fmt="o", color=colour, capsize=3)
    left.set(title="active units while training, % of 8 channels", xlabel="step", ylim=(-4, 104))
    left.axhline(30, color="#bbbbbb", linewidth=0.8, linestyle="--")
    left.axhline(90, color="#bbbbbb", linewidth=0.8, linestyle="--")
    left.legend(frameon=False)
    middle.set(title="KL of each channel, bits a latent (sorted)", xlabel="channel")
    middle.set_yscale("symlog", linthresh=0.1)
    right.set(title="PSNR of 150 validation emoji, dB (95 %)", xticks=range(len(results)))
    right.set_xticklabels([name.replace(", ", ",\n") for name in results])
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run everything, print the table, write the figures and the plot."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--data", type=Path, default=Path("data/emoji"))
    arguments.add_argument("--steps", type=int, default=400)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments.add_argument("--out", type=Path, default=HERE)
    given = arguments.parse_args()
    results = {name: [run(given.data, loss, seed, given.steps) for seed in given.seeds] for name, loss in RUNS.items()}
    given.out.mkdir(parents=True, exist_ok=True)
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    (given.out / "emoji.json").write_text(
        json.dumps({"steps": given.steps, "machine": machine, "runs": results}, indent=1) + "\n"
    )
    print(table(results))
    for name, runs in results.items():
        print(f"{name}: {runs[0]['alarms'] or 'no alarm'}")
    try:
        plot(results, given.out / "emoji.png")
    except ImportError:
        print("no plot: it needs matplotlib")


if __name__ == "__main__":
    main()
