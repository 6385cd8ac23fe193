"""latentpipe grid: an X/Y plot on one sheet, with a bar that Ctrl-C stops."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latentpipe.cli.argument_checks import size_of, weighted
from latentpipe.cli.argument_parser import Positional
from latentpipe.cli.generate import Stop, stop_on_interrupt
from latentpipe.utils.defaults import GUIDANCE, STEPS
from latentpipe.utils.setting_names import in_python


@dataclass(frozen=True)
class Grid:
    """Draw a picture for each pair of values of two axes on one sheet (at most 100), and print its path.

    An axis is seed, steps, guidance, vae, lora:NAME (its weight), scheduler or prompt with its values: seed=1,2,3 or
    guidance=1:9:2 (first:last:step). prompt=red,green,blue: the first one is the text in the prompt that the others take the
    place of. vae=built-in,emoji-decoder-ft: built-in is the model's own.
    """

    prompt: Positional[str]
    """What to draw."""
    x: str
    """What varies from column to column, such as seed=1,2,3."""
    y: str | None = None
    """What varies from row to row; left out: one row."""
    out: Path = Path("grid.png")
    """The PNG file to write; it carries what is needed to draw it again."""
    seed: int | None = None
    """0 to 4294967295; left out: a random one, the same for all."""
    model: str = "emoji"
    """Name ('latentpipe ls') or folder of a model."""
    vae: str | None = None
    """Name, folder or file of another VAE to decode with."""
    negative: str = ""
    """What the pictures should not show."""
    steps: int = STEPS
    """Denoising steps."""
    guidance: float = GUIDANCE
    """Classifier-free guidance; 1 turns it off."""
    scheduler: Literal["dpm++", "ddim", "euler", "unipc"] | None = None
    """Left out: the model's own."""
    size: str | None = None
    """Side or WIDTHxHEIGHT of each picture in pixels; left out: what the model was trained at."""
    lora: tuple[str, ...] = ()
    """Names of installed LoRA that are on in all pictures, each with its weight: flat=0.7."""
    lora_partial: bool = False
    """Take LoRA files that fit in part; what is left out is told."""
    device: str | None = None
    """cpu, cuda or mps; left out: the best one present."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the weights."""


def run_grid(options: Grid) -> None:
    """Draw, save and print the path; KeyboardInterrupt (`Terminated`) after a stopped plot was saved."""
    names = ("seed", "vae", "negative", "steps", "guidance", "scheduler", "lora_partial")
    settings = in_python({name: getattr(options, name) for name in names})
    settings |= {"size": size_of(options.size), "loras": dict(weighted(text) for text in options.lora)}
    from latentpipe.engine.pipeline_cache import PipelineCache
    from latentpipe.engine.xy_grid.axes import read_axis
    from latentpipe.engine.xy_grid.plot import plot
    from latentpipe.utils.progress import ProgressCallback

    axes = read_axis(options.x), read_axis(options.y) if options.y is not None else None
    models = PipelineCache(device=options.device, dtype=options.dtype)

    def work(report: ProgressCallback) -> Any:
        return plot(lambda vae: models.open(options.model, vae), options.prompt, *axes, report=report, **settings)

    found, stop = _watch(work)
    print(found.save(options.out))
    stop.heed()


def _watch(work: Any) -> tuple[Any, Stop]:
    """Show a plot's steps; the first Ctrl-C (or SIGTERM) stops it and keeps the pictures that are done."""
    from tqdm import tqdm

    from latentpipe.engine.jobs import Cancelled, Done, Progress, run_job

    with stop_on_interrupt() as stop, tqdm(unit="step", disable=None, file=sys.stderr) as bar:
        try:
            for event in run_job(work, stop.token):
                if isinstance(event, Done):
                    return event.result, stop
                if isinstance(event, Progress):
                    bar.total = event.total
                    bar.set_description(event.what, refresh=False)
                    bar.update(event.done - bar.n)
        except Cancelled:
            print("stopped before the first picture was done; nothing was written", file=sys.stderr)
            stop.heed()
            raise
    raise RuntimeError("the job ended without a result")
