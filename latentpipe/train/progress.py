"""What a run tells while it trains: a bar with ETA, log.jsonl, and TensorBoard files where they are wanted."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from latentpipe.utils.errors import UserError
from latentpipe.utils.io import atomic_file
from latentpipe.utils.reading import parse_json


class TrainingLog:
    """A progress bar with ETA on stderr, and one JSON line for every step in log.jsonl; `told` False: neither."""

    def __init__(self, path: Path, steps: int, first: int, tensorboard: bool = False, told: bool = True) -> None:
        self.path, self.steps, self.told = path, steps, told
        self.board = _board(path.parent / "tensorboard", first) if tensorboard and told else None
        self.begin = time.monotonic()
        self.warned: set[str] = set()
        self.bar: Any = None
        if told:
            self._open(first)

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Log one step."""
        if not self.told:
            return
        self._write(step, {"seconds": round(time.monotonic() - self.begin, 2), **figures})
        shown = " ".join(f"{name} {value:.4f}" for name, value in figures.items() if "." not in name)
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()

    def figures(self, step: int, figures: dict[str, float]) -> None:
        """Log validation figures and show them above the bar."""
        if not self.told:
            return
        self._write(step, figures)
        self.file.flush()
        shown = {name: value for name, value in figures.items() if "." not in name}
        if shown:
            self.say(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in shown.items()))

    def sheet(self, step: int, name: str, picture: Any) -> None:
        """Write a sheet (PIL) beside the log, and to TensorBoard."""
        if not self.told:
            return
        with atomic_file(self.path.parent / f"{name}-{step:06d}.png") as part:
            picture.save(part, format="PNG")
        if self.board is not None:
            import numpy as np

            self.board.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def say(self, sentence: str) -> None:
        """A sentence above the bar."""
        if self.told:
            self.bar.write(sentence, file=sys.stderr)

    def warn(self, step: int, sentence: str) -> None:
        """A sentence above the bar, once: the same one with other numbers is not repeated."""
        kind = re.sub(r"[\d.,]+", "", sentence)
        if kind not in self.warned:
            self.warned.add(kind)
            self.say(f"step {step}: {sentence}")

    def rewind(self, step: int) -> None:
        """Forget what came after `step`."""
        if self.told:
            self.bar.close()
            self.file.close()
            self._open(step)

    def flush(self) -> None:
        """Put what was logged on the disk."""
        if self.told:
            self.file.flush()
            os.fsync(self.file.fileno())
        if self.board is not None:
            self.board.flush()

    def close(self) -> None:
        """Close the bar and the log."""
        if self.told:
            self.bar.close()
            self.file.close()
        if self.board is not None:
            self.board.close()

    def _open(self, first: int) -> None:
        if first and self.path.is_file():  # a resumed run rewrites what came after its checkpoint
            with self.path.open() as log, atomic_file(self.path) as part, part.open("w") as kept:
                for line in log:
                    if 0 < _step_of(line) <= first:
                        kept.write(f"{line.rstrip()}\n")
        self.file = self.path.open("a" if first else "w")
        quiet = not sys.stderr.isatty()
        self.bar = tqdm(total=self.steps, initial=first, mininterval=30.0 if quiet else 0.5, unit="step", dynamic_ncols=not quiet)

    def _write(self, step: int, figures: dict[str, float]) -> None:
        rounded = {name: round(value, 6) if math.isfinite(value) else None for name, value in figures.items()}
        self.file.write(json.dumps({"step": step, **rounded}) + "\n")
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)


def _board(folder: Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("run.tensorboard needs the tensorboard package: pip install 'latentpipe[train]'.") from None
    # what an earlier process wrote from this step on is not shown: it was lost, and comes again
    return SummaryWriter(str(folder), purge_step=first + 1)


def _step_of(line: str) -> int:
    """The step of a log line; 0 for the torn last line of a run that was killed."""
    try:
        return int(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0
