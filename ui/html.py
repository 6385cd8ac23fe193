"""What is shown as HTML: progress with preview, lights, tables, empty places. Everything that goes in is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from latentpipe import Verdict


def progress(done: int, total: int, what: str, eta_s: float | None = None, preview: Image.Image | None = None) -> str:
    """A bar with words, and the preview of the step (JPEG: it is looked at for a moment only)."""
    share = round(100 * done / max(total, 1))
    left = f", about {eta_s:.0f} s left" if eta_s is not None and eta_s >= 1 else ""
    words = f"{escape(what)}: {done} of {total} ({share} %){left}"
    bar = f'<progress max="{max(total, 1)}" value="{done}" aria-label="{escape(what)}"></progress>'
    shown = "" if preview is None else picture(preview, f"Preview after {done} of {total} steps", lossy=True)
    return f'<div class="lp-status" role="status"><p>{words}</p>{bar}{shown}</div>'


def waiting(ahead: int) -> str:
    """The status of a job that begins, or waits for others."""
    return words("Beginning ..." if ahead == 0 else f"In the queue: {ahead} before you.")


def words(text: str) -> str:
    """A line of status."""
    return f'<div class="lp-status" role="status"><p>{escape(text)}</p></div>'


def light(colour: str, text: str, head: str = "") -> str:
    """A coloured light ("green", "amber", "red", "wait") with the word for it and a sentence."""
    strong = f"<b>{escape(head or colour)}:</b> " if head or colour != "wait" else ""
    return f'<div class="lp-light lp-{colour}" role="status"><span>{strong}{escape(text)}</span></div>'


def text(words: str) -> str:
    """Words as HTML."""
    return escape(words)


def verdict(found: Verdict, name: str = "") -> str:
    """The light of a verdict on a VAE, with its reason."""
    heads = {
        "same space": "Fits", "decoder fits": "Fits (decoder)", "same shape, other space": "Needs an adapter",
    }  # fmt: skip
    head = heads.get(found.outcome, "Does not fit")
    return light(found.status, found.reason, name + head.lower() if name else head)


def empty(text: str) -> str:
    """What an empty place says: what to do."""
    return f'<div class="lp-empty">{escape(text)}</div>'


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table whose first column names its rows."""
    head = "".join(f'<th scope="col">{escape(str(cell))}</th>' for cell in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(str(row[0]))}</th>' + "".join(f"<td>{escape(str(cell))}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="lp-table" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def picture(image: Image.Image, alt: str, lossy: bool = False) -> str:
    """An `img` with the picture inside (PNG, or JPEG where lossy)."""
    buffer = io.BytesIO()
    image.save(buffer, *(("JPEG",) if lossy else ("PNG",)))
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/{"jpeg" if lossy else "png"};base64,{data}">'


def pictures(entries: Sequence[tuple[Image.Image, str]]) -> str:
    """Pictures in a grid, each with its caption, which is its alternative text too."""
    figures = "".join(
        f"<figure>{picture(image, text)}<figcaption>{escape(text)}</figcaption></figure>" for image, text in entries
    )
    return f'<div class="lp-pictures">{figures}</div>'
