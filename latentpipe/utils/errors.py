"""What a person is told: one exception for mistakes that they can mend, one warning, and what is under way."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that a person can mend: its message says what was given, what was expected and what to do next.

    The command line prints it without a traceback and exits with status 2. It is a ValueError, so that programs catch it as one.
    """


class Cancelled(Exception):
    """A job was stopped before it had anything to keep."""


class LatentpipeWarning(UserWarning):
    """Something unusual that was done all the same."""


def near(word: object, known: Iterable[str], least: float = 0.6) -> str:
    """ " Did you mean 'red'?", where one of the `known` words is like `word` (from `least` on, up to 1); else an empty text."""
    folded = {name.casefold(): name for name in known}
    found = difflib.get_close_matches(str(word).casefold()[:100], folded, n=1, cutoff=least)
    return f" Did you mean '{folded[found[0]]}'?" if found else ""


def counted(number: int, what: str, several: str = "") -> str:
    """ "1 picture", "2 pictures", "1,000 pictures"; `several` is the plural where it is not made with an s."""
    return f"{number:,} {what if number == 1 else several or what + 's'}"


def short(value: float, digits: int = 3) -> str:
    """A number with so many significant digits as people write it: "120", "12,000" and "0.0012", not "1.2e+02"."""
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if "e+" in text and abs(value) < 1e9 else text


def expect(name: str, value: object, kinds: type | tuple[type, ...], what: str) -> None:
    """UserError where a value has another type than one of `kinds`; `what` says in words what was expected.

    True and False are no numbers; a whole number is a number.
    """
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    right = isinstance(value, allowed) and (not isinstance(value, bool) or bool in allowed)
    if not right and not (float in allowed and isinstance(value, int) and not isinstance(value, bool)):
        raise UserError(f"{name} is {repr(value)[:80]}, of type {type(value).__name__}; expected {what}.")


def begin(sentence: str) -> None:
    """Say what is under way, before seconds of imports; on stderr, so that what a verb prints stays its result alone."""
    print(f"latentpipe: {sentence} ...", file=sys.stderr, flush=True)
