"""Work in a thread that ends with its OpenMP pool, and threads that spin less on a busy machine."""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def run_in_thread(work: Callable[[], T]) -> T:
    """Run ``work()`` in a thread of its own; returns what it returns, raises what it raises.

    GNU OpenMP keeps a pool of threads for every thread that has computed in parallel. While there are more of them than
    processors none spins while it waits, and a small denoiser that draws in a worker thread takes twice as long a step. What is
    opened in a thread that has ended leaves no pool behind.
    """
    found: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            raised.append(error)

    # a daemon: after Ctrl-C nobody waits for it
    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name="latentpipe_apart", daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return found[0]


SPINS = (
    "2000"  # rounds that GNU OpenMP waits in before a thread sleeps, a tenth of a millisecond; its own 300,000 are 10 ms and more
)


def spin_less_where_busy(environment: MutableMapping[str, str] = os.environ, load: Path = Path("/proc/loadavg")) -> None:
    """Let OpenMP's threads sleep sooner, where others compute on this machine now; to be called before torch is imported.

    A thread that waits for one that the system has put aside spins its time away, and both lose it: beside busy neighbours on two
    cores a step took 35 times as long (dev/LOG.md). On a machine that is free, spinning is faster. Results are the same.
    """
    if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        return  # somebody has chosen
    cores = os.cpu_count() or 1
    with suppress(OSError, ValueError, IndexError):  # no such file on other systems
        others = int(load.read_text().split()[3].partition("/")[0]) - 1  # that run at this moment, this one aside
        threads = int(environment.get("OMP_NUM_THREADS", cores))
        if threads > 1 and others + threads > cores:
            environment["GOMP_SPINCOUNT"] = SPINS
