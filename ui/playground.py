"""Playground: what lies between two pictures or prompts, along a direction, and around a picture's latents, decoded live."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from PIL import Image

from latentpipe.engine.jobs import Done, Waiting
from latentpipe.explore import playground
from latentpipe.pipelines.metadata.recipe import MAX_SEED
from latentpipe.ui import html, interpolate
from latentpipe.ui.failures import remembered, said_why
from latentpipe.ui.playground_inputs import PlaygroundInputs, build_inputs, result, shown_event
from latentpipe.ui.state import HEAVY, LIGHT, App, toast_errors, wire_stop
from latentpipe.ui.theme import RUN, SAID, STOP
from latentpipe.ui.uploads import picture_of
from latentpipe.utils.progress import ProgressCallback

EMPTY = "Drop a picture at the left, or choose a pair below it; then move a slider."
NO_SHEET = "No sheet yet. Choose directions, then press Draw the sheet."
NONE = "none"
ROWS = 6  # directions of a sheet


def build(app: App) -> None:
    """Lay the tab out and wire it; to be called inside a gr.Tab."""
    with gr.Row(elem_classes="lp-wide"):
        with gr.Column(scale=4, min_width=320):
            given = build_inputs(app)
        with gr.Column(scale=6, min_width=320), gr.Tabs(elem_id="lp-play-tabs"):
            with gr.Tab("Edit live", id="live"):
                names = _live(app, given)
            with gr.Tab("Traverse", id="traverse"):
                _traverse(app, given, names)
            with gr.Tab("Interpolate", id="between"):
                interpolate.build(app, given)


# --- edit live ------------------------------------------------------------------------------------------------


def _live(app: App, given: PlaygroundInputs) -> tuple[gr.Dropdown, gr.Dropdown]:
    status = gr.HTML(html.empty(EMPTY), elem_id="lp-play-status", elem_classes=SAID)
    picture = gr.Image(
        label="Decoded", show_label=False, format="png", interactive=False, visible=False, height=260, elem_id="lp-play-live",
        elem_classes="lp-large", buttons=["download", "fullscreen"],
    )  # fmt: skip
    with gr.Row():
        share = gr.Slider(0, 1, 0, step=0.01, label="Mix in the second picture", elem_id="lp-play-share", min_width=150)
        scale = gr.Slider(0, 3, 1, step=0.01, label="Scale of the latents", min_width=150)
    with gr.Row():
        noise = gr.Slider(0, 3, 0, step=0.01, label="Noise", info="standard deviation", min_width=150, elem_id="lp-play-noise")
        seed = gr.Number(0, label="Seed of the noise", precision=0, minimum=0, maximum=MAX_SEED, min_width=150)
    pairs = []
    for place in ("One", "Other"):
        with gr.Row():
            name = gr.Dropdown([NONE], value=NONE, label=f"{place} direction", elem_id=f"lp-play-{place.lower()}", min_width=150)
            far = gr.Slider(-5, 5, 0, step=0.05, label=f"Move along {place.lower()}", info="standard deviations", min_width=150)
        pairs.append((name, far))
    with gr.Row():
        learn = gr.Button("Find directions", elem_id="lp-play-learn", elem_classes=RUN)
        stop = gr.Button("Stop", scale=0, min_width=90, elem_id="lp-play-stop", elem_classes=STOP)
        reset = gr.Button("Back to the picture", elem_id="lp-play-reset")
    learned = gr.HTML(elem_id="lp-play-learned", elem_classes=SAID)
    fields = [given.first, given.second, given.vae, share, scale, noise, seed, *(field for pair in pairs for field in pair)]

    def live(
        first: str | None, second: str | None, vae: str, share: float, scale: float, noise: float, seed: float,
        one: str, one_far: float, other: str, other_far: float, request: gr.Request,
    ) -> Iterator[tuple[Any, Any]]:  # fmt: skip
        if first is None:
            yield html.empty(EMPTY), gr.update(visible=False)
            return
        with toast_errors() as notes:
            moves = {NONE: 0.0, one: one_far} | {other: other_far + (one_far if one == other else 0.0)}
            del moves[NONE]
            mixed = share if second is not None else 0.0
            edit = playground.Edit(mixed, {name: far for name, far in moves.items() if far}, scale, noise, int(seed or 0))
            pictures = picture_of(first), picture_of(second) if second is not None else None

            def work(report: ProgressCallback) -> Image.Image:
                return playground.edited_picture(given.stage(app, vae), *pictures, edit)

            for event in app.jobs.run(request, work, notes):
                if isinstance(event, Done):
                    words = _words(mixed, scale, noise, edit.moves or {})
                    yield html.words(words), gr.update(value=event.result, visible=True, alt_text=words)
                elif isinstance(event, Waiting) and event.ahead:
                    yield html.waiting(event.ahead), gr.skip()

    gr.on(
        [field.change for field in fields if field is not given.vae], live, fields, [status, picture], show_progress="hidden",
        trigger_mode="always_last", **HEAVY,
    )  # fmt: skip
    reset.click(_back, None, [share, scale, noise, pairs[0][1], pairs[1][1]], **LIGHT)
    names = (pairs[0][0], pairs[1][0])
    _wire_learn(app, given, (learn, stop), learned, names)
    # another VAE has other directions: they go first, then the picture is decoded anew
    forgotten = given.vae.input(lambda: [gr.update(choices=[NONE], value=NONE)] * 2 + [""], None, [*names, learned], **LIGHT)
    forgotten.then(live, fields, [status, picture], show_progress="hidden", **HEAVY)
    return names


def _back() -> list[float]:
    """The sliders where they change nothing."""
    gr.Info("The sliders are back: nothing is mixed, moved or scaled.", duration=4)
    return [0, 1, 0, 0, 0]


def _words(share: float, scale: float, noise: float, moves: Any) -> str:
    """What was done to the picture."""
    parts = [f"{share:.0%} of the second picture"] * (share > 0) + [f"scale {scale:g}"] * (scale != 1)
    parts += [f"noise {noise:g}"] * (noise > 0) + [f"{name} {far:+g} sd" for name, far in moves.items()]
    return f"The first picture, decoded from its latents{', with ' * bool(parts)}{', '.join(parts)}."


def _wire_learn(
    app: App,
    given: PlaygroundInputs,
    buttons: tuple[gr.Button, gr.Button],
    learned: gr.HTML,
    names: tuple[gr.Dropdown, gr.Dropdown],
) -> None:
    def found(vae: str, request: gr.Request) -> Iterator[tuple[Any, Any, Any]]:
        with toast_errors() as notes:

            def work(report: ProgressCallback) -> list[str]:
                return playground.directions(given.stage(app, vae), report)

            for event in app.jobs.run(request, work, notes):
                if isinstance(event, Done):
                    words = f"{len(event.result)} directions, those that change pictures most first. Choose some and move them."
                    first, second = [*event.result, NONE, NONE][:2]
                    choices = [NONE, *event.result]
                    yield html.words(words), gr.update(choices=choices, value=first), gr.update(choices=choices, value=second)
                else:
                    yield shown_event(event), gr.skip(), gr.skip()
            return
        yield html.words("No directions were found."), gr.skip(), gr.skip()

    learn, stop = buttons
    wire_stop(app, stop)
    learn.click(found, [given.vae], [learned, *names], show_progress="hidden", trigger_mode="once", **HEAVY)


# --- traverse -------------------------------------------------------------------------------------------------


def _traverse(app: App, given: PlaygroundInputs, names: tuple[gr.Dropdown, gr.Dropdown]) -> None:
    gr.Markdown(
        f"A row for each of the {ROWS} directions that change pictures most, or the plane of the two chosen in *Edit live*."
    )
    with gr.Row():
        what = gr.Radio(["Rows", "Plane"], value="Rows", label="Sheet", min_width=140, elem_id="lp-play-what")
        count = gr.Slider(3, 11, 7, step=2, label="Pictures in a row", min_width=140)
        most = gr.Slider(0.5, 5, 3, step=0.5, label="As far as", info="standard deviations", min_width=140)
    with gr.Row():
        run = gr.Button("Draw the sheet", variant="primary", scale=3, elem_id="lp-play-traverse", elem_classes=RUN)
        stop = gr.Button("Stop", scale=1, min_width=60, elem_classes=STOP)
    shown = result("lp-play-sheet", NO_SHEET)

    def draw(
        first: str | None, vae: str, what: str, count: float, most: float, one: str, other: str, request: gr.Request
    ) -> Iterator[tuple[Any, Any, Any]]:
        with remembered(app, request), toast_errors() as notes:
            picture = picture_of(first)

            def work(report: ProgressCallback) -> Image.Image:
                stage = given.stage(app, vae)
                known = playground.directions(stage, report)
                if what == "Rows":
                    return playground.traversal(stage, picture, known[:ROWS], int(count), most, report)
                pair = [one, other] if NONE not in (one, other) and one != other else known[:2]
                return playground.plane(stage, picture, (pair[0], pair[1]), int(count), most, report)

            alt = f"Sheet of the first picture moved along directions of {vae}, from -{most:g} to {most:g} standard deviations"
            yield from _watched(app, request, work, notes, alt)
            return
        yield html.empty(NO_SHEET), gr.skip(), gr.skip()

    drawing = run.click(
        draw, [given.first, given.vae, what, count, most, *names], list(shown), show_progress="hidden", trigger_mode="once",
        **HEAVY,
    )  # fmt: skip
    drawing.failure(said_why(app, "No sheet was drawn."), None, [shown[0]], **LIGHT)
    wire_stop(app, stop)


def _watched(
    app: App, request: gr.Request, work: Callable[[ProgressCallback], Image.Image], notes: list[str], alt: str
) -> Iterator[tuple[Any, Any, Any]]:
    """Progress, then the picture with its download."""
    for event in app.jobs.run(request, work, notes):
        if isinstance(event, Done):
            path = app.place("sheet.png")
            event.result.save(path)
            done = html.words(f"Done in {event.seconds:.1f} s.")
            yield done, gr.update(value=str(path), visible=True, alt_text=alt), gr.update(value=str(path), interactive=True)
        else:
            yield shown_event(event), gr.skip(), gr.skip()
