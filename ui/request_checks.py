"""What a request may hold: wrong types, missing arguments and files that were not sent here are answered in a sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from gradio.exceptions import Error
from gradio.route_utils import FnIndexInferError
from gradio.utils import get_upload_folder
from starlette.requests import Request
from starlette.responses import JSONResponse

WANTED: tuple[tuple[type, str], ...] = (
    (gr.Number, "a number"),
    (gr.Textbox, "text"),
    (gr.Image, 'an uploaded file: {"path": ..., "meta": {"_type": "gradio.FileData"}}, its path as /gradio_api/upload gave it'),
    (gr.File, 'a list of uploaded files, each {"path": ..., "meta": {"_type": "gradio.FileData"}}'),
)
"""Fields of the endpoints, and what each takes (beside null, for which its handler has words)."""


def check_arguments(page: gr.Blocks) -> None:
    """Look at the arguments of every event before gradio does, whose errors of this kind reach nobody."""
    prepare = page.preprocess_data

    async def checked(fn: Any, inputs: list[Any], *rest: Any, **named: Any) -> Any:
        if words := wrong(fn, inputs):
            raise gr.Error(words, duration=20, print_exception=False)
        try:
            return await prepare(fn, inputs, *rest, **named)
        except Error as error:
            if words := beyond(fn, inputs):
                raise gr.Error(words, duration=20, print_exception=False) from None
            error.print_exception = False
            raise
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, OSError):
            raise gr.Error("These values are not what the fields of this page send. Reload it.", print_exception=False) from None

    page.preprocess_data = checked  # type: ignore[method-assign, assignment]


def wrong(fn: Any, inputs: list[Any]) -> str:
    """Why the arguments of an event cannot be taken; "" where they can."""
    public = fn.api_visibility == "public"
    names = [str(field.label) for field in fn.inputs]
    if len(inputs) != len(names):
        if not public:
            return "This page is older than the server. Reload it."
        return f"/{fn.api_name} takes {len(names)} arguments ({', '.join(names) or 'none'}); given {len(inputs)}."
    for field, name, value in zip(fn.inputs, names, inputs, strict=True):
        if getattr(field, "stateful", False):
            continue  # what the server itself remembers
        if public and value is not None and (wanted := _unlike(field, value)):
            return f"{name} is {_short(value)}; expected {wanted}."
        for path in _paths(value):
            if not _was_sent(path):
                return f"{Path(path).name[:80]} was not uploaded here; upload the file first."
    return ""


def beyond(fn: Any, inputs: list[Any]) -> str:
    """Which number of an event lies beyond its field's limits, and these; "" where none does."""
    for field, value in zip(fn.inputs, inputs, strict=True):
        if isinstance(field, gr.Number | gr.Slider) and isinstance(value, int | float):
            low, high = field.minimum, field.maximum
            if (low is not None and value < low) or (high is not None and value > high):
                least = "up" if low is None else f"{low:.10g}"
                limits = f"{least} or more" if high is None else f"{least} to {high:.10g}"
                return f"{field.label} is {value:.12g}; expected {limits}."
    return ""


def _unlike(field: Any, value: Any) -> str:
    """What a field takes, where the value is of another type; else ""."""
    wanted = next((words for kind, words in WANTED if isinstance(field, kind)), "")
    if isinstance(field, gr.Number):
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    elif isinstance(field, gr.Textbox):
        fits = isinstance(value, str)
    elif isinstance(field, gr.Image):
        fits = _is_file(value)
    elif isinstance(field, gr.File):
        fits = isinstance(value, list) and all(_is_file(one) for one in value)
    else:
        fits = True
    return "" if fits else wanted


def _is_file(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("path"), str) and isinstance(value.get("meta"), dict)


def _paths(value: Any) -> Iterator[str]:
    """Every path to a file inside a value."""
    if isinstance(value, dict):
        if isinstance(value.get("path"), str):
            yield value["path"]
        for part in value.values():
            yield from _paths(part)
    elif isinstance(value, list):
        for part in value:
            yield from _paths(part)


def _was_sent(path: str) -> bool:
    """Whether a file lies in the folder of what was sent or shown; an address (http://...) never does."""
    try:
        return Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve())
    except (OSError, ValueError, RuntimeError):
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def answer_in_words(app: FastAPI) -> None:
    """Let gradio's application answer a request that it cannot make sense of with a sentence, in place of a bare 500."""

    async def not_valid(_: Request, error: Exception) -> JSONResponse:
        problems = error.errors() if isinstance(error, RequestValidationError) else []
        if any(one["type"] == "json_invalid" for one in problems):
            return _said("The request is no JSON.", 422)
        found = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg'].lower()}" for one in problems[:3])
        return _said(f"The request is not of the form that is taken here: {found}.", 422)

    async def not_known(request: Request, _: Exception) -> JSONResponse:
        return _said(
            f"{request.url.path} has no such endpoint or argument. The endpoints and what they take: 'Use via API' on the page.",
            400,
        )

    app.add_exception_handler(RequestValidationError, not_valid)
    for kind in (FnIndexInferError, ValueError, KeyError, TypeError, IndexError, AttributeError, AssertionError):
        app.add_exception_handler(kind, not_known)


def _said(words: str, status: int) -> JSONResponse:
    return JSONResponse({"detail": words, "error": words}, status)
