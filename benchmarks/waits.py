"""How long a person waits, here and in another checkout: python benchmarks/waits.py --before FOLDER [--repeats 3]

Each command runs in turns in both checkouts, each with the Python of its own .venv; the table gives the medians of two times:
until the first sign on the terminal, and until the process has ended. `--limit` seconds end a command that takes longer; its
times are then bounds.
"""

from __future__ import annotations

import argparse
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "a misspelt verb": ["genrate", "red apple"],
    "a misspelt flag": ["generate", "red apple", "--sed", "7"],
    "a value that cannot be": ["generate", "red apple", "--steps", "0"],
    "a model that is not there": ["generate", "red apple", "--model", "emojo"],
    "--help": ["--help"],
    "ls": ["ls"],
    "generate, one picture": ["generate", "red apple", "--seed", "7", "--out", "OUT"],
    "swap with a VAE of another shape": ["swap", "--vae", "emoji-vector"],
    "ls vae --fits": ["ls", "vae", "--fits", "emoji"],
    "evaluate vae, 12 pictures": ["evaluate", "vae", "emoji", "--images", "IMAGES", "--size", "256"],
}


def timed(root: Path, command: list[str], limit_s: float, work: Path) -> tuple[float, float]:
    """Seconds until the first output and until the end."""
    swapped = {"OUT": str(work / "out"), "IMAGES": str(work / "images")}
    arguments = [str(root / ".venv" / "bin" / "python"), "-m", "latentpipe", *(swapped.get(word, word) for word in command)]
    environment = {**os.environ, "LATENTPIPE_HOME": str(work / "home"), "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
    begin, first = time.monotonic(), None
    with subprocess.Popen(arguments, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        pipe = process.stdout.fileno()
        while (left := limit_s - (time.monotonic() - begin)) > 0:
            if select.select([pipe], [], [], left)[0]:
                if not os.read(pipe, 65536):
                    break
                first = first or time.monotonic() - begin
        else:
            process.kill()
        process.wait()
    end = time.monotonic() - begin
    return first or end, end


def pictures(folder: Path) -> None:
    """Twelve pictures of 256 px made by code."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    for index in range(12):
        noise = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{index}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="another checkout with a .venv of its own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=300.0)
    given = parser.parse_args()
    print("| wait | before: first sign / end (s) | now: first sign / end (s) |\n|---|---|---|")
    for name, command in COMMANDS.items():
        times: dict[Path, list[tuple[float, float]]] = {given.before.resolve(): [], ROOT: []}
        for _ in range(given.repeats):
            for root, found in times.items():
                if any(end >= given.limit for _, end in found):
                    continue
                with tempfile.TemporaryDirectory() as work:
                    pictures(Path(work) / "images")
                    found.append(timed(root, command, given.limit, Path(work)))
        cells = [
            " / ".join(f"{statistics.median(column):.1f}" for column in zip(*found, strict=True)) for found in times.values()
        ]
        print(f"| {name} (`latentpipe {' '.join(command)}`) | {cells[0]} | {cells[1]} |", flush=True)
    print(f"\nload average {', '.join(f'{load:.1f}' for load in os.getloadavg())}", file=sys.stderr)


if __name__ == "__main__":
    main()
