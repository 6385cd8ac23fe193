"""Interpolate: what lies between two pictures or two prompts, as a strip, a grid or a clip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from latentpipe import UserError
from latentpipe.engine.jobs import Done
from latentpipe.explore import playground
from latentpipe.pipelines.metadata.recipe import MAX_PROMPT, MAX_SEED
from latentpipe.ui import html
from latentpipe.ui.failures import remembered, said_why
from latentpipe.ui.playground_inputs import PlaygroundInputs, result, shown_event
from latentpipe.ui.state import HEAVY, LIGHT, App, toast_errors, wire_stop
from latentpipe.ui.theme import RUN, STOP
from latentpipe.ui.uploads import picture_of
from latentpipe.utils.defaults import STEPS
from latentpipe.utils.progress import ProgressCallback

EMPTY = "No path yet. Choose two pictures (or two prompts), then press Interpolate."
NAMES = ("first", "second", "vae", "ends", "way", "form", "one", "two", "seed", "steps", "count")
SEEDS = 3  # rows of a grid between prompts


def build(app: App, given: PlaygroundInputs) -> None:
    """Lay the part out and wire it; to be called inside a gr.Tab."""
    with gr.Row():
        ends = gr.Radio(["Pictures", "Prompts"], value="Pictures", label="Between two", min_width=140, elem_id="lp-play-ends")
        way = gr.Radio([*playground.WAYS], value="slerp", label="Way", min_width=140, elem_id="lp-play-way")
        form = gr.Radio(["Strip", "Grid", "Clip"], value="Strip", label="Show as", min_width=140, elem_id="lp-play-form")
    with gr.Column(visible=False) as prompts:
        with gr.Row():
            one = gr.Textbox("red apple", label="First prompt", max_length=MAX_PROMPT, min_width=140, elem_id="lp-play-prompt")
            two = gr.Textbox("green apple", label="Second prompt", max_length=MAX_PROMPT, min_width=140)
        with gr.Row():
            seed = gr.Number(7, label="Seed", precision=0, minimum=0, maximum=MAX_SEED - SEEDS, min_width=140)
            steps = gr.Slider(1, 50, STEPS, step=1, label="Steps", min_width=140)
    count = gr.Slider(3, 48, 7, step=1, label="Pictures", elem_id="lp-play-count", info="a grid has at most 15 in a row")
    with gr.Row():
        run = gr.Button("Interpolate", variant="primary", scale=3, elem_id="lp-play-interpolate", elem_classes=RUN)
        stop = gr.Button("Stop", scale=1, min_width=60, elem_classes=STOP)
    status, picture, download = result("lp-play-between", EMPTY)
    ends.input(lambda chosen: gr.update(visible=chosen == "Prompts"), [ends], [prompts], **LIGHT)
    fields = [given.first, given.second, given.vae, ends, way, form, one, two, seed, steps, count]

    def draw(values: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        with remembered(app, request), toast_errors() as notes:
            work, alt = _path_work(app, given, dict(zip(NAMES, (values[field] for field in fields), strict=True)))
            for event in app.jobs.run(request, work, notes):
                if isinstance(event, Done):
                    path = str(event.result)
                    yield {
                        status: html.words(f"{alt}. Done in {event.seconds:.1f} s."),
                        picture: gr.update(value=path, visible=True, alt_text=alt),
                        download: gr.update(value=path, interactive=True),
                    }
                else:
                    yield {status: shown_event(event)}
            return
        yield {status: html.empty(EMPTY)}

    drawing = run.click(draw, set(fields), [status, picture, download], show_progress="hidden", trigger_mode="once", **HEAVY)
    drawing.failure(said_why(app, "Nothing was drawn."), None, [status], **LIGHT)
    wire_stop(app, stop)


def _path_work(app: App, given: PlaygroundInputs, chosen: dict[str, Any]) -> tuple[Callable[[ProgressCallback], Path], str]:
    """The job that writes a strip, a grid or a clip, and what it shows in words."""
    form, count = chosen["form"], int(chosen["count"])
    way, seed = str(chosen["way"]), int(chosen["seed"] or 0)
    if form == "Grid" and count > 15:
        raise UserError(f"A grid of {count} pictures in a row is too wide; choose at most 15, or a clip.")
    if chosen["ends"] == "Pictures":
        first, second = picture_of(chosen["first"]), picture_of(chosen["second"])
        alt = f"{count} pictures from the first to the second, by {way}"
        ways = playground.WAYS if form == "Grid" else (way,)

        def rows(report: ProgressCallback) -> dict[str, list[Image.Image]]:
            stage = given.stage(app, chosen["vae"])
            return {each: playground.between_pictures(stage, first, second, count, each, report) for each in ways}
    else:
        alt = f"{count} pictures from '{chosen['one']}' to '{chosen['two']}', by {way}"
        seeds = range(seed, seed + (SEEDS if form == "Grid" else 1))

        def rows(report: ProgressCallback) -> dict[str, list[Image.Image]]:
            pipe = app.pipe(None, chosen["vae"])
            ends, steps = (chosen["one"] or "", chosen["two"] or ""), int(chosen["steps"])
            app.jobs.allow(*pipe.native_size, steps, count * len(seeds))
            return {f"seed {each}": playground.between_prompts(pipe, *ends, count, way, each, steps, report) for each in seeds}

    def work(report: ProgressCallback) -> Path:
        found = rows(report)
        if form == "Clip":
            path = app.place("clip.gif")
            playground.write_clip(next(iter(found.values())), path)
        else:
            path = app.place("sheet.png")
            playground.playground_page(found).save(path)
        return path

    return work, alt
