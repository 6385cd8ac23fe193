"""The jobs of each visitor: begun in turn, by this process or by workers, stopped by whoever began them or has left."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from latentpipe import Engine, Finished, LatentPipeline, StepDone, UserError
from latentpipe.engine.jobs import Cancelled, Done, JobQueue, Progress, Waiting, device, run_job
from latentpipe.engine.studio import Names, Studio
from latentpipe.ui.listeners import Listeners
from latentpipe.utils.defaults import STEPS
from latentpipe.utils.progress import ProgressCallback

MAX_WORK = 300.0  # millions of pixels x steps x pictures in one request: 1024 x 1024 pixels, 28 steps, 10 pictures
JOB_NOTES: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("notes", default=None)


class Jobs:
    """The jobs of each visitor, by session, so that Stop ends one's own only.

    max_work   the most that one request may ask for: pixels x steps x pictures, in millions
    listeners  who reads the events of a visitor; None: nobody looks, and every job goes on to its end
    studio     workers that draw; None: this process does
    """

    def __init__(self, max_work: float = MAX_WORK, listeners: Listeners | None = None, studio: Studio | None = None) -> None:
        self.max_work, self.listeners, self.studio = max_work, listeners, studio
        self._tokens: dict[str, list[threading.Event]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def allow(self, width: float, height: float, steps: float, count: float) -> None:
        """UserError where a request asks for more than `max_work`."""
        work = width * height * steps * count / 1e6
        if not work <= self.max_work:
            raise UserError(
                f"This asks for {width:g} x {height:g} pixels x {steps:g} steps x {count:g} pictures: {work:,.6g} million; "
                f"at most {self.max_work:,.6g} million are drawn at once here. Choose fewer steps or pictures, or a smaller size."
            )

    def run(
        self, request: gr.Request, work: Callable[[ProgressCallback], Any], notes: list[str] | None = None
    ) -> Iterator[Waiting | Progress | Done]:
        """Events of `latentpipe.engine.jobs.run_job` for this visitor: `Waiting` ..., `Progress` ..., `Done` with `.result`.

        The first one is ``Waiting(0)``, at once.

        notes  of `toast_errors()`: where the job's notes go
        """
        with self._token(request) as token:
            yield Waiting(0)  # so that a click is seen at once, and Stop has something to stop from here on
            JOB_NOTES.set(notes)  # the job's thread, which starts below, inherits it
            yield from self._read(run_job(work, token), token, request)

    def draw(
        self,
        request: gr.Request,
        open_pipe: Callable[[], LatentPipeline],
        prompt: str,
        notes: list[str] | None = None,
        previews: bool = True,
        names: Names | None = None,
        **settings: Any,
    ) -> Iterator[Waiting | StepDone | Finished]:
        """Events of `latentpipe.Engine.run` for this visitor; UserError where that is too much work.

        names  of model, VAE and adapter, for workers to open them too
        """
        with self._token(request) as token:
            yield Waiting(0)
            pipe = open_pipe()
            if token.is_set():
                raise Cancelled("stopped while the model was opened")
            width, height = settings.get("size") or pipe.native_size
            self.allow(width, height, settings.get("num_inference_steps", STEPS), settings.get("n", 1))
            JOB_NOTES.set(notes)
            if self.studio is not None and names is not None:
                events = self.studio.run(names, prompt, token, previews, **settings)
            else:
                events = Engine(pipe).run(prompt, cancel=token, previews=previews, **settings)
            yield from self._read(events, token, request)

    def stop(self, request: gr.Request) -> int:
        """Stop this visitor's jobs; returns how many there were."""
        with self._lock:
            tokens = list(self._tokens.get(request.session_hash or "", ()))
        for token in tokens:
            token.set()
        return len(tokens)

    def leave(self, request: gr.Request) -> None:
        """A visitor has closed the page: nobody waits for the jobs."""
        self.stop(request)

    def close(self, seconds: float = 5.0) -> None:
        """Stop everybody's jobs, begin no more, and wait until those at work have left their step."""
        with self._lock:
            self._closed = True
            tokens = [token for every in self._tokens.values() for token in every]
        for token in tokens:
            token.set()
        for line in self._lines():
            line.wake()
        until = time.monotonic() + seconds
        for thread in threading.enumerate():
            if thread.name == "latentpipe_work":
                thread.join(max(0.0, until - time.monotonic()))

    @property
    def length(self) -> int:
        """Jobs of all visitors that run or wait."""
        return sum(line.length for line in self._lines())

    def _lines(self) -> list[JobQueue]:
        return [device] if self.studio is None else [device, self.studio.line]

    def _read(self, events: Generator[Any, None, None], token: threading.Event, request: gr.Request) -> Iterator[Any]:
        """The events of a job, which stops when nobody reads the visitor's events any more."""
        session, since = request.session_hash or "", time.monotonic()
        for event in _left_at_once(events, token):
            if self.listeners is not None and self.listeners.gone(session, since):
                token.set()
            yield event

    @contextmanager
    def _token(self, request: gr.Request) -> Generator[threading.Event, None, None]:
        token, session = threading.Event(), request.session_hash or ""
        with self._lock:
            if self._closed:
                raise UserError("The server is about to end; nothing more is begun.")
            self._tokens.setdefault(session, []).append(token)
        try:
            yield token
        finally:
            token.set()
            with self._lock:
                self._tokens[session].remove(token)
                if not self._tokens[session]:
                    del self._tokens[session]


def _left_at_once(events: Generator[Any, None, None], token: threading.Event) -> Iterator[Any]:
    """The events of a job. Closing stops it without waiting for its step: gradio closes on the thread that serves everybody."""
    try:
        for event in events:  # noqa: UP028 - the close of `yield from` waits
            yield event
    except GeneratorExit:
        token.set()
        threading.Thread(target=events.close, name="latentpipe_close", daemon=True).start()
        raise
