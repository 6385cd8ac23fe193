"""Measure several VAEs on the same pictures, compare them, and cut the crops that are shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from latentpipe.checkpoints.registry import find_model, name_of
from latentpipe.checkpoints.vae_io import open_vae
from latentpipe.evaluate import preprocessing
from latentpipe.evaluate.accumulator import KERNEL
from latentpipe.evaluate.comparison import Comparison, SetDifferences, compare
from latentpipe.evaluate.crew import Crew, Hired
from latentpipe.evaluate.metrics.features import metric_names, open_features
from latentpipe.evaluate.metrics.frechet import paired_frechet, paired_kernel
from latentpipe.evaluate.metrics.latents import batch_of, rebuild_batch
from latentpipe.evaluate.protocol import Protocol, find_protocol, round_images
from latentpipe.evaluate.reconstruction import evaluate_with
from latentpipe.evaluate.report.crops import Strip, choose, strip
from latentpipe.evaluate.report.html import write_report
from latentpipe.evaluate.results import Evaluation
from latentpipe.evaluate.speed import measure_cost
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import bytes_to_images
from latentpipe.utils.io import content_hash
from latentpipe.utils.logging import quiet
from latentpipe.vae.stage import VAEStage


def compare_vaes(
    vaes: Sequence[str | Path],
    folder: Path,
    *,
    protocol: str = "latentpipe",
    size: int | None = None,
    max_images: int | None = None,
    features: str = "emoji-words",
    cost: bool = True,
    device: str = "cpu",
    out: Path | None = None,
    command: str = "",
    workers: int | None = None,
) -> Comparison:
    """Evaluate each VAE (name, folder or file) on the pictures of `folder`, and compare all pairs.

    protocol  name of a protocol;  size: side of the pictures in pixels, left out: as the protocol or the pictures say
    max_images      the first so many files only
    features  the network of the Frechet and kernel distances
    cost      measure time and memory as well
    out       an HTML page to write: figures, intervals and crops, self-contained
    command   what the page says that it was made with
    workers   processes of one thread that share the pictures, as for `evaluate_vae`; None: this process alone

    UserError: fewer than two VAEs, one that cannot be opened or has no decoder, or a size that not all of them take.
    """
    folder = Path(folder)
    if out is not None and (out.suffix.lower() not in (".html", ".htm") or out.is_dir()):
        raise UserError(f"--out {out}: expected the name of an HTML file, as report.html.")
    chosen = find_protocol(protocol, size_px=size)
    with nullcontext() if workers is None else Crew(workers, device) as crew:
        found, strips = compare_with_crops(vaes, folder, chosen, max_images, features, cost, device, crew)
    if out is not None:
        write_report(out, found, strips, command)
    return found


def compare_with_crops(
    vaes: Sequence[str | Path],
    folder: Path,
    protocol: Protocol,
    max_images: int | None,
    features: str,
    cost: bool,
    device: str,
    crew: Crew | None = None,
) -> tuple[Comparison, list[Strip]]:
    """As `compare_vaes`; with the crops of the pictures that the page shows."""
    if len(vaes) < 2:
        raise UserError(f"A comparison takes two VAEs or more; given {len(vaes)}. Name another.")
    paths = [find_model(vae, "vae") for vae in vaes]
    stages = [open_stage(path, device) for path in paths]
    chosen = common_protocol(protocol, stages, folder, max_images)
    sent = [None if crew is None else Hired(crew, path) for path in paths]
    evaluations = [
        replace(evaluate_with(one, stage, folder, chosen, max_images, features, full=True), name=short_name(path))
        for path, stage, one in zip(paths, stages, sent, strict=True)
    ]
    if cost:  # one right after the other, since a machine is not as fast at all times
        evaluations = [
            replace(one, cost=measure_cost(stage, *_size(one))) for one, stage in zip(evaluations, stages, strict=True)
        ]
    comparison = compare(evaluations, set_differences(evaluations, stages, folder, chosen, features, sent))
    return comparison, strips_of(comparison, stages, folder, chosen)


def open_stage(path: Path, device: str = "cpu") -> VAEStage:
    """A VAE in fp32 on a device, with the hash of its stored weights."""
    opened = open_vae(path)
    with quiet():
        built = opened.build()
    stage = VAEStage(built.float(), opened.space, content_hash(opened.tensors, opened.space))
    try:
        return stage.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None


def short_name(path: Path) -> str:
    """The name of a VAE for people; one in a folder that is only called "vae" has the name of the folder around it."""
    name = name_of(path, "vae")
    return path.resolve().parent.name if name == "vae" else name


def common_protocol(protocol: Protocol, stages: Sequence[VAEStage], folder: Path, max_images: int | None) -> Protocol:
    """The protocol at a size that every VAE takes: VAEs of different downscales would else crop the pictures differently."""
    factors = [stage.space.downscale for stage in stages]
    if protocol.size_px is not None or len(set(factors)) == 1:
        return protocol
    both = preprocessing.plan(folder, protocol, math.lcm(*factors), max_images)
    if all(
        (plan.height, plan.width) == (both.height, both.width)
        for plan in (preprocessing.plan(folder, protocol, factor, max_images) for factor in set(factors))
    ):
        return protocol
    if both.height != both.width:
        side = min(both.height, both.width)
        raise UserError(
            f"These VAEs take multiples of {', '.join(map(str, sorted(set(factors))))} pixels and would crop the pictures of "
            f"{folder} differently; expected one size for all. Give --size {side}."
        )
    return replace(protocol, size_px=both.height)


def rebuild(
    stage: VAEStage, folder: Path, protocol: Protocol, seeds: Mapping[str, int]
) -> Iterator[tuple[list[str], torch.Tensor, torch.Tensor]]:
    """Pictures of `folder` by name, encoded and decoded as in their evaluation: (names, originals, reconstructions), uint8.

    seeds  for each name its place in the evaluation, from which a sampled posterior takes its noise
    """
    plan = preprocessing.plan(folder, protocol, stage.space.downscale)
    with torch.no_grad():
        for names, images in preprocessing.read(plan, list(seeds), batch_of(plan.height, plan.width)):
            rebuilt = rebuild_batch(stage, images, protocol, [seeds[name] for name in names]).images
            yield names, round_images(images, "nearest"), protocol.to_bytes(rebuilt)


def set_differences(
    evaluations: Sequence[Evaluation],
    stages: Sequence[VAEStage],
    folder: Path,
    protocol: Protocol,
    features: str,
    workers: Sequence[Hired | None] = (),
) -> SetDifferences:
    """Paired differences of the distances between sets for every pair of VAEs; empty where the distances were not measured.

    The pictures are rebuilt once more, since an evaluation keeps no features.
    """
    measured = [name for name in metric_names(features) if all(name in evaluation.scores for evaluation in evaluations)]
    if not measured or any(evaluation.names != evaluations[0].names for evaluation in evaluations):
        return {}
    network = open_features(features)
    seeds = {name: index for index, name in enumerate(evaluations[0].names)}
    originals: list[np.ndarray] = []
    rebuilt: list[np.ndarray] = []
    for stage, sent in zip(stages, workers or [None] * len(stages), strict=True):
        if sent is not None:
            plan = preprocessing.plan(folder, protocol, stage.space.downscale)
            parts = [part for _, part in sent.batches("features", plan, list(seeds), protocol, features, again=True)]
            rebuilt.append(np.concatenate([part["after"].numpy() for part in parts]))
            originals = originals or [part["before"].numpy() for part in parts]
            continue
        pairs = [(before, network(bytes_to_images(after))) for _, before, after in rebuild(stage, folder, protocol, seeds)]
        rebuilt.append(np.concatenate([made for _, made in pairs]))
        if not originals:
            originals = [network(bytes_to_images(before)) for before, _ in pairs]
    real = np.concatenate(originals)
    frechet, kernel = metric_names(features)
    found: dict[tuple[str, int, int], tuple[float, float, float]] = {}
    for a, b in combinations(range(len(stages)), 2):
        if frechet in measured:
            found[frechet, a, b] = paired_frechet(real, rebuilt[a], rebuilt[b])
        if kernel in measured:
            found[kernel, a, b] = paired_kernel(real[:KERNEL], rebuilt[a][:KERNEL], rebuilt[b][:KERNEL])
    return found


def strips_of(comparison: Comparison, stages: Sequence[VAEStage], folder: Path, protocol: Protocol) -> list[Strip]:
    """The crops of the pictures that `crops.choose` names, in its order."""
    chosen = choose(comparison)
    place = {name: index for index, name in enumerate(comparison.evaluations[0].names)}
    seeds = {name: place[name] for name in chosen}
    before: dict[str, np.ndarray] = {}
    after: dict[str, list[np.ndarray]] = {name: [] for name in chosen}
    for stage in stages:
        for names, originals, rebuilt in rebuild(stage, folder, protocol, seeds):
            for name, original, other in zip(names, _arrays(originals), _arrays(rebuilt), strict=True):
                before[name] = original
                after[name].append(other)
    rows = [evaluation.per_picture["PSNR"] for evaluation in comparison.evaluations] if chosen else []
    return [
        strip(name, why, before[name], after[name], comparison.labels, [row[place[name]] for row in rows])
        for name, why in chosen.items()
    ]


def _size(evaluation: Evaluation) -> tuple[int, int]:
    """Height and width of the pictures."""
    size = evaluation.pictures["size_px"]
    return (size[0], size[1]) if isinstance(size, list) else (size, size)


def _arrays(pixels: torch.Tensor) -> np.ndarray:
    """uint8 B 3 H W as B H W 3."""
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()
