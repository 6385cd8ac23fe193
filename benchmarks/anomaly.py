"""Anomalies, measured: python benchmarks/anomaly.py digits|artwork|defects [--out benchmarks/explore/anomaly]

digits   one-class detection on scikit-learn's ten digits (8 x 8): a small VAE learns one digit, the rest of the ten-digit half
         that nothing was trained on is to be told from it; 10 digits x SEEDS; and latent size against AUROC (anomaly.png)
artwork  held-out Noto emoji against other artists' pictures, through the embedded VAE (needs LATENTPIPE_ASSETS)
defects  scratches, blobs, swapped patches, blur and colour shifts on held-out emoji, through the embedded VAE
Each prints a table and writes NAME.json. AUROC: 0.5 is chance, that of AUPRC the share of anomalies. Minutes each on two cores.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from latentpipe import VAEStage
from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import open_vae
from latentpipe.data import defects, image_set
from latentpipe.data.image_set import read_given_pictures
from latentpipe.evaluate.metrics.features import open_features
from latentpipe.evaluate.metrics.posterior import kl_values
from latentpipe.explore.anomaly import detector as anomaly
from latentpipe.explore.anomaly.conformal import auprc, auroc, with_interval
from latentpipe.explore.anomaly.heatmap import heatmap_page
from latentpipe.utils.images import to_arrays
from latentpipe.vae.latent_space import LatentSpace

SIZES = (2, 4, 8, 16, 32, 64)  # numbers in the latent
MAIN, SEEDS, STEPS, BATCH = 8, 3, 100, 32
SIDE = 64
PUBLISHED = {"OCSDF": "95.5 +- 0.4", "Deep SVDD": "94.8 +- 0.9", "isolation forest": "92.3", "one-class SVM": "91.3"}


def small_vae(numbers: int, seed: int) -> VAEStage:
    """8 x 8 -> one vector of `numbers`."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 8, 16, 32),
        layers_per_block=1,
        latent_channels=numbers,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=8,
        scaling_factor=1.0,
    )
    return VAEStage(vae, LatentSpace.of(vae))


