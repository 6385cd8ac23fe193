"""The training loop that every verb shares: optimizer, EMA, checkpoints, log, progress bar, exact resume.

Everything random in a step comes from a generator seeded by (seed, step), and the data order from
(seed, epoch); so a run that is resumed at step k goes on bit for bit (same machine, same threads).
"""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Protocol

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from latentpipe.train.config import Optimization, Run
from latentpipe.train.distributed import DistributedContext
from latentpipe.train.progress import TrainingLog
from latentpipe.train.spike_guard import TRIES
from latentpipe.train.state import State, Stateful
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.system import has_bf16_units

Losses = dict[str, torch.Tensor]
Figures = dict[str, float]


class TrainingStep(Protocol):
    """One step in parts, each small enough for the memory."""

    def losses(self, part: int) -> Losses:
        """The weighted terms of one part; asked for in order, the gradients of the one before having been added up."""

    def after_backward(self) -> Figures:
        """What learns after the model has its gradients (a discriminator, a controller); further figures for the log."""


def generator_for(seed: int, step: int, device: str = "cpu") -> torch.Generator:
    """The generator of one step; reading it never depends on earlier steps."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> torch.Tensor:
    """Which of `n` samples step `step` (from 0) sees: shuffled epochs laid end to end."""
    first = step * batch_size
    parts: list[torch.Tensor] = []
    position, missing = first, batch_size
    while missing:
        epoch, offset = divmod(position, n)
        taken = _order(n, seed, epoch)[offset : offset + missing]
        parts.append(taken)
        position, missing = position + len(taken), missing - len(taken)
    return torch.cat(parts)


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=generator_for(seed + 7919, epoch))


def learning_rate(optim: Optimization, step: int) -> float:
    """Linear warm-up, then a half cosine to zero at the last step, or the peak with a linear decay over the last share."""
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        falling = optim.steps * optim.decay_share
        return optim.learning_rate * (min(1.0, (optim.steps - step) / falling) if falling else 1.0)
    span = max(1, optim.steps - optim.warmup_steps)
    return optim.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - optim.warmup_steps) / span))


@contextmanager
def fast_forward(run: Run, device: torch.device) -> Iterator[None]:
    """The fastest exact way to compute a forward pass here.

    bf16 or fp16 autocast where the run wants it (auto: bf16 where the processor has the units); on a CPU plain attention,
    whose backward pass is several times faster than the fused one on the short sequences of small latents.
    """
    dtype = torch.float16 if run.precision == "fp16" else torch.bfloat16
    wanted = run.precision in ("bf16", "fp16") or (run.precision == "auto" and has_bf16_units())
    with attention(device), torch.autocast(device.type, dtype) if wanted else nullcontext():
        yield


def attention(device: torch.device) -> AbstractContextManager[None]:
    """Plain attention on a CPU; also around a backward pass, where checkpointing computes it again and must do the same."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def fit(
    module: nn.Module,
    optim: Optimization,
    run: Run,
    losses_of: Callable[[int, torch.Generator], Losses | TrainingStep],
    sample: Callable[[int, TrainingLog], Figures],
    team: DistributedContext | None = None,
    extras: tuple[Stateful, ...] = (),
    parts: int = 1,
    patience: int = 0,
    begun: Callable[[], None] = lambda: None,
    score: Callable[[], float] | None = None,
) -> int:
    """Train `module` for ``optim.steps`` steps; on return it holds the EMA weights. Returns the steps that were taken.

    losses_of(step, generator)  the weighted loss terms by name, whose sum is minimized; or a `TrainingStep`, whose `parts` come
                                one after the other (each is averaged in)
    sample(step, log)           draws sheets with the EMA weights in place and returns figures for the log
    extras                      what else changes from step to step and belongs to a checkpoint
    patience                    ends the run after so many "validation_psnr_db" in a row that are no better than the best
    begun                       called once the checkpoint to go on from, if any, has been taken
    score()                     a loss of the weights in place, lower is better: chooses between two averages, and is logged

    A step whose loss jumps or is not finite sends the run back to its last checkpoint with half the learning rate, three
    times at most. At Ctrl-C and SIGTERM the step that is under way is finished and saved; a second Ctrl-C ends at once.
    """
    state = State.new(module, optim, run, extras)
    done = state.resume(run.work) if run.resume else 0
    if done > optim.steps:
        raise UserError(f"{run.work} holds a checkpoint of step {done}, and optim.steps is {optim.steps}; give at least {done}.")
    begun()
    origin = _clones(state) if done == 0 else None
    told = team is None or team.is_first
    log = TrainingLog(run.work / "log.jsonl", optim.steps, done, run.tensorboard, told)

    def save(step: int) -> None:
        log.flush()
        if told:
            state.save(run.work, step)
        if team is not None:
            team.wait()

    def validate(step: int) -> None:
        figures = state.with_ema(partial(sample, step, log)) | ({} if score is None else state.scores(score))
        if team is not None and figures:  # one figure for all processes, so that all stop at the same step
            shared = team.mean(torch.tensor(list(figures.values()), device=team.device)).tolist()
            figures = dict(zip(figures, shared, strict=True))
        log.figures(step, figures)
        if patience:
            state.note(figures["validation_psnr_db"], run.work, told)
        state.validated = step

    ended = 0
    try:
        with _on_signals() as came:
            if 0 < done < optim.steps and done % run.sample_every_steps == 0 and state.validated < done:
                validate(done)  # the run was stopped in the middle of it
            while done < optim.steps and not (patience and state.misses >= patience):
                figures = _step(state, optim, run, losses_of, done, parts, team)
                if figures is None:
                    done = _roll_back(state, run, done, origin, log)
                    continue
                done, state.whole = done + 1, True  # from here on weights and EMA are those of `done` steps
                log.step(done, figures)
                if done % run.sample_every_steps == 0 and done < optim.steps:
                    validate(done)
                ended = _latest(came, team)
                if ended:
                    break
                if done % run.save_every_steps == 0 and done < optim.steps:
                    save(done)
                    origin = None
            if patience and done == optim.steps and state.validated < done:
                validate(done)
            save(done)
            state.whole = False  # it is saved
    except KeyboardInterrupt:
        if state.whole and told:  # in the middle of an update only the checkpoint before it is exact
            log.flush()
            state.save(run.work, done)
        print(f"Stopped after {done} of {counted(optim.steps, 'step')}; go on with --run.resume.", file=sys.stderr)
        raise
    finally:
        log.close()
    if ended:
        print(f"Stopped after {done} of {counted(optim.steps, 'step')}; go on with --run.resume.", file=sys.stderr)
        raise KeyboardInterrupt if ended == signal.SIGINT else SystemExit(128 + ended)
    state.settle(run.work if patience else None, score, told)
    return done


