"""From a page to a server that answers: sockets on every address asked for, gradio inside its guard, an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import threading
from collections.abc import Sequence
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.routing import Mount
from starlette.types import ASGIApp

from latentpipe import UserError
from latentpipe.ui import request_checks
from latentpipe.ui.allowed_hosts import EVERY

PORTS = range(7860, 7960)
START_S, END_S = 60.0, 5.0
SILENT_MS = 30_000  # a peer that confirms nothing for so long has left without a word


def sockets_for(host: str, port: int | None) -> list[socket.socket]:
    """A bound socket for each address of `host`, all at one port: the one asked for, or the first free one from 7860 on.

    host  an address, or a name with one or more of them; ``::`` and ``0.0.0.0``: every address, with IPv6 where there is any
    UserError where the name leads nowhere, or no port is free.
    """
    if port is not None and not 1 <= port <= 65535:
        raise UserError(f"--port is {port}; expected 1 to 65535.")
    addresses = _addresses(host)
    why = ""
    for candidate in [port] if port is not None else PORTS:
        with contextlib.ExitStack() as opened:
            found = []
            try:
                for family, address in addresses:
                    try:
                        found.append(opened.enter_context(_bound(family, address, candidate)))
                    except OSError:
                        if not (host in EVERY and family == socket.AF_INET6 and not _has_ipv6()):
                            raise
                opened.pop_all()
                return found
            except OSError as error:
                why = (error.strerror or "").lower()
                if "assign" in why:
                    raise UserError(f"--host {host}: this machine has no such address.") from None
    raise UserError(
        f"--port {port} is taken or not allowed ({why}); choose another one."
        if port
        else f"No port from {PORTS.start} to {PORTS.stop - 1} is free."
    )


def _addresses(host: str) -> list[tuple[Any, str]]:
    if host in EVERY:
        return [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")]
    with contextlib.suppress(ValueError):
        return [(socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET, host)]
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise UserError(f"--host {host}: no such address or name is known here; give an address of this machine.") from None
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


def _bound(family: Any, address: str, port: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_MS)
        made.bind((address, port))
    except BaseException:
        made.close()
        raise
    return made


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
        return True
    except OSError:
        return False


def address_of(host: str, port: int) -> str:
    """A link to the server that can be clicked on."""
    name = "localhost" if host in EVERY else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


def mounted(page: gr.Blocks, **options: Any) -> FastAPI:
    """gradio's application of a page, with the options of `gradio.mount_gradio_app`."""
    app = gr.mount_gradio_app(FastAPI(docs_url=None, redoc_url=None, openapi_url=None), page, path="/", **options)
    page.has_launched = True  # until then gradio 6.31 takes any file of this machine for an uploaded one
    inside = next(route.app for route in app.routes if isinstance(route, Mount))
    page.app = page.server_app = inside  # type: ignore[assignment]
    request_checks.check_arguments(page)
    request_checks.answer_in_words(inside)  # type: ignore[arg-type]
    return app


class Running:
    """A server that answers in a thread of its own until `close`."""

    def __init__(self, app: ASGIApp, sockets: Sequence[socket.socket], behind_proxy: bool) -> None:
        config = uvicorn.Config(
            app, log_level="warning", proxy_headers=behind_proxy, server_header=False, timeout_graceful_shutdown=1, ws="none"
        )
        self._server = uvicorn.Server(config)
        self._loop: asyncio.AbstractEventLoop | None = None

        async def answer() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.serve(sockets=list(sockets))

        self._thread = threading.Thread(target=asyncio.run, args=(answer(),), name="latentpipe_server", daemon=True)
        self._thread.start()
        waited = threading.Event()
        for _ in range(int(START_S / 0.02)):
            if self._server.started or not self._thread.is_alive():
                break
            waited.wait(0.02)
        if not self._server.started:
            raise UserError("The server did not start; what it said stands above.")

    def close(self, page: gr.Blocks) -> None:
        """Answer no more; whoever reads the page's events is let go."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would print where each stream was cut off
        page._queue.close()
        page.is_running = False
        if self._loop is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it has just ended
                self._loop.call_soon_threadsafe(page.app.stop_event.set)
        self._server.should_exit = True
        self._thread.join(END_S)
