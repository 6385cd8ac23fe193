"""One job at a time on one device: step events with preview and ETA, cancel. Knows no interface."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from latentpipe.engine.jobs import Waiting, events_of
from latentpipe.lora.merge import Weight
from latentpipe.lora.prompt_tags import split_tags
from latentpipe.pipelines.latent_pipeline import LatentPipeline, Picture
from latentpipe.pipelines.sampling import Step

PREVIEW_SECONDS = 0.25


@dataclass(frozen=True)
class StepDone:
    """A step is done: `step` of `steps`, the seconds left, and a picture of the estimate (at most four a second)."""

    step: int
    steps: int
    eta_s: float
    preview: Image.Image | None


@dataclass(frozen=True)
class Finished:
    """The job is over; after a cancel these are the partial pictures."""

    pictures: list[Picture]
    seconds: float


class Engine:
    """Runs jobs of one pipeline, one after another, with events; one job at a time on one device, whoever asks."""

    def __init__(self, pipe: LatentPipeline) -> None:
        self.pipe = pipe

    def run(
        self,
        prompt: str | Sequence[tuple[str, int]],
        cancel: threading.Event | None = None,
        previews: bool = False,
        loras: Mapping[str, Weight] | None = None,
        lora_partial: bool = False,
        embeddings: Sequence[str] = (),
        **settings: Any,
    ) -> Generator[Waiting | StepDone | Finished, None, None]:
        """Draw `prompt` in a worker thread and yield its events; the last one is `Finished`.

        prompt    one text; or several, each with its seed, which are drawn in one batch (`LatentPipeline.several`)
        cancel    setting it stops within the current step and keeps the partial pictures of the step before
        previews  whether the events carry a picture of the estimate
        loras     installed adapters that are on for this job, beside those of the pipeline and of the prompt
        lora_partial  take these and the prompt's where they fit in part; what is left out is told in a warning
        embeddings  installed textual inversions that the prompts may name without angle brackets too
        settings  arguments of `LatentPipeline.__call__`
        Closing the iterator cancels the job and waits until it has left its step. `Cancelled` where it was stopped while it
        waited for another job, in its first step, or while the pictures were decoded.
        """
        cancel = cancel or threading.Event()
        known = dict(loras or {})
        work = partial(self._draw, cancel, previews, prompt, known, lora_partial, tuple(embeddings), settings)
        return events_of(work, cancel, keeps=True)

    def _draw(
        self,
        cancel: threading.Event,
        previews: bool,
        prompt: str | Sequence[tuple[str, int]],
        loras: Mapping[str, Weight],
        lora_partial: bool,
        embeddings: Sequence[str],
        settings: dict[str, Any],
        emit: Callable[[StepDone], None],
    ) -> Finished:
        begin, last_preview = time.monotonic(), 0.0

        def on_step(step: Step) -> bool:
            nonlocal last_preview
            now = time.monotonic()
            preview = None
            if previews and now - last_preview >= PREVIEW_SECONDS:
                preview, last_preview = self.pipe.preview(step.latents), now
            emit(StepDone(step.step, step.steps, (now - begin) / step.step * (step.steps - step.step), preview))
            return cancel.is_set()

        if lora_partial and isinstance(prompt, str):
            prompt, tagged = split_tags(prompt)
            loras = {**loras, **tagged}
        with self.pipe.loras.more(loras, loras if lora_partial else ()), self.pipe.embeddings.more(embeddings):
            if isinstance(prompt, str):
                pictures = self.pipe(prompt, on_step=on_step, **settings)
            else:
                pictures = self.pipe.several(prompt, on_step=on_step, **settings)
        return Finished(pictures, time.monotonic() - begin)
