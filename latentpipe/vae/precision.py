"""The precision ladder: fp16 -> bf16 -> fp32 until every value is finite, and what is remembered of it.

fp16 ends at 65504; a VAE whose activations pass that gives NaN, a black picture, without an error.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from latentpipe.utils.errors import LatentpipeWarning, UserError, short
from latentpipe.utils.io import atomic_file, content_hash, home, read_json
from latentpipe.vae.offload import copied, device_of, dtype_of, in_layers, weights_of

Direction = Literal["encode", "decode"]
Run = Callable[[Any, torch.Tensor], Any]
LADDER = (torch.float16, torch.bfloat16, torch.float32)
NAMES = dict(zip(LADDER, ("fp16", "bf16", "fp32"), strict=True))
MEMORY_FILE = "precision.json"  # in files.home(); only a hint


@dataclass(frozen=True)
class DtypeFallback:
    """The dtype that was finite, and the first block that was not in the dtype asked for."""

    dtype: torch.dtype
    block: str


@dataclass
class _State:
    """What is kept with one VAE object for as long as its weights stay as they are."""

    stamp: tuple[Any, ...]
    digest: str = ""
    copies: dict[torch.dtype, nn.Module] = field(default_factory=dict)
    climbs: dict[tuple[Direction, torch.dtype], DtypeFallback | None] = field(default_factory=dict)


_states: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()
_climbs: dict[str, DtypeFallback] = {}  # of this process, by hash/direction/dtype
_unchecked: ContextVar[bool] = ContextVar("unchecked", default=False)


def run_with_dtype_fallback(vae: Any, direction: Direction, run: Run, given: torch.Tensor) -> Any:
    """``run(vae, given)`` with every value finite, in the lowest dtype of the ladder that achieves it.

    vae      the autoencoder; it is never changed: a higher dtype runs on a copy, kept for as long as the VAE lives
    run      takes (autoencoder, input) and returns a tensor or a posterior (`parameters`, `mean`, `std`)
    given    images (B 3 H W) or raw latents (B C h w) in any dtype, on any device; `run` gets them in the
             autoencoder's own

    The result has the dtype of the plain run, or a wider one where its values would not fit. A climb is told once,
    as a warning that names the first block that overflowed, and remembered for the content hash of the weights. A VAE
    that is being trained is run as it is. UserError: `given` is not finite, or fp32 is not finite either.
    """
    device, asked = device_of(vae), _asked(vae)
    if _unchecked.get() or (vae.training and torch.is_grad_enabled()):
        return run(vae, given.to(device, dtype_of(vae)))
    state = _state(vae) if asked in LADDER[:-1] else _State(())
    known = _recall(vae, state, direction, asked)
    block = known.block if known else ""
    for dtype in _rungs(known.dtype if known else asked, device):
        model, guard = (vae, nullcontext()) if dtype == asked else _upcast(vae, state, dtype)
        prepared = given.to(device, dtype_of(model))
        with guard:
            result = run(model, prepared)
            if all_finite(_values(result)):
                if dtype != asked:
                    _remember(vae, state, direction, asked, DtypeFallback(dtype, block))
                return result if dtype == asked else _as_asked(result, asked)
            _check_given(direction, given)
            if not block or dtype == torch.float32:
                block = first_overflow(model, run, prepared) if all_finite(prepared) else "the input"
                _check_weights(model, block)
        state.copies.pop(dtype, None)
    raise UserError(
        f"This VAE cannot {direction}: {block} gives values that are not finite even in {_name(dtype)}, although the "
        f"{_noun(direction)} are finite (at most {short(float(given.abs().max()))} in size). Expected finite "
        f"values; check that the "
        f"{_noun(direction)} belong to this VAE and are in its range, and open the VAE from its file again."
    )


@contextmanager
def unchecked() -> Iterator[None]:
    """Within it, `run_with_dtype_fallback` runs once, in the VAE's own dtype, and checks nothing (proofs, benchmarks)."""
    token = _unchecked.set(True)
    try:
        yield
    finally:
        _unchecked.reset(token)


