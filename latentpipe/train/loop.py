"""The training loop that every verb shares: optimizer, EMA, checkpoints, log, progress bar, exact resume.

Everything random in a step comes from a generator seeded by (seed, step), and the data order from
(seed, epoch); so a run that is resumed at step k goes on bit for bit (same machine, same threads).
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.training_utils import EMAModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from latentpipe.config import Optimization, Run, Strict, dump
from latentpipe.errors import Note, UserError
from latentpipe.files import atomic_file
from latentpipe.train import checkpoint

Losses = dict[str, torch.Tensor]


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
        order = torch.randperm(n, generator=generator_for(seed + 7919, epoch))
        taken = order[offset : offset + missing]
        parts.append(taken)
        position, missing = position + len(taken), missing - len(taken)
    return torch.cat(parts)


def learning_rate(optim: Optimization, step: int) -> float:
    """Linear warm-up, then a half cosine to zero at the last step."""
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    span = max(1, optim.steps - optim.warmup_steps)
    return optim.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - optim.warmup_steps) / span))


def has_bf16_units() -> bool:
    """Whether this machine computes bf16 faster than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and any(name in flags.read_text() for name in ("avx512_bf16", "amx_bf16", " bf16 "))


@contextmanager
def fast_forward(run: Run, device: torch.device) -> Iterator[None]:
    """The fastest exact way to compute a forward pass here.

    bf16 autocast where the run wants it (auto: where the processor has the units); on a CPU plain attention,
    whose backward pass is several times faster than the fused one on the short sequences of small latents.
    """
    wanted = run.precision == "bf16" or (run.precision == "auto" and has_bf16_units())
    with ExitStack() as stack:
        if wanted:
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        if device.type == "cpu":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def begin(config: Strict, run: Run) -> None:
    """Prepare the work folder: refuse to mix two runs, write the resolved config."""
    out, work = run.out.resolve(), run.work.resolve()
    if work == out or work.is_relative_to(out):
        raise UserError(
            f"run.work ({run.work}) lies in run.out ({run.out}), which is replaced at the end; choose another folder."
        )
    if out.exists() and any(out.iterdir()) and not any((out / name).is_file() for name in ("config.json", "model_index.json")):
        raise UserError(f"run.out ({run.out}) holds something that is no model, and would be replaced; choose another folder.")
    started = (run.work / "checkpoints").is_dir() and any((run.work / "checkpoints").iterdir())
    if started and not run.resume:
        raise UserError(
            f"{run.work} holds checkpoints of an earlier run; add --run.resume to go on from there, or choose another --run.work."
        )
    run.work.mkdir(parents=True, exist_ok=True)
    record = run.work / "config.yaml"
    if run.resume and record.is_file():
        before, now = _flat(yaml.safe_load(record.read_text())), _flat(config.model_dump(mode="json"))
        free = {"run.resume", "run.out", "run.work", "run.save_every_steps", "run.sample_every_steps"}
        changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if key not in free and before.get(key) != now[key]]
        if changed:
            warnings.warn(f"this run goes on with another config: {', '.join(changed)}", Note, stacklevel=3)
    with atomic_file(record) as part:
        part.write_text(dump(config))


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    return {name: value for key, inner in values.items() for name, value in _flat(inner, f"{prefix}{key}.").items()}


