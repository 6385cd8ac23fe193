"""How fast pictures, commands, the page and training are: python benchmarks/speed.py [ROW ...] [--runs 5] [--before FOLDER]

Everything is a ratio: two things take turns in one run, each turn gives one ratio, and the table shows the median with its
95 % interval (bootstrap over the turns). Stock diffusers draws with the same weights, in the same process.

draw      the default picture against stock diffusers at 50 steps, and at 20 steps, both at guidance 3 with the full decoder;
          `turbo` and the tiny decoder have rows of their own where the model has them
batch     a picture of a batch of 16 against one that is drawn alone
cold      `latentpipe generate` to the file against `python -c "import torch"`; seconds of `latentpipe --help`
page      `latentpipe ui` to its first answer and to its first picture, against `import gradio`
memory    peak memory of one picture above that of `import torch` (MB)
train     pictures a second of train-vae and train-denoiser against another checkout (--before, with a .venv of its own)

--scores FILE  JSON of names to prompt scores, such as {"stock 50": 0.93, "default": 0.92}; seconds a picture of the row
               `draw` are drawn against them into speed.png (needs matplotlib)
Processor seconds of a turn are measured too, as the second ratio: they say what a busy machine hides.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROMPT = "red apple"
Time = tuple[float, float]  # seconds that passed, seconds of processors
Call = Callable[[], object]


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median, and the 2.5th and 97.5th percentile of medians of 2,000 samples drawn with replacement."""
    draws = random.Random(0)
    medians = sorted(statistics.median(draws.choices(values, k=len(values))) for _ in range(2000))
    return statistics.median(values), medians[49], medians[1949]


def row(name: str, ratios: Sequence[tuple[float, ...]], note: str = "") -> None:
    """Print one line of the table."""
    cells = ["{:.2f} ({:.2f} to {:.2f})".format(*interval(list(column))) for column in zip(*ratios, strict=True)]
    print(f"| {name} | {cells[0]} | {cells[1] if len(cells) > 1 else ''} | {len(ratios)} | {note} |", flush=True)


def timed(call: Call) -> Time:
    """Seconds of a call in this process."""
    begin, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - begin, time.process_time() - used


def run(command: list[str], root: Path = ROOT) -> Time:
    """Seconds of a command, from its start to its end."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([python(root), *command], cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def python(root: Path) -> str:
    """The interpreter of a checkout."""
    own = root / ".venv" / "bin" / "python"
    return str(own) if own.exists() else sys.executable


def turns(runs: int, *calls: Callable[[], Time]) -> list[list[Time]]:
    """What each call takes, in turns, after one of each that is not counted."""
    for call in calls:
        call()
    return [[call() for call in calls] for _ in range(runs)]


def ratio(above: Time, below: Time) -> Time:
    """One time over another, for both clocks."""
    return above[0] / below[0], above[1] / below[1]


# --- rows ---------------------------------------------------------------------------------------------------


def pipelines() -> tuple[dict[str, Call], dict[str, Call]]:
    """Ways to draw a picture: ours by name, and stock diffusers'."""
    import torch
    from diffusers import StableDiffusionPipeline

    from latentpipe import LatentPipeline
    from latentpipe.checkpoints.registry import available, find_model

    stock = StableDiffusionPipeline.from_pretrained(find_model("emoji"))
    stock.set_progress_bar_config(disable=True)

    def theirs(steps: int) -> Call:
        return lambda: stock(PROMPT, num_inference_steps=steps, guidance_scale=3.0, generator=torch.Generator().manual_seed(1))

    pipe = LatentPipeline.from_pretrained()
    ours: dict[str, Call] = {"default": lambda: pipe(PROMPT, seed=1)}
    if "turbo" in inspect.signature(LatentPipeline.from_pretrained).parameters:
        turbo = LatentPipeline.from_pretrained(turbo=True)  # type: ignore[call-arg]
        ours["turbo"] = lambda: turbo(PROMPT, seed=1)
    if "emoji-tiny" in available("vae"):
        tiny = LatentPipeline.from_pretrained(vae="emoji-tiny")
        ours["tiny decoder"] = lambda: tiny(PROMPT, seed=1)
    return ours, {"stock 50": theirs(50), "stock 20": theirs(20)}


def measure_draw(runs: int, scores: dict[str, float]) -> None:
    """Default, turbo and tiny decoder against both ways of stock diffusers."""
    ours, theirs = pipelines()
    calls = {**ours, **theirs}
    found = turns(runs, *((lambda call=call: timed(call)) for call in calls.values()))
    columns = {name: [each[place] for each in found] for place, name in enumerate(calls)}
    for name in ours:
        for other in theirs:
            pairs = zip(columns[other], columns[name], strict=True)
            row(f"{other} over {name}, times as fast", [ratio(stock, own) for stock, own in pairs])
    seconds = {name: statistics.median(one[0] for one in times) for name, times in columns.items()}
    print("seconds a picture: " + ", ".join(f"{name} {value:.3f}" for name, value in seconds.items()), file=sys.stderr)
    if scores:
        draw_scores({name: (seconds[name], scores[name]) for name in seconds if name in scores})


