"""What latents mean: python benchmarks/traverse.py [--data data/emoji] [--factors FOLDER ...] [--out benchmarks/explore]

1  Edits of the skin tone, light to dark: emoji of 60 kinds, none of which the directions were learnt from (one direction for
   all, and local ones of 40 neighbours), at several strengths; what is read from the result, and what stays.
2  Disentanglement of VAEs that were trained on drawn factors (--factors, folders of VAEs; their pictures are drawn here), beside
   the principal components of the pixels, the factors themselves and noise.
3  Sheets: traverse-NAME.png, edit-NAME.png, factors-NAME.png.

The VAEs of 2: python -m latentpipe.data.factor_shapes data/factors, then
latentpipe train-vae drawn-factors --loss.kl KL --run.out runs/factors-KL/vae --run.work runs/factors-KL
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentpipe import VAEStage
from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import load_vae, vae_hash
from latentpipe.data import factor_shapes, image_set
from latentpipe.evaluate.health import measure
from latentpipe.explore import attributes, directions, traverse
from latentpipe.explore import disentanglement as disentangle
from latentpipe.utils.images import bytes_to_images, to_pixels

SIZE = 64
KINDS = 60
STRENGTHS = (1.0, 1.5, 2.0)
SHOWN = 1.5  # of them, on the page
SPLITS = 5  # of the pictures into a half to learn from and one to test on
NOMINAL = (0, 4)  # shape, and hue, which goes round


def edits(stage: VAEStage, everything: image_set.PictureSet) -> tuple[dict[str, Any], Any]:
    """Light to dark, judged; and a page of the first emoji: before, rebuilt, either edit, the emoji's own dark picture."""
    pairs = attributes.pairs_of(everything.captions, "light", "dark")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:KINDS].tolist()
    pairs = [pairs[index] for index in order]
    kind = [attributes.TONE.sub("", texts[0]) if texts else "" for texts in everything.captions]
    tested = {kind[source] for source, _ in pairs}
    known = [row for row in range(len(kind)) if kind[row] not in tested]
    latents = image_set.encode(stage, everything.images)
    tones = attributes.labels([everything.captions[row] for row in known], "skin tone")
    sources, targets = ([pair[side] for pair in pairs] for side in (0, 1))
    images, goals = everything.images[sources], everything.images[targets]
    rebuilt, ceiling = (image_set.decode(stage, latents[rows]) for rows in (sources, targets))
    wanted = [everything.captions[row][0] for row in targets]
    (one,) = directions.supervised(latents[known], {"skin tone": tones})
    ways: dict[str, directions.Direction | Sequence[directions.Direction]] = {
        "one direction": one,
        "local": attributes.local(latents[sources], latents[known], tones, "skin tone"),
    }
    found: dict[str, Any] = {"kinds": len(pairs), "learnt_from": len(known)}
    shown = []
    for name, way in ways.items():
        for strength in STRENGTHS:
            edited = attributes.edit(stage, images, way, strength)
            judged = attributes.judge(edited, rebuilt, goals, ceiling, wanted)
            shown += [edited] if strength == SHOWN else []
            found[f"{name}, strength {strength:g}"] = {key: asdict(score) for key, score in asdict_scores(judged).items()}
    columns = [images, rebuilt, *(edited[:8] for edited in shown), goals]
    rows = [to_pixels(torch.stack([column[index] for column in columns])) for index in range(8)]
    heads = ["picture", "rebuilt", "one dir.", "local", "its dark"]
    return found, traverse.page(rows, [caption.replace("dark skin tone", "").strip() for caption in wanted[:8]], heads)


def asdict_scores(judged: attributes.ToneEdit) -> dict[str, Any]:
    """The scores by name."""
    return {name: getattr(judged, name) for name in attributes.ToneEdit.__dataclass_fields__}


