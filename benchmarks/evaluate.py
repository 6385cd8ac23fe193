"""`evaluate_vae` against a plain loop of encode, decode and torchmetrics on the same pictures, in turns.

python benchmarks/evaluate.py [--size 256] [--n 12] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from latentpipe.data.image_folder import read_pictures
from latentpipe.evaluate.reconstruction import evaluate_vae
from latentpipe.pipelines.swap import stage_of
from latentpipe.utils.images import to_images, to_pixels
from latentpipe.vae.probe_images import probe_images


def plain(vae: object, folder: Path, size: int) -> dict[str, float]:
    """The loop that one would write: batches of 4, and three metrics of torchmetrics on bytes."""
    from torchmetrics.functional.image import (
        multiscale_structural_similarity_index_measure as ms_ssim,
    )
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio as psnr,
    )
    from torchmetrics.functional.image import (
        structural_similarity_index_measure as ssim,
    )

    found: dict[str, list[float]] = {"psnr": [], "ssim": [], "ms_ssim": []}
    images = to_images(read_pictures(folder, size).pixels)
    with torch.no_grad():
        for batch in images.split(4):
            rebuilt = vae.decode(vae.encode(batch).latent_dist.mode()).sample  # type: ignore[attr-defined]
            first, second = (((part + 1) * 127.5).round().clamp(0, 255) for part in (batch, rebuilt))
            for name, metric, options in (
                ("psnr", psnr, {"reduction": "none", "dim": (1, 2, 3)}),
                ("ssim", ssim, {"reduction": "none"}),
                ("ms_ssim", ms_ssim, {"reduction": "none", "betas": (0.0448, 0.2856, 0.3001)}),
            ):
                values: Any = metric(second, first, data_range=255.0, **options)
                found[name] += values.tolist()
    return {name: statistics.fmean(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--n", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vae", default="emoji")
    given = parser.parse_args()
    stage = stage_of(given.vae)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index, image in enumerate(to_pixels(probe_images(given.n, given.size))):
            Image.Image.save(image, folder / f"{index:03}.png")
        times: dict[str, list[float]] = {"plain": [], "evaluate_vae": []}
        for _ in range(given.rounds + 1):
            for label, run in (
                ("plain", lambda: plain(stage.vae, folder, given.size)),
                ("evaluate_vae", lambda: evaluate_vae(stage, folder)),
            ):
                before = time.perf_counter()
                run()
                times[label].append(time.perf_counter() - before)
    ratios = [ours / theirs for ours, theirs in zip(times["evaluate_vae"][1:], times["plain"][1:], strict=True)]
    spread = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    seconds = {label: round(statistics.median(values[1:]), 3) for label, values in times.items()}
    print(json.dumps({"n": given.n, "size_px": given.size, "vae": given.vae, "seconds": seconds, "ratio": spread}, indent=1))


if __name__ == "__main__":
    main()
