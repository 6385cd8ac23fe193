"""How long a picture takes: python benchmarks/generate.py [--runs 5]

Prints medians: `latentpipe --help`, cold start to the file, and one picture with the model loaded at default settings,
beside stock diffusers on the same weights in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any


def median_seconds(call: Callable[[], object], runs: int) -> float:
    """Median wall time of `runs` calls after one that is not counted."""
    call()
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    command = [sys.executable, "-m", "latentpipe"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}
    with tempfile.TemporaryDirectory() as out:
        print(f"latentpipe --help           {median_seconds(lambda: subprocess.run([*command, '--help'], **quiet), runs):7.2f} s")
        cold = median_seconds(lambda: subprocess.run([*command, "generate", "red apple", "--out", out], **quiet), min(runs, 3))
        print(f"generate, cold start        {cold:7.2f} s")

    import torch
    from diffusers import StableDiffusionPipeline

    from latentpipe import LatentPipeline
    from latentpipe.checkpoints.registry import find_model
    from latentpipe.utils.defaults import GUIDANCE, STEPS

    pipe = LatentPipeline.from_pretrained()
    stock = StableDiffusionPipeline.from_pretrained(find_model("emoji"))
    stock.set_progress_bar_config(disable=True)
    defaults = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    ours = median_seconds(lambda: pipe("red apple", seed=1), runs)
    theirs = median_seconds(lambda: stock("red apple", generator=torch.Generator().manual_seed(1), **defaults), runs)
    batch = median_seconds(lambda: pipe("red apple", n=16, seed=1), min(runs, 3)) / 16
    print(f"one picture, model loaded   {ours:7.2f} s")
    print(f"  stock diffusers           {theirs:7.2f} s   ratio {ours / theirs:.2f}")
    print(f"  in a batch of 16          {batch:7.2f} s")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
