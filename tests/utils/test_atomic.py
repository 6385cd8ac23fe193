"""Files and folders that appear whole: failures, kills, several writers, leftovers."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from latentpipe.utils import atomic
from latentpipe.utils.atomic import DAY_S, atomic_file, atomic_folder, atomic_if_new, discard, sweep


def write_folder(target: Path, content: str, failure: BaseException | None = None) -> None:
    """Write one file through `atomic_folder`, and fail where asked to."""
    with atomic_folder(target) as part:
        (part / "file").write_text(content)
        if failure is not None:
            raise failure


def write_file(target: Path, content: str, failure: BaseException | None = None) -> None:
    """Write through `atomic_file`, and fail where asked to."""
    with atomic_file(target) as part:
        part.write_text(content)
        if failure is not None:
            raise failure


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "new" / "out") as part:
        (part / "file").write_text("1")
        assert not (tmp_path / "new" / "out").exists()
    assert (tmp_path / "new" / "out" / "file").read_text() == "1"
    with atomic_folder(tmp_path / "new" / "out") as part:
        (part / "other").write_text("2")
    assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == ["other"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failure", [FULL, KeyboardInterrupt()])
def test_a_failed_folder_leaves_the_old_one(tmp_path: Path, failure: BaseException) -> None:
    with pytest.raises(type(failure)):
        write_folder(tmp_path / "out", "half", failure)
    assert not list(tmp_path.iterdir())
    write_folder(tmp_path / "out", "old")
    with pytest.raises(type(failure)):
        write_folder(tmp_path / "out", "half", failure)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_a_failed_rename_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")

    def fails(source: Any, target: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(atomic, "_exchanger", lambda: None)
    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="Input/output"):
        write_folder(tmp_path / "out", "new")
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x.bin"
    with atomic_file(target) as part:
        part.write_text("1")
        assert not target.exists()
    with pytest.raises(OSError, match="No space"):
        write_file(target, "half", FULL)
    assert target.read_text() == "1"
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "new" / "y.bin", "half", FULL)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.bin"]


@pytest.mark.skipif(os.name != "posix", reason="modes of other systems")
def test_weights_are_readable_as_other_files_are(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "usual").touch()
    with atomic_file(tmp_path / "a.safetensors") as part:
        save_file({"a": torch.zeros(1)}, part)
    with atomic_folder(tmp_path / "folder") as folder:
        save_file({"a": torch.zeros(1)}, folder / "b.safetensors")
        (folder / "own").touch(mode=0o400)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes["a.safetensors"] == modes["b.safetensors"] == modes["usual"]
    assert modes["own"] == 0o400


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "taken.txt").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_file(tmp_path / "taken.txt", "x")
    assert caught.value.filename == str(tmp_path / "taken.txt")
    missing = tmp_path / "missing.txt"
    with pytest.raises(OSError, match=r"missing\.txt") as caught, atomic_file(missing) as part:
        raise OSError(28, "No space left on device", str(part))
    assert caught.value.filename == str(missing)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ended() -> int:
    """The number of a process that has ended."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


@pytest.fixture
def gone() -> Any:
    """Makes the temporary names of a process that is gone."""

    def name(target: Path, kind: str = "part", host: str | None = None, pid: int | None = None) -> Path:
        return target.with_name(f".{target.name}.{host or atomic._host()}-{pid or ended()}-0123abcd.{kind}")

    return name


def test_what_killed_writers_left_is_removed_and_what_others_write_is_kept(tmp_path: Path, gone: Any) -> None:
    target = tmp_path / "out"
    left = gone(target)
    left.mkdir()
    (left / "stale").write_text("x")
    gone(tmp_path / "a.bin").write_text("x")
    alive, far, own = gone(target, pid=os.getpid()), gone(target, host="00000000"), tmp_path / ".video.mp4.part"
    for kept in (alive, far, own):
        kept.write_text("x")
    write_folder(target, "1")
    assert names(tmp_path) == sorted([alive.name, far.name, own.name, "out"])
    for old in (alive, far, own):
        os.utime(old, (0, time.time() - DAY_S - 1))
    sweep(tmp_path)
    assert names(tmp_path) == [own.name, "out"]


def test_leftovers_of_earlier_versions_are_removed_after_a_day(tmp_path: Path) -> None:
    for kind in ("part", "old"):
        (tmp_path / f".out.{kind}").mkdir()
    write_folder(tmp_path / "out", "1")
    assert names(tmp_path) == [".out.old", ".out.part", "out"]
    for kind in ("part", "old"):
        os.utime(tmp_path / f".out.{kind}", (0, 0))
    write_folder(tmp_path / "out", "2")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_was_moved_aside_comes_back(tmp_path: Path, gone: Any, there: bool) -> None:
    aside = gone(tmp_path / "out", "old")
    aside.mkdir()
    (aside / "file").write_text("old")
    if there:
        write_folder(tmp_path / "out", "new")
    sweep(tmp_path)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == ("new" if there else "old")


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_takes_the_place_of_whatever_is_there(tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanges:
        monkeypatch.setattr(atomic, "_exchanger", lambda: None)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "full", "old")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    for name in ("file", "empty", "full", "link"):
        write_folder(tmp_path / name, "new")
        assert not (tmp_path / name).is_symlink()
        assert (tmp_path / name / "file").read_text() == "new"
    assert names(tmp_path) == ["empty", "file", "full", "link"]


def test_names_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    for name in ("n" * 255, "\u00e9" * 127):
        with atomic_file(tmp_path / name) as part:
            part.write_text("1")
        assert (tmp_path / name).read_text() == "1"


def test_a_discarded_folder_is_gone(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", "1")
    discard(tmp_path / "out")
    assert names(tmp_path) == []


def test_a_folder_in_use_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    for name in ("mine", "new"):
        with atomic_if_new(tmp_path / name) as at:
            (at / "a").write_text("1")
    assert names(tmp_path / "mine") == ["a", "thesis.txt"]
    assert names(tmp_path / "new") == ["a"]


def test_content_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    sync = os.fsync

    def noted(handle: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{handle}"))
        name = "temporary" if place.name.endswith(".part") else place.name
        seen.append((name, (tmp_path / "x").exists()))
        sync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    write_file(tmp_path / "x", "1")
    assert seen == [("temporary", False), (tmp_path.name, True)]
    (tmp_path / "x").unlink()
    seen.clear()
    write_folder(tmp_path / "x", "1")
    assert seen == [("file", False), ("temporary", False), (tmp_path.name, True)]


def _write_for_ever(target: Path, content: str, folder: bool) -> None:
    while True:
        if folder:
            write_folder(target, content * 50_000)
        else:
            write_file(target, content * 50_000)


@pytest.mark.parametrize("folder", [False, True])
def test_two_writers_that_are_killed_at_any_moment_leave_whole_ones(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "out"
    path = target / "file" if folder else target
    context = multiprocessing.get_context("fork")
    seen = 0
    for trial in range(6):
        writers = [context.Process(target=_write_for_ever, args=(target, letter, folder)) for letter in "ab"]
        for writer in writers:
            writer.start()
        end = time.monotonic() + 0.02 + 0.013 * trial
        while time.monotonic() < end or not seen:
            with suppress(FileNotFoundError):
                content = path.read_text()
                assert content in ("a" * 50_000, "b" * 50_000)
                seen += 1
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)  # type: ignore[arg-type]
            writer.join()
            assert writer.exitcode == -signal.SIGKILL
        assert path.read_text() in ("a" * 50_000, "b" * 50_000)
    sweep(tmp_path)
    assert names(tmp_path) == ["out"]
