"""How far draws from a prior are from real emoji: python benchmarks/sample.py [--data data/emoji] [--out benchmarks/explore]

For each VAE: Frechet distance (64 px) of draws from N(0, I), of a Gaussian and of mixtures fitted to the posteriors of the
training pictures, and of reconstructions, to pictures that nothing was trained on (validation and held-out). Other real pictures:
as many of training, the distance that real sets have at this N. Beside it what the prior has to match: the
rate in bits a picture, and how far each latent's distribution is from N(0, 1). Writes sample.json, and sample-NAME.png with the
first draws of each prior (seeds 0 to 9) and the second ten unseen pictures, nothing selected otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from latentpipe import VAEStage
from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import load_vae, vae_hash
from latentpipe.data import image_set
from latentpipe.evaluate.health import measure
from latentpipe.evaluate.metrics.features import Features, open_features
from latentpipe.explore import sample
from latentpipe.explore.prior import Prior, aggregate, normal
from latentpipe.explore.traverse import page
from latentpipe.utils.images import to_pixels

SIZE = 64
SHOWN = 10
COMPONENTS = (1, 10)


def mixed(pictures: image_set.PictureSet) -> image_set.PictureSet:
    """The same pictures in a fixed random order."""
    order = torch.randperm(len(pictures.images), generator=torch.Generator().manual_seed(0)).tolist()
    return image_set.PictureSet(
        pictures.name, pictures.images[order], [pictures.captions[row] for row in order], [pictures.keys[row] for row in order]
    )


def read(data: Path) -> tuple[image_set.PictureSet, image_set.PictureSet]:
    """The training pictures, and those that nothing was trained on."""
    train = mixed(image_set.read_set(data / "train", SIZE))
    parts = [image_set.read_set(data / name, SIZE) for name in ("validation", "held_out")]
    unseen = image_set.PictureSet(
        "validation and held_out",
        torch.cat([part.images for part in parts]),
        [caption for part in parts for caption in part.captions],
        [key for part in parts for key in part.keys],
    )
    return train, mixed(unseen)


def priors_of(stage: VAEStage, train: image_set.PictureSet) -> dict[str, Prior]:
    """N(0, I), and what is fitted to samples of the posteriors."""
    latents = image_set.encode(stage, train.images, generator=torch.Generator().manual_seed(0))
    found = [normal(stage.space.shape(1, SIZE, SIZE)[1:]), *(aggregate(latents, k) for k in COMPONENTS)]
    return {prior.name: prior for prior in found}


def row_of(
    stage: VAEStage, train: image_set.PictureSet, unseen: image_set.PictureSet, features: Features
) -> tuple[dict[str, Any], dict[str, Prior]]:
    """Distances to both sets, and the figures that say how near the posteriors are to N(0, I)."""
    priors = priors_of(stage, train)
    health = measure(stage, train.images[:500].split(50))
    rate = None if health.kl_bits is None else sum(health.kl_bits) * (SIZE // stage.space.downscale) ** 2
    row: dict[str, Any] = {
        "latents": math.prod(stage.space.shape(1, SIZE, SIZE)),
        "rate_bits_per_picture": rate,
        "bits_that_name_a_training_picture": math.log2(len(train.images)),
        "active_share": health.active_share,
        "mean_gap_to_normal_bits_per_latent": sum(health.gaussian_gap_bits) / len(health.gaussian_gap_bits),
    }
    scores = sample.distances(stage, priors, unseen, features, train.images[: len(unseen.images)])
    row["unseen"] = sample.figures(scores, unseen, SIZE, features)
    return row, priors


def picture(stage: VAEStage, priors: dict[str, Prior], unseen: image_set.PictureSet) -> Any:
    """Unseen pictures, their reconstructions, and the first draws of each prior."""
    real = unseen.images[SHOWN : 2 * SHOWN]  # the first ten hold a rude gesture
    rows = {"unseen pictures": real, "rebuilt": image_set.decode(stage, image_set.encode(stage, real))}
    rows |= {name: sample.draw(stage, prior, SHOWN) for name, prior in priors.items()}
    return page([to_pixels(images) for images in rows.values()], list(rows), [""] * SHOWN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--vae", nargs="+", default=["emoji-vector", "emoji"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/explore"))
    given = parser.parse_args()
    train, unseen = read(given.data)
    features = open_features("emoji-words")
    given.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {}
    for name in given.vae:
        path = find_model(name, "vae")
        stage = VAEStage(load_vae(path))
        row, priors = row_of(stage, train, unseen, features)
        result[path.name if "/" in name else name] = {"hash": vae_hash(path), **row}
        picture(stage, priors, unseen).quantize(256).save(given.out / f"sample-{Path(name).name}.png", optimize=True)
        print(name, {key: value for key, value in row.items() if key != "unseen"})
        print(sample.Samples(None, "", row["unseen"]).table())  # type: ignore[arg-type]
    (given.out / "sample.json").write_text(json.dumps(result, indent=2) + "\n")
    print(given.out / "sample.json")


if __name__ == "__main__":
    main()
