"""latentpipe ui: start the server, on this machine only unless asked otherwise, and never without a login beyond it."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from latentpipe import UserError
from latentpipe.checkpoints.registry import bundled_weights_dir, find_model
from latentpipe.checkpoints.single_file.gather import Stated
from latentpipe.ui import app as pages
from latentpipe.ui import serving, sessions, theme
from latentpipe.ui.allowed_hosts import AllowedHosts, is_loopback, names_for
from latentpipe.ui.guard import MAX_FILE, RequestGuard
from latentpipe.ui.listeners import Listeners
from latentpipe.ui.login import LOGIN, LoginSessions, login_of
from latentpipe.ui.state import MAX_WORK, App, Jobs, collect_notes
from latentpipe.utils.io import home
from latentpipe.utils.signals import signals_to

THREADS = 128  # a job that waits in the line holds one
SWITCH_S = 5e-4  # Python's 5 ms, waited for by each small operation of a denoiser while the server is busy, make its steps slow


def serve(
    model: str = "emoji",
    port: int | None = None,
    listen: bool = False,
    auth_file: Path | None = None,
    no_auth: bool = False,
    out: Path | None = None,
    device: str | None = None,
    dtype: str = "fp32",
    mcp: bool = False,
    host: str | None = None,
    allow_host: Sequence[str] = (),
    root_path: str = "",
    max_work: float = MAX_WORK,
    block: bool = True,
    stated: Stated | None = None,
) -> Served:
    """Serve the interface; returns what serves it where `block` is off, else after Ctrl-C or SIGTERM.

    listen      for other machines too, at every address; needs a login, or `no_auth`
    host        an address or name of this machine to listen at; "::": every address
    allow_host  further names that the server answers to, such as that of a reverse proxy
    root_path   path that a reverse proxy serves it at, such as /draw
    auth_file   lines of ``user:password``; the variable LATENTPIPE_UI_LOGIN holds one such line
    max_work    the most that one request may ask for: pixels x steps x pictures, in millions
    stated      what the single file of `model` does not say itself
    mcp         offer the endpoints to language models as tools as well (needs the extra)
    out         where pictures are kept; None: nowhere but in the visitor's browser
    """
    host = (host or ("::" if listen else "127.0.0.1")).strip("[] ")
    login = login_of(auth_file)
    _refuse(not is_loopback(host) and login is None and not no_auth, mcp and importlib.util.find_spec("mcp") is None)
    root_path = _root_of(root_path)
    if not max_work > 0:
        raise UserError(f"--max-work is {max_work:g}; expected more than 0 (millions of pixels x steps x pictures).")
    place = find_model(model)  # a wrong name is said now
    _refuse_hidden(Path(get_upload_folder()))
    sockets = serving.sockets_for(host, port)
    collect_notes()
    sys.setswitchinterval(SWITCH_S)
    state = App(model=model, out=out, jobs=Jobs(max_work, listeners := Listeners()))
    state.models.device, state.models.dtype = device, dtype
    state.models.stated |= {place: stated} if stated is not None and place.is_file() else {}
    page = pages.build(state).queue(default_concurrency_limit=8, api_open=False)
    sessions.lighten(page)
    page.max_threads = page._queue.max_thread_count = THREADS
    page.state_session_capacity = sessions.MOST
    names = AllowedHosts(names_for([host], allow_host), allow_host)
    door = LoginSessions(login, root_path) if login is not None else None
    inside = serving.mounted(page, **_options(root_path, mcp))
    guard = RequestGuard(inside, names, door, listeners, _session_of(page), root_path)
    running = serving.Running(guard, sockets, behind_proxy=bool(root_path or allow_host))
    served = Served(page, serving.address_of(host, sockets[0].getsockname()[1]), state, running)
    print(f"latentpipe is at {served.address}  (Ctrl-C ends it)", flush=True)
    if block:
        served.until_told()
    return served


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


def _root_of(path: str) -> str:
    """``draw/`` as ``/draw``, "" for none; UserError for an address."""
    if "://" in path or any(letter in path for letter in '?#\\"<> '):
        raise UserError(f"--root-path {path}: expected a path alone, such as /draw.")
    path = path.strip("/")
    return f"/{path}" if path else ""


def _refuse(open_to_all: bool, without_mcp: bool) -> None:
    if open_to_all:
        raise UserError(
            f"This opens the interface to other machines; give --auth-file FILE (lines of user:password) or the variable "
            f"{LOGIN}=user:password, or say --no-auth to let everybody in."
        )
    if without_mcp:
        raise UserError("--mcp needs a package that is not installed: pip install 'latentpipe[mcp]' (it holds pydantic back).")
