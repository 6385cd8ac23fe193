"""Pictures by several workers: whose they are, what a stop does, and what happens where a worker dies."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import InThread, opened_in_threads
from PIL import Image

from latentpipe import Engine, Finished, LatentPipeline, StepDone, UserError
from latentpipe.engine import worker_pool as module
from latentpipe.engine.jobs import Cancelled, JobQueue, Waiting
from latentpipe.engine.worker_pool import DrawingPool
from latentpipe.utils.errors import LatentpipeWarning
from latentpipe.utils.workers import Died, LocalWorker

pytestmark = pytest.mark.slow


@pytest.fixture
def two(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DrawingPool]:
    """Two workers, in threads."""
    monkeypatch.setattr(module, "opened_on", opened_in_threads)
    found = DrawingPool(2, str(model_folder), "cpu")
    yield found
    found.close()


def drawn(pool: DrawingPool, model: Path, prompt: str, **settings: Any) -> Finished:
    """The last event of a job."""
    last: Any = None
    for event in pool.run((str(model), None, None), prompt, **settings):
        last = event
    assert isinstance(last, Finished)
    return last


def test_a_worker_draws_what_this_process_draws(two: DrawingPool, model_folder: Path, pipe: LatentPipeline) -> None:
    source = Image.new("RGB", (16, 16), (200, 30, 30))
    way = {"seed": 3, "num_inference_steps": 3, "n": 2, "size": (16, 16), "image": source, "strength": 0.9}
    found = drawn(two, model_folder, "red circle", **way)
    *_, ours = Engine(pipe).run("red circle", **way)
    assert [picture.image.tobytes() for picture in found.pictures] == [picture.image.tobytes() for picture in ours.pictures]
    assert [picture.recipe for picture in found.pictures] == [picture.recipe for picture in ours.pictures]


def test_steps_come_with_previews(two: DrawingPool, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentpipe.engine.engine.PREVIEW_SECONDS", 0)  # a slow reader sees the newest steps alone
    events = list(two.run((str(model_folder), None, None), "red bar", previews=True, seed=1, num_inference_steps=4))
    steps = [event for event in events if isinstance(event, StepDone)]
    assert steps
    assert all(event.steps == 4 for event in steps)
    assert any(event.preview is not None for event in steps)


def test_jobs_at_once_get_their_own_pictures(two: DrawingPool, model_folder: Path) -> None:
    alone = [drawn(two, model_folder, "red bar", seed=seed, num_inference_steps=2).pictures[0] for seed in range(6)]
    found: dict[int, Any] = {}

    def visit(seed: int) -> None:
        found[seed] = drawn(two, model_folder, "red bar", seed=seed, num_inference_steps=2).pictures[0]

    visitors = [threading.Thread(target=visit, args=(seed,)) for seed in range(6)]
    for one in visitors:
        one.start()
    for one in visitors:
        one.join()
    assert [found[seed].recipe for seed in range(6)] == [picture.recipe for picture in alone]
    assert [found[seed].image.tobytes() for seed in range(6)] == [picture.image.tobytes() for picture in alone]


def test_a_mistake_is_its_sentence_and_a_note_is_told(two: DrawingPool, model_folder: Path) -> None:
    with pytest.raises(UserError, match=r"steps"):
        drawn(two, model_folder, "red", num_inference_steps=-1)
    with pytest.raises(UserError, match="nowhere"):
        list(two.run(("nowhere", None, None), "red"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        drawn(two, model_folder, "red " * 40, seed=0, num_inference_steps=1)
    assert all(issubclass(one.category, LatentpipeWarning) for one in told if "token" in str(one.message))


class Mortal(InThread):
    """Dies at the first questions."""

    deaths = 0
    asked: list[int]

    def ask(self, task: Any, on_event: Any = None) -> dict[str, Any]:
        """Die, or answer."""
        if Mortal.deaths > 0:
            Mortal.deaths -= 1
            raise Died("SIGKILL")
        return super().ask(task, on_event)


def test_a_dead_workers_job_goes_to_another_or_ends_in_a_sentence(two: DrawingPool, model_folder: Path) -> None:
    arguments = {"model": str(model_folder), "dtype": "fp32", "stated": []}
    two._opened = lambda number: Mortal("latentpipe.engine.worker_pool:open_drawing", arguments)
    for number in range(2):
        two._seats.get()
        two._seats.put((number, two._opened(number)))
    Mortal.deaths = 2
    assert len(drawn(two, model_folder, "red", seed=0, num_inference_steps=1).pictures) == 1
    Mortal.deaths = 3
    with pytest.raises(UserError, match=r"The worker that drew this died, and so did 2 others .SIGKILL"):
        drawn(two, model_folder, "red", seed=0, num_inference_steps=1)
    assert len(drawn(two, model_folder, "red", seed=0, num_inference_steps=1).pictures) == 1  # both places are free again


def test_a_stop_reaches_the_job_that_it_is_meant_for(two: DrawingPool, model_folder: Path) -> None:
    token = threading.Event()
    events = two.run((str(model_folder), None, None), "red", token, seed=0, num_inference_steps=400)
    for event in events:
        if isinstance(event, StepDone):
            token.set()
        last = event
    assert isinstance(last, Finished)
    stopped = last.pictures[0].recipe.stopped_after
    assert stopped is not None
    assert stopped < 400
    assert drawn(two, model_folder, "red", seed=0, num_inference_steps=3).pictures[0].recipe.stopped_after is None


def test_a_killed_process_is_replaced(model_folder: Path) -> None:
    pool = DrawingPool(1, str(model_folder), "cpu")
    try:
        first = pool._workers[0]
        assert isinstance(first, LocalWorker)
        killed = False
        for event in pool.run((str(model_folder), None, None), "red", seed=5, num_inference_steps=30):
            if isinstance(event, StepDone) and not killed:
                os.kill(first.pid, signal.SIGKILL)
                killed = True
        assert isinstance(event, Finished)
        assert event.pictures[0].recipe.seed == 5
        assert pool._workers[0] is not first
    finally:
        pool.close()


def test_a_line_of_two_places_lets_two_in() -> None:
    line, waits = JobQueue(2), []
    with line.turn(threading.Event(), waits.append), line.turn(threading.Event(), waits.append):
        assert waits == []
        token = threading.Event()
        token.set()
        with pytest.raises(Cancelled), line.turn(token, waits.append):
            pass
    assert line.length == 0
    assert Waiting(1) not in waits
