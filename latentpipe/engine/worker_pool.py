"""Several workers that draw, one on each device: the events of `Engine.run`, from whichever of them is free.

Visitors wait in one line. A job whose worker dies is begun again by another one, from its first step; where that dies as well the
job ends in one sentence. A worker has one job at a time, and is told to stop while it has that one alone: nothing is crossed.
"""

from __future__ import annotations

import base64
import io
import queue
import threading
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.single_file.gather import Stated
from latentpipe.engine.engine import Engine, Finished, StepDone
from latentpipe.engine.jobs import JobQueue, Waiting, events_of
from latentpipe.engine.pipeline_cache import PipelineCache
from latentpipe.pipelines.metadata.recipe import Recipe
from latentpipe.pipelines.picture import Picture
from latentpipe.utils.cluster import opened_on
from latentpipe.utils.errors import Cancelled, LatentpipeWarning, UserError
from latentpipe.utils.images import picture_of
from latentpipe.utils.worker_process import Emit, Job
from latentpipe.utils.workers import MOST_WORKERS, Died, Worker, unpacked

AGAIN_S = 0.2  # between two calls to stop
TRIES = 3  # workers that a job is given to, one after the other
Names = tuple[str, str | None, str | None]  # of a model, of another VAE, of an adapter to it


class DrawingPool:
    """Workers that draw, until `close`.

    workers  how many; each has its own models open
    model    that is opened at first
    device   that each computes on; None: the GPUs in turn, or the processor
    dtype    precision of the weights
    stated   what single files do not say themselves, by their places
    cluster  address of a Ray cluster that the workers run on; None: this machine
    """

    def __init__(
        self,
        workers: int,
        model: str = "emoji",
        device: str | None = None,
        dtype: str = "fp32",
        stated: Mapping[Path, Stated] | None = None,
        cluster: str | None = None,
    ) -> None:
        import torch

        if not 1 <= workers <= MOST_WORKERS:
            raise UserError(f"workers is {workers}; expected 1 to {MOST_WORKERS:,}.")
        self.line = JobQueue(workers)
        told = [(str(place), one.family, one.prediction, one.config, one.parts) for place, one in (stated or {}).items()]
        plain = [(*known, None if config is None else str(config), list(map(str, parts))) for *known, config, parts in told]
        arguments = {"model": model, "dtype": dtype, "stated": plain}
        threads = max(1, torch.get_num_threads() // workers)
        self._context = opened_on(cluster, "latentpipe.engine.worker_pool:open_drawing", arguments, threads, device)
        self._opened = self._context.__enter__()
        self._seats: queue.SimpleQueue[tuple[int, Worker]] = queue.SimpleQueue()
        self._workers: dict[int, Worker] = {}
        self._closed = False
        for number in range(workers):
            self._workers[number] = self._opened(number)
            self._seats.put((number, self._workers[number]))

    def run(
        self, names: Names, prompt: str, cancel: threading.Event | None = None, previews: bool = False, **settings: Any
    ) -> Generator[Waiting | StepDone | Finished, None, None]:
        """As `Engine.run`, of the model, VAE and adapter of these names."""
        cancel = cancel or threading.Event()
        task: dict[str, Any] = {"names": names, "prompt": prompt, "previews": previews, "settings": settings}
        return events_of(partial(self._draw, task, cancel), cancel, where=self.line)

    def close(self) -> None:
        """End the workers."""
        self._closed = True
        for worker in self._workers.values():
            worker.end()
        self._context.__exit__(None, None, None)

    def _draw(self, task: dict[str, Any], cancel: threading.Event, emit: Callable[[StepDone], None]) -> Finished:
        """The job on a free worker, and on the next one where that dies."""
        image = task["settings"].get("image")
        task = {**task, "settings": {**task["settings"], "image": None if image is None else _encoded(image)}}
        how = ""
        for _ in range(TRIES):
            if self._closed or cancel.is_set():
                raise Cancelled("stopped before it began")
            number, worker = self._seats.get()  # there is one: the line lets in as many as there are
            try:
                return self._asked(worker, task, cancel, emit)
            except Died as death:
                how, worker = str(death), self._next(number, worker)
            finally:
                self._seats.put((number, worker))
        raise UserError(f"The worker that drew this died, and so did {TRIES - 1} others ({how}); ask for a smaller picture.")

    def _next(self, number: int, dead: Worker) -> Worker:
        dead.end()
        if not self._closed:
            self._workers[number] = self._opened(number)
        return self._workers[number]

    def _asked(self, worker: Worker, task: dict[str, Any], cancel: threading.Event, emit: Callable[[StepDone], None]) -> Finished:
        """Have one worker do it; a stop reaches it while it is at this job, and never the next one's."""
        over, lock = threading.Event(), threading.Lock()
        pictures: list[Picture] = []

        def watch() -> None:
            cancel.wait()
            while True:
                with lock:
                    if over.is_set():
                        return
                    worker.cancel()
                over.wait(AGAIN_S)  # the first may have come before the task, which begins without it

        def heard(event: dict[str, Any]) -> None:
            if "picture" in event:
                image = picture_of(base64.b64decode(event["picture"])).convert("RGB")
                pictures.append(Picture(image, Recipe.model_validate(event["recipe"]), tuple(event["notes"])))
            else:
                emit(_step(event))

        threading.Thread(target=watch, name="latentpipe_watch", daemon=True).start()
        try:
            found = unpacked(worker.ask(task, heard), "The picture")
        finally:
            with lock:
                over.set()
        for text in found["told"]:
            warnings.warn(LatentpipeWarning(text), stacklevel=2)
        return Finished(pictures, found["seconds"])


def _step(event: dict[str, Any]) -> StepDone:
    preview = None if event["preview"] is None else picture_of(base64.b64decode(event["preview"]))
    return StepDone(event["step"], event["steps"], event["eta_s"], preview)


# --- in a worker --------------------------------------------------------------------------------------------


def open_drawing(arguments: dict[str, Any], device: str) -> Job:
    """The work of one: names, prompt and settings -> steps and pictures as events; at the end what was told, and the seconds."""
    cache = PipelineCache(device=device, dtype=arguments["dtype"])
    for place, family, prediction, config, parts in arguments["stated"]:
        made = Stated(family, prediction, None if config is None else Path(config), tuple(map(Path, parts)))
        cache.stated[Path(place)] = made
    with suppress(UserError):  # told to whoever asks for it
        find_model(arguments["model"])
        cache.open(arguments["model"])

    def work(task: Any, emit: Emit, cancel: threading.Event) -> dict[str, Any]:
        model, vae, adapter = task["names"]
        settings: dict[str, Any] = {
            name: tuple(value) if name in PAIRS and value else value for name, value in task["settings"].items()
        }
        if settings.get("image") is not None:
            settings["image"] = picture_of(base64.b64decode(settings["image"]))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", LatentpipeWarning)
            engine = Engine(cache.open(model, vae, adapter))
            for event in engine.run(task["prompt"], cancel=cancel, previews=task["previews"], **settings):
                if isinstance(event, StepDone):
                    preview = None if event.preview is None else _encoded(event.preview)
                    emit({"step": event.step, "steps": event.steps, "eta_s": event.eta_s, "preview": preview})
                elif isinstance(event, Finished):
                    finished = event
        for picture in finished.pictures:
            recipe = picture.recipe.model_dump(mode="json")
            emit({"picture": _encoded(picture.image), "recipe": recipe, "notes": picture.notes})
        notes = [str(one.message) for one in told if issubclass(one.category, LatentpipeWarning)]
        return {"told": notes, "seconds": finished.seconds}

    return work


PAIRS = ("size", "guidance_interval")


def _encoded(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, format="PNG")
    return base64.b64encode(data.getvalue()).decode()
