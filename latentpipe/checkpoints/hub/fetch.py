"""One file's content from the hub into a cache: goes on after a kill, and takes its final name only when its hash is right."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentpipe.checkpoints.hub.client import Entry, Hub, address, persistently, stream
from latentpipe.checkpoints.places.hub_cache import HubId
from latentpipe.utils.errors import UserError

CHUNK = 2**20  # bytes that are hashed and written at once
LEFTOVER = ".latentpipe.incomplete"  # after the hash: a part of a file; `hf cache` counts it among the incomplete ones

Progress = Callable[[int], Any]


def fetch(hub: Hub, wanted: HubId, commit: str, path: str, entry: Entry, blobs: Path, progress: Progress) -> None:
    """Have the content of a file in `blobs`, verified. What is there already is verified too, and fetched again if it is wrong.

    progress  is told each number of bytes that is there (negative where some were thrown away)
    UserError where the hub does not give it, or gives something else; OSError where the disk does not take it.
    """
    whole, part = blobs / entry.blob, blobs / f"{entry.blob}{LEFTOVER}"
    if whole.is_file() and whole.stat().st_size == entry.size and _hash_of(whole, entry).hexdigest() == entry.blob:
        progress(entry.size)
        part.unlink(missing_ok=True)
        return
    resumed = _stream_into(part, hub, wanted, commit, path, entry, progress)
    found = _hash_of(part, entry).hexdigest()
    if found != entry.blob and resumed:  # what an earlier run left may have been damaged
        part.unlink()
        progress(-entry.size)
        _stream_into(part, hub, wanted, commit, path, entry, progress)
        found = _hash_of(part, entry).hexdigest()
    if found != entry.blob:
        part.unlink()
        raise UserError(
            f"{wanted.repo}: {path} arrived damaged (its hash is {found[:16]}, expected {entry.blob[:16]}); it was thrown away. "
            "Run it again; if that happens twice, what stands between (a proxy, a mirror) changes files."
        )
    os.replace(part, whole)


def _stream_into(part: Path, hub: Hub, wanted: HubId, commit: str, path: str, entry: Entry, progress: Progress) -> bool:
    """Have all bytes of a file in `part`; whether an earlier run had fetched some of them."""
    there = part.stat().st_size if part.is_file() else 0
    resumed = 0 < there <= entry.size
    url = address(hub, wanted.repo, commit, path)
    with open(part, "r+b" if resumed else "wb") as file:
        at = file.seek(0, os.SEEK_END)
        progress(at)

        def more() -> None:
            nonlocal at
            if at == entry.size:
                return
            with stream(hub, url, at) as answer:
                begin = _start(answer, at)
                if begin != at:
                    progress(begin - at)
                    at = file.seek(begin)
                    file.truncate()
                for chunk in answer.iter_bytes():  # as they come: larger ones would be lost where the stream breaks off
                    if at + len(chunk) > entry.size:
                        progress(-at)
                        at = 0
                        raise UserError(f"{wanted.repo}: {path} is longer than the {entry.size:,} bytes that the hub lists.")
                    file.write(chunk)
                    at += len(chunk)
                    progress(len(chunk))
            if at < entry.size:
                raise _cut(f"{path} ended after {at:,} of {entry.size:,} bytes")

        try:
            persistently(more, hub, wanted, lambda: at)
        except UserError:
            if not at:
                part.unlink(missing_ok=True)
            raise
        finally:
            file.flush()
        os.fsync(file.fileno())
    return resumed


def _start(answer: Any, asked: int) -> int:
    """Where the content of an answer begins: the hub may give less than was asked for, and all of it where it knows no ranges."""
    if answer.status_code != 206:
        return 0
    unit, _, rest = answer.headers.get("Content-Range", "").partition(" ")
    begin = rest.partition("-")[0]
    return int(begin) if unit == "bytes" and begin.isdigit() and int(begin) <= asked else asked


def _cut(reason: str) -> Exception:
    """The error of a connection that ended early."""
    from huggingface_hub.errors import HTTPError

    return HTTPError(reason)


def _hash_of(path: Path, entry: Entry) -> Any:
    """sha256 over the content, or git's hash, which is over a head and the content."""
    digest = hashlib.sha256() if entry.sha256 else hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest


def refuse_full(blobs: Path, needed: int) -> None:
    """OSError where the disk has not so many bytes left."""
    import shutil

    if shutil.disk_usage(blobs).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(blobs))
