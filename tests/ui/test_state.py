"""What all tabs share: names, toasts, notes and jobs of each visitor."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

gr = pytest.importorskip("gradio")

from latentpipe import UserError  # noqa: E402
from latentpipe.checkpoints.registry import named_lora  # noqa: E402
from latentpipe.compatibility.latent_adapter import own_adapter  # noqa: E402
from latentpipe.engine.jobs import Cancelled, Done, Progress, Waiting  # noqa: E402
from latentpipe.ui import listeners  # noqa: E402
from latentpipe.ui.jobs import Jobs  # noqa: E402
from latentpipe.ui.state import App, collect_notes, public, toast_errors  # noqa: E402
from latentpipe.utils.errors import LatentpipeWarning  # noqa: E402
from latentpipe.utils.progress import ProgressCallback  # noqa: E402

PATIENCE_S = 30
PATHS = [
    "../emoji", "../../etc/passwd", "/etc/passwd", "emoji/../emoji", "./emoji", "emoji/", "..", ".", "", " emoji", "emoji\0",
    "~/emoji", "file:///etc/passwd", "..\\emoji", "C:\\emoji", "https://example.org/x", "%2e%2e%2femoji", "emoji\n", "x" * 5000,
]  # fmt: skip


@pytest.fixture
def app() -> Iterator[App]:
    app = App()
    yield app
    app.close()


@pytest.fixture
def toasts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sentences that gradio was told to show."""
    found: list[str] = []
    monkeypatch.setattr(gr, "Info", lambda sentence, **_: found.append(sentence))
    return found


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Notes go to their jobs, as in a server, until the test ends."""
    with warnings.catch_warnings():
        collect_notes()
        yield


def visitor(session: str) -> Any:
    return SimpleNamespace(session_hash=session)


@pytest.mark.parametrize("kind", ["models", "vae", "lora"])
@pytest.mark.parametrize("name", PATHS)
def test_no_path_is_a_name(app: App, kind: str, name: str) -> None:
    with pytest.raises(UserError, match=r"is installed; there are: ") as caught:
        app.named(kind, name)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", PATHS)
def test_no_path_opens_a_pipeline(app: App, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.models, "open", lambda *names: names)
    if name:  # an empty one is the model that was chosen at first, and its own VAE
        with pytest.raises(UserError, match="is installed"):
            app.pipe(name)
        with pytest.raises(UserError, match="is installed"):
            app.pipe(None, name)
    assert app.pipe() == ("emoji", None, None)


def test_a_path_that_exists_is_no_name(app: App, vae_folder: Path) -> None:
    with pytest.raises(UserError, match="is installed"):
        app.named("vae", str(vae_folder))


def test_installed_names_are_taken(app: App, installed: str) -> None:
    assert app.named("models", "emoji") == "emoji"
    assert app.named("models", installed) == installed
    assert installed in app.choices("models")


@pytest.mark.parametrize("adapter", [*filter(None, PATHS)])
def test_no_path_is_an_adapter(app: App, adapter: str) -> None:
    with pytest.raises(UserError):
        app.pipe("emoji", "emoji", adapter)


def test_an_adapter_needs_its_vae(app: App) -> None:
    with pytest.raises(UserError, match="leads to another VAE"):
        app.pipe("emoji", None, "some-adapter")


def test_a_users_mistake_is_its_sentence(toasts: list[str]) -> None:
    with pytest.raises(gr.Error) as caught, toast_errors():
        raise UserError("It does not fit: other space.\nmeasured on 64 pictures: R^2 0.1")
    assert caught.value.message == "It does not fit: other space."
    assert caught.value.print_exception is False
    assert toasts == []


def test_a_stop_is_no_error(toasts: list[str]) -> None:
    with toast_errors():
        raise Cancelled("stopped")
    assert toasts == ["Stopped."]


def test_a_defect_keeps_its_details_to_the_server(toasts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(gr.Error) as caught, toast_errors():
        raise RuntimeError("/home/someone/secret.txt: password 1234")
    assert caught.value.message == "This failed inside (RuntimeError); the window that runs the server has the details."
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert "secret.txt" in capsys.readouterr().err


def test_toasts_and_closed_readers_pass(toasts: list[str]) -> None:
    mine = gr.Error("mine")
    with pytest.raises(gr.Error) as caught, toast_errors():
        raise mine
    assert caught.value is mine

    def reader() -> Iterator[int]:
        with toast_errors():
            yield 1

    events = reader()
    next(events)
    events.close()
    assert toasts == []


def test_notes_are_shown_once_when_all_went_well(toasts: list[str]) -> None:
    with toast_errors() as notes:
        notes += ["one", "two", "one"]
    assert toasts == ["One. Two."]
    with pytest.raises(gr.Error), toast_errors() as notes:  # noqa: PT012
        notes.append("three")
        raise UserError("no")
    assert toasts == ["One. Two."]


def test_notes_reach_their_own_visitor(collected: None) -> None:
    """Two visitors' jobs, one of which waits for the other, and a note outside of any job."""
    jobs = Jobs()
    notes: dict[str, list[str]] = {"anna": [], "bert": []}
    results: dict[str, Any] = {}

    def visit(name: str) -> None:
        def work(report: Any) -> str:
            for step in range(20):
                report(step, 20, "step")
                warnings.warn(f"{name} {step}", LatentpipeWarning, stacklevel=1)
            return name

        *_, last = jobs.run(visitor(name), work, notes[name])
        results[name] = last.result

    threads = [threading.Thread(target=visit, args=(name,)) for name in notes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert results == {"anna": "anna", "bert": "bert"}
    assert notes == {name: [f"{name} {step}" for step in range(20)] for name in notes}


def test_other_warnings_are_no_notes(collected: None, capsys: pytest.CaptureFixture[str]) -> None:
    notes: list[str] = []

    def work(_: Any) -> None:
        warnings.showwarning("of a library", DeprecationWarning, "file.py", 1, sys.stderr)
        warnings.warn("ours", LatentpipeWarning, stacklevel=1)

    *_, last = Jobs().run(visitor("anna"), work, notes)
    assert isinstance(last, Done)
    assert notes == ["ours"]


def test_stop_is_for_ones_own_jobs() -> None:
    jobs = Jobs()
    anna, bert = visitor("anna"), visitor("bert")

    def endless(report: Any) -> None:
        while True:
            report(0, 1, "on")

    mine = jobs.run(anna, endless)
    next(mine)
    theirs = jobs.run(bert, lambda _: "bert has a picture")
    next(theirs)  # waits for mine
    assert jobs.stop(visitor("carl")) == 0
    assert jobs.stop(anna) == 1
    with pytest.raises(Cancelled):
        list(mine)
    *_, last = theirs
    assert last.result == "bert has a picture"
    assert jobs.stop(anna) == jobs.stop(bert) == 0


def test_a_visitor_who_leaves_stops_all_of_theirs() -> None:
    jobs = Jobs()
    first, second = (jobs.run(visitor("anna"), lambda report: [report(0, 1, "on") for _ in iter(int, 1)]) for _ in range(2))
    next(first)
    next(second)
    jobs.leave(visitor("anna"))
    for events in (first, second):
        with pytest.raises(Cancelled):
            list(events)


def test_close_removes_what_was_shown(app: App) -> None:
    path = app.place("picture.png")
    path.write_bytes(b"x")
    assert app.place("picture.png") != path
    app.close()
    assert not app.shown.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: named_lora("nothing"),
        lambda: own_adapter("nothing"),
    ],
)
def test_a_page_gives_no_advice_of_the_command_line(wrong: Callable[[], Any], toasts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        wrong()
    assert "--" in str(caught.value)
    assert "--" not in public(caught.value)


def test_pictures_of_one_name_are_all_kept(tmp_path: Path) -> None:
    app = App(out=tmp_path)
    picture = tmp_path / "shown.png"
    picture.write_bytes(b"x" * 100_000)
    visitors = [threading.Thread(target=app.keep_file, args=(picture, "red apple", 7)) for _ in range(12)]
    for one in visitors:
        one.start()
    for one in visitors:
        one.join()
    kept = list(tmp_path.rglob("red-apple*"))
    assert len(kept) == 12
    assert {path.read_bytes() for path in kept} == {picture.read_bytes()}
    assert not list(tmp_path.rglob("*.part"))
    app.close()


def test_a_job_whose_events_nobody_reads_gives_up_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "GRACE_S", 0.05)
    known = listeners.Listeners()
    jobs = Jobs(listeners=known)

    def work(report: ProgressCallback) -> str:
        for step in range(1, 2000):
            report(step, 2000, "step")
            time.sleep(0.005)
        return "done"

    with known.reading("reads"):
        events = jobs.run(visitor("reads"), work)
        begin = time.monotonic()
        while time.monotonic() - begin < 0.2:
            assert isinstance(next(events), Progress | Waiting)
        events.close()
    with pytest.raises(Cancelled):
        list(jobs.run(visitor("left"), work))


def test_a_closed_server_stops_all_and_begins_nothing() -> None:
    jobs = Jobs()
    events = jobs.run(visitor("one"), lambda report: [report(step, 10**6, "step") for step in range(10**6)])
    while not isinstance(next(events), Progress):
        pass
    jobs.close(seconds=0.05)  # its last event waits for a reader
    with pytest.raises(Cancelled):
        list(events)
    with pytest.raises(UserError, match="about to end"):
        next(iter(jobs.run(visitor("one"), lambda report: None)))


@pytest.mark.parametrize(("steps", "count", "fine"), [(28, 10, True), (29, 10, False), (float("nan"), 1, False)])
def test_a_request_has_a_limit_of_work(steps: float, count: int, fine: bool) -> None:
    with contextlib.nullcontext() if fine else pytest.raises(UserError, match="at most 300 million"):
        Jobs().allow(1024, 1024, steps, count)
