"""Grid: an X/Y plot on one sheet, every picture with its own recipe; a sheet is drawn again from its own file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial as bound
from pathlib import Path
from typing import Any

import gradio as gr

from latentpipe import UserError
from latentpipe.engine.jobs import Done, Progress, Waiting
from latentpipe.engine.xy_grid.axes import MAX_CELLS, MAX_VAES, Axis, make_axis
from latentpipe.engine.xy_grid.plot import Grid, plot, read_grid, redraw
from latentpipe.pipelines.metadata.recipe import MAX_PROMPT, MAX_SEED
from latentpipe.pipelines.sampling import SCHEDULERS
from latentpipe.ui import html
from latentpipe.ui.failures import remembered, said_why
from latentpipe.ui.form import OWN, Values
from latentpipe.ui.state import BUILT_IN, HEAVY, LIGHT, App, toast_errors, wire_stop
from latentpipe.ui.theme import RUN, SAID, STOP
from latentpipe.ui.uploads import picture_input, picture_of
from latentpipe.utils.defaults import GUIDANCE, STEPS
from latentpipe.utils.progress import ProgressCallback
from latentpipe.utils.setting_names import in_python

EMPTY = "No grid yet. Write a prompt, say what varies along X and Y, or choose an example below, and press Draw the grid."
NONE = "nothing"
NAMES = {
    "Seed": "seed", "Steps": "steps", "Guidance": "guidance", "VAE": "vae", "LoRA weight": "lora", "Scheduler": "scheduler",
    "Prompt word": "prompt",
}  # fmt: skip
HINTS = {
    NONE: "",
    "Seed": "Whole numbers: 1, 2, 3 or a range, 1:9:2",
    "Steps": "Whole numbers: 5, 10, 20 or a range, 5:20:5",
    "Guidance": "Numbers: 1, 3, 5 or a range, 1:7:2",
    "VAE": f"Installed names; built-in is the model's own. At most {MAX_VAES}",
    "LoRA weight": "Numbers: 0, 0.5, 1 or a range, 0:1:0.25",
    "Scheduler": f"Some of {', '.join(SCHEDULERS)}",
    "Prompt word": "The first one stands in the prompt; the others take its place",
}
VALUES = {
    NONE: "", "Seed": "1, 2, 3", "Steps": "5, 10, 20", "Guidance": "1, 3, 5", "LoRA weight": "0, 0.5, 1",
    "Scheduler": ", ".join(SCHEDULERS), "Prompt word": "red, green, blue",
}  # fmt: skip
EXAMPLES = [
    ("Seeds × guidance", "red apple", "Seed", "1, 2, 3", "Guidance", "1, 3, 5"),
    ("A word × seeds", "woman firefighter medium dark skin tone", "Prompt word", "firefighter, astronaut, judge", "Seed", "1:3"),
    ("Steps × scheduler", "cat face", "Steps", "2, 5, 10, 20", "Scheduler", "dpm++, ddim, euler"),
    ("LoRA weight × seeds", "cat face", "LoRA weight", "0, 0.5, 1", "Seed", "1, 2"),
]


@dataclass(frozen=True)
class Side:
    """The fields of one axis."""

    kind: gr.Dropdown
    lora: gr.Dropdown
    text: gr.Textbox

    def axis(self, app: App, values: Values) -> Axis | None:
        """What was chosen; None for nothing, UserError for values that are wrong or a LoRA that is not installed."""
        kind = values[self.kind]
        if kind == NONE:
            return None
        name = app.named("lora", values[self.lora] or "") if kind == "LoRA weight" else ""
        return make_axis(NAMES.get(kind, str(kind)), values[self.text] or "", name)


def build(app: App) -> None:
    """Lay the tab out and wire it; to be called inside a gr.Tab."""
    with gr.Row(elem_classes="lp-wide"):
        with gr.Column(scale=4, min_width=320):
            prompt = gr.Textbox("red apple", label="Prompt of all pictures", max_length=MAX_PROMPT, elem_id="lp-grid-prompt")
            x = _side(app, "X, from left to right", "Seed", [*NAMES], "x")
            y = _side(app, "Y, from top to bottom", "Guidance", [NONE, *NAMES], "y")
            with gr.Row():
                run = gr.Button("Draw the grid", variant="primary", scale=3, elem_id="lp-grid-run", elem_classes=RUN)
                stop = gr.Button("Stop", scale=1, min_width=60, elem_id="lp-grid-stop", elem_classes=STOP)
            rest = _rest(app)
            with gr.Accordion("Draw a sheet again", open=False):
                sheet_in = picture_input("A PNG that a grid was saved to", height=160, elem_id="lp-grid-again-image")
                again = gr.Button("Draw it again", elem_id="lp-grid-again")
        with gr.Column(scale=6, min_width=320):
            status = gr.HTML(html.empty(EMPTY), elem_id="lp-grid-status", elem_classes=SAID)
            sheet = gr.Image(
                label="Grid", show_label=False, format="png", interactive=False, visible=False, elem_id="lp-grid-sheet",
                buttons=["fullscreen"],
            )  # fmt: skip
            download = gr.DownloadButton("Download PNG", size="sm", interactive=False, elem_id="lp-grid-download")
            with gr.Accordion("Single pictures, each with its own settings inside", open=False):
                single = gr.Gallery(
                    label="Single pictures", show_label=False, format="png", columns=4, height=320, object_fit="contain",
                    interactive=False, elem_id="lp-grid-single", buttons=["download", "fullscreen"],
                )  # fmt: skip
    shown = (status, sheet, download, single)
    _wire_run(app, prompt, x, y, rest, shown, run)
    _wire_again(app, sheet_in, again, shown)
    wire_stop(app, stop)
    _examples(prompt, x, y)


def _side(app: App, label: str, kind: str, kinds: list[str], letter: str) -> Side:
    names = app.choices("lora")
    with gr.Group():
        with gr.Row():
            chosen = gr.Dropdown(kinds, value=kind, label=label, min_width=120, elem_id=f"lp-grid-{letter}")
            lora = gr.Dropdown(
                names, value=names[0] if names else None, label=f"LoRA along {letter.upper()}", visible=False, min_width=120
            )
        text = gr.Textbox(
            VALUES[kind], label=f"Values along {letter.upper()}", info=HINTS[kind], max_length=20_000,
            elem_id=f"lp-grid-{letter}-values",
        )  # fmt: skip

    def turn(name: str) -> tuple[Any, Any]:
        with toast_errors():
            value = _fitting(app) if name == "VAE" else VALUES.get(name, "")
            return gr.update(visible=name == "LoRA weight", choices=app.choices("lora")), gr.update(
                value=value, info=HINTS.get(name, ""), interactive=name != NONE
            )
        raise AssertionError

    chosen.input(turn, [chosen], [lora, text], show_progress="hidden", **HEAVY)
    return Side(chosen, lora, text)


def _fitting(app: App) -> str:
    """The values of a VAE axis: those that fit the chosen model, which is measured once."""
    found = ["built-in"]
    for name in app.choices("vae"):
        with suppress(UserError):
            if name != app.model and app.models.verdict(app.model, name).fits:
                found.append(name)
    return ", ".join(found[:MAX_VAES])


def _rest(app: App) -> dict[str, Any]:
    """The fields of what all pictures share, by argument of `plot` (and "model")."""
    with gr.Accordion("What all pictures share", open=False):
        with gr.Row():
            seed = gr.Number(7, label="Seed", precision=0, minimum=-1, maximum=MAX_SEED, info="-1: a random one", min_width=120)
            steps = gr.Slider(1, 100, STEPS, step=1, label="Steps", min_width=160)
        with gr.Row():
            guidance = gr.Slider(0, 15, GUIDANCE, step=0.1, label="Guidance", min_width=160)
            scheduler = gr.Dropdown([OWN, *SCHEDULERS], value=OWN, label="Scheduler", min_width=120)
        negative = gr.Textbox(label="Negative prompt", max_length=MAX_PROMPT)
        with gr.Row():
            model = gr.Dropdown(app.choices("models"), value=app.model, label="Model", min_width=120)
            vae = gr.Dropdown([BUILT_IN, *app.choices("vae")], value=BUILT_IN, label="VAE", min_width=120)
        partial = gr.Checkbox(False, label="Take LoRA that fit in part", info="what is left out is told")
    return {
        "seed": seed, "steps": steps, "guidance": guidance, "scheduler": scheduler, "negative": negative, "model": model,
        "vae": vae, "lora_partial": partial,
    }  # fmt: skip


def _wire_run(
    app: App, prompt: gr.Textbox, x: Side, y: Side, rest: dict[str, Any], shown: tuple[Any, ...], run: gr.Button
) -> None:
    def draw(values: Values, request: gr.Request) -> Iterator[dict[Any, Any]]:
        def work(report: ProgressCallback) -> Grid:
            model = values[rest["model"]]
            _allow(app, app.pipe(model).native_size, settings["num_inference_steps"], axes)
            return plot(lambda vae: app.pipe(model, vae), values[prompt] or "", *axes, report=report, **settings)  # type: ignore[arg-type]

        with remembered(app, request), toast_errors() as notes:
            axes = (x.axis(app, values), y.axis(app, values))
            if axes[0] is None:
                raise UserError("Nothing varies along X; choose what does.")
            settings = settings_of(rest, values)
            yield from _watched(app, request, work, notes, shown)
            return
        yield {shown[0]: html.empty(EMPTY)}

    fields = {prompt, x.kind, x.lora, x.text, y.kind, y.lora, y.text, *rest.values()}
    drawing = gr.on(
        [run.click, prompt.submit, x.text.submit, y.text.submit], draw, fields, list(shown), show_progress="hidden",
        trigger_mode="once", **HEAVY,
    )  # fmt: skip
    drawing.failure(said_why(app, "No grid was drawn."), None, [shown[0]], **LIGHT)


def settings_of(rest: dict[str, Any], values: Values) -> dict[str, Any]:
    """Arguments of `plot` out of the fields that all pictures share."""
    found = in_python({name: values[field] for name, field in rest.items() if name != "model"})
    return found | {
        "seed": None if found["seed"] is None or int(found["seed"]) < 0 else int(found["seed"]),
        "num_inference_steps": int(found["num_inference_steps"]),
        "guidance_scale": float(found["guidance_scale"]),
        "scheduler": None if found["scheduler"] == OWN else found["scheduler"],
        "negative_prompt": found["negative_prompt"] or "",
        "vae": None if found["vae"] == BUILT_IN else found["vae"],
        "lora_partial": bool(found["lora_partial"]),
    }


def _wire_again(app: App, image: gr.Image, again: gr.Button, shown: tuple[Any, ...]) -> None:
    def draw(path: str | None, request: gr.Request) -> Iterator[dict[Any, Any]]:
        with remembered(app, request), toast_errors() as notes:
            before = picture_of(path)

            def work(report: ProgressCallback) -> Grid:
                old = read_grid(Path(str(path)))
                size = old.base.size or app.pipe(old.model).native_size
                _allow(app, size, old.base.steps, (old.x, old.y))
                return redraw(Path(str(path)), app.pipe, report)

            def said(done: Done) -> str:
                image = done.result.image
                if image.size == before.size and image.tobytes() == before.tobytes():
                    return html.light("green", "every pixel is that of the file.", "Identical")
                return html.light("amber", "it was stopped, or drawn on another machine.", "Other pixels")

            yield from _watched(app, request, work, notes, shown, said)
            return
        yield {shown[0]: html.empty(EMPTY)}

    drawing = again.click(draw, [image], list(shown), show_progress="hidden", trigger_mode="once", **HEAVY)
    drawing.failure(said_why(app, "No grid was drawn."), None, [shown[0]], **LIGHT)


def _allow(app: App, size: tuple[int, int], steps: int, axes: tuple[Axis | None, ...]) -> None:
    """UserError where a plot is too much work."""
    sides = [axis for axis in axes if axis is not None]
    most = max([steps, *(int(value) for axis in sides if axis.kind == "steps" for value in axis.values)])
    app.jobs.allow(*size, most, math.prod(len(axis.values) for axis in sides))


def _said(done: Done) -> str:
    grid = done.result
    drawn = len(grid.pictures) - grid.pictures.count(None)
    if drawn < len(grid.pictures):
        return html.words(f"Stopped: {drawn} of {len(grid.pictures)} pictures are drawn and kept; the others are empty.")
    return html.words(f"{drawn} picture{'s' * (drawn > 1)} in {done.seconds:.1f} s, seed {grid.recipe.base.seed}.")


def _watched(
    app: App,
    request: gr.Request,
    work: Callable[[ProgressCallback], Grid],
    notes: list[str],
    shown: tuple[Any, ...],
    said: Callable[[Done], str] = _said,
) -> Iterator[dict[Any, Any]]:
    """Progress, then the sheet."""
    status, sheet, download, single = shown
    for event in app.jobs.run(request, work, notes):
        if isinstance(event, Waiting):
            yield {status: html.waiting(event.ahead)}
        elif isinstance(event, Progress):
            yield {status: html.progress(event.done, event.total, f"Drawing, {event.what}, steps", event.eta_s)}
        elif isinstance(event, Done):
            grid = event.result
            path = app.keep_file(grid.save(app.place("grid.png")), grid.recipe.base.prompt, grid.recipe.base.seed)
            yield {
                status: said(event),
                sheet: gr.update(value=path, visible=True, alt_text=_alt(grid)),
                download: gr.update(value=path, interactive=True),
                single: _single(app, grid),
            }


def _alt(grid: Grid) -> str:
    """What the sheet shows, for those who do not see it."""
    x, y = grid.recipe.x, grid.recipe.y
    down = f"; from top to bottom {y.title}: {', '.join(y.labels)}" if y else ""
    return f"Grid of '{grid.recipe.base.prompt}'; from left to right {x.title}: {', '.join(x.labels)}{down}"[:1000]


def _single(app: App, grid: Grid) -> list[tuple[str, str]]:
    """Files and captions of the pictures that were drawn."""
    return [
        (str(picture.save(app.place(f"picture-{index + 1}.png"))), caption)
        for index, (picture, caption) in enumerate(zip(grid.pictures, grid.captions, strict=True))
        if picture is not None
    ]


def _examples(prompt: gr.Textbox, x: Side, y: Side) -> None:
    gr.Markdown(f"**Examples** fill the form; at most {MAX_CELLS} pictures are drawn.")
    with gr.Row():
        for name, words, *sides in EXAMPLES:
            gr.Button(name, size="sm", min_width=140).click(
                bound(_filled, words, *sides), None, [prompt, x.kind, x.lora, x.text, y.kind, y.lora, y.text], **LIGHT
            )


def _filled(prompt: str, *sides: str) -> list[Any]:
    """The form's fields for an example."""
    values: list[Any] = [prompt]
    for kind, text in zip(sides[::2], sides[1::2], strict=True):
        values += [kind, gr.update(visible=kind == "LoRA weight"), gr.update(value=text, info=HINTS[kind], interactive=True)]
    return values
