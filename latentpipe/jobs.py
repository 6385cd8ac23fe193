"""One job at a time on one device: work in a thread, its events read by one reader, stopped by a token. Knows no interface."""

from __future__ import annotations

import contextvars
import queue
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

device_lock = threading.Lock()  # host pipelines are not re-entrant, and two jobs slow each other more than twice
Report = Callable[[int, int, str], None]


class Cancelled(Exception):
    """The job was stopped before it had anything to keep."""


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


def run_job(work: Callable[[Report], Any], cancel: threading.Event | None = None) -> Generator[Progress | Done, None, None]:
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


def events_of(work: Callable[[Callable[[Any], None]], Any], cancel: threading.Event) -> Generator[Any, None, None]:
    """The events that `work(emit)` emits in a thread that holds the device, then what it returns.

    A reader that is slow sees the newest event only. As `run_job`, but `work` looks at `cancel` itself.
    """
    events: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1)
    context = contextvars.copy_context()  # whoever collects a job's notes finds them by its context
    worker = threading.Thread(target=context.run, args=(_work, work, events, cancel), name="latentpipe_work", daemon=True)
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
        while worker.is_alive():
            _drop(events)  # the worker must not wait for a reader that has left
            worker.join(0.05)


def _work(work: Callable[[Callable[[Any], None]], Any], events: queue.Queue, cancel: threading.Event) -> None:
    def emit(event: Any) -> None:
        _drop(events)
        events.put(("event", event))

    try:
        _take_device(cancel)
        try:
            last = ("last", work(emit))
        finally:
            device_lock.release()
    except BaseException as error:  # handed to the reader, who raises it
        last = ("error", error)
    events.put(last)


def _take_device(cancel: threading.Event) -> None:
    """Hold the device; Cancelled where the job is stopped while it waits."""
    while not device_lock.acquire(timeout=0.1):
        if cancel.is_set():
            raise Cancelled("stopped while it waited for another job")


def _drop(events: queue.Queue) -> None:
    with suppress(queue.Empty):
        events.get_nowait()
