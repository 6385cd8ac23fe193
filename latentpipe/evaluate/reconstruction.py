"""Evaluate one VAE on a folder of pictures: encode, decode, and score, in one streaming pass and a few smaller ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from latentpipe.checkpoints.registry import find_model, name_of
from latentpipe.checkpoints.vae_io import open_vae
from latentpipe.evaluate import preprocessing
from latentpipe.evaluate.accumulator import UNITS, Accumulator, MetricNetworks, open_networks
from latentpipe.evaluate.crew import Hired, hired
from latentpipe.evaluate.metrics.latents import TOP_DB, batch_of, cycles, equivariance, nearest, rebuild_batch, slerp, statistics
from latentpipe.evaluate.preprocessing import Plan
from latentpipe.evaluate.protocol import Protocol, find_protocol, round_images
from latentpipe.evaluate.report.text import example_sheet, examples
from latentpipe.evaluate.results import Better, Evaluation, Score
from latentpipe.evaluate.speed import measure_cost
from latentpipe.evaluate.statistics import resampled_means
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.images import bytes_to_images
from latentpipe.utils.io import atomic_file, content_hash
from latentpipe.vae.precision import NAMES
from latentpipe.vae.stage import VAEStage

PROBED = 64  # pictures for what encodes or decodes each several times


def evaluate_vae(
    vae: str | Path | VAEStage,
    folder: Path,
    *,
    protocol: Protocol | str = "latentpipe",
    max_images: int | None = None,
    features: str = "emoji-words",
    full: bool = False,
    probe: int = PROBED,
    cost: bool = True,
    device: str = "cpu",
    sheet: Path | None = None,
    workers: int | None = None,
) -> Evaluation:
    """Measure a VAE on a folder of pictures.

    vae       a name, folder or file, computed in fp32 on `device`; or a stage, as it is
    folder    pictures of any size and kind; broken ones are skipped and named
    protocol  a Protocol, or the name of one
    max_images      the first so many files only
    features  the network of the Frechet and kernel distances (`features.metric_names`)
    full      measure round trips, equivariance and interpolation as well, which encode and decode each picture a dozen times
    probe     with `full`: so many pictures for round trips and equivariance
    cost      with `full`: measure time and memory too
    sheet     a PNG to write: the best, median and worst picture, original, rebuilt and difference
    workers   processes of one thread that share the pictures, for a VAE that is no stage; the figures are those of one such
              process. None: this process alone, with all of its threads

    Memory does not grow with the folder but for the latents (fp16, at most 1 GiB; above that the interpolation is of the
    first pictures) and a row of features for each picture. The same call gives the same figures. UserError: nothing to
    read, a size that the VAE does not take, no decoder.
    """
    with hired(workers, vae, device) as sent:
        return evaluate_with(sent, vae, folder, protocol, max_images, features, full, probe, cost, device, sheet)


def evaluate_with(
    workers: Hired | None,
    vae: str | Path | VAEStage,
    folder: Path,
    protocol: Protocol | str,
    max_images: int | None,
    features: str,
    full: bool,
    probe: int = PROBED,
    cost: bool = False,
    device: str = "cpu",
    sheet: Path | None = None,
) -> Evaluation:
    """As `evaluate_vae`, by workers that are there already, or by this process alone."""
    if probe < 1:
        raise UserError(f"probe is {probe}; expected at least 1 picture.")
    chosen = find_protocol(protocol) if isinstance(protocol, str) else protocol
    stage, name, digest = _open(vae, device)
    if not stage.decodes:
        raise UserError(f"{name} is an encoder alone; it has no decoder, so nothing can be rebuilt. Give one that has both.")
    plan = preprocessing.plan(Path(folder), chosen, stage.space.downscale, max_images)
    with torch.no_grad():
        found = _measure(stage, plan, chosen, features, probe if full else 0, sheet, workers)
        spent = measure_cost(stage, plan.height, plan.width) if full and cost else {}
    return replace(found, name=name, hash=digest, cost=spent)


def _measure(
    stage: VAEStage, plan: Plan, protocol: Protocol, features: str, probe: int, sheet: Path | None, workers: Hired | None
) -> Evaluation:
    """Everything but the names and the cost; `probe` 0: the main pass alone."""
    tools = open_networks(protocol, features, plan.height, plan.width)
    tally = _rebuild(stage, plan, protocol, tools, workers, features)
    scores, rows = summarize(tally, tools)
    if probe:
        probed = _probe(stage, plan, protocol, tally.names[:probe], workers, features)
        for metric, values in probed.items():
            scores[metric] = Score.of(values, *_unit(metric))
            rows[metric] = values + [math.nan] * (len(tally.names) - len(values))
        if not any("half size" in metric for metric in probed):
            tools.missing["equivariance (half size)"] = "a side of the latents is odd"
        scores |= _interpolate(stage, plan, tally, tools)
    else:
        tools.missing["round trips, equivariance, interpolation, time and memory"] = "they encode and decode again (--full)"
    scores |= tally.rates(plan.height * plan.width, tools.missing)
    if sheet is not None:
        _save_sheet(stage, plan, protocol, tally, sheet)
    used = {"features": tools.features.name} if tools.features is not None else {}
    way = {**protocol.about(), **used, "probed": min(probe, len(tally.names))}
    curves = tally.curves() | statistics(np.concatenate(tally.moments))
    return Evaluation(
        "", "", about(stage), _set(plan, tally, tools), way, scores, rows, tally.names, curves, not_measured=tools.missing
    )


def _open(vae: str | Path | VAEStage, device: str) -> tuple[VAEStage, str, str]:
    """The stage, its name and the hash of its weights."""
    if isinstance(vae, VAEStage):
        return vae, type(vae.vae).__name__, vae.digest or content_hash(vae.vae.state_dict(), vae.space)
    path = find_model(vae, "vae")
    opened = open_vae(path)
    digest = content_hash(opened.tensors, opened.space)
    try:
        stage = VAEStage(opened.build(), opened.space, digest).to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return stage, name_of(path, "vae"), digest


def about(stage: VAEStage) -> dict[str, Any]:
    """Class, channels, downscale, parameters, dtype and bytes of the weights in memory."""
    tensors = list(stage.vae.parameters())
    return {
        "class": type(stage.vae).__name__,
        "channels": stage.space.channels,
        "downscale": stage.space.downscale,
        "parameters": sum(tensor.numel() for tensor in tensors),
        "dtype": NAMES.get(stage.dtype, str(stage.dtype)),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }


def _rebuild(
    stage: VAEStage, plan: Plan, protocol: Protocol, tools: MetricNetworks, workers: Hired | None, features: str
) -> Accumulator:
    """Every picture encoded and decoded once, and what is kept of that."""
    tally = Accumulator(stage.space)
    seed, size, total = 0, batch_of(plan.height, plan.width), len(plan.names)
    if workers is not None:
        for names, found in _bar(workers.batches("rebuild", plan, plan.names, protocol, features), total, "rebuild"):
            tally.take(names, found)
    for names, images in _bar([] if workers else preprocessing.read(plan, plan.names, size), total, "rebuild"):
        found = rebuild_batch(stage, images, protocol, range(seed, seed + len(names)))
        tally.add(names, images, found.images, protocol, tools)
        tally.add_latents(found.latents, found.normalized, found.raw)
        seed += len(names)
    if not tally.names:
        listed = "\n".join(f"  skipped {name}: {reason}" for name, reason in plan.skipped.items())
        raise UserError(f"No picture in {plan.folder} could be read.\n{listed}")
    return tally


def summarize(tally: Accumulator, tools: MetricNetworks) -> tuple[dict[str, Score], dict[str, list[float]]]:
    """The scores of the main pass, and their values for each picture."""
    scores = {metric: Score.of(values, *_unit(metric)) for metric, values in tally.values.items()}
    errors = np.asarray(tally.errors)
    low, high = pooled_psnr(np.quantile(resampled_means(errors), (0.975, 0.025))).tolist()
    scores["PSNR of the pooled error"] = Score(float(pooled_psnr(errors.mean())), low, high, len(errors), "dB", "higher")
    scores |= tally.detail()
    if tools.features is not None:
        scores |= tools.distances(tally.features, tally.rebuilt_features)
    return scores, {metric: list(values) for metric, values in tally.values.items()}


def pooled_psnr(error: np.ndarray | float) -> np.ndarray:
    """PSNR in dB of a mean squared error of uint8 values, at most TOP_DB: ``10 log10(255^2 / MSE)``."""
    return 10 * np.log10(255.0**2 / np.maximum(error, 255.0**2 / 10 ** (TOP_DB / 10)))


def _probe(
    stage: VAEStage, plan: Plan, protocol: Protocol, names: list[str], workers: Hired | None, features: str
) -> dict[str, list[float]]:
    """Round trips and equivariance on the named pictures."""
    found: dict[str, list[float]] = {}
    seed = 0
    if workers is not None:
        parts = workers.batches("probe", plan, names, protocol, features, again=True)
        for _, tensors in _bar(parts, len(names), "probe"):
            for metric, row in tensors.items():
                found.setdefault(metric, []).extend(row.tolist())
        return found
    for part, images in _bar(preprocessing.read(plan, names, batch_of(plan.height, plan.width), again=True), len(names), "probe"):
        seeds = range(seed, seed + len(part))
        for metric, values in (cycles(stage, images, protocol, seeds) | equivariance(stage, images, protocol)).items():
            found.setdefault(metric, []).extend(values)
        seed += len(part)
    return found


def _interpolate(stage: VAEStage, plan: Plan, tally: Accumulator, tools: MetricNetworks) -> dict[str, Score]:
    """Distances of decoded midpoints between nearest latents to the pictures, beside the same for cross-faded pictures.

    As iFID (arXiv:2603.05630): each picture's nearest neighbour in latent space, slerp at 0.5, decoded; here the neighbour is
    sought within the set, and the features are those named.
    """
    if tools.features is None:
        return {}
    latents = torch.cat(tally.latents)
    n = len(latents)
    if n < 2:
        tools.missing["interpolation distance"] = f"{n} picture has no neighbour"
        return {}
    partners = nearest(latents.flatten(1)).tolist()
    places = {name: index for index, name in enumerate(tally.names)}
    midpoints: list[np.ndarray] = []
    faded: list[np.ndarray] = []
    for names, images in _bar(
        preprocessing.read(plan, tally.names[:n], batch_of(plan.height, plan.width), again=True), n, "interpolate"
    ):
        mine = [places[name] for name in names]
        theirs = [partners[index] for index in mine]
        wanted = [tally.names[index] for index in theirs]
        others = {part[0]: image[0] for part, image in preprocessing.read(plan, wanted, 1, again=True)}
        between = slerp(latents[mine].float(), latents[theirs].float())
        decoded = bytes_to_images(round_images(stage.decode(between.to(stage.device)).cpu(), "nearest"))
        second = torch.stack([others[name] for name in wanted])
        midpoints.append(tools.describe(decoded))
        faded.append(tools.describe(bytes_to_images(round_images((images + second) / 2, "nearest"))))
    real = [np.concatenate(tally.features)[:n]]
    found = tools.distances(real, midpoints, "interpolation ", kernel=False)
    beside = tools.distances(real, faded, "cross-fade ", kernel=False)  # of pixels: nothing that a VAE is better or worse at
    return found | {metric: replace(score, better="neither") for metric, score in beside.items()}


def _save_sheet(stage: VAEStage, plan: Plan, protocol: Protocol, tally: Accumulator, path: Path) -> None:
    """Rebuild the best, median and worst picture again, and write them."""
    originals, rebuilt, labels = [], [], []
    for word, index in examples(tally.values["PSNR"]).items():
        [(_, images)] = preprocessing.read(plan, [tally.names[index]], 1, again=True)
        originals.append(images)
        rebuilt.append(rebuild_batch(stage, images, protocol, [index]).images)
        labels.append(f"{word}: {tally.names[index]}, {tally.values['PSNR'][index]:.1f} dB")
    with atomic_file(path) as part:
        example_sheet(torch.cat(originals), torch.cat(rebuilt), labels).save(part, format="PNG")


def _set(plan: Plan, tally: Accumulator, tools: MetricNetworks) -> dict[str, Any]:
    """What was fed in, and what to keep in mind about it."""
    notes = []
    if tools.features is not None and len(tally.names) <= tools.features.size:
        notes.append(
            f"{counted(len(tally.names), 'picture')} are no more than the {tools.features.size} features: "
            f"Frechet distances are far too "
            "large, and compare only at the same N"
        )
    if tools.features is not None and sum(map(len, tally.latents)) < len(tally.names):
        notes.append(f"interpolation is of the first {counted(sum(map(len, tally.latents)), 'picture')}, whose latents were kept")
    return {
        "set": plan.folder.resolve().name,
        "n": len(tally.names),
        "size_px": plan.height if plan.height == plan.width else [plan.height, plan.width],
        "sha256": tally.digest.hexdigest(),
        "chosen": plan.how,
        "skipped": dict(plan.skipped),
        "notes": notes,
    }


def _unit(metric: str) -> tuple[str, Better]:
    """Unit and better end of a metric that has a value for each picture."""
    start = next((key for key in UNITS if metric.startswith(key)), None)
    return UNITS[start] if start else ("", "neither")


def _bar(batches: Iterable[Any], total: int, title: str) -> Iterator[Any]:
    """The same batches, with a bar on stderr that counts pictures."""
    with tqdm(total=total, desc=title, unit="picture", disable=None, leave=False) as bar:
        for names, images in batches:
            yield names, images
            bar.update(len(names))
