"""Several processes: the gradients of one, whatever the loss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import denoiser_run, vae_run, write_shards

from latentpipe import UserError, train_denoiser, train_lora
from latentpipe.data.latent_cache import open_cache
from latentpipe.train import checkpoint
from latentpipe.train.config import TrainLora, dump

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


def run(path: Path, processes: int, verb: str = "train-vae") -> dict[str, torch.Tensor]:
    """Train in so many processes; the last checkpoint's tensors."""
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes), "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "latentpipe"]
    command = [sys.executable, *(launch if processes > 1 else ["-m", "latentpipe"]), verb, str(path)]
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
    from latentpipe.train.distributed import DistributedContext

    team = DistributedContext()
    assert [(part.start, part.stop) for part in team.shards(8, 2)] == [(0, 4), (4, 8)]
    monkeypatch.setattr(team, "world", 3)
    with pytest.raises(UserError, match="multiple of 6"):
        team.shards(8, 2)
    monkeypatch.setattr(team, "rank", 2)
    assert [(part.start, part.stop) for part in team.shards(12, 2)] == [(8, 10), (10, 12)]


def test_the_whole_chain_refuses_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from latentpipe.train.distributed import refuse_several

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        refuse_several("train-embedded")


def losses(root: Path) -> list[tuple[int, float]]:
    """Step and loss of each step in a run's log."""
    rows = [json.loads(line) for line in (root / "work" / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["v"]) for row in rows if "v" in row]


def denoises(root: Path, steps: int, cache: Path, vae: Path, **run: Any) -> Any:
    """A denoiser of so many steps of eight pictures, whose rate stays, so that a run can be made longer."""
    optim = {"steps": steps, "batch_size": 8, "schedule": "constant", "accumulate": 2, "ema_decay_slow": 0.99}
    return denoiser_run(root, cache, vae, optim=optim, **run)


def adapts(root: Path, steps: int, cache: Path, model: Path, **run: Any) -> Any:
    """A LoRA likewise, on the UNet and the text encoder, from latents alone."""
    optim = {"steps": steps, "batch_size": 8, "schedule": "constant", "accumulate": 2, "warmup_steps": 1}
    places = {"out": root / "x.safetensors", "work": root / "work", "precision": "fp32"}
    raw = {"model": model, "data": {"cache": cache, "size_px": 16}, "run": places | run, "optim": optim}
    return TrainLora.model_validate({**raw, "adapter": {"rank": 2, "sites": ("unet.attention", "text")}})


@pytest.mark.parametrize("verb", ["train-denoiser", "train-lora"])
def test_two_processes_are_one_and_one_goes_on_from_two(
    tmp_path: Path, cache_file: Path, vae_folder: Path, model_folder: Path, verb: str
) -> None:
    shards = write_shards(tmp_path / "shards", open_cache(cache_file, vae_folder), 5)

    def config(root: Path, steps: int, **more: Any) -> Any:
        if verb == "train-lora":
            return adapts(root, steps, shards, model_folder, **more)
        return denoises(root, steps, shards, vae_folder, **more)

    train = train_lora if verb == "train-lora" else train_denoiser
    train(config(tmp_path / "one", 4))
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "config.yaml").write_text(dump(config(tmp_path / "two", 2)))
    run(tmp_path / "two" / "config.yaml", 2, verb)
    train(config(tmp_path / "two", 4, resume=True))
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    assert [step for step, _ in two] == [1, 2, 3, 4]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], abs=1e-6)


def test_the_parts_of_a_step_have_its_gradient(tmp_path: Path, cache_file: Path, vae_folder: Path) -> None:
    for parts in (1, 4):
        config = denoiser_run(tmp_path / str(parts), cache_file, vae_folder, optim={"batch_size": 8, "accumulate": parts})
        train_denoiser(config)
    one, four = (losses(tmp_path / name) for name in ("1", "4"))
    assert [loss for _, loss in four] == pytest.approx([loss for _, loss in one], abs=1e-6)


def test_shards_train_as_a_cache_does(tmp_path: Path, cache_file: Path, vae_folder: Path) -> None:
    shards = write_shards(tmp_path / "shards", open_cache(cache_file, vae_folder), 5)
    found = []
    for source in (cache_file, shards):
        train_denoiser(denoiser_run(tmp_path / source.name, source, vae_folder, optim={"steps": 3}))
        found.append(checkpoint.newest(tmp_path / source.name / "work"))
    assert all(torch.equal(tensor, found[1][0][name]) for name, tensor in found[0][0].items())


def test_latents_alone_train_no_decoder(tmp_path: Path, cache_file: Path, model_folder: Path) -> None:
    config = adapts(tmp_path, 2, cache_file, model_folder)
    config = config.model_copy(update={"adapter": config.adapter.model_copy(update={"sites": ("vae.decoder",)})})
    with pytest.raises(UserError, match=r"give data.train in place of data.cache"):
        train_lora(config)
    other = adapts(tmp_path, 2, cache_file, model_folder)
    with pytest.raises(UserError, match=r"latents of 16 px, expected 32"):
        train_lora(other.model_copy(update={"data": other.data.model_copy(update={"size_px": 32})}))
    with pytest.raises(ValueError, match="give either train"):
        TrainLora.model_validate(other.model_dump() | {"data": {"size_px": 16}})
