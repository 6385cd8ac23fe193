"""How much clients may send, and how often they may guess a password."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress

PER_CLIENT, IN_ALL = 1_000_000_000, 4_000_000_000
DAY_S = 86400.0  # gradio removes what was sent after a day (`delete_cache`)
TRIES, TRIES_S, TRIES_IN_ALL = 5, 60.0, 100
MOST_KNOWN = 10_000  # addresses; who was heard of longest ago is forgotten


def group_of(address: str) -> str:
    """What counts as one client: an IPv4 address, or the /64 network of an IPv6 one, which is one household's."""
    with suppress(ValueError):
        if (found := ipaddress.ip_address(address)).version == 6:
            return str(ipaddress.ip_network((found, 64), strict=False))
    return address


class Window:
    """Amounts by client within the last seconds; at most so much for each of them, and in all.

    `clock` gives seconds.
    """

    def __init__(self, per_client: float, in_all: float, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_client, self.in_all, self.seconds, self.clock = per_client, in_all, seconds, clock
        self._all: deque[tuple[float, str, float]] = deque()
        self._of: OrderedDict[str, float] = OrderedDict()
        self._sum = 0.0
        self._lock = threading.Lock()

    def wait(self, client: str, amount: float) -> float:
        """Seconds until so much more is allowed; 0 where it is now, infinity where it never is."""
        client = group_of(client)
        with self._lock:
            self._forget()
            over = max(self._of.get(client, 0.0) + amount - self.per_client, 0.0)
            over_all = max(self._sum + amount - self.in_all, 0.0)
            if not over and not over_all:
                return 0.0
            for at, who, much in self._all:
                over_all -= much
                over -= much if who == client else 0.0
                if over <= 0 and over_all <= 0:
                    return max(at + self.seconds - self.clock(), 1.0)
            return float("inf")

    def add(self, client: str, amount: float) -> None:
        """Count an amount (a negative one gives back what was counted)."""
        client = group_of(client)
        with self._lock:
            self._all.append((self.clock(), client, amount))
            self._count(client, amount)
            while len(self._of) > MOST_KNOWN:
                self._of.popitem(last=False)

    def clear(self, client: str) -> None:
        """Forget what a client has used."""
        client = group_of(client)
        with self._lock:
            self._all = deque(entry for entry in self._all if entry[1] != client)
            self._sum -= self._of.pop(client, 0.0)

    def _forget(self) -> None:
        while self._all and self._all[0][0] <= self.clock() - self.seconds:
            _, client, amount = self._all.popleft()
            self._count(client, -amount)

    def _count(self, client: str, amount: float) -> None:
        self._sum += amount
        left = self._of.pop(client, 0.0) + amount
        if left > 0:
            self._of[client] = left


def uploads() -> Window:
    """Bytes that were sent within a day."""
    return Window(PER_CLIENT, IN_ALL, DAY_S)


def logins() -> Window:
    """Wrong logins within a minute."""
    return Window(TRIES, TRIES_IN_ALL, TRIES_S)
