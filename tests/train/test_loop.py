"""The training loop: data order, schedules, checkpoints, log."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from latentpipe import UserError
from latentpipe.train import checkpoint, loop, progress, run_dir, weighted_order
from latentpipe.train.config import Optimization, Run, TrainVAE
from latentpipe.utils.errors import LatentpipeWarning


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 1000), st.integers(1, 4))
def test_each_epoch_sees_every_sample_once(n: int, batch_size: int, seed: int, epochs: int) -> None:
    steps = math.ceil(n * epochs / batch_size)
    stream = torch.cat([loop.batch_indices(n, batch_size, seed, step) for step in range(steps)]).tolist()
    assert len(stream) == steps * batch_size
    for epoch in range(epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_the_order_depends_on_seed_and_epoch() -> None:
    first, again, seeded, later = (
        loop.batch_indices(50, 50, seed, step).tolist() for seed, step in ((1, 0), (1, 0), (2, 0), (1, 1))
    )
    assert first == again
    assert first != seeded
    assert first != later
    assert first != sorted(first)


def test_a_steps_generator_depends_on_the_step_only() -> None:
    draws = [torch.rand(3, generator=loop.generator_for(seed, step)).tolist() for seed, step in ((0, 5), (0, 5), (0, 6), (1, 5))]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert draws[0] != draws[3]


@given(st.integers(1, 500), st.integers(0, 100), st.floats(1e-6, 1))
def test_the_learning_rate_is_a_warm_up_and_a_half_cosine(steps: int, warmup: int, peak: float) -> None:
    optim = Optimization(steps=steps, warmup_steps=warmup, learning_rate=peak)
    rates = [loop.learning_rate(optim, step) for step in range(max(steps, warmup) + 1)]
    for step, rate in enumerate(rates):
        if step < warmup:
            assert rate == pytest.approx(peak * (step + 1) / warmup)
        elif step <= steps:
            share = (step - warmup) / max(1, steps - warmup)
            assert rate == pytest.approx(peak * (1 + math.cos(math.pi * share)) / 2, abs=1e-12)
    assert max(rates) <= peak * (1 + 1e-12)
    if steps > warmup:
        assert rates[warmup] == pytest.approx(peak)
        assert rates[steps] == pytest.approx(0, abs=1e-12)


@given(st.integers(1, 500), st.integers(0, 50), st.floats(0, 1))
def test_a_constant_rate_stays_and_falls_linearly_over_its_last_share(steps: int, warmup: int, share: float) -> None:
    optim = Optimization(steps=steps, warmup_steps=warmup, learning_rate=0.5, schedule="constant", decay_share=share)
    for step in range(warmup, steps):
        left = (steps - step) / (steps * share) if share else 1.0
        assert loop.learning_rate(optim, step) == pytest.approx(0.5 * min(1.0, left))


def test_a_constant_rate_does_not_depend_on_the_length() -> None:
    short, long = (Optimization(steps=steps, schedule="constant") for steps in (200, 2000))
    assert [loop.learning_rate(short, step) for step in range(200)] == [loop.learning_rate(long, step) for step in range(200)]


@given(st.lists(st.sampled_from([1.0, 0.5, 0.25]), min_size=1, max_size=20), st.integers(1, 9), st.integers(0, 99))
def test_each_sample_comes_as_often_as_its_weight_says(weights: list[float], batch_size: int, seed: int) -> None:
    size = math.ceil(sum(weights) / max(weights))  # of an epoch
    steps = math.ceil(size / batch_size)
    stream = torch.cat([weighted_order.weighted_indices(tuple(weights), batch_size, seed, step) for step in range(steps)])
    counts = torch.bincount(stream[:size], minlength=len(weights))
    for weight, count in zip(weights, counts.tolist(), strict=True):
        wanted = weight * size / sum(weights)
        assert math.floor(wanted) <= count <= math.ceil(wanted)


def test_light_samples_take_turns_over_the_epochs() -> None:
    weights = (1.0,) * 5 + (0.25,) * 20  # ten to an epoch
    epochs = [weighted_order.weighted_indices(weights, 10, 3, epoch).tolist() for epoch in range(400)]
    counts = torch.bincount(torch.tensor(epochs).flatten(), minlength=25).float() / 400
    assert torch.equal(counts[:5], torch.ones(5))
    assert ((counts[5:] - 0.25).abs() < 0.1).all()
    assert epochs[0] != epochs[1]
    assert epochs[0] == weighted_order.weighted_indices(weights, 10, 3, 0).tolist()


def test_the_cosine_is_torchs_own() -> None:
    optim = Optimization(steps=20, warmup_steps=0, learning_rate=0.3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for step in range(20):
        assert loop.learning_rate(optim, step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


# --- fit ----------------------------------------------------------------------------------------------------


class Line(nn.Module):
    """y = a x + b with a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.moving = nn.Linear(2, 1)
        self.frozen = nn.Linear(2, 1).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moving(x) + self.frozen(x)


