"""One job at a time on one device: work in a thread, its events read by one reader, stopped by a token. Knows no interface."""

from __future__ import annotations

import contextvars
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from latentpipe.utils import cancellation
from latentpipe.utils.errors import Cancelled, UserError
from latentpipe.utils.progress import ProgressCallback

__all__ = ["Cancelled", "Done", "JobQueue", "Progress", "ProgressCallback", "Waiting", "device", "events_of", "run_job"]

MAX_WAITING = 32
HEARTBEAT_S = 0.5  # how often a job that waits says so: whoever reads it notices then that its client has left


@dataclass(frozen=True)
class Waiting:
    """Another job is on the device; `ahead` jobs come first, the running one included."""

    ahead: int


class JobQueue:
    """Jobs on one device, first come, first served: host pipelines are not re-entrant, and two jobs slow each other.

    places  jobs that run at once, each on a device of its own
    """

    def __init__(self, places: int = 1) -> None:
        self.places = places
        self._turn = threading.Condition()
        self._jobs: deque[object] = deque()  # the first ones are running

    @property
    def length(self) -> int:
        """Jobs that run or wait."""
        return len(self._jobs)

    def wake(self) -> None:
        """Let those that wait look at their cancel tokens now."""
        with self._turn:
            self._turn.notify_all()

    @contextmanager
    def turn(self, cancel: threading.Event, waits: Callable[[Waiting], None]) -> Iterator[None]:
        """Alone on a device inside; `waits` is called while others are. Cancelled on a stop, UserError where too many wait."""
        job = object()
        with self._turn:
            if len(self._jobs) >= MAX_WAITING + self.places:
                raise UserError(f"The queue is full: {MAX_WAITING} jobs are waiting. Try again in a minute.")
            self._jobs.append(job)
        try:
            with self._turn:
                while (ahead := self._jobs.index(job) - self.places + 1) > 0:
                    if cancel.is_set():
                        raise Cancelled("stopped while it waited for another job")
                    waits(Waiting(ahead))
                    self._turn.wait(HEARTBEAT_S)
            yield
        finally:
            with self._turn:
                self._jobs.remove(job)
                self._turn.notify_all()


device = JobQueue()


@dataclass(frozen=True)
class Progress:
    """`done` of `total` parts are done; `what` names the one in work, `eta_s` estimates the seconds left."""

    done: int
    total: int
    what: str
    eta_s: float


@dataclass(frozen=True)
class Done:
    """The job is over: what it returned, and the seconds that it took on the device."""

    result: Any
    seconds: float


def run_job(
    work: Callable[[ProgressCallback], Any], cancel: threading.Event | None = None
) -> Generator[Waiting | Progress | Done, None, None]:
    """Run `work(report)` alone on the device and yield its progress; the last event is `Done`.

    work    calls ``report(done, total, what)`` as it goes on; after a cancel that call raises `Cancelled` inside it, which
            work may catch to return what it has
    cancel  setting it stops the job at its next report, also while it waits for the device
    Closing the iterator cancels the job and waits for it. What `work` raises is raised here.
    """
    cancel = cancel or threading.Event()

    def watched(emit: Callable[[Progress], None]) -> Done:
        begin = time.monotonic()

        def report(done: int, total: int, what: str) -> None:
            if cancel.is_set():
                raise Cancelled("stopped")
            emit(Progress(done, total, what, (time.monotonic() - begin) / max(done, 1) * (total - done)))

        return Done(work(report), time.monotonic() - begin)

    return events_of(watched, cancel)


def events_of(
    work: Callable[[Callable[[Any], None]], Any], cancel: threading.Event, keeps: bool = False, where: JobQueue | None = None
) -> Generator[Any, None, None]:
    """The events that `work(emit)` emits in a thread that has the device, then what it returns; `Waiting` ones before them.

    A reader that is slow sees the newest event only. As `run_job`, but `work` looks at `cancel` itself; `keeps`: what the last
    whole step made before it is wanted; `where`: the queue that it waits in, else this process's own.
    """
    line = where or device
    events: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1)
    context = contextvars.copy_context()  # whoever collects a job's notes finds them by its context
    worker = threading.Thread(
        target=context.run, args=(_work, work, events, cancel, keeps, line), name="latentpipe_work", daemon=True
    )
    worker.start()
    try:
        while True:
            kind, event = events.get()
            if kind == "error":
                raise event
            yield event
            if kind == "last":
                return
    finally:
        cancel.set()
        line.wake()
        while worker.is_alive():
            _drop(events)  # the worker must not wait for a reader that has left
            worker.join(0.05)


def _work(
    work: Callable[[Callable[[Any], None]], Any], events: queue.Queue, cancel: threading.Event, keeps: bool, line: JobQueue
) -> None:
    def emit(event: Any) -> None:
        _drop(events)
        events.put(("event", event))

    try:
        with line.turn(cancel, emit), cancellation.job(cancel, keeps):
            last = ("last", work(emit))
    except BaseException as error:  # handed to the reader, who raises it
        last = ("error", error)
    events.put(last)


def _drop(events: queue.Queue) -> None:
    with suppress(queue.Empty):
        events.get_nowait()
