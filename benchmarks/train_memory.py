"""What train-vae keeps in memory, and how soon it starts: python benchmarks/train_memory.py [--steps 10000] [--folder-files N]

memory  A tiny model trains for 10,000 steps, with its checkpoints and sheets as usual. After every 50th step the resident
        set of the process is read (/proc/self/statm). It is drawn against the steps (memory.png, needs matplotlib) and
        written down (memory.json): is the end above step 1,000?
start   Seconds from the start of `latentpipe train-vae` to the first step in its log, for a folder of 100,000 pictures and for
        one of 16, in fresh processes that take turns. The files are 8 px PNGs that were just made (hard links of 16), so the
        disk is not measured.

--steps 0 leaves the first part out, --folder-files 0 the second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentpipe.train.config import Crops, Parts, PictureData, TrainVAE, VAERun, VAEShape, dump

EVERY = 50  # steps between two samples
SETTLED = 1000  # the step after which memory should not grow
DISTINCT = 16  # picture files; the others are links to them


def tiny(pictures: Path, work: Path, steps: int, size_px: int, save_every: int) -> TrainVAE:
    """A config of the smallest model that is one."""
    return TrainVAE(
        data=PictureData(train=pictures, read_size_px=size_px),
        run=VAERun(out=work / "vae", work=work / "work", save_every_steps=save_every),
        optim=Parts(steps=steps, batch_size=4),
        model=VAEShape(blocks=(8, 16)),
        crops=Crops(size_px=size_px),
    )


def fill(folder: Path, files: int, size_px: int) -> Path:
    """A folder of so many pictures of noise."""
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(0)
    for index in range(files):
        path = folder / f"{index:06d}.png"
        if index < DISTINCT:
            Image.fromarray(numbers.integers(0, 256, (size_px, size_px, 3), np.uint8)).save(path)
        else:
            os.link(folder / f"{index % DISTINCT:06d}.png", path)
    return folder


def resident_mb() -> float:
    """The resident set of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def watch(steps: int) -> tuple[list[int], list[float]]:
    """Steps, and the resident set in MB after each of them, of one training in this process."""
    from latentpipe.train.progress import TrainingLog
    from latentpipe.train.vae.train import train_vae

    at: list[int] = []
    resident: list[float] = []
    logged = TrainingLog.step

    def step(log: TrainingLog, number: int, figures: dict[str, float]) -> None:
        logged(log, number, figures)
        if number % EVERY == 0:
            at.append(number)
            resident.append(resident_mb())

    TrainingLog.step = step  # type: ignore[method-assign, assignment]
    try:
        with tempfile.TemporaryDirectory() as place, open(os.devnull, "w") as nowhere:
            work = Path(place)
            config = tiny(fill(work / "pictures", DISTINCT, 16), work, steps, 16, 250)
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                train_vae(config)
    finally:
        TrainingLog.step = logged  # type: ignore[method-assign]
    return at, resident


