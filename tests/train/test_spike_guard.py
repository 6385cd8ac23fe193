"""What can go wrong in a run: spikes, a full disk, SIGTERM, no better validation figure, too little memory."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import vae_run
from torch import nn

from latentpipe import UserError, VAEStage
from latentpipe.checkpoints.vae_io import load_vae
from latentpipe.train import checkpoint, loop, state
from latentpipe.train.config import Optimization, Run, TrainVAE, dump
from latentpipe.train.distributed import DistributedContext
from latentpipe.train.spike_guard import JUMP, WARM, SpikeGuard
from latentpipe.train.vae import train as training
from latentpipe.train.vae.microbatch import parts_that_fit, saved_bytes
from latentpipe.utils.errors import LatentpipeWarning

STEADY = Optimization(steps=60, warmup_steps=0, learning_rate=1e-3, ema_decay=0.5)


def run_of(work: Path, **changes: Any) -> Run:
    """A Run below `work`, whose folder exists."""
    (work / "work").mkdir(parents=True, exist_ok=True)
    return Run(**{"out": work / "out", "work": work / "work", "save_every_steps": 10, "sample_every_steps": 1000} | changes)


class Slope(nn.Module):
    """One weight that is pulled to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self) -> torch.Tensor:
        return self.weight.square().sum()


