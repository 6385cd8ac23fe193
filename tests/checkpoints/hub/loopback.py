"""A hub on the loopback: the routes that huggingface_hub and `pull` ask, and the ways in which a hub can fail."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 4096  # bytes from which on a file is kept as a large one, by its sha256


class Repository:
    """Files of one repository, by commit; `main` is the newest."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """Add a commit that `ref` means from now on."""
        name = hashlib.sha1(
            repr(sorted((path, hashlib.sha1(data).hexdigest()) for path, data in files.items())).encode()
        ).hexdigest()
        self.commits[name] = dict(files)
        self.refs[ref] = name
        return name

    def at(self, revision: str) -> str | None:
        """The commit that a revision means."""
        revision = self.refs.get(revision, revision)
        return revision if revision in self.commits else None


class LoopbackHub:
    """What is served, what was asked, and what goes wrong."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[tuple[str, str, str]] = []  # method, path, Range
        self.authorizations: list[str] = []
        self.status: dict[str, list[int]] = {}  # part of a path: statuses in place of the next answers
        self.headers: dict[str, str] = {}  # with these statuses
        self.cut: list[int] = []  # bytes after which the next contents end
        self.flip: set[str] = set()  # paths with one wrong byte
        self.longer: set[str] = set()
        self.ranges = True
        self.slow_s = 0.0  # before each 64 kB
        self.page = 1000  # entries of a listing at once
        self.url = ""

    def add(self, name: str, files: Mapping[str, bytes]) -> str:
        """A repository with one commit, or one more of it."""
        return self.repositories.setdefault(name, Repository(name)).commit(files)


def entry(path: str, data: bytes) -> dict[str, Any]:
    """A row of a listing."""
    row: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
    if len(data) >= LARGE:
        row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return row


def git_hash(data: bytes) -> str:
    """What git names a content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def etag(data: bytes) -> str:
    """What the hub names a content."""
    return hashlib.sha256(data).hexdigest() if len(data) >= LARGE else git_hash(data)


def files_of(folder: Path) -> dict[str, bytes]:
    """A folder as a repository."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def serving(hub: LoopbackHub) -> Iterator[LoopbackHub]:
    """The hub at ``hub.url``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            _answer(hub, self)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _answer(hub: LoopbackHub, to: BaseHTTPRequestHandler) -> None:
    parts = urlsplit(to.path)  # a proxy is asked with the whole address
    path = unquote(parts.path)
    hub.asked.append((to.command, to.path, to.headers.get("Range") or ""))
    hub.authorizations.append(to.headers.get("Authorization") or "")
    for key, statuses in hub.status.items():
        if key in path and statuses:
            _send(to, statuses.pop(0), b"no", hub.headers)
            return
    if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
        _describe(hub, to, found[1], found[2] or "revision", found[3] or "main", parts.query)
    elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/((?:refs/[^/]+/)?[^/]+)/(.+)", path):
        _content(hub, to, found[1], found[2], found[3])
    else:
        _send(to, 404, b"")


def _describe(hub: LoopbackHub, to: BaseHTTPRequestHandler, name: str, what: str, revision: str, query: str) -> None:
    repository = hub.repositories.get(name)
    commit = repository.at(revision) if repository else None
    if repository is None or commit is None:
        _send(to, 404, b"", {"X-Error-Code": "RepoNotFound" if repository is None else "RevisionNotFound"})
        return
    files = repository.commits[commit]
    if what == "revision":
        siblings = [{"rfilename": path} for path in files]
        facts = {"id": name, "sha": commit, "siblings": siblings, "private": False, "gated": False, "tags": ["license:mit"]}
        _send(to, 200, json.dumps(facts).encode())
        return
    at = int((re.search(r"cursor=(\d+)", query) or [0, 0])[1])
    rows = [entry(path, data) for path, data in sorted(files.items())]
    head = {}
    if at + hub.page < len(rows):
        following = f"{hub.url}/api/models/{name}/tree/{revision}?recursive=true&cursor={at + hub.page}"
        head["Link"] = f'<{following}>; rel="next"'
    folders = [{"type": "directory", "path": path.split("/")[0], "oid": "0" * 40, "size": 0} for path in files if "/" in path]
    _send(to, 200, json.dumps((folders if at == 0 else []) + rows[at : at + hub.page]).encode(), head)


def _content(hub: LoopbackHub, to: BaseHTTPRequestHandler, name: str, revision: str, path: str) -> None:
    repository = hub.repositories.get(name)
    commit = repository.at(revision) if repository else None
    data = repository.commits[commit].get(path) if repository and commit else None
    if data is None:
        code = "RepoNotFound" if repository is None else "RevisionNotFound" if commit is None else "EntryNotFound"
        _send(to, 404, b"", {"X-Error-Code": code})
        return
    head = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": str(commit), "Accept-Ranges": "bytes"}
    if path in hub.flip:
        middle = len(data) // 2
        data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    if path in hub.longer:
        data += b"more"
    wanted = re.fullmatch(r"bytes=(\d+)-", to.headers.get("Range") or "")
    status, begin = 200, 0
    if wanted and hub.ranges:
        status, begin = 206, int(wanted[1])
        head["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
    most = hub.cut.pop(0) if hub.cut and to.command == "GET" and len(data) >= LARGE else None
    _send(to, status, data[begin:], head, most, hub.slow_s)


def _send(
    to: BaseHTTPRequestHandler,
    status: int,
    data: bytes,
    head: Mapping[str, str] | None = None,
    most: int | None = None,
    slow_s: float = 0.0,
) -> None:
    to.send_response(status)
    for key, value in ({"Content-Length": str(len(data))} | dict(head or {})).items():
        to.send_header(key, value)
    to.end_headers()
    if to.command == "HEAD":
        return
    given = data if most is None else data[:most]
    try:
        for at in range(0, len(given), 2**16):
            time.sleep(slow_s)
            to.wfile.write(given[at : at + 2**16])
    except OSError:  # who asked has left
        to.close_connection = True
    if most is not None and most < len(data):
        to.close_connection = True
