"""latentpipe ui: the page behind its guard, at sockets that listen already, until it is told to end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from latentpipe import UserError
from latentpipe.checkpoints.registry import bundled_weights_dir, find_model
from latentpipe.checkpoints.single_file.gather import Stated
from latentpipe.engine.studio import Studio
from latentpipe.ui import app as pages
from latentpipe.ui import serving, sessions, theme
from latentpipe.ui.entrance import Entrance
from latentpipe.ui.guard import MAX_FILE, RequestGuard
from latentpipe.ui.jobs import MAX_WORK, Jobs
from latentpipe.ui.listeners import Listeners
from latentpipe.ui.login import LoginSessions
from latentpipe.ui.state import App, collect_notes
from latentpipe.utils.io import home
from latentpipe.utils.signals import signals_to

THREADS = 128  # a job that waits in the line holds one
SWITCH_S = 5e-4  # Python's 5 ms, waited for by each small operation of a denoiser while the server is busy, make its steps slow


def serve(
    entrance: Entrance,
    model: str = "emoji",
    out: Path | None = None,
    device: str | None = None,
    dtype: str = "fp32",
    mcp: bool = False,
    max_work: float = MAX_WORK,
    stated: Stated | None = None,
    takes_over: Callable[[], None] = lambda: None,
    workers: int | None = None,
    cluster: str | None = None,
) -> Served:
    """Serve the interface at an entrance; returns what serves it.

    max_work    the most that one request may ask for: pixels x steps x pictures, in millions
    stated      what the single file of `model` does not say itself
    mcp         offer the endpoints to language models as tools as well (needs the extra)
    out         where pictures are kept; None: nowhere but in the visitor's browser
    workers     processes that draw, one for each device; None: this process draws
    cluster     address of a Ray cluster that they run on
    takes_over  called right before the server answers at the sockets of the entrance
    """
    if not max_work > 0:
        raise UserError(f"--max-work is {max_work:g}; expected more than 0 (millions of pixels x steps x pictures).")
    place = find_model(model)  # a wrong name is said now
    _refuse_hidden(Path(get_upload_folder()))
    collect_notes()
    sys.setswitchinterval(SWITCH_S)
    state = App(model=model, out=out, jobs=Jobs(max_work, listeners := Listeners()))
    with contextlib.ExitStack() as undo:
        undo.callback(state.close)
        state.models.device, state.models.dtype = device, dtype
        state.models.stated |= {place: stated} if stated is not None and place.is_file() else {}
        if workers is not None:
            state.jobs.studio = Studio(workers, model, device, dtype, state.models.stated, cluster)
        page = pages.build(state).queue(default_concurrency_limit=8, api_open=False)
        sessions.lighten(page)
        page.max_threads = page._queue.max_thread_count = THREADS
        page.state_session_capacity = sessions.MOST
        door = LoginSessions(entrance.login, entrance.root_path) if entrance.login is not None else None
        inside = serving.mounted(page, **_options(entrance.root_path, mcp))
        guard = RequestGuard(inside, entrance.names, door, listeners, _session_of(page), entrance.root_path)
        takes_over()
        running = serving.Running(guard, entrance.sockets, entrance.behind_proxy)
        undo.pop_all()
    return Served(page, entrance.address, state, running)


class Served:
    """A running interface: its page, its address, and how to end it."""

    def __init__(self, page: gr.Blocks, address: str, state: App, running: serving.Running) -> None:
        self.page, self.address, self._state, self._running = page, address, state, running

    def until_told(self) -> None:
        """Serve until Ctrl-C (KeyboardInterrupt, exit status 130) or SIGTERM (a server's usual end, 0); a second one kills."""
        told = threading.Event()
        came: list[int] = []

        def on_signal(number: int, _: Any) -> None:
            if came:
                os._exit(128 + number)
            came.append(number)
            told.set()

        with signals_to(on_signal):
            told.wait()
            print("latentpipe: ending; a picture in work is given up.", file=sys.stderr, flush=True)
            self.close()
        if came == [signal.SIGINT]:
            raise KeyboardInterrupt
        raise SystemExit(0)

    def close(self) -> None:
        """Stop the jobs, let the visitors go, and remove what was shown."""
        self._state.jobs.close()
        self._running.close(self.page)
        self._state.close()


def _options(root_path: str, mcp: bool) -> dict[str, Any]:
    return {
        "root_path": root_path, "show_error": False, "max_file_size": MAX_FILE, "allowed_paths": [],
        "blocked_paths": [str(folder) for folder in _hidden()],
        "enable_monitoring": False, "ssr_mode": False, "run_history": False,
        "mcp_server": mcp, "footer_links": ["api", "settings"], "theme": theme.theme(), "css": theme.CSS, "head": theme.KEYS,
    }  # fmt: skip


def _hidden() -> tuple[Path, Path]:
    """Folders that no address leads into: the shipped weights, and the user's own."""
    return bundled_weights_dir(), home()


def _refuse_hidden(shown: Path) -> None:
    """gradio shows nothing from below a folder that it hides: every picture would be an error."""
    for folder in _hidden():
        if shown.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"Pictures for the browser would go to {shown}, inside of {folder}, which the page never serves from; "
                "let GRADIO_TEMP_DIR (or TMPDIR) name a folder outside of it, or LATENTPIPE_HOME another one."
            )


def _session_of(page: gr.Blocks) -> Any:
    """From an event of gradio's queue to its visitor."""

    def session(event: str) -> str | None:
        found = page._queue.event_ids_to_events.get(event)
        return None if found is None else found.session_hash

    return session
