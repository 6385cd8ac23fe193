"""What encoding and decoding one picture costs: milliseconds and peak memory above the weights."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from latentpipe.utils.system import release_freed_memory
from latentpipe.vae.precision import NAMES
from latentpipe.vae.stage import VAEStage

MB = 2**20
WARM_UP = 1
REPEATS = 5
PEAKS = 3
STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@torch.no_grad()
def measure_cost(stage: VAEStage, height: int, width: int, repeats: int = REPEATS) -> dict[str, Any]:
    """Cost of one picture of `height` x `width` pixels, as the stage runs it.

    encode, decode  {"ms": median of `repeats` runs after a warm-up, "least", "most", "peak_mb": memory above the
                    weights and what else was there before, in MB of 2^20 bytes, None where it cannot be measured}
    and size_px (the side; where it is no square [height, width]), threads, device, dtype, repeats, and `memory`: how the
    memory was measured.

    Memory: on a GPU the allocator's peak; on Linux the peak of the resident set, reset for each run; elsewhere None. The
    least of three runs: what another thread of the process takes meanwhile only adds.
    The picture is a fixed random one: no layer's time depends on values.
    """
    images = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = images.to(stage.device, stage.dtype)
    latents = stage.encode(images)
    runs: dict[str, Callable[[], Any]] = {"encode": lambda: stage.encode(images)}
    if stage.decodes:
        runs["decode"] = lambda: stage.decode(latents)
    how = {"cuda": "peak of torch's allocator", "cpu": "peak resident set"}.get(stage.device.type, "")
    times = {name: _times(run, stage.device, repeats) for name, run in runs.items()}
    peaks = {name: _least_peak(run, stage.device) for name, run in runs.items()}  # after the warm-up, whose caches stay
    return {
        **{name: times[name] | {"peak_mb": peaks[name]} for name in runs},
        "size_px": height if height == width else [height, width],
        "threads": torch.get_num_threads(),
        "device": str(stage.device),
        "dtype": NAMES.get(stage.dtype, str(stage.dtype)),
        "repeats": repeats,
        "memory": how if None not in peaks.values() else "cannot be measured on this system",
    }


def _times(run: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, float]:
    taken = []
    for _ in range(WARM_UP + repeats):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        taken.append(1000 * (time.perf_counter() - start))
    taken = taken[WARM_UP:]
    return {"ms": statistics.median(taken), "least": min(taken), "most": max(taken)}


def _least_peak(run: Callable[[], Any], device: torch.device) -> float | None:
    found = [peak for peak in (_peak(run, device) for _ in range(PEAKS)) if peak is not None]
    return min(found) if found else None


def _peak(run: Callable[[], Any], device: torch.device) -> float | None:
    """MB that `run` takes at its peak above what was there before; None where that cannot be measured."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MB
    if device.type != "cpu":
        return None
    with release_freed_memory(device):  # what was freed before is given back, so that none of it hides what the run takes
        try:
            REFERENCES.write_text("5")  # resets the peak (proc(5), clear_refs)
            before = _resident("VmRSS")
            run()
            return max(0.0, _resident("VmHWM") - before) / MB
        except (OSError, LookupError):
            return None


def _resident(key: str) -> int:
    """Bytes of a line of /proc/self/status, which is in kB; LookupError where there is none."""
    found = re.search(rf"^{key}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise LookupError(key)
    return int(found[1]) * 1024


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