def refuse_other_shape(source: Path, found: Mapping[str, Any], wanted: dict[str, Any]) -> None:
    """UserError where the model to warm-start from differs from the config in one of `wanted`."""
    pairs = {name: (_plain(found[name]), _plain(value)) for name, value in wanted.items()}
    other = [f"{name} {mine} (config: {value})" for name, (mine, value) in pairs.items() if mine != value]
    if other:
        raise UserError(f"run.warm_start {source} is a model of another shape: {', '.join(other)}.")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def fit(
    module: nn.Module,
    optim: Optimization,
    run: Run,
    losses_of: Callable[[int, torch.Generator], Losses],
    sample: Callable[[int], dict[str, float]],
) -> None:
    """Train `module` for ``optim.steps`` steps; on return it holds the EMA weights.

    losses_of(step, generator)  the weighted loss terms by name; their sum is minimized
    sample(step)                draws sheets with the EMA weights in place and returns figures for the log
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=optim.learning_rate, weight_decay=optim.weight_decay)
    ema = EMAModel(parameters, decay=optim.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    first = _resume(module, optimizer, ema, run)
    log = Progress(run.work / "log.jsonl", optim.steps, first)

    def save(step: int) -> None:
        log.flush()
        tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
        tensors |= {f"ema.{index}": value for index, value in enumerate(ema.shadow_params)}
        checkpoint.save(run.work, step, tensors | checkpoint.optimizer_tensors(optimizer), {"ema_steps": ema.optimization_step})

    done, whole = first, True
    try:
        for step in range(first, optim.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(optim, step)
            losses = losses_of(step, generator_for(run.seed, step))
            total = torch.stack(list(losses.values())).sum()
            if not torch.isfinite(total):
                raise UserError(
                    f"The loss is not finite at step {step}: {_figures(losses)}. Lower optim.learning_rate, then --run.resume."
                )
            total.backward()
            whole = False
            norm = nn.utils.clip_grad_norm_(parameters, optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.step(parameters)
            done, whole = step + 1, True  # from here on weights and EMA are those of `done` steps
            log.step(done, {**_figures(losses), "gradient_norm": float(norm)})
            if done % run.save_every_steps == 0 and done < optim.steps:
                save(done)
            if done % run.sample_every_steps == 0 and done < optim.steps:
                log.figures(done, _with_ema(ema, parameters, partial(sample, done)))
    except KeyboardInterrupt:
        if whole:  # in the middle of an update only the checkpoint before it is exact
            save(done)
        log.close()
        print(f"Stopped after {done} of {optim.steps} steps; go on with --run.resume.", file=sys.stderr)
        raise
    save(optim.steps)
    log.close()
    ema.copy_to(parameters)


def _with_ema(ema: EMAModel, parameters: list[nn.Parameter], call: Callable[[], dict[str, float]]) -> dict[str, float]:
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        return call()
    finally:
        ema.restore(parameters)


def _resume(module: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel, run: Run) -> int:
    found = checkpoint.newest(run.work) if run.resume else None
    if found is None:
        return 0
    tensors, state = found
    weights = {name.removeprefix("module."): value for name, value in tensors.items() if name.startswith("module.")}
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"The checkpoint in {run.work} is of another model: {str(error).splitlines()[1].strip()}") from None
    checkpoint.restore_optimizer(optimizer, tensors)
    ema.shadow_params = [tensors[f"ema.{index}"].to(shadow.device) for index, shadow in enumerate(ema.shadow_params)]
    ema.optimization_step = state["ema_steps"]
    return int(state["step"])


def _figures(losses: Losses) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in losses.items()}


class Progress:
    """A progress bar with ETA on stderr, and one JSON line for every step in log.jsonl."""

    def __init__(self, path: Path, steps: int, first: int) -> None:
        self.path = path
        if first and path.is_file():  # a resumed run rewrites what came after its checkpoint
            kept = [line for line in path.read_text().splitlines() if 0 < _step_of(line) <= first]
            with atomic_file(path) as part:
                part.write_text("".join(f"{line}\n" for line in kept))
        self.file = path.open("a" if first else "w")
        quiet = not sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=first, mininterval=30.0 if quiet else 0.5, unit="step", dynamic_ncols=not quiet)
        self.begin = time.monotonic()

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Log one step."""
        self._write(step, {"seconds": round(time.monotonic() - self.begin, 2), **figures})
        shown = " ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()

    def figures(self, step: int, figures: dict[str, float]) -> None:
        """Log validation figures and show them above the bar."""
        self._write(step, figures)
        self.file.flush()
        self.bar.write(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()), file=sys.stderr)

    def flush(self) -> None:
        """Put what was logged on the disk."""
        self.file.flush()

    def close(self) -> None:
        """Close the bar and the log."""
        self.bar.close()
        self.file.close()

    def _write(self, step: int, figures: dict[str, float]) -> None:
        rounded = {name: round(value, 6) for name, value in figures.items()}
        self.file.write(json.dumps({"step": step, **rounded}) + "\n")


def _step_of(line: str) -> int:
    """The step of a log line; 0 for the torn last line of a run that was killed."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0