def train(images: torch.Tensor, numbers: int, seed: int, kl: float = 1e-2) -> VAEStage:
    """A VAE of these pictures: squared error (mean over values) + kl x KL (nats) / values."""
    stage = small_vae(numbers, seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(stage.parameters(), 5e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS)
    for _ in range(STEPS):
        batch = images[torch.randint(len(images), (BATCH,), generator=generator)]
        noise = torch.randn(len(batch), numbers, 1, 1, generator=generator)
        rebuilt, posterior = stage(batch, noise=noise)
        loss = (rebuilt - batch).square().mean() + kl * kl_values(posterior.mean, posterior.logvar).sum((1, 2, 3)).mean() / 192
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return stage.eval()


def one_class(images: torch.Tensor, labels: np.ndarray, digit: int, seed: int, numbers: int) -> dict[str, float]:
    """AUROC of each score for one digit: trained on it in one half, tested on all ten in the other."""
    order = np.random.default_rng(seed).permutation(len(labels))
    known, test = order[: len(order) // 2], order[len(order) // 2 :]
    known = known[labels[known] == digit]
    other = labels[test] != digit
    stage = train(images[known], numbers, seed)
    asked = [part for part in anomaly.PARTS if part != "feature"]  # the network that ships knows emoji, no 8 x 8 digits
    fit, _ = anomaly.measure(stage, images[known], asked)
    raw, _ = anomaly.measure(stage, images[test], asked)
    logs = {part: np.log(values + anomaly.LEAST) for part, values in fit.items()}
    parts, total = anomaly.standardised(
        raw, {part: values.mean() for part, values in logs.items()}, {part: values.std() for part, values in logs.items()}
    )
    scores = parts | {"all four": total} | baselines(flat(images[known]), flat(images[test]))
    return {name: 100 * auroc(values[~other], values[other]) for name, values in scores.items()}


def flat(images: torch.Tensor) -> np.ndarray:
    """Rows of values."""
    return images.flatten(1).double().numpy()


def baselines(known: np.ndarray, test: np.ndarray, kept: int = 8) -> dict[str, np.ndarray]:
    """Scores without a network: distance from a principal subspace, from the nearest known picture, and the norm."""
    mean = known.mean(0)
    axes = np.linalg.svd(known - mean, full_matrices=False)[2][:kept]
    centred = test - mean
    rest = centred - centred @ axes.T @ axes
    near = (np.square(test).sum(1)[:, None] - 2 * test @ known.T + np.square(known).sum(1)[None]).min(1)
    return {f"PCA {kept}": np.square(rest).sum(1), "nearest neighbour": near, "pixel norm": np.square(test).sum(1)}


def digits() -> dict[str, Any]:
    """Protocol a, with the curve."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None].repeat(1, 3, 1, 1) / 8 - 1
    found: dict[str, Any] = {"pictures": len(images), "published (MNIST, another set)": PUBLISHED, "curve": {}}
    curve: dict[int, list[float]] = {}
    jobs = [(n, seed, digit) for n in SIZES for seed in range(SEEDS if n == MAIN else 1) for digit in range(10)]
    with ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        waiting = {job: pool.submit(one_class, images, data.target, job[2], job[1], job[0]) for job in jobs}
        done = {}
        for job, row in waiting.items():
            done[job] = row.result()
            print(f"  {len(done)} of {len(jobs)}", end="\r", flush=True)
    for numbers in SIZES:
        seeds = range(SEEDS if numbers == MAIN else 1)
        runs = [[done[numbers, seed, digit] for digit in range(10)] for seed in seeds]
        means = {name: [float(np.mean([run[name] for run in row])) for row in runs] for name in runs[0][0]}
        curve[numbers] = [run["pixel"] for run in runs[0]]
        found["curve"][numbers] = {name: values[0] for name, values in means.items()} | {"pixel, each digit": curve[numbers]}
        if numbers == MAIN:
            found["mean AUROC"] = {name: {"mean": np.mean(v), "sd": np.std(v, ddof=1), "seeds": v} for name, v in means.items()}
            found["each digit"] = {
                digit: {name: np.mean([row[digit][name] for row in runs]) for name in means} for digit in range(10)
            }
        print(f"  {numbers:3} numbers  pixel {means['pixel'][0]:.1f}  all four {means['all four'][0]:.1f}", flush=True)
    for name, row in found["mean AUROC"].items():
        print(f"  {name:20} {row['mean']:6.2f} +- {row['sd']:.2f}  ({SEEDS} seeds x 10 digits, {MAIN} numbers)")
    for name, text in PUBLISHED.items():
        print(f"  {name:20} {text}  (published, MNIST at 28 x 28: another set)")
    plot(found["curve"], Path(__file__).with_suffix(".png"))
    return found


def plot(curve: dict[int, dict[str, Any]], path: Path) -> None:
    """Latent size against mean AUROC."""
    from PIL import ImageDraw, ImageFont

    heatmap_page = Image.new("RGB", (640, 400), (255, 255, 255))
    draw, font = ImageDraw.Draw(heatmap_page), ImageFont.load_default(13)
    names = {"pixel": (0, 114, 178), "kl": (213, 94, 0), "all four": (0, 158, 115), "PCA 8": (140, 140, 140)}
    values = [row[name] for row in curve.values() for name in names]
    low, high = 5 * np.floor(min(values) / 5), 100

    def at(index: int, value: float) -> tuple[float, float]:
        return 70 + index * 100, 330 - (value - low) / (high - low) * 260

    for value in np.linspace(low, high, 6):
        y = at(0, value)[1]
        draw.line([(60, y), (590, y)], fill=(225, 225, 225))
        draw.text((22, y - 8), f"{value:.0f}", fill=(60, 60, 60), font=font)
    for index, numbers in enumerate(curve):
        draw.text((at(index, low)[0] - 6, 338), str(numbers), fill=(60, 60, 60), font=font)
    for rank, (name, colour) in enumerate(names.items()):
        points = [at(index, row[name]) for index, row in enumerate(curve.values())]
        draw.line(points, fill=colour, width=3)
        for x, y in points:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        draw.rectangle((70 + rank * 140, 40, 84 + rank * 140, 48), fill=colour)
        draw.text((90 + rank * 140, 36), name, fill=(60, 60, 60), font=font)
    draw.text((70, 10), "One-class digits, 8 x 8: mean AUROC over ten digits (%)", fill=(0, 0, 0), font=font)
    draw.text((70, 366), "numbers in the latent (PCA: always 8 components, no network)", fill=(60, 60, 60), font=font)
    heatmap_page.save(path, optimize=True)


def embedded() -> VAEStage:
    """The embedded VAE."""
    file = open_vae(find_model("emoji", "vae"))
    return VAEStage(file.build(), file.space).eval()


def unseen() -> torch.Tensor:
    """Emoji that the VAE was not trained on: validation and held out."""
    return torch.cat([image_set.read_set(None, SIDE, None, split).images for split in ("validation", "held_out")])


def halves(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A fixed shuffle, cut in two: to learn from, and to test on."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    return images[order[: len(order) // 2]], images[order[len(order) // 2 :]]


def table(normal: dict[str, np.ndarray], strange: dict[str, np.ndarray]) -> dict[str, Any]:
    """AUROC and AUPRC of every score, with intervals; printed."""
    rows: dict[str, Any] = {}
    for name, values in normal.items():
        roc, prc = (with_interval(measure, values, strange[name], resamples=500) for measure in (auroc, auprc))
        rows[name] = {"AUROC": asdict(roc), "AUPRC": asdict(prc)}
        text = f"AUROC {roc.value:.3f} [{roc.low:.3f}, {roc.high:.3f}]  AUPRC {prc.value:.3f} [{prc.low:.3f}, {prc.high:.3f}]"
        print(f"  {name:28} {text}", flush=True)
    return rows


def plain(images: torch.Tensor, known: torch.Tensor) -> dict[str, np.ndarray]:
    """Scores that know no VAE: bytes as JPEG, entropy of the grey levels, PCA, nearest neighbour, distance in features."""
    found: dict[str, Any] = {"JPEG bytes": [], "grey entropy": []}
    for array in to_arrays(images):
        file = io.BytesIO()
        Image.fromarray(array).save(file, format="JPEG", quality=75)
        found["JPEG bytes"].append(len(file.getvalue()))
        found["grey entropy"].append(Image.fromarray(array).convert("L").entropy())
    small = [flat(torch.nn.functional.avg_pool2d(part, 2)) for part in (known, images)]
    found |= baselines(small[0], small[1], 32)
    network = open_features("emoji-words")
    base, here = network(known), network(images)
    inverse = np.linalg.inv(np.cov(base.T) + 1e-2 * np.eye(base.shape[1]) * np.trace(np.cov(base.T)) / base.shape[1])
    away = here - base.mean(0)
    found["Mahalanobis, emoji-words"] = np.einsum("ni,ij,nj->n", away, inverse, away)
    return {name: np.asarray(values, np.float64) for name, values in found.items()}


def artwork() -> dict[str, Any]:
    """Protocol b."""
    root = Path(os.environ["LATENTPIPE_ASSETS"]) / "data"
    known, test = halves(unseen())
    detector = anomaly.calibrate(embedded(), known, 0.05, "emoji")
    calm = detector.score(test)
    normal = {"all five": calm.total} | calm.parts | plain(test, known)
    found: dict[str, Any] = {"normal": len(test), "false alarms, asked 0.05": float(calm.anomalous.mean())}
    print(f"normal: {len(test)} unseen Noto emoji; false alarms {calm.anomalous.mean():.3f} (asked: 0.05)")
    for name in ("crawl_tiles32", "twemoji72", "fluent3d"):
        images = read_given_pictures([root / name], SIDE, True, 300).images
        result = detector.score(images)
        print(f"{name}: {len(images)} pictures, {result.anomalous.mean():.3f} flagged")
        rows = table(normal, {"all five": result.total} | result.parts | plain(images, known))
        found[name] = {"n": len(images), "flagged": float(result.anomalous.mean()), "scores": rows}
    return found


def pro(maps: np.ndarray, masks: np.ndarray, most: float = 0.3) -> float:
    """Per-region overlap up to a false-positive rate of 0.3, normalised (Bergmann et al., CVPR 2019); one region each."""
    limits = np.quantile(maps[~masks], np.linspace(1 - most, 1, 100))
    rates = [float((maps[~masks] > limit).mean()) for limit in limits]
    overlap = [np.mean([(one[mask] > limit).mean() for one, mask in zip(maps, masks, strict=True)]) for limit in limits]
    order = np.argsort(rates)
    return float(np.trapezoid(np.array(overlap)[order], np.array(rates)[order]) / max(rates))


def by_picture(maps: np.ndarray, masks: np.ndarray, measure: Callable[..., float]) -> dict[str, float]:
    """A measure of maps and masks with its 95 % bootstrap interval over pictures."""
    random = np.random.default_rng(0)
    draws = []
    for _ in range(30):
        rows = random.integers(0, len(maps), len(maps))
        draws.append(measure(maps[rows], masks[rows]))
    low, high = np.quantile(draws, (0.025, 0.975))
    return {"value": measure(maps, masks), "low": float(low), "high": float(high), "n": len(maps)}


def pixel_auroc(maps: np.ndarray, masks: np.ndarray) -> float:
    """AUROC over all pixels together."""
    return auroc(maps[~masks], maps[masks])


def planted(out: Path) -> dict[str, Any]:
    """Protocol c."""
    known, test = halves(unseen())
    detector = anomaly.calibrate(embedded(), known, 0.05, "emoji")
    calm = detector.score(test)
    found: dict[str, Any] = {"normal": len(test)}
    shown = []
    for kind in defects.KINDS:
        images, masks = defects.plant(test, kind)
        kept = masks.flatten(1).any(1)
        images, masks = images[kept], masks[kept]
        result, maps = detector.both(images)
        print(f"{kind}: {len(images)} pictures, mask {masks.float().mean():.3f} of each, {result.anomalous.mean():.3f} flagged")
        rows = table({"all five": calm.total} | calm.parts, {"all five": result.total} | result.parts)
        where = {name: by_picture(maps.numpy(), masks.numpy(), run) for name, run in (("pixel AUROC", pixel_auroc), ("PRO", pro))}
        for name, row in where.items():
            print(f"  {name:28} {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")
        found[kind] = {"n": len(images), "flagged": float(result.anomalous.mean()), "scores": rows, "where": where}
        shown += [(images[i], maps[i], kind) for i in (0, 3)]
    sheet = heatmap_page(
        torch.stack([x for x, _, _ in shown]), torch.stack([x for _, x, _ in shown]), [x for _, _, x in shown], 4
    )
    sheet.save(out / "defects.png", optimize=True)
    return found


def main() -> None:
    """One protocol."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=("digits", "artwork", "defects"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/explore/anomaly"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    runs = {"digits": digits, "artwork": artwork, "defects": lambda: planted(given.out)}
    found = runs[given.protocol]()
    (given.out / f"{given.protocol}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