def all_finite(value: Any) -> bool:
    """Are all values of a tensor finite, or of all tensors in lists, tuples and mappings? One pass, no mask in memory."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point() or not value.numel():
            return True
        low, high = value.detach().aminmax()  # both are NaN where any value is
        return bool((low.isfinite() & high.isfinite()).item())
    if isinstance(value, Mapping):
        return all(all_finite(entry) for entry in value.values())
    return all(all_finite(entry) for entry in value) if isinstance(value, list | tuple) else True


def first_overflow(model: nn.Module, run: Run, given: torch.Tensor) -> str:
    """Run once more with hooks; the first module, by its name in `model`, with finite inputs and an output that is not.

    A module ends after its parts, so the smallest one is found: a convolution by itself, a residual add as its block.
    """
    names = {module: name for name, module in model.named_modules()}
    sound: list[bool] = []  # were the inputs finite, of every module that is running now
    found: list[str] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        sound.append(not found and all_finite((args, kwargs)))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if sound.pop() and not found and not all_finite(output):
            found.append(names[module])

    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in names]
    hooks += [module.register_forward_hook(after) for module in names]
    try:
        with torch.no_grad():
            run(model, given)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "an operation outside the modules"


def _asked(vae: nn.Module) -> torch.dtype:
    """The dtype that a plain run computes in."""
    device = device_of(vae).type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype_of(vae)


def _rungs(start: torch.dtype, device: torch.device) -> list[torch.dtype]:
    if start not in LADDER:
        return [start]
    rungs = LADDER[LADDER.index(start) :]
    slow = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return [dtype for dtype in rungs if dtype == start or not (slow and dtype == torch.bfloat16)]


def _upcast(vae: nn.Module, state: _State, dtype: torch.dtype) -> tuple[nn.Module, AbstractContextManager[Any]]:
    """The VAE in another dtype (itself where it has it, else its one kept copy), and a guard against autocast."""
    device = device_of(vae).type
    autocast = torch.is_autocast_enabled(device)
    guard: AbstractContextManager[Any] = torch.autocast(device, enabled=False) if autocast else nullcontext()
    if dtype_of(vae) == dtype:
        return vae, guard
    if dtype not in state.copies:
        state.copies[dtype] = copied(vae, dtype)
    for name, value in vars(vae).items():  # tiling and slicing may have been switched since
        if isinstance(value, bool | int | float):
            setattr(state.copies[dtype], name, value)
    return state.copies[dtype], guard


def _state(vae: nn.Module) -> _State:
    # hooks that move or cast single layers leave other tensors behind at every call; they are for inference alone
    tensors = () if in_layers(vae) else chain(vae.named_parameters(), vae.named_buffers())
    stamp = tuple((name, each.data_ptr(), 0 if each.is_inference() else each._version) for name, each in tensors)
    state = _states.get(vae)
    if state is None or state.stamp != stamp:  # trained or replaced weights: nothing that is known holds
        state = _states[vae] = _State(stamp)
    return state


def _key(vae: nn.Module, state: _State, direction: Direction, asked: torch.dtype) -> str:
    """What is remembered is found by this. The hash reads every weight: computed when needed, and once for a VAE."""
    state.digest = state.digest or content_hash(weights_of(vae))
    return f"{state.digest}/{direction}/{_name(asked)}"


def _recall(vae: nn.Module, state: _State, direction: Direction, asked: torch.dtype) -> DtypeFallback | None:
    if asked not in LADDER[:-1]:
        return None
    if (direction, asked) not in state.climbs:
        stored = _read() | _climbs
        climb = stored.get(_key(vae, state, direction, asked)) if stored else None
        state.climbs[direction, asked] = climb if climb and LADDER.index(climb.dtype) > LADDER.index(asked) else None
    return state.climbs[direction, asked]


def _remember(vae: nn.Module, state: _State, direction: Direction, asked: torch.dtype, climb: DtypeFallback) -> None:
    """Tell a climb once in a process, and keep it for this VAE object, this process and those to come."""
    key = _key(vae, state, direction, asked)
    state.climbs[direction, asked] = climb
    if _climbs.get(key) == climb:
        return
    _climbs[key] = climb
    rows = {name: {"dtype": NAMES[each.dtype], "block": each.block} for name, each in (_read() | _climbs).items()}
    with suppress(OSError), atomic_file(home() / MEMORY_FILE) as part:  # where it cannot be written, this process still knows
        part.write_text(json.dumps(rows, indent=2) + "\n")
    message = (
        f"{climb.block} of this VAE overflows in {_name(asked)} when it {direction}s, so it runs in {_name(climb.dtype)}. "
        "`latentpipe make-fp16-safe VAE --out DIR` writes a VAE that stays finite in fp16."
    )
    warnings.warn(LatentpipeWarning(message), stacklevel=4)


def _read() -> dict[str, DtypeFallback]:
    """What earlier processes found; nothing where the file is missing or damaged."""
    dtypes = {name: dtype for dtype, name in NAMES.items()}
    try:
        rows = read_json(home() / MEMORY_FILE)
        return {key: DtypeFallback(dtypes[row["dtype"]], str(row["block"])) for key, row in rows.items()}
    except (ValueError, KeyError, TypeError):
        return {}


def _values(result: Any) -> Any:
    """The tensors that a caller uses; a posterior's `var` may overflow where its `std` does not."""
    return result if isinstance(result, torch.Tensor) else (result.mean, result.std)


def _as_asked(result: Any, dtype: torch.dtype) -> Any:
    """The result in the dtype of the plain run, unless that makes it infinite."""
    if isinstance(result, torch.Tensor):
        cast = result.to(dtype)
    else:
        cast = type(result)(result.parameters.to(dtype), deterministic=result.deterministic)
    return cast if all_finite(_values(cast)) else result


def _check_given(direction: Direction, given: torch.Tensor) -> None:
    if all_finite(given):
        return
    bad = int((~given.isfinite()).sum())
    raise UserError(
        f"{bad:,} of the {given.numel():,} values of the {_noun(direction)} given to this VAE are not finite; expected finite "
        "values. The fault lies before the VAE: look at what made them."
    )


def _check_weights(model: nn.Module, block: str) -> None:
    """No dtype mends a weight that is NaN or infinite."""
    for name, weight in weights_of(model).items():
        if name.rpartition(".")[0] == block and not all_finite(weight):
            raise UserError(f"{name} of this VAE is not finite; expected finite weights. Fetch or export the VAE again.")


def _name(dtype: torch.dtype) -> str:
    return NAMES.get(dtype, str(dtype))


def _noun(direction: Direction) -> str:
    return "images" if direction == "encode" else "latents"
