"""The VAEs that ship, on the validation emoji: python benchmarks/shipped.py [--data data/emoji] (writes weights/vae/results.json)

PSNR of the mode (uint8), also of the embedded VAE's latents decoded by the VAEs of its space (what a swap does), and Frechet
distance on the shipped feature network; PSNR with its paired difference to the embedded VAE; equivariance under quarter turns;
decoding time of one picture and of 16, in turns with the embedded VAE in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from latentpipe import VAEStage
from latentpipe.checkpoints.registry import available, bundled_weights_dir, find_model
from latentpipe.checkpoints.vae_io import load_vae, vae_hash
from latentpipe.data.image_folder import read_pictures
from latentpipe.evaluate.metrics.features import open_features
from latentpipe.evaluate.metrics.frechet import frechet_score, paired_frechet
from latentpipe.evaluate.statistics import interval, paired
from latentpipe.train.vae.train import reconstruct
from latentpipe.utils.images import psnr, resized, to_bytes, to_images

SIZE = 64
SAME_SPACE = ("emoji-decoder-ft", "emoji-tiny")
ROUNDS = 15


def decode_ms(stages: dict[str, VAEStage], n: int) -> dict[str, float]:
    """Median milliseconds of decoding `n` pictures, the VAEs in turns."""
    times: dict[str, list[float]] = {name: [] for name in stages}
    for number in range(ROUNDS + 3):
        for name, stage in stages.items():
            latents = torch.randn(stage.space.shape(n, SIZE, SIZE))
            begin = time.perf_counter()
            with torch.no_grad():
                stage.decode(latents)
            if number >= 3:
                times[name].append(1000 * (time.perf_counter() - begin))
    return {name: statistics.median(found) for name, found in times.items()}


@torch.no_grad()
def decoded(stage: VAEStage, source: VAEStage, images: torch.Tensor) -> torch.Tensor:
    """Images (N 3 H W) through the encoder of `source` and the decoder of `stage`."""
    return torch.cat([stage.decode(source.encode(part)) for part in images.split(50)])


@torch.no_grad()
def turned(stage: VAEStage, images: torch.Tensor) -> list[float]:
    """PSNR of decoding turned latents against the turned pictures."""
    parts = [stage.decode(stage.encode(part).rot90(1, (2, 3))) for part in images.split(50)]
    return psnr(to_bytes(torch.cat(parts)), to_bytes(images.rot90(1, (2, 3)))).tolist()


def main() -> None:
    """Measure, print the table of docs/benchmarks, write the figures."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--data", type=Path, default=Path("data/emoji"))
    given = arguments.parse_args()
    images = to_images(resized(read_pictures(given.data / "validation", 128).pixels, SIZE))
    features = open_features("emoji-words")
    names = [name for name, path in available("vae").items() if path.is_relative_to(bundled_weights_dir())]
    stages = {name: VAEStage(load_vae(find_model(name, "vae"))) for name in names}
    truth, own = to_bytes(images), features(images)
    rebuilt = {name: reconstruct(stage, images) for name, stage in stages.items()}
    scores = {name: psnr(to_bytes(values), truth).tolist() for name, values in rebuilt.items()}
    found = {name: features(values.clamp(-1, 1)) for name, values in rebuilt.items()}
    swapped = {name: psnr(to_bytes(decoded(stages[name], stages["emoji"], images)), truth).tolist() for name in SAME_SPACE}
    one, many = decode_ms(stages, 1), decode_ms(stages, 16)
    results = {}
    for name, stage in stages.items():
        results[name] = {
            "hash": vae_hash(find_model(name, "vae")),
            "class": type(stage.vae).__name__,
            "parameters": sum(parameter.numel() for parameter in stage.parameters()),
            "n": len(images),
            "size_px": SIZE,
            "psnr_db": [statistics.fmean(scores[name]), *interval(scores[name])],
            "psnr_minus_emoji": paired(scores[name], scores["emoji"]),
            "decodes_emoji_minus_emoji": paired(swapped[name], scores["emoji"]) if name in swapped else None,
            "frechet_emoji_words": frechet_score(own, found[name]),
            "frechet_minus_emoji": paired_frechet(own, found[name], found["emoji"]),
            "turned_psnr_db": [statistics.fmean(values := turned(stage, images)), *interval(values)],
            "decode_ms": {"1": one[name], "16": many[name]},
            "decode_speed": {"1": one["emoji"] / one[name], "16": many["emoji"] / many[name]},
        }
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    (bundled_weights_dir() / "vae" / "results.json").write_text(
        json.dumps({"machine": machine, "vaes": results}, indent=1) + "\n"
    )
    print(table(results))


def table(results: dict) -> str:
    """Rows of the table in docs/benchmarks."""
    heads = ["VAE", "parameters", "PSNR, dB", "minus `emoji`", "decoding `emoji`'s latents", "Frechet distance on emoji-words"]
    lines = [f"| {' | '.join(heads)} | turned latents, dB | decode, one / 16 |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, row in results.items():
        value, apart, swap, far, turn = (
            row[key]
            for key in ("psnr_db", "psnr_minus_emoji", "decodes_emoji_minus_emoji", "frechet_emoji_words", "turned_psnr_db")
        )
        cells = [
            f"`{name}`",
            f"{row['parameters'] / 1e6:.2f} M",
            _interval(value),
            "-" if name == "emoji" else _interval(apart, "+"),
        ]
        cells += [_interval(swap, "+") if swap else "-", _interval(far, digits=3), _interval(turn, digits=1)]
        speed = row["decode_speed"]
        lines.append(f"| {' | '.join(cells)} | {speed['1']:.1f} x / {speed['16']:.1f} x |")
    return "\n".join(lines)


def _interval(score: list[float], sign: str = "", digits: int = 2) -> str:
    value, low, high = score
    return f"{value:{sign}.{digits}f} ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"


if __name__ == "__main__":
    main()
