"""Pictures of many prompts, drawn in batches by this process or by several workers, in the same order and with the same seeds."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from latentpipe.pipelines.latent_pipeline import LatentPipeline
from latentpipe.pipelines.sampling import Settings
from latentpipe.utils.cluster import opened_on
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import read_tensors
from latentpipe.utils.worker_process import Emit, Job
from latentpipe.utils.workers import MOST_WORKERS, Pool

Batch = tuple[list[str], list[int]]
DrawBatches = Callable[
    [Sequence[Batch], Settings], Iterator[list[Image.Image]]
]  # prompts with their seeds -> pictures, batch by batch


@contextmanager
def artists(pipe: LatentPipeline, model: str | Path, workers: int | None, device: str | None) -> Iterator[DrawBatches]:
    """What draws batches of prompts: `pipe`, or so many processes of one thread, each with the model open."""
    if workers is None:

        def alone(batches: Sequence[Batch], settings: Settings) -> Iterator[list[Image.Image]]:
            for prompts, seeds in batches:
                yield list(pipe.draw(prompts, seeds, settings))

        yield alone
        return
    if not 1 <= workers <= MOST_WORKERS:
        raise UserError(f"workers is {workers}; expected 1 to {MOST_WORKERS:,}.")
    folder = Path(tempfile.mkdtemp(prefix="latentpipe-artists-"))
    own = None if device in (None, "cuda") else device
    arguments = {"folder": str(folder), "model": str(model)}
    try:
        with (
            opened_on(None, "latentpipe.evaluate.artists:open_artist", arguments, 1, own) as opened,
            Pool(workers, opened) as pool,
        ):

            def together(batches: Sequence[Batch], settings: Settings) -> Iterator[list[Image.Image]]:
                way = asdict(settings)
                tasks = [
                    {"number": number, "prompts": prompts, "seeds": seeds, "settings": way}
                    for number, (prompts, seeds) in enumerate(batches)
                ]
                waiting: dict[int, list[Image.Image]] = {}
                told = 0
                for task, name in pool.run(tasks):
                    pixels = read_tensors(folder / name)["pixels"].numpy()
                    (folder / name).unlink()
                    waiting[task["number"]] = [Image.fromarray(one) for one in pixels]
                    while told in waiting:
                        yield waiting.pop(told)
                        told += 1

            yield together
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- in a worker --------------------------------------------------------------------------------------------


def open_artist(arguments: dict[str, str], device: str) -> Job:
    """The work of one: prompts and seeds -> the file of their pictures' pixels."""
    pipe = LatentPipeline.from_pretrained(arguments["model"], device=device)

    def work(task: Any, emit: Emit, cancel: threading.Event) -> str:
        settings = pipe.check(Settings(**{name: _settled(value) for name, value in task["settings"].items()}))
        drawn = pipe.draw(task["prompts"], task["seeds"], settings)
        pixels = torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in drawn]))
        name = f"{task['number']}-{threading.get_native_id()}.safetensors"
        save_file({"pixels": pixels}, Path(arguments["folder"]) / name)
        return name

    return work


def _settled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