def run_of(work: Path, **changes: Any) -> Run:
    """A Run below `work`."""
    return Run(
        **{"out": work / "out", "work": work / "work", "seed": 3, "save_every_steps": 1000, "sample_every_steps": 1000} | changes
    )


def fit(
    work: Path,
    optim: Optimization | None = None,
    stop_at: int | None = None,
    sample: Any = None,
    score: Any = None,
    **changes: Any,
) -> Line:
    """Train a line; `stop_at` raises KeyboardInterrupt in that step."""
    model, run = Line(), run_of(work, **changes)
    run.work.mkdir(parents=True, exist_ok=True)
    optim = optim or Optimization(steps=10, warmup_steps=2, ema_decay=0.8)

    def losses_of(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 2, generator=generator)
        return {"l2": (model(x) - x.sum(1, keepdim=True)).square().mean(), "size": 1e-3 * model.moving.weight.square().sum()}

    model.score = score and (lambda: score(model))  # type: ignore[assignment]
    loop.fit(model, optim, run, losses_of, sample or (lambda *_: {}), score=model.score)  # type: ignore[arg-type]
    return model


def same(first: nn.Module, second: nn.Module) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def log_of(work: Path) -> list[dict[str, float]]:
    """The rows of log.jsonl without the time."""
    rows = [json.loads(line) for line in (work / "work" / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize("stop_at", [0, 1, 5, 9])
@pytest.mark.numeric
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, stop_at: int) -> None:
    whole = fit(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", stop_at=stop_at)
    assert checkpoint.newest(tmp_path / "b" / "work")[1]["step"] == stop_at  # type: ignore[index]
    assert same(whole, fit(tmp_path / "b", resume=True))
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")


@pytest.mark.parametrize("place", ["log", "sample", "save"])
def test_an_interrupt_after_the_update_is_resumed_exactly(tmp_path: Path, place: str) -> None:
    whole = fit(tmp_path / "a")
    original = {"log": progress.TrainingLog.step, "save": checkpoint.save}

    def in_log(self: Any, step: int, figures: dict[str, float]) -> None:
        if step == 4:
            raise KeyboardInterrupt
        original["log"](self, step, figures)

    raised = []

    def in_save(*arguments: Any, **named: Any) -> Any:
        if not raised:
            raised.append(True)
            raise KeyboardInterrupt
        return original["save"](*arguments, **named)

    def in_sample(step: int, log: Any) -> dict[str, float]:
        raise KeyboardInterrupt

    patch = pytest.MonkeyPatch()
    if place == "log":
        patch.setattr(progress.TrainingLog, "step", in_log)
    if place == "save":
        patch.setattr(checkpoint, "save", in_save)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", sample=in_sample if place == "sample" else None, sample_every_steps=4, save_every_steps=4)
    patch.undo()
    assert same(whole, fit(tmp_path / "b", resume=True))


def test_a_crash_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    whole = fit(tmp_path / "a")

    class Power(BaseException):
        """A crash that nobody catches."""

    model = Line()

    def losses_of(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if step == 7:
            raise Power
        x = torch.randn(8, 2, generator=generator)
        return {"l2": (model(x) - x.sum(1, keepdim=True)).square().mean(), "size": 1e-3 * model.moving.weight.square().sum()}

    run = run_of(tmp_path / "b", save_every_steps=3)
    run.work.mkdir(parents=True)
    with pytest.raises(Power):
        loop.fit(model, Optimization(steps=10, warmup_steps=2, ema_decay=0.8), run, losses_of, lambda *_: {})
    assert checkpoint.newest(run.work)[1]["step"] == 6  # type: ignore[index]
    with (run.work / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "seco')  # a kill tears the last line
    assert same(whole, fit(tmp_path / "b", resume=True))
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    whole = fit(tmp_path)
    assert same(whole, fit(tmp_path, resume=True))
    assert len(log_of(tmp_path)) == 10


def test_resuming_nothing_begins(tmp_path: Path) -> None:
    assert same(fit(tmp_path / "a", resume=True), fit(tmp_path / "b"))


def test_the_result_is_the_moving_average(tmp_path: Path) -> None:
    model = fit(tmp_path)
    tensors, state = checkpoint.newest(tmp_path / "work")  # type: ignore[misc]
    assert state["step"] == 10
    assert torch.equal(model.moving.weight, tensors["ema.0"])
    assert not torch.equal(model.moving.weight, tensors["module.moving.weight"])


TWO = Optimization(steps=10, warmup_steps=2, ema_decay=0.2, ema_decay_slow=0.9)


@pytest.mark.parametrize("chosen", ["ema", "slow"])
def test_of_two_averages_the_one_with_the_lower_score_is_the_result(tmp_path: Path, chosen: str) -> None:
    sums: list[float] = []

    def score(model: Line) -> float:
        sums.append(model.moving.weight.sum().item())
        return float(len(sums) if chosen == "ema" else -len(sums))  # the first is asked first

    model = fit(tmp_path, TWO, score=score)
    tensors, _ = checkpoint.newest(tmp_path / "work")  # type: ignore[misc]
    assert torch.equal(model.moving.weight, tensors[f"{chosen}.0"])
    assert not torch.equal(tensors["ema.0"], tensors["slow.0"])
    assert sums == [tensors["ema.0"].sum().item(), tensors["slow.0"].sum().item()]


def test_two_averages_resume_bit_for_bit(tmp_path: Path) -> None:
    whole = fit(tmp_path / "a", TWO, score=lambda model: 0.0)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", TWO, stop_at=6, score=lambda model: 0.0)
    halves = fit(tmp_path / "b", TWO, resume=True, score=lambda model: 0.0)
    assert same(whole, halves)
    first, second = (checkpoint.newest(tmp_path / name / "work")[0] for name in "ab")  # type: ignore[index]
    assert torch.equal(first["slow.0"], second["slow.0"])


def test_a_second_average_that_comes_late_begins_with_the_first(tmp_path: Path) -> None:
    one = Optimization(**{**TWO.model_dump(), "ema_decay_slow": None})
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, one, stop_at=9)
    before, _ = checkpoint.newest(tmp_path / "work")  # type: ignore[misc]
    fit(tmp_path, Optimization(**{**TWO.model_dump(), "steps": 9}), resume=True, score=lambda model: 0.0)
    after, _ = checkpoint.newest(tmp_path / "work")  # type: ignore[misc]
    assert torch.equal(after["slow.0"], before["ema.0"])


def test_frozen_weights_stay(tmp_path: Path) -> None:
    assert torch.equal(fit(tmp_path).frozen.weight, Line().frozen.weight)
    assert not torch.equal(fit(tmp_path / "b").moving.weight, Line().moving.weight)


@pytest.mark.numeric
def test_training_without_average_is_plain_adamw(tmp_path: Path) -> None:
    optim = Optimization(steps=5, warmup_steps=0, learning_rate=0.01, ema_decay=0.0, clip_norm=1e9, weight_decay=0.1)
    model, plain = fit(tmp_path, optim), Line()
    optimizer = torch.optim.AdamW(plain.moving.parameters(), lr=0.01, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for step in range(5):
        x = torch.randn(8, 2, generator=loop.generator_for(3, step))
        loss = (plain(x) - x.sum(1, keepdim=True)).square().mean() + 1e-3 * plain.moving.weight.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert torch.allclose(model.moving.weight, plain.moving.weight, atol=1e-7)


def test_sheets_are_drawn_with_the_average_in_place(tmp_path: Path) -> None:
    optim = Optimization(steps=6, warmup_steps=0, ema_decay=0.9)
    holder: list[Any] = []
    seen: list[tuple[int, torch.Tensor]] = []
    model = Line()

    def losses_of(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        holder.append(model.moving.weight.detach().clone())
        return {"l2": model(torch.randn(8, 2, generator=generator)).square().mean()}

    def sample(step: int, log: Any) -> dict[str, float]:
        seen.append((step, model.moving.weight.detach().clone()))
        return {"score": 1.5}

    run = run_of(tmp_path, sample_every_steps=2)
    run.work.mkdir(parents=True)
    loop.fit(model, optim, run, losses_of, sample)
    assert [step for step, _ in seen] == [2, 4]
    assert not torch.equal(seen[0][1], holder[2])  # during the sheet: the average; afterwards: the weights again
    scores = [row["score"] for row in log_of(tmp_path) if "score" in row]
    assert scores == [1.5, 1.5]


@pytest.mark.numeric
def test_drawing_sheets_does_not_change_the_training(tmp_path: Path) -> None:
    assert same(fit(tmp_path / "a"), fit(tmp_path / "b", sample_every_steps=3, save_every_steps=2))


def test_a_loss_that_is_not_finite_stops_with_the_figures(tmp_path: Path) -> None:
    model, run = Line(), run_of(tmp_path)
    run.work.mkdir(parents=True)

    def losses_of(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"l2": model(torch.ones(1, 2)).sum() * (math.nan if step == 3 else 1.0)}

    with pytest.raises(UserError, match=r"not finite or jumps at step 3 \(l2 nan"):
        loop.fit(model, Optimization(steps=5), run, losses_of, lambda *_: {})
    assert torch.isfinite(model.moving.weight).all()


def test_the_gradient_is_clipped(tmp_path: Path) -> None:
    fit(tmp_path, Optimization(steps=2, clip_norm=1e-3))
    assert all(row["gradient_norm"] > 1e-3 for row in log_of(tmp_path))
    tensors, _ = checkpoint.newest(tmp_path / "work")  # type: ignore[misc]
    assert tensors["optimizer.0.exp_avg_sq"].sqrt().norm() < 1e-3


# --- checkpoints --------------------------------------------------------------------------------------------


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 20, 300):
        checkpoint.save(tmp_path, step, {"a": torch.tensor([float(step)])}, {"note": step})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000020", "step-00000300"]
    tensors, state = checkpoint.newest(tmp_path)  # type: ignore[misc]
    assert tensors["a"].item() == 300
    assert state == {"step": 300, "note": 300}
    assert checkpoint.newest(tmp_path / "none") is None


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 5, {"a": torch.zeros(3)}, {})
    (folder / "state.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="step-00000005"):
        checkpoint.newest(tmp_path)


def test_a_failed_save_leaves_the_older_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, {"a": torch.zeros(3)}, {})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, {"a": torch.zeros(3)}, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    fit(tmp_path)
    other, run = nn.Linear(3, 3), run_of(tmp_path, resume=True)
    with pytest.raises(UserError, match="another model"):
        loop.fit(other, Optimization(steps=20), run, lambda *_: {"x": other.weight.sum()}, lambda *_: {})


# --- begin --------------------------------------------------------------------------------------------------


def config_of(tmp_path: Path, **run: Any) -> TrainVAE:
    """A config that writes below `tmp_path`."""
    places = {"out": tmp_path / "out", "work": tmp_path / "work"} | run
    return TrainVAE.model_validate({"data": {"train": tmp_path}, "run": places, "optim": {"steps": 3}})


def begin(config: TrainVAE) -> None:
    """Begin and end a run that trains nothing."""
    with run_dir.prepare_run_dir(config, config.run) as record:
        record()


def test_begin_writes_the_resolved_config(tmp_path: Path) -> None:
    from latentpipe.train.config import load

    config = config_of(tmp_path)
    begin(config)
    assert load(tmp_path / "work" / "config.yaml", TrainVAE) == config


def test_going_on_with_another_config_is_said(tmp_path: Path) -> None:
    first = config_of(tmp_path)
    begin(first)
    again = config_of(tmp_path, resume=True, seed=9)
    with pytest.warns(LatentpipeWarning, match=r"run\.seed 0 -> 9"):
        begin(again)
    same_again = config_of(tmp_path, resume=True, seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin(same_again)


def test_two_runs_are_not_mixed(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "work", 5, {"a": torch.zeros(3)}, {})
    config = config_of(tmp_path)
    with pytest.raises(UserError, match=r"--run\.resume"):
        begin(config)
    again = config_of(tmp_path, resume=True)
    begin(again)


@pytest.mark.parametrize("work", ["out", "out/work"])
def test_a_work_folder_inside_the_result_is_refused(tmp_path: Path, work: str) -> None:
    config = config_of(tmp_path, work=tmp_path / work)
    with pytest.raises(UserError, match=r"run\.work"):
        begin(config)


def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    config = config_of(tmp_path)
    with pytest.raises(UserError, match="would be replaced"):
        begin(config)


def test_autocast_follows_the_precision(tmp_path: Path) -> None:
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with loop.fast_forward(run_of(tmp_path, precision=precision), torch.device("cpu")):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
