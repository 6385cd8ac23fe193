"""Several workers at one list of tasks: processes of this machine, or actors of a cluster. One that dies is replaced.

A task is plain JSON and is done again when its worker died, so a job's tasks write atomically and give the same result each time.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from latentpipe.utils.errors import Cancelled, UserError, counted
from latentpipe.utils.reading import MOST_HEADER, parse_json
from latentpipe.version import VERSION

DEATHS = 5  # of workers in one and the same task, after which it is given up
WAKE_S = 0.5  # between two looks for a signal
MOST_WORKERS = 1024


class Died(Exception):
    """A worker is gone; how, in words."""


class Worker(Protocol):
    """One that takes tasks."""

    def ask(self, task: Any, on_event: Callable[[Any], None] | None = None) -> dict[str, Any]:
        """Do a task: its {"result"} or {"error", "kind"}; `Died` where the worker did not live to say so."""

    def cancel(self) -> None:
        """Tell the task in work to stop."""

    def end(self) -> None:
        """End the worker, whatever it is at."""


class LocalWorker:
    """A process of this machine.

    opener     "module:function", of arguments and device; see `worker_process.open_job`
    arguments  plain JSON
    device     "cpu", "cuda:0", ...
    threads    of torch; another number changes the last bits of what is computed
    """

    def __init__(self, opener: str, arguments: Any, device: str, threads: int) -> None:
        command = [sys.executable, "-m", "latentpipe.utils.worker_process", opener]
        own = str(Path(__file__).parents[2])  # the same code, from wherever this process has it
        paths = [own, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, encoding="utf-8"
        )
        self._asking = threading.Lock()
        self._tell({"threads": threads, "device": device, "arguments": arguments})
        self._ready = False

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self._process.pid

    def ask(self, task: Any, on_event: Callable[[Any], None] | None = None) -> dict[str, Any]:
        """As `Worker.ask`; the first call also waits until the job is open."""
        if not self._ready:
            hello = self._hear(None)
            if "error" in hello:
                return hello
            check_version(hello["ready"], "this machine")
            self._ready = True
        self._tell({"task": task})
        return self._hear(on_event)

    def cancel(self) -> None:
        """Tell the task in work to stop."""
        with contextlib.suppress(Died):
            self._tell({"cancel": True})

    def end(self) -> None:
        """Kill the process: what it had not finished has no final name."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def _tell(self, message: Any) -> None:
        assert self._process.stdin is not None
        try:
            with self._asking:
                self._process.stdin.write(json.dumps(message) + "\n")
                self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise Died(self._how()) from None

    def _hear(self, on_event: Callable[[Any], None] | None) -> dict[str, Any]:
        assert self._process.stdout is not None
        while True:
            try:
                line = self._process.stdout.readline()
            except ValueError:  # `end` has closed it
                line = ""
            if not line.endswith("\n"):
                raise Died(self._how())
            message = parse_json(line, most=MOST_HEADER, infinite=True)
            if "event" not in message:
                return message
            if on_event is not None:
                on_event(message["event"])

    def _how(self) -> str:
        status = self._process.wait()
        if status >= 0:
            return f"exit status {status}"
        with contextlib.suppress(ValueError):
            return f"{signal.Signals(-status).name}{', as where memory runs out' if status == -signal.SIGKILL else ''}"
        return f"signal {-status}"


def check_version(theirs: str, where: str) -> None:
    """UserError where a worker runs another version of this package."""
    if theirs != VERSION:
        raise UserError(
            f"The worker on {where} has latentpipe {theirs}, and this is {VERSION}: their results may differ. "
            f"Install latentpipe {VERSION} there."
        )


class Pool:
    """Workers that stay open from one list of tasks to the next; they end with the `with` block.

    workers   how many
    opened    makes the worker of a number, at first and again where it died
    what      a task in words
    on_death  is called with the task that a dead worker had, and how it died
    """

    def __init__(
        self,
        workers: int,
        opened: Callable[[int], Worker],
        what: Callable[[Any], str] = lambda task: f"Task {task}",
        on_death: Callable[[Any, str], None] = lambda task, how: None,
    ) -> None:
        self.slots = [_Slot(number, opened, what, on_death) for number in range(workers)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for slot in self.slots:
            slot.end()

    def run(self, tasks: Iterable[Any]) -> Generator[tuple[Any, Any], None, None]:
        """Every task with its result, in the order in which they are done.

        The first error ends all workers and is raised: UserError, also where memory ran out and where a task ended five workers.
        """
        run, count = _Run(), 0
        for task in tasks:
            run.waiting.put(task)
            count += 1
        slots = self.slots[:count]
        threads = [threading.Thread(target=slot.run, args=(run,), name="latentpipe_slot", daemon=True) for slot in slots]
        for thread in threads:
            thread.start()
        left = count
        try:
            while left:
                try:  # a wait without end hears no signal on every system
                    task, result = run.found.get(timeout=WAKE_S)
                except queue.Empty:
                    continue
                if isinstance(result, BaseException):
                    raise result
                left -= 1
                yield task, result
        finally:
            run.over.set()
            if left:
                for slot in slots:
                    slot.end()
            for thread in threads:
                thread.join(WAKE_S)


@dataclass
class _Run:
    """One list of tasks: those that wait, what was found, and whether anybody still wants it."""

    waiting: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    found: queue.SimpleQueue[tuple[Any, Any]] = field(default_factory=queue.SimpleQueue)
    over: threading.Event = field(default_factory=threading.Event)


class _Slot:
    """The place of one worker: its tasks, and the next worker where it dies."""

    def __init__(
        self, number: int, opened: Callable[[int], Worker], what: Callable[[Any], str], on_death: Callable[[Any, str], None]
    ) -> None:
        self.number, self.opened, self.what, self.on_death = number, opened, what, on_death
        self.worker: Worker | None = None

    def run(self, run: _Run) -> None:
        """Tasks until there is none; what goes wrong is handed to the reader."""
        while not run.over.is_set():
            try:
                task = run.waiting.get_nowait()
            except queue.Empty:
                return
            try:
                run.found.put((task, self._result(task, run.over)))
            except BaseException as error:
                run.found.put((task, error))

    def end(self) -> None:
        """End the worker, where there is one."""
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.end()

    def _result(self, task: Any, over: threading.Event) -> Any:
        how = ""
        for _ in range(DEATHS):
            if over.is_set():
                raise UserError("stopped")
            try:
                if self.worker is None:
                    self.worker = self.opened(self.number)
                return unpacked(self.worker.ask(task), self.what(task))
            except Died as death:
                how = str(death)
                self.end()
                if not over.is_set():
                    self.on_death(task, how)
        raise UserError(
            f"{self.what(task)}: {counted(DEATHS, 'worker')} died of it, the last one by {how}. What is done is kept; give each "
            "worker more memory, or take fewer of them."
        )


def unpacked(reply: dict[str, Any], what: str) -> Any:
    """The result in a worker's answer; what went wrong is raised as what it was: UserError, Cancelled, RuntimeError."""
    if "error" not in reply:
        return reply["result"]
    if reply["kind"] == "cancelled":
        raise Cancelled(reply["error"])
    if reply["kind"] == "memory":
        raise UserError(f"{what}: {reply['error']} What is done is kept; fewer workers need less.")
    if reply["kind"] == "user":
        raise UserError(reply["error"])
    raise RuntimeError(f"{what}: a worker failed.\n{reply['error']}")
