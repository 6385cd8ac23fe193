"""Batches of an evaluation by several workers: each takes the same batches as one would, and what they find is put in order.

Every worker computes in one thread, so figures do not depend on how many there are; beside an evaluation without workers, which
uses all threads, the last bits of a figure may differ.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import open_vae
from latentpipe.evaluate import preprocessing
from latentpipe.evaluate.accumulator import Accumulator, MetricNetworks, open_networks
from latentpipe.evaluate.metrics.latents import batch_of, cycles, equivariance, rebuild_batch
from latentpipe.evaluate.preprocessing import Plan
from latentpipe.evaluate.protocol import Protocol, round_images
from latentpipe.utils.cluster import opened_on
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import bytes_to_images
from latentpipe.utils.io import content_hash, read_tensors
from latentpipe.utils.worker_process import Emit, Job
from latentpipe.utils.workers import MOST_WORKERS, Pool
from latentpipe.vae.stage import VAEStage

Tensors = dict[str, torch.Tensor]


class Crew:
    """Workers that evaluate VAEs, within a `with` block.

    workers  how many
    device   that each computes on; "cuda": the GPUs in turn
    """

    def __init__(self, workers: int, device: str = "cpu") -> None:
        if not 1 <= workers <= MOST_WORKERS:
            raise UserError(f"workers is {workers}; expected 1 to {MOST_WORKERS:,}.")
        self.workers, self.device = workers, device

    def __enter__(self) -> Crew:
        self.folder = Path(tempfile.mkdtemp(prefix="latentpipe-crew-"))
        own = None if self.device == "cuda" else self.device
        self._context = opened_on(None, "latentpipe.evaluate.crew:open_evaluation", {"folder": str(self.folder)}, 1, own)
        self._pool = Pool(self.workers, self._context.__enter__(), lambda task: f"The batch from {task['names'][0]} on")
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.__exit__()
        self._context.__exit__(None, None, None)
        shutil.rmtree(self.folder, ignore_errors=True)

    def batches(
        self, kind: str, vae: Path, plan: Plan, names: Sequence[str], protocol: Protocol, features: str, again: bool = False
    ) -> Iterator[tuple[list[str], Tensors]]:
        """What the workers find in each batch of the named files, in order: its names and tensors.

        kind   "rebuild", "probe" or "features"
        again  as for `preprocessing.read`: broken files are left out the first time, which shifts what follows them
        """
        size, left, first = batch_of(plan.height, plan.width), list(names), 0
        way = {"plan": _plain(plan), "protocol": asdict(protocol), "features": features}
        while left:
            tasks = [
                {"kind": kind, "vae": str(vae), **way, "names": left[at : at + size], "first": first + at}
                for at in range(0, len(left), size)
            ]
            waiting: dict[int, Tensors] = {}
            broken: dict[str, str] = {}
            merged = first
            for task, found in self._pool.run(tasks):
                if found["skipped"] and again:
                    name, reason = next(iter(found["skipped"].items()))
                    raise UserError(f"{name} was changed while it was measured ({reason}). Leave the folder alone meanwhile.")
                broken |= found["skipped"]
                path = self.folder / found["file"]
                if not found["skipped"]:
                    waiting[task["first"]] = {} if broken and task["first"] > merged else read_tensors(path)
                path.unlink()
                while waiting.get(merged):
                    tensors, part = waiting.pop(merged), left[merged - first : merged - first + size]
                    yield part, tensors
                    merged += len(part)
            plan.skipped |= {name: broken[name] for name in left if name in broken}
            left, first = [name for name in left[merged - first :] if name not in broken], merged


@dataclass(frozen=True)
class Hired:
    """A crew at one VAE."""

    crew: Crew
    vae: Path

    def batches(
        self, kind: str, plan: Plan, names: Sequence[str], protocol: Protocol, features: str, again: bool = False
    ) -> Iterator[tuple[list[str], Tensors]]:
        """As `Crew.batches`."""
        return self.crew.batches(kind, self.vae, plan, names, protocol, features, again)


@contextmanager
def hired(workers: int | None, vae: str | Path | VAEStage, device: str) -> Iterator[Hired | None]:
    """So many workers at a VAE, or none; UserError where a stage is to be sent to processes."""
    if workers is None:
        yield None
        return
    if isinstance(vae, VAEStage):
        raise UserError("workers open the VAE themselves; give its name, folder or file in place of a stage.")
    with Crew(workers, device) as crew:
        yield Hired(crew, find_model(vae, "vae"))


def _plain(plan: Plan) -> dict[str, Any]:
    return asdict(replace(plan, names=[], skipped={})) | {"folder": str(plan.folder)}


# --- in a worker --------------------------------------------------------------------------------------------


def open_evaluation(arguments: dict[str, str], device: str) -> Job:
    """The work of one: a batch -> the file of its tensors. VAEs and networks stay open."""
    stages: dict[str, VAEStage] = {}
    networks: dict[str, MetricNetworks] = {}

    @torch.no_grad()
    def work(task: Any, emit: Emit, cancel: threading.Event) -> dict[str, Any]:
        vae = task["vae"]
        if vae not in stages:
            opened = open_vae(Path(vae))
            stages[vae] = VAEStage(opened.build(), opened.space, content_hash(opened.tensors, opened.space)).to(device)
        protocol = Protocol(**{**task["protocol"], "open": tuple(task["protocol"]["open"])})
        plan = Plan(**{**task["plan"], "folder": Path(task["plan"]["folder"])})
        key = f"{protocol} {task['features']} {plan.height} {plan.width}"
        if key not in networks:
            networks[key] = open_networks(protocol, task["features"], plan.height, plan.width)
        batches = list(preprocessing.read(plan, task["names"], max(1, len(task["names"]))))
        name = f"{task['kind']}-{task['first']}-{threading.get_native_id()}.safetensors"
        found = {"none": torch.zeros(1)}
        if batches and not plan.skipped:
            [(names, images)] = batches
            seeds = range(task["first"], task["first"] + len(names))
            found = KINDS[task["kind"]](stages[vae], names, images, protocol, seeds, networks[key])
        save_file({key: value.contiguous() for key, value in found.items()}, Path(arguments["folder"]) / name)
        return {"file": name, "skipped": plan.skipped}

    return work


def _rebuild(
    stage: VAEStage, names: list[str], images: torch.Tensor, protocol: Protocol, seeds: range, tools: MetricNetworks
) -> Tensors:
    tally = Accumulator(stage.space)
    found = rebuild_batch(stage, images, protocol, seeds)
    tally.add(names, images, found.images, protocol, tools)
    tally.add_latents(found.latents, found.normalized, found.raw)
    return tally.given() | {"bytes": round_images(images, "nearest").permute(0, 2, 3, 1)}


def _probe(
    stage: VAEStage, names: list[str], images: torch.Tensor, protocol: Protocol, seeds: range, tools: MetricNetworks
) -> Tensors:
    values = cycles(stage, images, protocol, seeds) | equivariance(stage, images, protocol)
    return {metric: torch.tensor(row, dtype=torch.float64) for metric, row in values.items()}


def _features(
    stage: VAEStage, names: list[str], images: torch.Tensor, protocol: Protocol, seeds: range, tools: MetricNetworks
) -> Tensors:
    assert tools.features is not None
    made = protocol.to_bytes(rebuild_batch(stage, images, protocol, seeds).images)
    both = {"before": round_images(images, "nearest"), "after": made}
    return {name: torch.from_numpy(np.asarray(tools.features(bytes_to_images(pixels)))) for name, pixels in both.items()}


KINDS = {"rebuild": _rebuild, "probe": _probe, "features": _features}
