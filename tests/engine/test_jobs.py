"""One job at a time: the order of the line, stopping, errors, slow readers, contexts. Threads meet at events."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from latentpipe import UserError
from latentpipe.engine import jobs
from latentpipe.engine.jobs import Cancelled, Done, JobQueue, Progress, Waiting, run_job

PATIENCE_S = 30


@pytest.fixture(autouse=True)
def line(monkeypatch: pytest.MonkeyPatch) -> JobQueue:
    """A device of the test's own, and a heartbeat that keeps no test waiting."""
    line = JobQueue()
    monkeypatch.setattr(jobs, "device", line)
    monkeypatch.setattr(jobs, "HEARTBEAT_S", 0.02)
    return line


@pytest.fixture
def busy(line: JobQueue) -> Iterator[threading.Event]:
    """A job that holds the device until the event is set."""
    begun, free = threading.Event(), threading.Event()

    def hold(_: Any) -> None:
        begun.set()
        free.wait(PATIENCE_S)

    thread = threading.Thread(target=lambda: list(run_job(hold)))
    thread.start()
    assert begun.wait(PATIENCE_S)
    yield free
    free.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert line.length == 0


def workers() -> int:
    """Threads that are at work for a job."""
    return sum(thread.name == "latentpipe_work" for thread in threading.enumerate())


def read(events: Iterator[Any], into: list[Any]) -> threading.Thread:
    """Read a job's events in a thread; an error is the last entry."""

    def follow() -> None:
        try:
            into.extend(events)
        except Exception as error:
            into.append(error)

    thread = threading.Thread(target=follow)
    thread.start()
    return thread


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    pause = threading.Event()
    for _ in range(PATIENCE_S * 100):
        if holds():
            return
        pause.wait(0.01)
    raise AssertionError("it did not happen")


def test_a_job_alone_reports_and_ends() -> None:
    def work(report: jobs.ProgressCallback) -> str:
        report(1, 4, "one")
        return "result"

    *told, last = run_job(work)
    assert isinstance(last, Done)
    assert last.result == "result"
    assert last.seconds >= 0
    assert [(event.done, event.total, event.what) for event in told] == [(1, 4, "one")]
    assert told[0].eta_s >= 0


def test_first_come_first_served(busy: threading.Event, line: JobQueue) -> None:
    order: list[int] = []
    readers = []
    for index in range(6):
        readers.append(read(run_job(lambda _, index=index: order.append(index)), []))
        until(lambda index=index: line.length == index + 2)
    busy.set()
    for reader in readers:
        reader.join(PATIENCE_S)
    assert order == [0, 1, 2, 3, 4, 5]


def test_never_two_at_once() -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def work(_: Any) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        threading.Event().wait(0.005)
        with lock:
            inside -= 1

    found: list[Any] = []
    for reader in [read(run_job(work), found) for _ in range(8)]:
        reader.join(PATIENCE_S)
    assert most == 1
    assert sum(isinstance(event, Done) for event in found) == 8


def test_whoever_waits_is_told_how_many_come_first(busy: threading.Event, line: JobQueue) -> None:
    first, second = run_job(lambda _: "first"), run_job(lambda _: "second")
    assert next(first) == Waiting(1)
    assert next(second) == Waiting(2)
    first.close()
    until(lambda: line.length == 2)
    assert Waiting(1) in {next(second), next(second), next(second)}  # the place of the one that left
    busy.set()
    *told, last = second
    assert isinstance(last, Done)
    assert last.result == "second"
    assert set(told) <= {Waiting(1)}


def test_a_cancel_while_it_waits(busy: threading.Event, line: JobQueue) -> None:
    cancel, ran = threading.Event(), []
    events = run_job(lambda _: ran.append(1), cancel)
    assert next(events) == Waiting(1)
    cancel.set()
    with pytest.raises(Cancelled):
        list(events)
    assert line.length == 1  # the busy one
    assert not busy.is_set()  # which still has the device
    assert ran == []


def test_a_full_queue(busy: threading.Event, line: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_WAITING", 2)
    waiting = [run_job(lambda _: "done") for _ in range(2)]
    for place, events in enumerate(waiting, 1):
        assert next(events) == Waiting(place)
    with pytest.raises(UserError, match=r"^The queue is full: 2 jobs are waiting"):
        list(run_job(lambda _: None))
    assert line.length == 3
    waiting.pop().close()
    again = run_job(lambda _: "done")  # a place is free again
    assert next(again) == Waiting(2)
    busy.set()
    for events in (*waiting, again):
        *_, last = events
        assert isinstance(last, Done)


def test_closing_while_it_waits(busy: threading.Event, line: JobQueue) -> None:
    before, ran = workers(), []
    events = run_job(lambda _: ran.append(1))
    next(events)
    assert workers() == before + 1
    events.close()
    assert workers() == before
    assert line.length == 1
    busy.set()
    until(lambda: line.length == 0)
    assert ran == []


def test_closing_while_it_runs(line: JobQueue) -> None:
    ended: list[str] = []

    def work(report: jobs.ProgressCallback) -> None:
        try:
            for step in range(10**6):
                report(step, 10**6, "step")
        except Cancelled:
            ended.append("cancelled")
            raise

    events = run_job(work)
    assert isinstance(next(events), Progress)
    events.close()
    assert ended == ["cancelled"]
    assert workers() == 0
    assert line.length == 0


def test_work_may_keep_what_it_has() -> None:
    cancel = threading.Event()

    def work(report: jobs.ProgressCallback) -> list[int]:
        kept: list[int] = []
        try:
            for step in range(5):
                report(step, 5, "step")
                kept.append(step)
                if step == 2:
                    cancel.set()
        except Cancelled:
            pass
        return kept

    *_, last = run_job(work, cancel)
    assert last.result == [0, 1, 2]


@pytest.mark.parametrize("error", [UserError("a sentence"), ZeroDivisionError("a defect"), Cancelled("stopped")])
def test_errors_of_the_work_reach_the_reader(error: Exception, line: JobQueue) -> None:
    def work(report: jobs.ProgressCallback) -> None:
        report(0, 1, "begin")
        raise error

    with pytest.raises(type(error)) as caught:
        list(run_job(work))
    assert caught.value is error
    assert line.length == 0
    assert workers() == 0
    *_, last = run_job(lambda _: "the device is free")
    assert last.result == "the device is free"


def test_a_slow_reader_sees_the_newest_event_and_the_last() -> None:
    first, all_told = threading.Event(), threading.Event()

    def work(report: jobs.ProgressCallback) -> str:
        report(0, 100, "step")
        first.wait(PATIENCE_S)
        for step in range(1, 101):
            report(step, 100, "step")
        all_told.set()
        return "end"

    events = run_job(work)
    assert next(events).done == 0
    first.set()
    assert all_told.wait(PATIENCE_S)  # no reader held the work up
    newest, last = events
    assert newest.done == 100
    assert last.result == "end"


def test_the_work_has_the_context_of_its_reader() -> None:
    colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")

    def work(_: Any) -> str:
        mine = colour.get()
        colour.set("of the work")
        return mine

    def visit(name: str) -> tuple[str, str]:
        colour.set(name)
        *_, last = run_job(work)
        return last.result, colour.get()

    assert contextvars.copy_context().run(visit, "red") == ("red", "red")
    assert contextvars.copy_context().run(visit, "blue") == ("blue", "blue")
    assert colour.get() == "none"
