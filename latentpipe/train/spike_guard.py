"""The spike guard: a step whose loss jumps or is not finite sends the run back to its last good checkpoint."""

from __future__ import annotations

import math
import statistics
from collections import deque

WINDOW = 100  # steps whose median says what is usual
WARM = 20  # steps before anything but a value that is not finite counts as a spike
JUMP = 8.0  # times the usual loss
TRIES = 3
UNSTEADY = frozenset({"kl", "adversarial", "spectrum", "scale"})  # terms that move by schedule, or may be negative


class SpikeGuard:
    """Remembers the usual size of the reconstruction terms; part of every checkpoint, so that a resumed run judges alike.

    detours  how often the run went back; each halves the learning rate from there on
    """

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.rollbacks = 0

    def is_spike(self, figures: dict[str, float]) -> bool:
        """Whether a step with these loss terms must not be taken; otherwise it counts as usual from now on."""
        if not all(math.isfinite(value) for value in figures.values()):
            return True
        steady = sum(value for name, value in figures.items() if name not in UNSTEADY)
        if len(self.recent) >= WARM and steady > JUMP * statistics.median(self.recent):
            return True
        self.recent.append(steady)
        return False

    def state(self) -> dict[str, object]:
        """For a checkpoint."""
        return {"recent": list(self.recent), "detours": self.rollbacks}

    def restore(self, state: dict[str, object]) -> None:
        """The inverse of `state`."""
        self.recent = deque(state["recent"], maxlen=WINDOW)  # type: ignore[call-overload]
        self.rollbacks = int(state["detours"])  # type: ignore[call-overload]
