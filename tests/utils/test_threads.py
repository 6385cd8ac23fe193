"""Work in a thread of its own."""

from __future__ import annotations

import contextvars
import threading
from pathlib import Path

import pytest

from latentpipe import LatentPipeline, UserError
from latentpipe.pipelines import opening
from latentpipe.utils import threads

who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")


def test_it_returns_what_the_work_returns_from_another_thread_that_ends() -> None:
    seen: list[threading.Thread] = []

    def work() -> str:
        seen.append(threading.current_thread())
        return who.get()

    token = who.set("anna")
    assert threads.run_in_thread(work) == "anna"
    who.reset(token)
    assert seen[0] is not threading.current_thread()
    assert not seen[0].is_alive()


def test_what_the_work_raises_is_raised() -> None:
    def work() -> None:
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        threads.run_in_thread(work)


def test_models_are_opened_apart(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[str] = []
    load = opening.load_pipeline

    def watched(*given: object, **options: object) -> object:
        where.append(threading.current_thread().name)
        return load(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(opening, "load_pipeline", watched)
    LatentPipeline.from_pretrained(model_folder, device="cpu")
    assert where == ["latentpipe_apart"]


@pytest.mark.parametrize(
    ("running", "given", "spins"),
    [
        (1, {}, None),  # this process alone
        (2, {}, "2000"),  # one beside it on two processors
        (2, {"OMP_NUM_THREADS": "1"}, None),
        (9, {"OMP_WAIT_POLICY": "active"}, None),
        (9, {"GOMP_SPINCOUNT": "5"}, "5"),
        (9, {"OMP_NUM_THREADS": "many"}, None),
    ],
)
def test_openmp_spins_less_where_others_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: int, given: dict[str, str], spins: str | None
) -> None:
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 2)
    load = tmp_path / "loadavg"
    load.write_text(f"8.03 8.50 7.65 {running}/412 10681\n")
    environment = dict(given)
    threads.spin_less_where_busy(environment, load)
    assert environment.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize("text", [None, "", "0.1 0.2 0.3 one/2 3"])
def test_a_system_that_does_not_say_who_runs_is_left_alone(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "loadavg").write_text(text)
    environment: dict[str, str] = {}
    threads.spin_less_where_busy(environment, tmp_path / "loadavg")
    assert environment == {}
