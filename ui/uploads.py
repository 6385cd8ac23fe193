"""Pictures that a visitor sends: opened within limits, or refused in one sentence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from latentpipe import UserError
from latentpipe.ui.state import LIGHT
from latentpipe.utils.images import open_picture, picture_file

MAX_PIXELS = 4096 * 4096
MOST_TOLD = 3  # files that a toast names


def picture_of(path: str | None) -> Image.Image:
    """An uploaded file as an upright 8-bit RGB picture; UserError says what is wrong with it."""
    if path is None:
        raise UserError("No picture was given; drop one here first.")
    check_picture(path)
    return open_picture(Path(path))


def name_of_file(path: str) -> str:
    """What the visitor calls the file: its name without the server's folders."""
    return Path(path).name[:80]


def check_picture(path: str) -> None:
    """UserError unless the file begins as a picture of a known kind and of bearable size; nothing is decoded yet."""
    name = name_of_file(path)
    try:
        with picture_file(Path(path)) as picture:
            size = picture.size
    except UserError as error:  # it names the server's folders
        reason = str(getattr(error, "reason", ""))
        if "pixels" in reason:
            raise UserError(f"{name} cannot be read as a picture: {reason}.") from None
        raise UserError(f"{name} cannot be read as a picture; expected a PNG, JPEG, WebP, GIF, BMP or TIFF file.") from None
    if math.prod(size) > MAX_PIXELS:
        raise UserError(f"{name} has {size[0]} x {size[1]} pixels; at most {MAX_PIXELS:,} in all are taken. Make it smaller.")


def picture_input(label: str, said: bool = True, **options: Any) -> gr.Image:
    """A place to drop or paste a picture; its handler gets the path of the file as it was sent, undecoded.

    said  refuse what is no picture, or too large, as soon as it is dropped: a toast, and the place is empty again
    """
    image = gr.Image(label=label, type="filepath", format="png", image_mode=None, sources=["upload", "clipboard"], **options)
    image.preprocess = _path  # type: ignore[method-assign]  # gradio would decode it without limits
    if said:
        image.upload(_taken, [image], [image], **LIGHT)
    return image


def _taken(path: str | None) -> Any:
    try:
        if path is not None:
            check_picture(path)
    except UserError as error:
        gr.Warning(str(error), duration=12)
        return None
    return gr.skip()


def _path(payload: Any) -> str | None:
    if payload is None:
        return None
    if payload.path is None:
        raise gr.Error("The picture came without a file; upload one.", print_exception=False)
    return str(payload.path)


def readable(paths: list[str] | None) -> Any:
    """For the upload of a field of several pictures: those that can be read; the others are told in one toast."""
    kept, told = [], []
    for path in paths or []:
        try:
            check_picture(path)
            kept.append(path)
        except UserError as error:
            told.append(str(error))
    if not told:
        return gr.skip()
    more = f" And {len(told) - MOST_TOLD} more." if len(told) > MOST_TOLD else ""
    gr.Warning(" ".join(told[:MOST_TOLD]) + more, duration=12)
    return kept or None