def memory(steps: int, out: Path) -> None:
    """The first part: measure, print, write, draw."""
    import torch

    at, resident = watch(steps)
    settled = next((index for index, step in enumerate(at) if step >= min(SETTLED, steps // 2)), 0)
    growth, late = resident[-1] - resident[settled], resident[-1] - resident[(len(at) - 1) // 2]
    sentence = f"step {at[settled]:,}: {resident[settled]:,.1f} MB, step {at[-1]:,}: {resident[-1]:,.1f} MB, {growth:+.1f} MB"
    print(f"{sentence}, {late:+.1f} MB of it since step {at[(len(at) - 1) // 2]:,}; at most {max(resident):,.1f} MB")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    found: dict[str, Any] = {"from_step": at[settled], "to_step": at[-1], "growth_mb": round(growth, 3)}
    found |= {"second_half_mb": round(late, 3), "torch": torch.__version__, "threads": torch.get_num_threads()}
    found |= {"steps": at, "resident_mb": [round(value, 3) for value in resident]}
    (out / "memory.json").write_text(json.dumps(found) + "\n")
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("The plot needs matplotlib: pip install matplotlib, then run this again.")
        return
    matplotlib.use("Agg")
    draw(out / "memory.png", at, resident, settled)


def draw(path: Path, at: list[int], resident: list[float], settled: int) -> None:
    """The picture: all memory from zero, and beside it what was added since step 1,000."""
    from matplotlib import pyplot as plt

    growth = resident[-1] - resident[settled]
    figure, (whole, added) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharex=True)
    whole.plot(at, resident, color="#0b3c5d", linewidth=1.8)
    whole.set(title="resident memory, MB", ylim=(0, max(resident) * 1.15))
    since = [value - resident[settled] for value in resident]
    added.plot(at, since, color="#0b3c5d", linewidth=1.2)
    added.axhline(0, color="#555555", linewidth=0.8)
    added.plot([at[settled], at[-1]], [0, growth], linestyle="", marker="o", color="#d9822b", markersize=6, zorder=3)
    added.annotate(f"{growth:+.1f} MB", (at[-1], growth), (-6, 10), textcoords="offset points", ha="right", color="#9a5a12")
    added.set(title=f"the same, less that of step {at[settled]:,}, MB")
    low, high = min(since[settled:]), max(since[settled:])
    room = max(1.0, high - low)
    added.set_ylim(low - 0.3 * room, high + 0.4 * room)
    for axis in (whole, added):
        axis.axvline(at[settled], color="#d9822b", linestyle=(0, (4, 3)), linewidth=0.9)
        axis.set(xlabel="step", xlim=(0, at[-1] * 1.02))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.grid(alpha=0.2, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    late = f"{resident[-1] - resident[(len(at) - 1) // 2]:+.1f} MB of it since step {at[(len(at) - 1) // 2]:,}"
    figure.suptitle(f"train-vae for {at[-1]:,} steps: {growth:+.1f} MB between step {at[settled]:,} and the end, {late}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def first_step_seconds(pictures: Path) -> float:
    """From the start of a process of its own to the first line of its log, which a checkpoint after each step flushes."""
    with tempfile.TemporaryDirectory() as place, open(Path(place) / "said", "w+") as said:
        config = tiny(pictures, Path(place), 1000, 8, 1)
        file, log = Path(place) / "config.yaml", config.run.work / "log.jsonl"
        file.write_text(dump(config))
        command = [sys.executable, "-m", "latentpipe", "train-vae", str(file)]
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            while not (log.is_file() and log.stat().st_size):
                if process.poll() is not None:
                    said.seek(0)
                    raise SystemExit(f"train-vae ended before its first step:\n{said.read()}")
                time.sleep(0.005)
            return time.perf_counter() - begin
        finally:
            process.terminate()
            process.wait()


def start(files: int, runs: int) -> None:
    """The second part: measure and print."""
    with tempfile.TemporaryDirectory() as place:
        sizes = {files: fill(Path(place) / "many", files, 8), DISTINCT: fill(Path(place) / "few", DISTINCT, 8)}
        first_step_seconds(sizes[DISTINCT])  # files of Python and torch into the disk's cache
        found: dict[int, list[float]] = {count: [] for count in sizes}
        for _ in range(runs):
            for count, folder in sizes.items():
                found[count].append(first_step_seconds(folder))
    for count, values in found.items():
        seconds = f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"
        print(f"folder of {count:,} pictures: first step logged after {seconds}, median of {runs}")
    more = [many - few for many, few in zip(found[files], found[DISTINCT], strict=True)]
    print(f"the larger folder takes {statistics.median(more):.2f} s more ({min(more):.2f} to {max(more):.2f})")


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help=f"at least {2 * EVERY}, or 0")
    parser.add_argument("--folder-files", type=int, default=100_000, help=f"more than {DISTINCT}, or 0")
    parser.add_argument("--runs", type=int, default=3, help="processes for each of the two folders")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "training", help="folder of memory.json and .png")
    args = parser.parse_args()
    if 0 < args.steps < 2 * EVERY or 0 < args.folder_files <= DISTINCT:
        parser.error(f"--steps is 0 or at least {2 * EVERY}, --folder-files 0 or more than {DISTINCT}")
    if args.steps and not Path("/proc/self/statm").is_file():
        parser.error("the memory part reads /proc/self/statm, which this system does not have; give --steps 0")
    warnings.simplefilter("ignore")
    if args.folder_files:
        start(args.folder_files, args.runs)
    if args.steps:
        args.out.mkdir(parents=True, exist_ok=True)
        memory(args.steps, args.out)


if __name__ == "__main__":
    main()
