"""Why a visitor's job came to nothing: a line that stays, in place of a toast that goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gradio as gr

from latentpipe.ui import html
from latentpipe.ui.state import App


@contextmanager
def remembered(app: App, request: gr.Request) -> Iterator[None]:
    """Keep the sentence of a gr.Error from inside until `said_why` shows it: gradio tells a failure's handler nothing."""
    session = request.session_hash or ""
    app.reasons.pop(session, None)
    try:
        yield
    except gr.Error as error:
        app.reasons[session] = str(error.message)
        raise


def said_why(app: App, what: str) -> Callable[[gr.Request], str]:
    """For `failure`: `what` came of it, such as "Nothing was drawn.", and the reason."""

    def said(request: gr.Request) -> str:
        return html.words(f"{what} {app.reasons.pop(request.session_hash or '', '')}".strip())

    return said
