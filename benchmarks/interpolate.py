"""Latent paths against cross-fades: python benchmarks/interpolate.py [--vae emoji emoji-vector] [--pairs 130] [--out FOLDER]

Pairs of held-out emoji of the bank that ships: each with another of a fixed mixed order, so that every emoji is a first and a
second once. Both ends of the cross-fade are the VAE's reconstructions, as on the latent path: what differs is the way alone.
Features: emoji-words, which ship; the Frechet distance of midpoints is to the first pictures as they are.
Writes interpolate.json and a sheet, interpolate.png: for some pairs the cross-fade and each way of each VAE.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from latentpipe import VAEStage
from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import load_vae, vae_hash
from latentpipe.data.image_set import decode, encode, first, read_set
from latentpipe.evaluate.metrics.features import open_features
from latentpipe.explore import interpolate, smoothness, traverse
from latentpipe.utils.images import to_pixels

SIZE = 64
FRAMES = 9
LEAST = 100


def paths_of(stage: VAEStage, latents: torch.Tensor, order: list[int], way: str, bank: Any) -> list[torch.Tensor]:
    """One path for each pair (i, order[i]): images FRAMES 3 H W."""
    found = []
    for index, other in enumerate(order):
        ends = latents[index : index + 1], latents[other : other + 1]
        found.append(decode(stage, interpolate.path(*ends, FRAMES, way, bank)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", nargs="*", default=["emoji", "emoji-vector"])
    parser.add_argument("--pairs", type=int, default=130)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/explore"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    known = first(read_set(None, SIZE, split="held_out"), given.pairs)
    n = len(known.images)
    order = [(index + n // 2) % n for index in range(n)]
    features = open_features("emoji-words")
    real = features(known.images)
    shown = [index for index in (0, 7, 11) if index < n]
    result: dict[str, Any] = {"set": known.name, "pairs": n, "frames": FRAMES, "size_px": SIZE}
    result |= {"features": features.name, "features_hash": features.hash, "vaes": {}}
    rows: list[list[Any]] = []
    names: list[str] = []
    for name in given.vae:
        place = find_model(name, "vae")
        stage = VAEStage(load_vae(place)).eval()
        latents = encode(stage, known.images)
        bank = interpolate.density(encode(stage, read_set(None, SIZE, interpolate.BANK, split="train").images))
        ends = decode(stage, latents)
        fades = [smoothness.cross_fade(ends[index], ends[other], FRAMES) for index, other in enumerate(order)]
        fade = smoothness.walks(features, fades)
        rows += [to_pixels(fades[index]) for index in shown]
        names += [f"{name}: cross-fade"] * len(shown)
        found: dict[str, Any] = {"hash": vae_hash(place), "latents": list(latents.shape[1:])}
        for way in interpolate.WAYS:
            paths = paths_of(stage, latents, order, way, bank)
            found[way] = smoothness.compare(smoothness.walks(features, paths), fade, real, min(LEAST, n))
            rows += [to_pixels(paths[index]) for index in shown]
            names += [f"{name}: {way}"] * len(shown)
            print(name, way, json.dumps(found[way], indent=1), flush=True)
        result["vaes"][name] = found
    # pair by pair: the ways beneath each other
    by_pair = [place for pair in range(len(shown)) for place in range(pair, len(rows), len(shown))]
    heads = [f"{index / (FRAMES - 1):.0%}" for index in range(FRAMES)]
    page = traverse.page([rows[place] for place in by_pair], [names[place] for place in by_pair], heads)
    page.quantize(64).save(given.out / "interpolate.png", optimize=True)
    (given.out / "interpolate.json").write_text(json.dumps(result, indent=2) + "\n")
    print(given.out / "interpolate.json")


if __name__ == "__main__":
    main()
