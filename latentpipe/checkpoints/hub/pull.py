"""Fetch a model from the hub into the local cache, such that huggingface_hub and everything built on it find it there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentpipe.checkpoints.hub.choose import choose
from latentpipe.checkpoints.hub.client import Entry, Hub, listing, read_object
from latentpipe.checkpoints.hub.fetch import LEFTOVER, fetch, refuse_full
from latentpipe.checkpoints.places.hub_cache import COMMIT, HubId, default_cache, storage
from latentpipe.utils.atomic import atomic_file
from latentpipe.utils.errors import UserError, counted

TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# This folder is a cache of huggingface_hub.\n"


@dataclass(frozen=True)
class Plan:
    """What a pull will fetch: sizes in bytes.

    total: of the chosen files; rest: of those that are still to come; repository: of all its files
    """

    wanted: HubId
    commit: str
    licence: str
    files: dict[str, Entry]
    notes: list[str]
    total: int
    rest: int
    repository: int
    folder: Path

    def __str__(self) -> str:
        rest = f"{size_of(self.rest)} of it still to come" if self.rest < self.total else "all of it to come"
        return (
            f"{self.wanted.repo} at {self.commit[:12]}, licence: {self.licence}; {counted(len(self.files), 'file')}, "
            f"{size_of(self.total)} ({rest}; the repository holds {size_of(self.repository)}), into {self.folder}"
        )


def plan(hub: Hub, wanted: HubId, cache: Path | None = None) -> Plan:
    """Ask the hub what there is, and choose the smallest files that suffice; UserError in a sentence for its errors."""
    found = listing(hub, wanted)
    sizes = {path: entry.size for path, entry in found.files.items()}

    def read(path: str) -> dict[str, Any]:
        return read_object(hub, wanted, found.commit, path)

    choice = choose(sizes, read, wanted.inside, wanted.repo)
    files = {path: found.files[path] for path in dict.fromkeys(choice.paths)}
    folder = storage(default_cache() if cache is None else cache, wanted.repo)
    contents = {entry.blob: entry for entry in files.values()}
    rest = sum(entry.size - _there(folder / "blobs", entry) for entry in contents.values())
    total = sum(entry.size for entry in contents.values())
    return Plan(wanted, found.commit, found.licence, files, choice.notes, total, rest, sum(sizes.values()), folder)


def pull(hub: Hub, planned: Plan, progress: Callable[[int], Any] = lambda _: None) -> Path:
    """Fetch and verify what was planned, and give it its names; the place of the model, its part or its file.

    Contents come first, under their hashes; the names in ``snapshots`` only when all of them are right, the model_index.json
    last. Stopped at any moment, it goes on where it was. What earlier runs left of other files is removed.
    progress  is told each number of bytes that is there
    """
    folder, wanted, commit = planned.folder, planned.wanted, planned.commit
    blobs, snapshot = folder / "blobs", folder / "snapshots" / commit
    with _alone(folder, wanted):
        for place in (blobs, folder / "snapshots"):
            place.mkdir(parents=True, exist_ok=True)
        if not (folder.parent / "CACHEDIR.TAG").exists():
            with atomic_file(folder.parent / "CACHEDIR.TAG") as part:
                part.write_text(TAG)
        refuse_full(blobs, planned.rest)
        done: set[str] = set()
        for path, entry in planned.files.items():
            if entry.blob not in done:
                fetch(hub, wanted, commit, path, entry, blobs, progress)
                done.add(entry.blob)
        for path, entry in planned.files.items():
            _name(snapshot / path, blobs / entry.blob)
        revision = wanted.revision or "main"
        if not COMMIT.fullmatch(revision):
            with atomic_file(folder / "refs" / revision) as part:
                part.write_text(commit)
        for left in [*blobs.glob(f"*{LEFTOVER}"), *snapshot.glob("**/.*.latentpipe.link")]:
            left.unlink(missing_ok=True)
    return snapshot / wanted.inside if wanted.inside else snapshot


def size_of(count: int) -> str:
    """Bytes as people read them: "2.1 GB"."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return counted(count, "byte")


def _there(blobs: Path, entry: Entry) -> int:
    """Bytes of a file that an earlier run fetched."""
    for path in (blobs / entry.blob, blobs / f"{entry.blob}{LEFTOVER}"):
        if path.is_file():
            return min(entry.size, path.stat().st_size)
    return 0


def _name(link: Path, blob: Path) -> None:
    """Give a content its name in a snapshot: a relative link, as the cache has them, or a copy where there are no links."""
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists() and link.samefile(blob):
        return
    if os.path.isdir(link):
        raise UserError(f"{link} is a folder; expected a file of the hub's cache. Remove it, and run this again.")
    temporary = link.with_name(f".{secrets.token_hex(4)}.latentpipe.link")
    try:
        try:
            os.symlink(os.path.relpath(blob, link.parent), temporary)
        except (OSError, NotImplementedError):
            os.link(blob, temporary)
        os.replace(temporary, link)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path, wanted: HubId) -> Iterator[None]:
    """One pull of a repository at a time; it ends with the process that holds it, however that ends."""
    from filelock import FileLock, Timeout

    lock = folder.parent / ".locks" / folder.name / "latentpipe.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise UserError(f"{wanted.repo} is being pulled by another process; wait for it, or end it.") from None


def notes_of(planned: Plan) -> Mapping[str, None]:
    """What a person should know about the chosen files, each once."""
    return dict.fromkeys(planned.notes)
