"""Who still reads the events of a visitor: a job that nobody listens to gives up its place."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GRACE_S = 20.0  # a job may be asked for before its events are; a connection may break for a moment
MOST_KNOWN = 10_000


class Listeners:
    """Streams of events that are read, by session.

    `clock` gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reading: dict[str, int] = {}
        self._left: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def reading(self, session: str) -> Iterator[None]:
        """A stream of the session is open inside."""
        with self._lock:
            self._reading[session] = self._reading.get(session, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._reading[session] -= 1
                if not self._reading[session]:
                    del self._reading[session]
                    self._left[session] = self._clock()
                    while len(self._left) > MOST_KNOWN:
                        del self._left[next(iter(self._left))]

    def gone(self, session: str, since: float) -> bool:
        """Whether nobody has read the session's events for `GRACE_S`; `since` is when the job began, on the same clock."""
        with self._lock:
            if session in self._reading:
                return False
            return self._clock() - max(since, self._left.get(session, since)) > GRACE_S
