"""How long work tells how far it is: a function that it calls with (parts done, parts in all, what is in work)."""

from __future__ import annotations

from collections.abc import Callable

ProgressCallback = Callable[[int, int, str], None]