def fit(work: Path, spikes: dict[int, list[float]], optim: Optimization = STEADY, **changes: Any) -> tuple[Slope, list[int]]:
    """Train; at a step of `spikes` the loss is multiplied by the next of its factors, as long as there are any."""
    model, seen = Slope(), []

    def losses_of(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        seen.append(step)
        factors = spikes.get(step, [])
        return {"l2": model() * (factors.pop(0) if factors else 1.0)}

    loop.fit(model, optim, run_of(work, **changes), losses_of, lambda *_: {})
    return model, seen


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e6])
def test_a_spike_goes_back_to_the_last_checkpoint(tmp_path: Path, factor: float) -> None:
    model, seen = fit(tmp_path, {35: [factor]})
    assert seen == [*range(36), *range(30, 60)]
    assert torch.isfinite(model.weight).all()
    rows = [json.loads(line) for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert all(row["l2"] < 4 for row in rows)


def test_before_the_first_checkpoint_it_goes_back_to_the_beginning(tmp_path: Path) -> None:
    _, seen = fit(tmp_path, {5: [math.nan]})
    assert seen == [*range(6), *range(60)]


def test_a_detour_halves_the_learning_rate(tmp_path: Path) -> None:
    optim = Optimization(steps=1, warmup_steps=0, learning_rate=0.5, weight_decay=0.0, ema_decay=0.0)
    moved = [(1 - fit(tmp_path / str(n), {0: [math.nan] * n}, optim)[0].weight).mean().item() for n in range(4)]
    assert moved == pytest.approx([0.5, 0.25, 0.125, 0.0625], rel=1e-4)  # Adam's first step is the learning rate


def test_a_spike_that_comes_again_ends_the_run_with_its_figures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 35 \(l2 nan.*3 times"):
        fit(tmp_path, {35: [math.nan] * 9})
    assert checkpoint.newest(tmp_path / "work")[1]["step"] == 30  # type: ignore[index]


def test_the_guard_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    whole, _ = fit(tmp_path / "a", {35: [math.nan]})
    model = Slope()
    spiked = []

    def losses_of(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if step == 45:
            raise KeyboardInterrupt
        spiked.append(step)
        return {"l2": model() * (math.nan if spiked.count(35) == 1 and step == 35 else 1.0)}

    with pytest.raises(KeyboardInterrupt):
        loop.fit(model, STEADY, run_of(tmp_path / "b"), losses_of, lambda *_: {})
    again, _ = fit(tmp_path / "b", {}, resume=True)
    assert torch.equal(whole.weight, again.weight)


def test_a_jump_counts_once_the_usual_is_known_and_terms_by_schedule_never() -> None:
    guard = SpikeGuard()
    for step in range(WARM):
        assert not guard.is_spike({"l1": 1000.0 if step == 3 else 1.0})
    assert not guard.is_spike({"l1": 1.0, "kl": 1e9, "adversarial": -1e9})
    assert not guard.is_spike({"l1": JUMP * 0.99})
    assert guard.is_spike({"l1": JUMP * 1.01})
    assert guard.is_spike({"l1": 1.0, "kl": math.nan})


# --- patience -----------------------------------------------------------------------------------------------


def validated(work: Path, figures: list[float], patience: int, **changes: Any) -> tuple[int, float]:
    """Train with these validation figures every 5 steps: how many steps were taken, and the weight that was kept."""
    model, given = Slope(), iter(figures)
    weights: list[float] = []

    def sample(step: int, log: Any) -> dict[str, float]:
        weights.append(model.weight[0].item())
        return {"validation_psnr_db": next(given)}

    run = run_of(work, sample_every_steps=5, **changes)
    steps = loop.fit(model, STEADY, run, lambda *_: {"l2": model()}, sample, patience=patience)
    best = max(range(len(weights)), key=lambda index: figures[index])
    assert model.weight[0].item() == pytest.approx(weights[best], abs=1e-7)
    return steps, model.weight[0].item()


def test_a_run_that_gets_no_better_ends_with_its_best_weights(tmp_path: Path) -> None:
    assert validated(tmp_path / "a", [10, 12, 11, 11.5, 9, 8, 7, 6], patience=3)[0] == 25
    assert validated(tmp_path / "b", [float(n) for n in range(20)], patience=3)[0] == 60
    assert validated(tmp_path / "c", [1, 2, 3, 2, 3, 4, 5, 4, 6, 1, 2, 3], patience=3)[0] == 60


# --- interrupts and disks -----------------------------------------------------------------------------------


def test_sigterm_leaves_a_checkpoint_of_the_last_whole_step(tmp_path: Path) -> None:
    model = Slope()

    def losses_of(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if step == 23:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"l2": model()}

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        loop.fit(model, STEADY, run_of(tmp_path / "b"), losses_of, lambda *_: {})
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.newest(tmp_path / "b" / "work")[1]["step"] == 24  # type: ignore[index]
    whole, _ = fit(tmp_path / "a", {})
    again, _ = fit(tmp_path / "b", {}, resume=True)
    assert torch.equal(whole.weight, again.weight)


@pytest.mark.slow
def test_sigterm_while_a_checkpoint_is_written_loses_nothing(tmp_path: Path, pictures: Path) -> None:
    config = vae_run(tmp_path, pictures, optim={"steps": 5000}, save_every_steps=1)
    (tmp_path / "config.yaml").write_text(dump(config))
    command = [sys.executable, "-m", "latentpipe", "train-vae", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "work" / "checkpoints"
    limit = time.monotonic() + 120
    while not list(folder.glob(".step-*.part")) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.001)  # until one is being written
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "go on with --run.resume" in errors
    found = checkpoint.newest(tmp_path / "work")
    assert found is not None
    assert not list(folder.glob(".*"))
    steps = len((tmp_path / "work" / "log.jsonl").read_text().splitlines())
    assert found[1]["step"] == steps


def test_a_full_disk_is_named_and_the_older_checkpoints_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = checkpoint.save_file, []

    def full(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(UserError, match=r"step 30 could not be written.*No space left.*--run\.resume"):
            fit(tmp_path / "b", {})
    assert sorted(path.name for path in (tmp_path / "b" / "work" / "checkpoints").iterdir()) == ["step-00000010", "step-00000020"]
    whole, _ = fit(tmp_path / "a", {})
    again, _ = fit(tmp_path / "b", {}, resume=True)
    assert torch.equal(whole.weight, again.weight)


# --- memory, precision, compilation -------------------------------------------------------------------------


def test_the_parts_of_a_step_are_counted_from_the_activations(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainVAE.model_validate(vae_run(tmp_path, pictures, optim={"batch_size": 12, "accumulate": "auto"}).model_dump())
    from latentpipe.train.vae.model import build_vae

    team, stage = DistributedContext(), VAEStage(build_vae(config, None))
    each = saved_bytes(config, stage, team.device)
    assert parts_that_fit(config, stage, team) == 1
    for room, parts in ((12.5, 1), (11.5, 2), (5.9, 3), (2.5, 6), (1.1, 12)):
        monkeypatch.setattr("latentpipe.vae.memory.available", lambda device, room=room: int(each * room / 0.6))
        assert parts_that_fit(config, stage, team) == parts
    monkeypatch.setattr("latentpipe.vae.memory.available", lambda device: int(each * 0.5))
    with pytest.raises(UserError, match=r"smaller crops, or --run\.gradient-checkpointing"):
        parts_that_fit(config, stage, team)


def test_saved_bytes_grow_with_the_picture_and_shrink_with_checkpointing(tmp_path: Path, pictures: Path) -> None:
    from latentpipe.train.vae.model import build_vae

    def bytes_of(side: int, **run: Any) -> int:
        config = vae_run(tmp_path, pictures, crops={"size_px": side}, data={"read_size_px": 64}, **run)
        return saved_bytes(config, VAEStage(build_vae(config, None)), torch.device("cpu"))

    assert 3.5 < bytes_of(64) / bytes_of(32) < 4.5
    assert bytes_of(64, gradient_checkpointing=True) < 0.6 * bytes_of(64)


@pytest.mark.parametrize("change", [{"optim": {"accumulate": 4}}, {"run": {"gradient_checkpointing": True}}])
def test_parts_and_recomputation_give_the_gradients_of_the_whole(tmp_path: Path, pictures: Path, change: dict[str, Any]) -> None:
    loss = {"equivariance": 0.5, "warps": ["rotate"], "kl": 0.1}
    plain = vae_run(tmp_path / "a", pictures, loss=loss)
    other = vae_run(tmp_path / "b", pictures, loss=loss, optim=change.get("optim", {}), **change.get("run", {}))
    for config in (plain, other):
        training.train_vae(config)
    first, second = (load_vae(tmp_path / name / "vae").state_dict() for name in "ab")
    for name, value in first.items():
        assert (value - second[name]).abs().mean() < 2e-3 * value.abs().mean().clamp_min(1e-2), name


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_trains(tmp_path: Path, pictures: Path, precision: str) -> None:
    training.train_vae(vae_run(tmp_path, pictures, precision=precision))
    tensors, figures = checkpoint.newest(tmp_path / "work")  # type: ignore[misc]
    assert all(torch.isfinite(value).all() for value in tensors.values())
    assert bool(figures["scaler"]) == (precision == "fp16")


def test_tensorboard_files_are_written_where_they_are_wanted(tmp_path: Path, pictures: Path) -> None:
    pytest.importorskip("tensorboard")
    training.train_vae(vae_run(tmp_path, pictures, tensorboard=True, sample_every_steps=2))
    written = list((tmp_path / "work" / "tensorboard").iterdir())
    assert len(written) == 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "work" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("l1")] == [1, 2, 3, 4]
    assert events.Tags()["images"] == ["rebuilt"]


def test_without_tensorboard_it_says_what_to_install(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install"):
        training.train_vae(vae_run(tmp_path, pictures, tensorboard=True))


def test_the_state_of_nothing_is_refused() -> None:
    frozen = Slope().requires_grad_(False)
    with pytest.raises(UserError, match="Nothing trains"):
        state.State.new(frozen, STEADY, Run(out=Path("a"), work=Path("b")))


# --- resuming something else --------------------------------------------------------------------------------


def trained(root: Path, pictures: Path, **changes: Any) -> None:
    """A tiny run on the embedded VAE's shape-free tiny sibling; `changes` are keys of the config, run.* under "run"."""
    run = changes.pop("run", {})
    optim = changes.pop("optim", {})
    loss = {"equivariance": 0.0, "kl": 0.01} | changes.pop("loss", {})
    base = vae_run(root, pictures, optim=optim, loss=loss, **run).model_dump()
    training.train_vae(TrainVAE.model_validate(base | changes))


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        ({}, {"adversarial": {"weight": 1.0, "width": 8, "layers": 1}}, r"without adversarial\.weight"),
        ({"loss": {"target_bits": 1.0}}, {}, r"with loss\.target_bits"),
        ({}, {"model": {"channels": 3, "blocks": (8, 16), "norm_groups": 4}}, "another model"),
        ({}, {"optim": {"steps": 2}}, r"step 4, and optim\.steps is 2"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_its_config_kept(
    tmp_path: Path, pictures: Path, first: dict[str, Any], then: dict[str, Any], words: str
) -> None:
    trained(tmp_path, pictures, **dict(first))
    before = (tmp_path / "work" / "config.yaml").read_text()
    with pytest.warns(LatentpipeWarning, match="another config"), pytest.raises(UserError, match=words):
        trained(tmp_path, pictures, **then, run={"resume": True})
    assert (tmp_path / "work" / "config.yaml").read_text() == before


def test_other_parts_are_not_resumed(tmp_path: Path, pictures: Path) -> None:
    trained(tmp_path / "a", pictures)
    start = {"warm_start": tmp_path / "a" / "vae"}
    trained(tmp_path / "b", pictures, parts=("decoder.mid",), model={}, run=start)
    with pytest.warns(LatentpipeWarning, match="another config"), pytest.raises(UserError, match="trained other parts"):
        trained(tmp_path / "b", pictures, parts=("encoder.mid",), model={}, run={**start, "resume": True})


@pytest.mark.parametrize("files", [("config.json", "thesis.txt"), ("thesis.txt",), ("config.json", "src/main.py")])
def test_a_folder_with_other_things_in_it_is_not_replaced(tmp_path: Path, pictures: Path, files: tuple[str, ...]) -> None:
    for name in files:
        path = tmp_path / "vae" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UserError, match="would be replaced"):
        trained(tmp_path, pictures)
    assert all((tmp_path / "vae" / name).is_file() for name in files)


def test_a_model_of_ours_is_replaced(tmp_path: Path, pictures: Path) -> None:
    trained(tmp_path, pictures)
    trained(tmp_path, pictures, run={"work": tmp_path / "other", "seed": 5})
    with pytest.raises(UserError, match="would be replaced"):
        trained(tmp_path, pictures, run={"work": tmp_path / "third", "out": tmp_path / "third" / "checkpoints"})


def test_a_result_that_cannot_be_written_is_found_before_training(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(UserError, match="cannot be written to"):
        trained(tmp_path, pictures, run={"out": Path("/proc/none/vae")})
    assert not (tmp_path / "work" / "log.jsonl").exists()


def test_fp16_survives_a_spike(tmp_path: Path, pictures: Path) -> None:
    model, run = Slope(), run_of(tmp_path, precision="fp16")
    factors = {5: [1e9], 25: [math.nan]}

    def losses_of(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"l2": model() * (factors[step].pop() if factors.get(step) else 1.0)}

    loop.fit(model, STEADY, run, losses_of, lambda *_: {})
    assert torch.isfinite(model.weight).all()


def test_ctrl_c_finishes_the_step_and_saves_it(tmp_path: Path) -> None:
    model = Slope()

    def losses_of(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if step == 23:
            signal.raise_signal(signal.SIGINT)
        return {"l2": model()}

    with pytest.raises(KeyboardInterrupt):
        loop.fit(model, STEADY, run_of(tmp_path), losses_of, lambda *_: {})
    assert checkpoint.newest(tmp_path / "work")[1]["step"] == 24  # type: ignore[index]


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    model = Slope()

    def losses_of(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if step == 23:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return {"l2": model()}

    with pytest.raises(KeyboardInterrupt):
        loop.fit(model, STEADY, run_of(tmp_path), losses_of, lambda *_: {})
    assert checkpoint.newest(tmp_path / "work")[1]["step"] == 23  # type: ignore[index]


def test_a_resumed_run_keeps_its_parts(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path, pictures, optim={"accumulate": "auto"})
    assert json.loads((tmp_path / "work" / "parts.json").read_text()) == 1
    (tmp_path / "work" / "parts.json").write_text("2")  # as if memory had been short
    config = TrainVAE.model_validate(vae_run(tmp_path, pictures, optim={"accumulate": "auto"}, resume=True).model_dump())
    from latentpipe.train.vae.model import build_vae

    assert parts_that_fit(config, VAEStage(build_vae(config, None)), DistributedContext()) == 2


def test_a_compiler_that_fails_is_named(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: Any) -> Any:
        def forward(*_: Any, **__: Any) -> Any:
            raise RuntimeError("no working C++ compiler\nand much more")

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(DistributedContext, "wrap", lambda self, module: module)
    with pytest.raises(UserError, match=r"run\.compile: .*no working C\+\+ compiler\)"):
        trained(tmp_path, pictures, run={"compile": True})