def sheet(stage: VAEStage, everything: image_set.PictureSet) -> Any:
    """The sheet of the verb, from a woman astronaut."""
    latents = image_set.encode(stage, everything.images[:1500])
    found = traverse.ranked(stage, latents[:8], traverse.candidates(latents, everything.captions[:1500]))[:8]
    start = next(row for row, texts in enumerate(everything.captions) if any("woman astronaut" in text for text in texts))
    return traverse.sheet(stage, image_set.encode(stage, everything.images[start : start + 1]), [one for one, _ in found])


def disentanglement(codes: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """MIG and SAP with bootstrap intervals; DCI as the mean and the ends over random halves."""
    row: dict[str, Any] = {"mig": asdict(disentangle.scored(disentangle.mig, codes, truth))}
    halves = np.array([disentangle.dci(codes, truth, seed) for seed in range(SPLITS)])
    for name, values in zip(("disentanglement", "completeness", "informativeness"), halves.T, strict=True):
        row[f"dci_{name}"] = {"value": values.mean(), "least": values.min(), "most": values.max(), "halves": SPLITS}
    by_order: Callable[[np.ndarray, np.ndarray], float] = lambda code, factor: disentangle.sap(code, factor, NOMINAL)  # noqa: E731
    row["sap"] = asdict(disentangle.scored(by_order, codes, truth))
    return row


def factor_rows(folders: list[Path], out: Path) -> dict[str, Any]:
    """Every VAE on every drawn picture, and three codes to read the figures against."""
    truth = factor_shapes.grid()
    images = bytes_to_images(torch.from_numpy(factor_shapes.draw_factors(truth, SIZE)).permute(0, 3, 1, 2))
    small = torch.nn.functional.avg_pool2d(images, 4).flatten(1).double()
    axes, _ = directions.components(small)
    random = np.random.default_rng(0)
    result = {
        "the factors themselves": disentanglement(truth.astype(float), truth),
        "noise": disentanglement(random.standard_normal((len(truth), 10)), truth),
        "10 principal components of the pixels": disentanglement((small @ axes[:10].T).numpy(), truth),
    }
    for folder in folders:
        stage = VAEStage(load_vae(folder))
        codes = image_set.encode(stage, images)
        name = folder.parent.name if folder.name == "vae" else folder.name
        health = measure(stage, images[::7].split(50))
        result[name] = disentanglement(codes.flatten(1).double().numpy(), truth)
        result[name] |= {"hash": vae_hash(folder), "active_share": health.active_share}
        result[name]["kl_bits_per_picture"] = None if health.kl_bits is None else sum(health.kl_bits)
        start = image_set.encode(stage, images[len(truth) // 2 : len(truth) // 2 + 1])
        ranked = [one for one, _ in traverse.ranked(stage, codes[::431], directions.channels(codes))]
        traverse.sheet(stage, start, ranked[:8]).quantize(256).save(out / f"{name}.png", optimize=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--vae", nargs="*", default=["emoji-vector", "emoji"])
    parser.add_argument("--factors", nargs="*", type=Path, default=[])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/explore"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "traverse.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    parts = [image_set.read_set(given.data / name, SIZE) for name in ("train", "validation", "held_out")] if given.vae else []
    for name in given.vae:
        everything = image_set.PictureSet(
            "emoji",
            torch.cat([part.images for part in parts]),
            [caption for part in parts for caption in part.captions],
            [key for part in parts for key in part.keys],
        )
        where = find_model(name, "vae")
        stage = VAEStage(load_vae(where))
        found, page = edits(stage, everything)
        result.setdefault("edits", {})[name] = {"hash": vae_hash(where), **found}
        page.quantize(256).save(given.out / f"edit-{Path(name).name}.png", optimize=True)
        sheet(stage, everything).quantize(256).save(given.out / f"traverse-{Path(name).name}.png", optimize=True)
    if given.factors:
        result["disentanglement"] = factor_rows(given.factors, given.out)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
