"""How a run ends before its work is done: Ctrl-C and SIGTERM become an exception, a sentence and an exit status."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

AGAIN_S = 10.0  # an exception that a callback has swallowed (those of the import system do) is raised anew after this
JOIN_S = 5.0  # seconds that a worker gets to leave its step


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Whoever tidies up after Ctrl-C does so after this as well."""


def interruption(number: int) -> KeyboardInterrupt:
    """The exception that stands for a signal."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def status_of(error: KeyboardInterrupt) -> int:
    """The exit status after it: 128 and the signal's number, 143 for SIGTERM and 130 for Ctrl-C."""
    return 143 if isinstance(error, Terminated) else 130


def say(error: KeyboardInterrupt) -> None:
    """One sentence on stderr."""
    cause = "SIGTERM" if isinstance(error, Terminated) else "Ctrl-C"
    with suppress(OSError, ValueError):  # the terminal may be gone as well
        print(f"latentpipe: stopped by {cause}; no file was left half-written.", file=sys.stderr, flush=True)


@contextmanager
def signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler` inside, unless ignored (a background job of a shell); in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` inside, as Ctrl-C raises KeyboardInterrupt; neither of them is lost."""
    over = threading.Event()

    def insist(number: int) -> None:
        if not over.wait(AGAIN_S):
            if hasattr(signal, "pthread_kill"):  # to the main thread, which may sleep in a system call
                signal.pthread_kill(threading.main_thread().ident or 0, number)
            else:
                signal.raise_signal(number)

    def on_signal(number: int, _: FrameType | None) -> None:
        threading.Thread(target=insist, args=(number,), name="latentpipe_insist", daemon=True).start()
        raise interruption(number)

    with signals_to(on_signal):
        try:
            yield
        finally:
            over.set()


@contextmanager
def ended_at_once() -> Iterator[None]:
    """SIGINT and SIGTERM end the process inside, with no exception: what is imported may swallow one, or leave half of itself."""

    def on_signal(number: int, _: FrameType | None) -> None:
        error = interruption(number)
        with suppress(RuntimeError):  # it came in the middle of a print
            say(error)
        leave(status_of(error))

    with signals_to(on_signal):
        yield


def leave(status: int) -> NoReturn:
    """End the process now. Threads that still compute would abort it while the interpreter is taken down, so that it is not."""
    until = time.monotonic() + JOIN_S
    for thread in threading.enumerate():
        if thread.name == "latentpipe_work":  # it has been told to stop, and tidies up behind itself
            thread.join(max(0.0, until - time.monotonic()))
        elif not thread.daemon and thread is not threading.current_thread() and status not in (130, 143):
            thread.join()
    with suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
