"""Files and folders that appear whole or not at all, whoever else writes them and whenever the process ends.

Each writer has a temporary name of its own (``.NAME.HOST-PID-RANDOM.part``). What was written is on the disk before it takes
the final name. What a killed writer left is removed by the next one in the same folder.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

DAY_S = 24 * 3600.0  # after which a temporary name of another machine counts as left behind
LONGEST = 200  # bytes of a name that a temporary one repeats; file systems take 255 in all
TRIES = 10  # of taking a name that other writers take at the same moment
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.(?P<kind>part|old)", re.DOTALL)
_UMASK = os.umask(0o022)
os.umask(_UMASK)  # it can only be asked for by setting it
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block succeeds, and vanishes when it fails.

    A folder that is there is exchanged for the new one in one step where the system can (Linux, macOS); elsewhere it is moved
    aside for a moment, and put back by the next writer if the process ends in that moment.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep_for(target)
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        yield temporary
        for at, _, names in os.walk(temporary):
            for path in (Path(at, name) for name in names):
                if not path.is_symlink():
                    _sync(path)
            _sync_folder(Path(at))
        _put(temporary, target)
        _sync_folder(target.parent)
    finally:
        _remove(temporary)  # what failed, or what was there before


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its name when the block succeeds, and vanishes when it fails."""
    target = Path(target)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep_for(target)
    temporary = _temporary(target)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(target)  # the name that was asked for
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_if_new(folder: Path) -> Iterator[Path]:
    """As `atomic_folder` where there is no folder of this name or an empty one; else that folder, to be written into."""
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        yield folder
        return
    with atomic_folder(folder) as part:
        yield part


def discard(folder: Path) -> None:
    """Remove a folder such that it is never half there under its name."""
    aside = _temporary(folder)
    os.replace(folder, aside)
    _remove(aside)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder; a folder that was moved aside and never replaced gets its name back.

    Left behind is what a process of this machine wrote that is gone, and what is older than a day.
    """
    with suppress(OSError):  # no such folder, or one that others may not change
        for entry in list(os.scandir(folder)):
            found = LEFTOVER.fullmatch(entry.name)
            if found is None or not _is_left(entry, found["host"], int(found["pid"])):
                continue
            target = Path(folder, found["name"])
            if found["kind"] == "old" and not os.path.lexists(target):
                with suppress(OSError):  # another writer was first
                    os.rename(entry.path, target)
            else:
                _remove(Path(entry.path))


@lru_cache(maxsize=4096)
def _swept(folder: str) -> None:
    sweep(Path(folder))


def _sweep_for(target: Path) -> None:
    """What was left beside `target`, once in a process; and what versions before unique names left of it."""
    _swept(str(target.parent.absolute()))
    for kind in ("part", "old"):
        left = target.with_name(f".{_short(target.name)}.{kind}")
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > DAY_S and (kind == "part" or os.path.lexists(target)):
                _remove(left)


def _is_left(entry: os.DirEntry[str], host: str, pid: int) -> bool:
    with suppress(OSError):  # it was just removed
        if time.time() - entry.stat(follow_symlinks=False).st_mtime > DAY_S:
            return True
        return host == _host() and not _runs(pid)
    return False


def _runs(pid: int) -> bool:
    """Whether a process of this machine is there; where that cannot be asked for without harm (Windows), it is."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


@lru_cache(maxsize=1)
def _host() -> str:
    """Names where a process number means something: this machine since it was started, and its container."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:8]


def _temporary(target: Path, kind: str = "part") -> Path:
    return target.with_name(f".{_short(target.name)}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.{kind}")


def _short(name: str) -> str:
    while len(os.fsencode(name)) > LONGEST:
        name = name[:-1]
    return name


def _put(new: Path, target: Path) -> None:
    """Give `new` the name `target`; afterwards `new` is what was there before, if anything was."""
    for _ in range(TRIES):
        if not os.path.lexists(target):
            try:
                os.rename(new, target)
            except OSError:
                if not os.path.lexists(target):
                    raise
            else:
                return
        try:
            if not _exchange(new, target):
                _move_aside(new, target)
        except FileNotFoundError:
            continue  # another writer has just taken it away
        return
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(target))


def _move_aside(new: Path, target: Path) -> None:
    """The same in two renames, for systems that cannot exchange two names."""
    old = _temporary(target, "old")
    with suppress(OSError):
        os.utime(target)  # its age is that of its being aside
    os.replace(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        if not os.path.lexists(target):
            os.replace(old, target)
        raise
    _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step (renameat2, renamex_np); False where the system or the file system cannot."""
    call = _exchanger()
    if call is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    here = -100  # AT_FDCWD
    given = (here, names[0], here, names[1]) if sys.platform == "linux" else names
    if call(*given, 2) == 0:  # RENAME_EXCHANGE, RENAME_SWAP
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(other))


@lru_cache(maxsize=1)
def _exchanger() -> Any:
    name = {"linux": "renameat2", "darwin": "renamex_np"}.get(sys.platform)
    return getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None


def _sync(path: Path) -> None:
    """Have a file's content on the disk; safetensors writes for its owner alone: those read it too whom the umask lets."""
    if os.name == "posix" and path.stat().st_mode & 0o777 == 0o600:
        path.chmod(0o666 & ~_UMASK)
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # a file system without it
            raise
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    """Have a folder's names on the disk, where the system lets a folder be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    """Take away a file, a link or a folder, as far as that is allowed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
