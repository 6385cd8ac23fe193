"""PNG info: what made a picture, ours or another program's; take its settings over, or draw it again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from latentpipe import replay
from latentpipe.engine.jobs import Done, Progress, Waiting
from latentpipe.pipelines.metadata.reader import Info, read_info
from latentpipe.pipelines.metadata.recipe import read
from latentpipe.ui import html
from latentpipe.ui.failures import remembered, said_why
from latentpipe.ui.form import Form
from latentpipe.ui.restored_settings import fields_of, taken_over
from latentpipe.ui.state import HEAVY, LIGHT, App, toast_errors, wire_stop
from latentpipe.ui.theme import RUN, SAID, STOP
from latentpipe.ui.uploads import check_picture, picture_input
from latentpipe.utils.progress import ProgressCallback
from latentpipe.utils.setting_names import shortened

EMPTY = "Drop a picture of latentpipe, A1111, ComfyUI, Fooocus, InvokeAI or NovelAI: its settings appear here."


@dataclass(frozen=True)
class PngInfo:
    """The tab: where other tabs send a picture to, and the event that takes its settings over."""

    image: gr.Image
    restored: Any
    """The event: the settings were taken over, or could not be."""


def build(app: App, form: Form, said: gr.HTML) -> PngInfo:
    """Lay the tab out and wire it; `form` is the one that settings are taken over into, `said` the status beside it."""
    with gr.Row(elem_classes="lp-wide"):
        with gr.Column(scale=4, min_width=320):
            image = picture_input("Picture with settings", said=False, height=300, elem_id="lp-info-image")
            with gr.Row():
                again = gr.Button("Draw it again (replay)", variant="primary", scale=3, elem_id="lp-replay", elem_classes=RUN)
                stop = gr.Button("Stop", scale=1, min_width=60, elem_classes=STOP)
            restore = gr.Button("Use these settings", elem_id="lp-restore")
            with gr.Accordion("It began from another picture (img2img)", open=False):
                source = picture_input("That picture", height=200, elem_id="lp-info-source")
        with gr.Column(scale=6, min_width=320):
            verdict = gr.HTML(elem_id="lp-replay-verdict", elem_classes=SAID)
            replayed = gr.Image(
                label="Drawn again", alt_text="the picture drawn again", format="png", interactive=False, visible=False,
                height=260, elem_id="lp-replayed", buttons=["download", "fullscreen"],
            )  # fmt: skip
            facts = gr.HTML(html.empty(EMPTY), elem_id="lp-facts")
            raw = gr.Textbox(label="As it stands in the file", lines=4, max_lines=12, interactive=False, buttons=["copy"])
    image.change(lambda path: look(path), [image], [facts, raw, verdict, replayed], **LIGHT)

    def run(path: str | None, other: str | None, request: gr.Request) -> Iterator[tuple[Any, Any]]:
        yield from _replay(app, path, other, request)

    done = again.click(run, [image, source], [verdict, replayed], show_progress="hidden", trigger_mode="once", **HEAVY)
    done.failure(said_why(app, "It was not drawn again."), None, [verdict], **LIGHT)
    wire_stop(app, stop)
    restored = restore.click(
        lambda path, model: taken_over(app, form, path, model), [image, form.model], [*fields_of(form), said], **LIGHT
    )
    return PngInfo(image, restored)


def info_of(path: str) -> Info:
    """The settings inside an uploaded picture; UserError says why there are none."""
    check_picture(path)
    return read_info(Path(path))


def look(path: str | None) -> tuple[str, str, str, Any]:
    """The settings as a table, and the text as it stands in the file."""
    hidden = gr.update(value=None, visible=False)
    if path is None:
        return html.empty(EMPTY), "", "", hidden
    try:
        with toast_errors():
            info = info_of(path)
    except gr.Error as error:  # a line that stays, in place of a toast that goes
        return html.light("red", str(error.message), "Not read"), "", "", hidden
    else:
        rows: list[tuple[str, str | int]] = [
            ("Written by", info.source),
            ("Prompt", info.prompt),
            ("Negative prompt", info.negative_prompt or "-"),
        ]
        rows += [(name.replace("_", " ").capitalize(), _words(value)) for name, value in shortened(info.settings).items()]
        rows += [("Seed", "-" if info.seed is None else info.seed), ("Picture", f"{info.width} x {info.height} pixels")]
        rows += [("Model", info.model or "-"), ("VAE", info.vae or "built in")]
        rows += [("LoRA", ", ".join(f"{name}: {weight}" for name, weight in info.loras.items()) or "-")]
        rows += [("Note", sentence) for sentence in info.changed]
        if info.recipe is not None:
            rows += [(f"Hash of {part}", digest[:16]) for part, digest in info.recipe.hashes.items()]
        return html.table("Settings of this picture", ["Setting", "Value"], rows), info.raw, "", hidden


def info_json(info: Info) -> dict[str, Any]:
    """The settings for a program."""
    found = info.shortened()
    found["recipe"] = info.recipe.model_dump(mode="json") if info.recipe else None
    return found


def _words(value: Any) -> str:
    return (" x " if isinstance(value[0], int) else " to ").join(map(str, value)) if isinstance(value, tuple) else str(value)


def _replay(app: App, path: str | None, source: str | None, request: gr.Request) -> Iterator[tuple[Any, Any]]:
    """Draw the picture again and say how far it is from the old one."""
    hidden = gr.update(visible=False)
    with remembered(app, request), toast_errors() as notes:
        if path is None:
            gr.Info("Drop a picture first.")
            return
        for each in (path, source):
            if each is not None:
                check_picture(each)
        other = Path(source) if source else None

        def work(report: ProgressCallback) -> Any:
            old = read(Path(path))
            app.jobs.allow(old.width, old.height, old.steps, old.batch_size)
            return replay(Path(path), source=other, report=report, device=app.models.device)

        for event in app.jobs.run(request, work, notes):
            if isinstance(event, Done):
                yield _verdict(event.result), gr.update(value=app.keep(event.result.picture), visible=True)
            elif isinstance(event, Progress):
                yield html.progress(event.done, event.total, "Drawing again, step", event.eta_s), hidden
            elif isinstance(event, Waiting):
                yield html.waiting(event.ahead), hidden
        return
    yield "", hidden


def _verdict(result: Any) -> str:
    if result.difference == 0:
        return html.light("green", "every pixel is the same.", "Identical")
    cause = "; ".join(result.causes) or "no cause found: same machine, versions and threads"
    return html.light(
        "amber", f"largest difference {result.difference} of 255 grey levels. What has changed: {cause}.", "Differs"
    )
