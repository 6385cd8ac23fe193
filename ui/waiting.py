"""What answers while gradio and torch are imported: a page that calls itself again, and "not yet" for programs.

It has the sockets that the server gets later. A connection that comes between the two waits in the sockets' queue, so none is
refused. Needs the standard library alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType

from latentpipe.ui.allowed_hosts import STRANGE, AllowedHosts

AGAIN_S = 1  # between two calls of the page, and what programs are told to wait
REQUEST_S = 5.0  # for the whole of a request
LAST_S = 0.5  # for requests that are being read when the server takes over
MOST_HEAD = 16_384  # bytes
MOST = 100  # connections at once
WORDS = "Starting ..."
PAGE = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Starting</title>
<meta http-equiv="refresh" content="{AGAIN_S}"><meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark; font-family: system-ui, sans-serif; }}
p {{ margin: 15vh auto; text-align: center; }}
</style></head><body><p role="status">{WORDS}</p></body></html>"""
REASONS = {400: "Bad Request", 403: "Forbidden", 503: "Service Unavailable"}


class WaitingPage:
    """Answers in a thread of its own within a `with` block, or until `close`; the sockets keep listening afterwards."""

    def __init__(self, sockets: Sequence[socket.socket], names: AllowedHosts) -> None:
        self._sockets, self._names = sockets, names
        self._loop = asyncio.new_event_loop()
        self._over, self._closed = asyncio.Event(), threading.Event()
        self._open: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="latentpipe_waiting", daemon=True)

    def __enter__(self) -> WaitingPage:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Take no further connection; those that are open get their answer. From here on the server may have the sockets."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it has just ended
                self._loop.call_soon_threadsafe(self._over.set)
            self._closed.wait(LAST_S + REQUEST_S)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._closed.set()
            self._loop.close()

    async def _serve(self) -> None:
        # closing a listener closes its socket, so each gets a copy; both stand for the same queue of connections
        copies = [one.dup() for one in self._sockets]
        listeners = [await asyncio.start_server(self._connected, sock=copy, limit=MOST_HEAD) for copy in copies]
        await self._over.wait()
        for listener in listeners:
            listener.close()
        self._closed.set()
        if self._open:
            await asyncio.wait(self._open, timeout=LAST_S)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._open) >= MOST:
            writer.close()
            return
        self._open.add(task)
        try:
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                async with asyncio.timeout(REQUEST_S):
                    await self._answer(reader, writer)
        finally:
            self._open.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            head = b""
        writer.write(self.answer(head, writer.get_extra_info("sockname")[0]))
        await writer.drain()
        writer.write_eof()
        while await reader.read(MOST_HEAD):  # a body that nobody reads would reset the connection, and the answer with it
            pass

    def answer(self, head: bytes, own: str) -> bytes:
        """The whole answer to the head of a request that came to the address `own`."""
        method, headers = read_head(head)
        if not method:
            return _response(400, "This is no HTTP request that this server reads.")
        hosts = [headers.get("host", ""), *(headers[name] for name in ("x-forwarded-host", "x-gradio-server") if name in headers)]
        if words := self._names.refusal(hosts, own):
            return _response(403, words, method)
        if not self._names.sends(headers, method):
            return _response(403, STRANGE, method)
        if method in ("GET", "HEAD") and "text/html" in headers.get("accept", ""):
            return _response(503, PAGE, method, "text/html")
        return _response(503, json.dumps({"detail": WORDS, "error": WORDS}), method, "application/json")


def read_head(head: bytes) -> tuple[str, Mapping[str, str]]:
    """Method and headers (names in lower case) of a request's head; no method where it is malformed, or names a header twice
    that decides who is answered."""
    first, _, rest = head.decode("latin-1").partition("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not words[0].isalpha() or not words[2].startswith("HTTP/1."):
        return "", {}
    headers: dict[str, str] = {}
    for line in rest.removesuffix("\r\n\r\n").split("\r\n") if rest.strip() else []:
        name, colon, value = line.partition(":")
        name = name.lower()
        if not colon or not name or name != name.strip():
            return "", {}
        if name in headers and (name in ("host", "origin", "x-gradio-server") or name.startswith(("sec-fetch-", "x-forwarded-"))):
            return "", {}
        headers[name] = value.strip()
    return words[0], headers


def _response(status: int, body: str, method: str = "", kind: str = "text/plain") -> bytes:
    content = body.encode()
    lines = [
        f"HTTP/1.1 {status} {REASONS[status]}",
        f"Content-Type: {kind}; charset=utf-8",
        f"Content-Length: {len(content)}",
        "Cache-Control: no-store",
        "Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
        *([f"Retry-After: {AGAIN_S}"] if status == 503 else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + (b"" if method == "HEAD" else content)
