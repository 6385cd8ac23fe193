"""latentpipe ui: start the server, on this machine only unless asked otherwise, and never without a login beyond it."""

from __future__ import annotations

import atexit
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1")  # gradio makes a table of so many events after each of them
if "GRADIO_TEMP_DIR" not in os.environ:
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="latentpipe-ui-")
    atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)

import gradio as gr

from latentpipe import UserError
from latentpipe.files import home
from latentpipe.ui import app as pages
from latentpipe.ui import sessions, theme
from latentpipe.ui.state import App, collect_notes
from latentpipe.weights import find_model, shipped

LOGIN = "LATENTPIPE_UI_LOGIN"
THREADS = 128  # a job that waits in the line holds one
SWITCH_S = 5e-4  # Python's 5 ms, waited for by each small operation of a denoiser while the server is busy, make its steps slow
Login = Callable[[str, str], bool]


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
    block: bool = True,
) -> tuple[gr.Blocks, str]:
    """Serve the interface; returns the page and its address where `block` is off.

    listen     for other machines too; needs a login, or `no_auth`
    auth_file  lines of ``user:password``; the variable LATENTPIPE_UI_LOGIN holds one such line
    mcp        offer the endpoints to language models as tools as well (needs the extra)
    out        where pictures are kept; None: nowhere but in the visitor's browser
    """
    login = login_of(auth_file)
    _refuse(listen and login is None and not no_auth, mcp and importlib.util.find_spec("mcp") is None)
    find_model(model)  # a wrong name is said now
    host = "0.0.0.0" if listen else "127.0.0.1"
    port = _free_port(port, host)
    collect_notes()
    sys.setswitchinterval(SWITCH_S)
    state = App(model=model, out=out)
    state.models.device, state.models.dtype = device, dtype
    page = pages.build(state).queue(default_concurrency_limit=8, api_open=False)
    sessions.lighten(page)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        auth=login,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        max_threads=THREADS,
        state_session_capacity=sessions.MOST,
        max_file_size="20mb",
        allowed_paths=[],
        blocked_paths=[str(shipped()), str(home())],
        enable_monitoring=False,
        ssr_mode=False,
        run_history=False,
        mcp_server=mcp,
        footer_links=["api", "settings"],
        theme=theme.theme(),
        css=theme.CSS,
        head=theme.KEYS,
    )
    print(f"latentpipe is at {address}  (Ctrl-C ends it)", flush=True)
    if block:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: what was shown is removed
        try:
            page.block_thread()
        finally:
            state.close()
    return page, address


def _refuse(open_to_all: bool, without_mcp: bool) -> None:
    if open_to_all:
        raise UserError(
            f"--listen opens the interface to other machines; give --auth-file FILE (lines of user:password) or the variable "
            f"{LOGIN}=user:password, or say --no-auth to let everybody in."
        )
    if without_mcp:
        raise UserError("--mcp needs a package that is not installed: pip install 'latentpipe[mcp]' (it holds pydantic back).")


def login_of(auth_file: Path | None) -> Login | None:
    """A check of user and password, from a file or the environment; None where neither is given."""
    lines = _lines(auth_file) if auth_file is not None else [os.environ[LOGIN]] if os.environ.get(LOGIN) else []
    where = f"{auth_file}" if auth_file is not None else LOGIN
    known: dict[str, str] = {}
    for line in lines:
        user, mark, password = line.partition(":")
        if not (mark and user and password):
            raise UserError(f"{where}: expected lines of user:password, with neither of them empty.")
        if user in known:
            raise UserError(f"{where} names the user '{user}' twice; keep one line for each.")
        known[user] = password
    if auth_file is not None and not known:
        raise UserError(f"{where} names no user; expected lines of user:password.")
    if not known:
        return None
    none = secrets.token_hex(32)

    def check(user: str, password: str) -> bool:
        right = known.get(user, none)  # an unknown user takes as long
        return secrets.compare_digest(right.encode(), password.encode()) and user in known

    return check


def _lines(path: Path) -> list[str]:
    try:
        if os.name == "posix" and path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
            raise UserError(f"{path} can be read or written by everybody on this machine; run: chmod 600 {path}")
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip() and not line.startswith("#")]
    except OSError as error:
        raise UserError(f"--auth-file {path}: {(error.strerror or 'cannot be read').lower()}.") from None
    except UnicodeDecodeError:
        raise UserError(f"--auth-file {path} is no text; expected lines of user:password.") from None


def _free_port(port: int | None, host: str = "127.0.0.1") -> int:
    """The port asked for, or the first free one from 7860 on; UserError where there is none."""
    if port is not None and not 1 <= port <= 65535:
        raise UserError(f"--port is {port}; expected 1 to 65535.")
    for candidate in [port] if port is not None else range(7860, 7960):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
                return candidate
            except OSError:
                continue
    raise UserError(
        f"--port {port} is taken or not allowed; choose another one." if port else "No port from 7860 to 7959 is free."
    )
