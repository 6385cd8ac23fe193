"""What every request passes before gradio sees it: the Host allow-list, the sender, the login, and how much is sent.

An ASGI application around another one; it knows nothing of gradio but the paths that it streams events at.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentpipe.ui.allowed_hosts import STRANGE, AllowedHosts
from latentpipe.ui.listeners import Listeners
from latentpipe.ui.login import LoginSessions
from latentpipe.ui.quota import Window, uploads

API = "/gradio_api/"
MAX_FILE = 20_000_000  # bytes of one file; gradio counts it too
MAX_REQUEST = 500_000_000  # bytes of one upload of several files
MAX_JSON = 1_000_000  # bytes of any other request


class RequestGuard:
    """The application inside, guarded.

    names      the hosts that are answered to
    door       the login; None: everybody is let in
    listeners  told of each stream of events that is read, by session
    session    gives the session of an event (`/call/NAME/EVENT` names that only)
    root       the path that a reverse proxy serves this at; taken off where the proxy leaves it on
    """

    def __init__(
        self,
        app: ASGIApp,
        names: AllowedHosts,
        door: LoginSessions | None = None,
        listeners: Listeners | None = None,
        session: Callable[[str], str | None] = lambda event: None,
        root: str = "",
        sent: Window | None = None,
    ) -> None:
        self.app, self.names, self.door, self.root = app, names, door, root
        self.listeners, self.session, self.sent = listeners or Listeners(), session, sent or uploads()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks over web sockets
            await send({"type": "websocket.close", "code": 1008})
            return
        scope = self._at_root(scope)
        if (refusal := self._stranger(scope)) is not None:
            await refusal(scope, receive, send)
        elif self.door is not None and (answer := await self._at_door(self.door, Request(scope, receive))) is not None:
            await answer(scope, receive, send)
        elif scope["method"] in ("POST", "PUT", "PATCH"):
            await self._measured(scope, receive, send)
        else:
            with self._listening(scope):
                await self.app(scope, receive, send)

    def _at_root(self, scope: Scope) -> Scope:
        path = scope["path"]
        if not self.root or not (path == self.root or path.startswith(f"{self.root}/")):
            return scope
        raw = scope.get("raw_path") or path.encode()
        return {**scope, "path": path[len(self.root) :] or "/", "raw_path": raw[len(self.root.encode()) :] or b"/"}

    def _stranger(self, scope: Scope) -> Response | None:
        """Why this request is not for us, or not from us."""
        headers = Headers(scope=scope)
        own = (scope.get("server") or ("",))[0]
        given = [headers.get("host", ""), *headers.getlist("x-forwarded-host"), *headers.getlist("x-gradio-server")]
        if words := self.names.refusal(given, own):
            return _said(scope, words, 403)
        method = "POST" if scope["path"].rstrip("/") == "/logout" else scope["method"]
        if not self.names.sends(headers, method):
            return _said(scope, STRANGE, 403)
        return None

    async def _at_door(self, door: LoginSessions, request: Request) -> Response | None:
        """The answer to somebody who has not logged in, logs in, or out; None for the others."""
        path = request.scope["path"].rstrip("/")
        if path == "/login" and request.method == "POST":
            return await door.log_in(request)
        if door.user(request) is None:
            return door.closed(request)
        return door.log_out(request) if path == "/logout" else None

    async def _measured(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if not length.isdigit():
            await _said(scope, "Say how long the request is (Content-Length).", 411)(scope, receive, send)
            return
        if not headers.get("content-type", "").lower().startswith("multipart/"):
            if int(length) > MAX_JSON:
                words = f"The request has {int(length):,} bytes; at most {MAX_JSON:,} are taken. Send pictures to {API}upload."
                await _said(scope, words, 413)(scope, receive, send)
                return
            await self.app(scope, receive, send)
            return
        client = (scope.get("client") or ("?",))[0]
        if words := self._too_much(client, int(length)):
            await _said(scope, words, 413)(scope, receive, send)
            return
        self.sent.add(client, int(length))
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            if status != 200:
                self.sent.add(client, -int(length))

    def _too_much(self, client: str, length: int) -> str:
        """Why an upload is refused; "" where it is not."""
        if length > MAX_REQUEST:
            return f"The upload has {length:,} bytes; at most {MAX_REQUEST:,} at once are taken, and {MAX_FILE:,} for a file."
        wait = self.sent.wait(client, length)
        if wait == 0:
            return ""
        limits = f"{self.sent.per_client / 1e6:,.0f} MB from one address and {self.sent.in_all / 1e6:,.0f} MB in all"
        then = "" if wait == float("inf") else f" Try again in {max(round(wait / 60), 1)} minutes, or restart the server."
        return f"Too much was uploaded: within a day {limits} are taken.{then}"

    def _listening(self, scope: Scope) -> Any:
        """Notes who reads the events of which session."""
        path, session = scope["path"], None
        if path.startswith(f"{API}queue/data"):
            session = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("session_hash", [None])[0]
        elif path.startswith(f"{API}call/"):
            session = self.session(path.rstrip("/").rpartition("/")[2])
        return self.listeners.reading(session) if session else ExitStack()


def _said(scope: Scope, words: str, status: int) -> Response:
    """One sentence, in the shape that the asker reads: gradio's page and client take JSON, but plain text of an upload."""
    path = scope["path"]
    if path.startswith(API) and not path.startswith(f"{API}upload"):
        return JSONResponse({"detail": words, "error": words}, status)
    return PlainTextResponse(words, status)
