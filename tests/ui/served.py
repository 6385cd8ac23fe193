"""Starting a server in another process, and opening its page."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def heed_interrupts() -> None:
    """As started from a terminal: what a shell starts in the background ignores Ctrl-C, and so would the server."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*options: str, home: Path, **environment: str) -> tuple[subprocess.Popen[str], str]:
    """Run `latentpipe ui` and wait until it answers; the process and its address."""
    port = free_port()
    command = [sys.executable, "-m", "latentpipe", "ui", "--port", str(port), *options]
    known = {**os.environ, "LATENTPIPE_HOME": str(home), "PYTHONWARNINGS": "", **environment}
    log = (home / "server.log").open("w")
    process = subprocess.Popen(command, env=known, cwd=home, stdout=log, stderr=log, text=True, preexec_fn=heed_interrupts)
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(address, timeout=1):
                return process, address
        except OSError:
            time.sleep(0.1)
    process.kill()
    raise AssertionError((home / "server.log").read_text())


def opened(browser: Any, address: str, size: dict[str, int]) -> Iterator[Any]:
    """A page of a size in pixels, ready to use."""
    context = browser.new_context(viewport=size, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(240_000)  # drawing takes seconds, and minutes on a machine that does other things too
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    page.on("request", lambda request: None if inside(request.url, address) else wrong.append(f"asked {request.url}"))
    page.goto(address)
    page.wait_for_selector("#lp-state .lp-green")
    yield page
    context.close()
    assert wrong == []


def inside(url: str, address: str) -> bool:
    """Whether a request stays on this machine."""
    origin = address.split("/?")[0]
    return url.startswith((origin, "data:", "blob:", origin.replace("http", "ws")))
