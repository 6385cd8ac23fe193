"""Several processes: the gradients of one, whatever the loss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import vae_run

from latentpipe.train import checkpoint
from latentpipe.train.config import dump

pytestmark = pytest.mark.slow

CASES: dict[str, dict[str, Any]] = {
    "adversarial": {
        "adversarial": {"weight": 0.5, "width": 8, "layers": 1, "lecam": 0.1},
        "loss": {"free_bits": 0.5, "kl": 0.1, "equivariance": 0.5, "warps": ["scale", "rotate", "flip"]},
        "optim": {"accumulate": 2},
    },
    "controller": {"loss": {"target_bits": 1.0, "kl": 0.01, "equivariance": 0, "perceptual": 0.5}},
}


def config_file(root: Path, pictures: Path, case: str) -> Path:
    """A config of three steps of eight pictures."""
    changes = {name: dict(values) for name, values in CASES[case].items()}
    optim = {"steps": 3, "batch_size": 8} | changes.pop("optim", {})
    config = vae_run(root, pictures, optim=optim, loss=changes.pop("loss"), crops={"whole": 0.5})
    config = type(config).model_validate(config.model_dump() | changes)
    root.mkdir(parents=True, exist_ok=True)
    path = root / "config.yaml"
    path.write_text(dump(config))
    return path


def run(path: Path, processes: int) -> dict[str, torch.Tensor]:
    """Train in so many processes; the last checkpoint's tensors."""
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes), "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "latentpipe"]
    command = [sys.executable, *(launch if processes > 1 else ["-m", "latentpipe"]), "train-vae", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = checkpoint.newest(path.parent / "work")
    assert found is not None
    return found[0]


@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_are_one(tmp_path: Path, pictures: Path, case: str) -> None:
    one, two = (run(config_file(tmp_path / str(n), pictures, case), n) for n in (1, 2))
    assert one.keys() == two.keys()
    assert any(name.startswith("critic.") for name in one) == (case == "adversarial")
    for name, tensor in one.items():
        # Adam divides by the root of the second moment: a gradient near zero may turn its sign by rounding
        scale = tensor.float().abs().mean().clamp_min(1e-3)
        apart = (tensor.float() - two[name].float()).abs()
        assert apart.mean() < 1e-3 * scale, f"{name}: {apart.mean():.2e} of {scale:.2e}"
    for n in (1, 2):
        assert (tmp_path / str(n) / "vae" / "config.json").is_file()
        assert len((tmp_path / str(n) / "work" / "log.jsonl").read_text().splitlines()) == 3  # one process writes


def test_a_batch_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from latentpipe import UserError
    from latentpipe.train.distributed import DistributedContext

    team = DistributedContext()
    assert [(part.start, part.stop) for part in team.shards(8, 2)] == [(0, 4), (4, 8)]
    monkeypatch.setattr(team, "world", 3)
    with pytest.raises(UserError, match="multiple of 6"):
        team.shards(8, 2)
    monkeypatch.setattr(team, "rank", 2)
    assert [(part.start, part.stop) for part in team.shards(12, 2)] == [(8, 10), (10, 12)]


def test_the_denoiser_refuses_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from latentpipe import UserError
    from latentpipe.train.distributed import refuse_several

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        refuse_several("train-denoiser")
