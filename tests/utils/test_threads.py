"""Work in a thread of its own."""

from __future__ import annotations

import contextvars
import threading
from pathlib import Path

import pytest

from latentpipe import LatentPipeline, UserError
from latentpipe.pipelines import latent_pipeline
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
    load = latent_pipeline.load_pipeline

    def watched(*given: object) -> object:
        where.append(threading.current_thread().name)
        return load(*given)

    monkeypatch.setattr(latent_pipeline, "load_pipeline", watched)
    LatentPipeline.from_pretrained(model_folder, device="cpu")
    assert where == ["latentpipe_apart"]
