"""Work in a thread that ends with it, so that its OpenMP pool ends too."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
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
