"""A run is alone in its folder, and one that is killed at any moment ends as if it had not been. By hand: benchmarks/kills.py."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import vae_run, write_pictures

from latentpipe import UserError
from latentpipe.data.image_folder import read_index
from latentpipe.train import checkpoint, run_dir
from latentpipe.train.config import dump
from latentpipe.train.vae import train as training

PATH = Path(__file__).parents[2] / "benchmarks" / "kills.py"
pytestmark = pytest.mark.skipif(os.name != "posix", reason="kill -9")


def the_script() -> Any:
    spec = importlib.util.spec_from_file_location("kills", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kills"] = module
    environment = dict(os.environ)
    spec.loader.exec_module(module)
    os.environ.clear()
    os.environ.update(environment)
    return module


def test_a_training_that_is_killed_ends_as_an_undisturbed_one(tmp_path: Path, pictures: Path) -> None:
    """Two kills in a process of its own, which has no threads that a fork would lose."""
    config = vae_run(tmp_path / "run", pictures, optim={"steps": 3}, save_every_steps=1, sample_every_steps=2)
    (tmp_path / "config.yaml").write_text(dump(config))
    script = f"""
import sys
sys.path.insert(0, {str(PATH.parent)!r})
import kills, torch
from pathlib import Path
torch.set_num_threads(1)
root = Path({str(tmp_path)!r})
case = kills.Case("train-vae", ("train-vae", str(root / "config.yaml")), (root / "run/vae", root / "run/work"), ("--run.resume",))
killed, bad = kills.rounds([case], 2, 0, root / "log.txt")
assert bad == 0
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "files" in done.stdout


def test_what_is_half_written_is_found_by_the_script(tmp_path: Path) -> None:
    """The check itself can fail."""
    kills = the_script()
    case = kills.Case("convert", (), (tmp_path / "out",))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.json").write_text("{}")
    assert kills.half_written(case) == []
    before = kills.content(case)
    (tmp_path / "out" / "a.json").write_text("{")
    (tmp_path / "out" / "b.safetensors").write_bytes(b"half")
    (tmp_path / "out" / f".c.{'0' * 8}-1-{'0' * 8}.part").write_text("half")
    assert len(kills.half_written(case)) == 2
    assert len(kills.differences(kills.content(case), before)) == 2
    assert len(kills.left(case)) == 1


# --- one training in a folder -------------------------------------------------------------------------------


def _hold(work: str, ready: Any) -> None:
    with run_dir.alone(Path(work)):
        ready.set()
        time.sleep(60)


def test_a_second_training_in_a_folder_is_refused_until_the_first_is_gone(tmp_path: Path, pictures: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    (tmp_path / "work").mkdir()
    other = context.Process(target=_hold, args=(str(tmp_path / "work"), ready))
    other.start()
    assert ready.wait(30)
    config = vae_run(tmp_path, pictures)
    with pytest.raises(UserError, match=rf"Another training runs in .*: process {other.pid} on .*--run\.work"):
        training.train_vae(config)
    assert not (tmp_path / "work" / "log.jsonl").exists()
    assert other.pid is not None
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    training.train_vae(config)  # the lock of a dead process holds nobody up
    assert (tmp_path / "vae" / "config.json").is_file()
    assert not (tmp_path / "work" / ".running.json").exists()


def test_a_lock_is_given_back_when_a_run_fails(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="x"), run_dir.alone(tmp_path):
            raise RuntimeError("x")
    with run_dir.alone(tmp_path), pytest.raises(UserError, match="Another training"), run_dir.alone(tmp_path):
        pass


def test_a_killed_runs_leftovers_are_no_earlier_run(tmp_path: Path, pictures: Path) -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    from latentpipe.utils import atomic

    folder = tmp_path / "work" / "checkpoints"
    left = folder / f".step-00000002.{atomic._host()}-{pid}-0123abcd.part"
    left.mkdir(parents=True)
    training.train_vae(vae_run(tmp_path, pictures))
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000004"]


def test_a_leftover_in_a_folder_of_pictures_is_not_read(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "set")
    (folder / "metadata.jsonl").unlink()
    count = len(read_index(folder))
    write_pictures(folder / f".train.{'0' * 8}-1-{'0' * 8}.part")
    assert len(read_index(folder)) == count


def test_the_last_figures_are_not_made_twice(tmp_path: Path, pictures: Path) -> None:
    """A run that was killed after its last checkpoint, while it wrote its result, has the log of an undisturbed one."""
    words: dict[str, Any] = {"data": {"validation": pictures}, "patience": 9, "sample_every_steps": 2}
    training.train_vae(vae_run(tmp_path, pictures, **dict(words)))
    log = (tmp_path / "work" / "log.jsonl").read_text()
    figures = checkpoint.newest(tmp_path / "work")[1]  # type: ignore[index]
    training.train_vae(vae_run(tmp_path, pictures, resume=True, **dict(words)))
    assert (tmp_path / "work" / "log.jsonl").read_text() == log
    assert checkpoint.newest(tmp_path / "work")[1] == figures  # type: ignore[index]
    assert sum("validation_psnr_db" in json.loads(line) for line in log.splitlines()) == 2


def test_figures_that_a_stop_cut_off_are_made_up_for(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words: dict[str, Any] = {"data": {"validation": pictures}, "patience": 9, "sample_every_steps": 2}
    training.train_vae(vae_run(tmp_path / "a", pictures, **dict(words)))

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "_figures", stopped)
        with pytest.raises(KeyboardInterrupt):
            training.train_vae(vae_run(tmp_path / "b", pictures, **dict(words)))
    training.train_vae(vae_run(tmp_path / "b", pictures, resume=True, **dict(words)))
    logs = [
        [{**json.loads(line), "seconds": 0} for line in (tmp_path / name / "work" / "log.jsonl").read_text().splitlines()]
        for name in "ab"
    ]
    assert logs[0] == logs[1]
