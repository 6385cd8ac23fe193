"""The interface: python benchmarks/ui.py start | overhead | load [--clients 50] [--seconds 180] [--workers 2 --kill-every 20]

start     seconds from the command to a page that answers and to a model that is loaded, and from the call of the page to a prompt
          that can be written in headless Chromium; every run has a new server, its first page has an empty browser cache
overhead  seconds of /txt2img through gradio_client beside `Engine.run` of the same prompt, steps and seed in this process, in
          turns; and of `Engine.run` with previews beside without. Medians and 95 % bootstrap intervals of paired differences
load      many clients at once that wait, stop, cancel or vanish: see ui_load.py; ends with 1 where anything went wrong. With
          --workers the page draws in so many processes, and every --kill-every seconds one of them is killed

Writes ui.json.

Needs chromium (Debian) for start, gradio for all. Everything stays on 127.0.0.1. The load averages beside the figures say how
quiet the machine was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "ui"))

PROMPT = "red apple"
FLOORS = {"page_s": 12.0, "usable_s": 2.0, "request_s": 0.15, "long_job": 0.05, "previews": 0.03}
JOBS = {"single": (20, 40), "long": (200, 20)}
"""Steps, and how often in turns; the long one takes over 3 s."""
PREVIEWS = (200, 20)
RESAMPLES = 10_000


@contextmanager
def server(*options: str) -> Iterator[tuple[int, str, Path]]:
    """A server with a user's folder of its own: process number, address, folder."""
    from served import start

    with tempfile.TemporaryDirectory(prefix="latentpipe-bench-") as home:
        process, address = start("--no-save", *options, home=Path(home))
        try:
            yield process.pid, address, Path(home)
        finally:
            process.terminate()
            process.wait(20)


def health(address: str) -> dict[str, Any]:
    """What /health says, without a session."""
    import urllib.request

    body = urllib.request.Request(f"{address}/gradio_api/run/health", b'{"data": []}', {"Content-Type": "application/json"})
    with urllib.request.urlopen(body, timeout=60) as answer:
        return json.load(answer)["data"][0]


def wait_ready(address: str) -> None:
    """Return when the model is loaded."""
    while health(address)["status"] != "ready":
        time.sleep(0.1)


# --- start --------------------------------------------------------------------------------------------------


def measure_start(runs: int) -> dict[str, Any]:
    """Medians over `runs` servers, each run's values beside them."""
    from playwright.sync_api import sync_playwright
    from served import CHROMIUM, FLAGS

    rows: dict[str, list[float]] = {"page_s": [], "ready_s": [], "usable_s": [], "usable_again_s": [], "load_average": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for _ in range(runs):
            rows["load_average"].append(os.getloadavg()[0])
            begin = time.perf_counter()
            with server() as (_, address, _home):
                rows["page_s"].append(time.perf_counter() - begin)
                wait_ready(address)
                rows["ready_s"].append(time.perf_counter() - begin)
                first, again = usable(browser, address)
                rows["usable_s"].append(first)
                rows["usable_again_s"].append(again)
        browser.close()
    return {name: {"median": statistics.median(values), "runs": values} for name, values in rows.items()}


def usable(browser: Any, address: str) -> tuple[float, float]:
    """Seconds from the call of the page to a prompt that can be written, with an empty cache and once more with a filled one."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, times = context.new_page(), []
    for _ in range(2):
        begin = time.perf_counter()
        page.goto(address, wait_until="commit")
        field = page.locator("#lp-prompt textarea")
        field.fill(PROMPT)  # waits until it is there, visible, enabled and editable
        assert field.input_value() == PROMPT
        times.append(time.perf_counter() - begin)
    context.close()
    return times[0], times[1]


# --- overhead -----------------------------------------------------------------------------------------------


def measure_overhead() -> dict[str, Any]:
    """Requests beside the engine, previews beside none, in turns."""
    from gradio_client import Client

    from latentpipe import Engine, LatentPipeline

    pipe = LatentPipeline.from_pretrained()

    def engine(steps: int, seed: int, previews: bool = False) -> None:
        for _ in Engine(pipe).run(PROMPT, seed=seed, num_inference_steps=steps, previews=previews):
            pass

    with server() as (_, address, _home):
        wait_ready(address)
        client = Client(address, verbose=False)

        def request(steps: int, seed: int) -> None:
            client.predict(prompt=PROMPT, seed=seed, steps=steps, api_name="/txt2img")

        jobs = {name: in_turns(engine, request, steps, n) for name, (steps, n) in JOBS.items()}
    steps, n = PREVIEWS
    return {
        **jobs,
        "previews": in_turns(engine, lambda steps, seed: engine(steps, seed, True), steps, n),
        "load_average": os.getloadavg()[0],
    }


def in_turns(base: Any, other: Any, steps: int, n: int) -> dict[str, Any]:
    """Median seconds of both, of their difference, and the difference as a part of the base; the order changes every turn."""
    base(steps, 0), other(steps, 0)
    pairs = []
    for seed in range(1, n + 1):
        times = {}
        for call in (base, other) if seed % 2 else (other, base):
            begin = time.perf_counter()
            call(steps, seed)
            times[call] = time.perf_counter() - begin
        pairs.append((times[base], times[other]))
    first, second = np.array(pairs).T
    return {
        "steps": steps, "n": n, "base_s": float(np.median(first)), "other_s": float(np.median(second)),
        "difference_s": median_interval(second - first), "relative": median_interval(second / first - 1),
    }  # fmt: skip


def median_interval(values: np.ndarray) -> list[float]:
    """Median and its 95 % percentile bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values)))
    return [float(np.median(values)), *np.quantile(np.median(drawn, 1), (0.025, 0.975)).tolist()]


# --- command ------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure one part, print its figures, put them into ui.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["start", "overhead", "load"])
    parser.add_argument("--runs", type=int, default=5, help="servers of start")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--kill-every", type=float, default=0)
    given = parser.parse_args()
    if given.part == "start":
        found = measure_start(given.runs)
    elif given.part == "overhead":
        found = measure_overhead()
    else:
        import ui_load

        workers = ["--workers", str(given.workers)] if given.workers else []
        with server(*workers) as (pid, address, home):
            wait_ready(address)
            found = ui_load.measure(address, pid, home, given.clients, given.seconds, given.kill_every)
    name = f"{given.part}, {given.workers} workers" if given.workers else given.part
    path = HERE / "ui.json"
    known = json.loads(path.read_text()) if path.exists() else {"floors": FLOORS}
    path.write_text(json.dumps({**known, "cores": os.cpu_count(), name: found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    if found.get("wrong"):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
