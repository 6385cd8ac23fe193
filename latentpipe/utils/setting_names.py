"""The names of three settings: in Python those of diffusers; in recipes, on the command line and on the page shorter ones.

This module alone knows both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from latentpipe.utils.errors import UserError

IN_PYTHON = {"negative": "negative_prompt", "steps": "num_inference_steps", "guidance": "guidance_scale"}
"""Short name -> name in Python."""
SHORT = {name: short for short, name in IN_PYTHON.items()}
_IN_SENTENCES = re.compile(rf"\b({'|'.join(SHORT)})\b")

P = ParamSpec("P")
R = TypeVar("R")


def in_python(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under their names in Python; other keys stay."""
    return {IN_PYTHON.get(name, name): value for name, value in settings.items()}


def shortened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under their short names, as recipes and endpoints have them; other keys stay."""
    return {SHORT.get(name, name): value for name, value in settings.items()}


def with_short_names(sentence: str) -> str:
    """A sentence of the library for the command line and the page: its settings under their short names."""
    return _IN_SENTENCES.sub(lambda match: SHORT[match[0]], sentence)


def refuse_short(names: Iterable[str]) -> None:
    """UserError where one of the names of arguments is a short one; it says the name in Python."""
    for name in names:
        if name in IN_PYTHON:
            raise UserError(f"there is no setting '{name}'; its name in Python is '{IN_PYTHON[name]}', as in diffusers.")


def takes_settings(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that takes settings as arguments: a short name is refused with `refuse_short`'s sentence."""

    @wraps(function)
    def checked(*args: P.args, **given: P.kwargs) -> R:
        refuse_short(given)
        return function(*args, **given)

    return checked