def draw_scores(points: dict[str, tuple[float, float]]) -> None:
    """Seconds a picture against prompt score, as speed.png."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, (seconds, score) in points.items():
        axes.plot(seconds, score, "o")
        axes.annotate(name, (seconds, score), xytext=(5, 5), textcoords="offset points")
    axes.set(xscale="log", xlabel="seconds a picture", ylabel="prompt score")
    figure.savefig(Path(__file__).with_name("speed.png"), dpi=120)


def measure_batch(runs: int) -> None:
    """A picture of sixteen against one alone."""
    from latentpipe import LatentPipeline

    pipe = LatentPipeline.from_pretrained()
    found = turns(runs, lambda: timed(lambda: pipe(PROMPT, n=16, seed=1)), lambda: timed(lambda: pipe(PROMPT, seed=1)))
    row("picture of 16 / alone", [ratio((many[0] / 16, many[1] / 16), one) for many, one in found])


def measure_cold(runs: int) -> None:
    """Command to file, against importing torch; and --help."""
    with tempfile.TemporaryDirectory() as out:
        generate = ["-m", "latentpipe", "generate", PROMPT, "--seed", "7", "--out", out]
        found = turns(runs, lambda: run(generate), lambda: run(["-c", "import torch"]))
    seconds = statistics.median(one[0][0] for one in found)
    row("cold start / import torch", [ratio(ours, torch) for ours, torch in found], f"{seconds:.1f} s")
    row("--help, seconds", [told for (told,) in turns(runs, lambda: run(["-m", "latentpipe", "--help"]))])


def measure_page(runs: int) -> None:
    """The page's first answer and first picture, against importing gradio."""
    answers, drawings = [], []
    run(["-c", "import gradio"])
    for _ in range(runs):
        gradio = run(["-c", "import gradio"])[0]
        first, picture = page()
        answers.append((first / gradio,))
        drawings.append((picture / gradio,))
    row("page: first answer / import gradio", answers)
    row("page: first picture / import gradio", drawings)


def page() -> tuple[float, float]:
    """Seconds from the command to the page, and to a picture that was asked for as soon as the page was there."""
    begin = time.perf_counter()
    with served() as address:
        with urllib.request.urlopen(address, timeout=60) as answer:
            answer.read()
        first = time.perf_counter() - begin
        from gradio_client import Client

        client = Client(address, verbose=False)
        wasted = time.perf_counter() - begin - first  # importing the client is not the server's time
        client.predict(prompt=PROMPT, seed=7, api_name="/txt2img")
        return first, time.perf_counter() - begin - wasted


@contextmanager
def served() -> Iterator[str]:
    """`latentpipe ui` on a free port; its address, once it has said so."""
    command = [python(ROOT), "-m", "latentpipe", "ui", "--no-save"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if "http" in line)
            yield next(word for word in line.split() if word.startswith("http"))
        finally:
            process.send_signal(signal.SIGTERM)


PEAK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"


def measure_memory(runs: int) -> None:
    """Peak memory of one picture above importing torch."""
    draw = "import sys; sys.argv[1:] = {arguments!r}\nfrom latentpipe.utils.deferred_imports import put_off\nput_off()\n"
    draw += "from latentpipe.cli.app import main\nmain()\n"
    with tempfile.TemporaryDirectory() as out:
        arguments = ["generate", PROMPT, "--seed", "7", "--out", f"{out}/one.png"]
        codes = [draw.format(arguments=arguments) + PEAK, "import torch\n" + PEAK]
        found = [[_printed(code) for code in codes] for _ in range(runs)]
    row("peak memory above import torch, MB", [(ours - torch,) for ours, torch in found])


def _printed(code: str) -> float:
    done = subprocess.run([python(ROOT), "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure_train(runs: int, before: Path, steps: int) -> None:
    """Pictures a second of both trainers, here over there."""
    roots = (ROOT, before.resolve())
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run(["-m", "latentpipe", "emoji", "--out", str(work / "emoji")])
        data = [str(next((work / "emoji").rglob("*.png")).parent)]
        cache = ["-m", "latentpipe", "encode", *data, "--size", "64", "--out", str(work / "cache.safetensors")]
        run(cache)
        verbs = {
            "train-vae": ["configs/emoji-vae.yaml", "--data.train", *data],
            "train-denoiser": ["configs/emoji-denoiser.yaml", "--data.cache", str(work / "cache.safetensors")],
        }
        for verb, words in verbs.items():
            found = [[rate(root, verb, words, steps) for root in roots] for _ in range(runs)]
            row(f"{verb}, pictures a second here / before", [(now / then,) for now, then in found])


def rate(root: Path, verb: str, words: list[str], steps: int) -> float:
    """Steps a second between the fifth and the last one of a short run, by its log."""
    with tempfile.TemporaryDirectory() as folder:
        places = ["--run.work", f"{folder}/work", "--run.out", f"{folder}/out", "--optim.steps", str(steps)]
        subprocess.run(
            [python(root), "-m", "latentpipe", verb, *words, *places],
            cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        lines = [json.loads(line) for line in Path(folder, "work", "log.jsonl").read_text().splitlines()]
    found = [(line["step"], line["seconds"]) for line in lines if "gradient_norm" in line and line["step"] >= 5]
    return (found[-1][0] - found[0][0]) / (found[-1][1] - found[0][1])


def main() -> None:
    """Measure what is asked for and print the table."""
    rows = ("draw", "batch", "cold", "page", "memory", "train")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*rows, []], default=[], help="left out: all of them")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--before", type=Path, help="another checkout, for the row train")
    parser.add_argument("--steps", type=int, default=30, help="of a training run")
    parser.add_argument("--scores", type=Path)
    given = parser.parse_args()
    scores: dict[str, Any] = json.loads(given.scores.read_text()) if given.scores else {}
    print("| what | by the clock (95 %) | by processor time (95 %) | turns | |\n|---|---|---|---|---|")
    for name in given.rows or rows:
        if name == "draw":
            measure_draw(given.runs, scores)
        elif name == "train" and given.before is not None:
            measure_train(given.runs, given.before, given.steps)
        elif name != "train":
            {"batch": measure_batch, "cold": measure_cold, "page": measure_page, "memory": measure_memory}[name](given.runs)
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"\nload average {load}; OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}", file=sys.stderr)


if __name__ == "__main__":
    main()
