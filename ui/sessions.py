"""gradio's memory of each visitor, made light and bounded; and its queue, made calm.

gradio 6 copies the description of the whole page for every session: 15 ms and 1 MB of this page for each call of an endpoint,
kept for the last 10 000 sessions. Only deep links read that copy, and this page has none.
"""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.state_holder import SessionState

MOST = 1000
"""Visitors whose history and choices are remembered; who was away for longest is forgotten first."""
POLL_S = 0.02
"""Seconds between looks for requests; gradio's millisecond, also while it draws, is felt by a denoiser's threads."""


class _Bare:
    """A page as a new session sees it: all of it, but no blocks to copy the description of."""

    def __init__(self, page: gr.Blocks) -> None:
        self._page = page
        self.blocks: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._page, name)


def lighten(page: gr.Blocks) -> None:
    """Let new sessions begin without that copy (gradio describes a block when its value first changes), and look for their
    requests seldom enough. `page` has its queue."""
    page._queue.sleep_when_free = page._queue.progress_update_sleep_when_free = POLL_S
    make = SessionState.__init__
    if getattr(make, "light", False):
        return

    def light(self: SessionState, blocks: Any) -> None:
        make(self, _Bare(blocks))  # type: ignore[arg-type]

    light.light = True  # type: ignore[attr-defined]
    SessionState.__init__ = light  # type: ignore[method-assign]
