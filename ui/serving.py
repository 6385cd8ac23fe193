"""From a page to a server that answers: gradio inside its guard, an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
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

START_S, END_S = 60.0, 5.0


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