def _step(
    state: State,
    optim: Optimization,
    run: Run,
    losses_of: Callable[[int, torch.Generator], Losses | TrainingStep],
    step: int,
    parts: int,
    team: DistributedContext | None,
) -> Figures | None:
    """One update; what to log, or None where it was not taken: the loss jumped or is not finite."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(optim, step) * 0.5**state.guard.rollbacks
    # after a detour the same pictures come with other crops and other noise
    begun = losses_of(step, generator_for(run.seed, step + state.guard.rollbacks * 2**32))
    with attention(state.parameters[0].device):
        seen, further = _backward(begun, parts, state)
    names = list(seen[0])
    values = torch.stack([torch.stack([losses[name].float() for name in names]) for losses in seen]).mean(0)
    figures = dict(zip(names, (values if team is None else team.mean(values)).tolist(), strict=True))
    state.scaler.unscale_(state.optimizer)
    norm = float(nn.utils.clip_grad_norm_(state.parameters, optim.clip_norm))
    watched = figures if state.scaler.is_enabled() else {**figures, "gradient": 0.0 if math.isfinite(norm) else norm}
    if state.guard.is_spike(watched):
        state.refused = ", ".join(f"{name} {value:.6g}" for name, value in {**figures, "gradient_norm": norm}.items())
        state.optimizer.zero_grad(set_to_none=True)
        state.scaler.update()
        return None
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.average()
    return {**figures, "gradient_norm": norm, **further}


def _backward(begun: Losses | TrainingStep, parts: int, state: State) -> tuple[list[Losses], Figures]:
    """Gradients of the mean over the parts; the terms of each part without gradient, and the further figures."""
    seen: list[Losses] = []
    for part in range(parts):
        losses = begun if isinstance(begun, dict) else begun.losses(part)
        total = torch.stack(list(losses.values())).sum()
        state.whole = False
        state.scaler.scale(total / parts).backward()
        seen.append({name: value.detach() for name, value in losses.items()})
    return seen, {} if isinstance(begun, dict) else begun.after_backward()


Snapshot = tuple[dict[str, torch.Tensor], dict[str, object]]


def _clones(state: State) -> Snapshot:
    tensors, figures = state.snapshot()
    return {name: value.detach().clone() for name, value in tensors.items()}, figures


def _roll_back(state: State, run: Run, step: int, origin: Snapshot | None, log: TrainingLog) -> int:
    """To the last checkpoint (the beginning where there is none); returns its step."""
    rollbacks = state.guard.rollbacks + 1
    if rollbacks > TRIES:
        raise UserError(
            f"The loss is not finite or jumps at step {step} ({state.refused}), also after going back {TRIES} times. "
            "Lower optim.learning_rate (or the weight of the adversarial term), then --run.resume."
        )
    best = state.best, state.misses  # the file of the best weights is not rolled back
    if origin is not None:
        state.restore({name: value.clone() for name, value in origin[0].items()}, origin[1])
        done = 0
    else:
        done = state.resume(run.work)
    state.guard.rollbacks, state.whole = rollbacks, True
    state.best, state.misses = best
    log.rewind(done)
    log.say(f"step {step}: the loss jumped or is not finite ({state.refused}); back to step {done}, with half the learning rate")
    return done


def _latest(came: list[int], team: DistributedContext | None) -> int:
    """The signal that has come to any process, 0 for none: all must leave the loop at the same step."""
    mine = came[-1] if came else 0
    if team is None or team.world == 1:
        return mine
    return team.largest(mine)


@contextmanager
def _on_signals() -> Iterator[list[int]]:
    """A list that holds SIGTERM or SIGINT once it has come; the step that is under way is finished first."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and came:
            raise KeyboardInterrupt
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
