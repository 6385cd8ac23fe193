"""Generate: prompt -> pictures, with preview, Stop, history and the ways on."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from latentpipe import Finished, StepDone
from latentpipe.checkpoints.registry import find_model
from latentpipe.compatibility.latent_adapter import own_adapters
from latentpipe.engine.engine import Waiting
from latentpipe.engine.jobs import Done
from latentpipe.pipelines.memory_need import layout_of, need_of
from latentpipe.pipelines.metadata.recipe import MAX_SEED, read
from latentpipe.ui import html
from latentpipe.ui.failures import remembered, said_why
from latentpipe.ui.form import NO_ADAPTER, Form, Values, build_form, build_prompt
from latentpipe.ui.state import BUILT_IN, HEAVY, LIGHT, App, sentences_of, toast_errors, wire_stop
from latentpipe.ui.theme import SAID, into_view
from latentpipe.utils.errors import counted
from latentpipe.vae.memory import available

EMPTY = "No picture yet. Write a prompt, or choose an example, and press Generate."
EXAMPLES = [
    "red apple",
    "thumbs up medium skin tone",
    "woman firefighter medium dark skin tone",
    "(red:1.3) heart",
    "woman firefighter medium dark skin tone <lora:flat:0.8>",
    "cat face <lora:pencil:0.8>",
]
HISTORY = 48
YIELD_S = 0.2  # a browser needs no more steps a second


@dataclass(frozen=True)
class Generate:
    """The tab: its form, and what other tabs send to or take from it."""

    form: Form
    status: gr.HTML
    chosen: gr.State
    """Path of the picture that the buttons act on."""
    to_lab: gr.Button
    to_replay: gr.Button


def build(app: App, state: gr.HTML) -> Generate:
    """Lay the tab out and wire it, inside a gr.Tab; `state` is the page's first line, which names the VAE in use."""
    with gr.Row(elem_classes="lp-grid"):
        with gr.Column():
            prompt, run, stop = build_prompt()
            gr.Examples([[text] for text in EXAMPLES], [prompt], label="Examples", api_visibility="private")
        with gr.Column():
            status = gr.HTML(html.empty(EMPTY), elem_id="lp-status", elem_classes=SAID, padding=False)
            gallery = gr.Gallery(
                label="Pictures", show_label=False, format="png", columns=2, height="auto", object_fit="contain", visible=False,
                interactive=False, elem_id="lp-gallery", buttons=["download", "fullscreen"],
            )  # fmt: skip
            with gr.Row(elem_classes="lp-tight"):
                download = gr.DownloadButton("Download PNG", size="sm", min_width=110, interactive=False, elem_id="lp-download")
                names = ("img2img", "VAE lab", "LoRA", "Replay")
                to_image, to_lab, to_lora, to_replay = (
                    gr.Button(f"→ {name}", size="sm", min_width=80, elem_id=f"lp-to-{name.lower().replace(' ', '-')}")
                    for name in names
                )
            with gr.Accordion("History of this visit", open=False):
                history = gr.Gallery(
                    label="History", format="png", columns=6, height=220, interactive=False, elem_id="lp-history", buttons=[]
                )
        with gr.Column():
            form = build_form(app, prompt, run, stop)
    chosen, past, last_seed = gr.State(None), gr.State([]), gr.State(-1)
    _wire_run(app, form, (status, gallery, download, history), (chosen, past, last_seed))
    _wire_form(app, form, last_seed, state)
    gr.on([gallery.select, history.select], _choose, None, [chosen, download], **LIGHT)
    to_image.click(_sent, [chosen], [form.image, form.begin], **LIGHT).then(None, js=into_view("lp-image", "lp-img2img"))
    fields = [form.lora, *(field for row in form.rows for field in row)]
    to_lora.click(lambda path: _lora_rows_of(form, path), [chosen], fields, **LIGHT)
    return Generate(form, status, chosen, to_lab, to_replay)


def _wire_run(app: App, form: Form, shown: tuple[Any, ...], kept: tuple[Any, ...]) -> None:
    status, gallery, download, history = shown
    chosen, past, last_seed = kept

    def draw(values: Values, request: gr.Request) -> Iterator[dict[Any, Any]]:
        with remembered(app, request), toast_errors() as notes:
            prompt = values[form.prompt] or ""
            chosen = values[form.model], values[form.vae], None if values[form.adapter] == NO_ADAPTER else values[form.adapter]

            def pipe() -> Any:
                return app.pipe(*chosen)

            shown_at = 0.0
            for event in app.jobs.draw(request, pipe, prompt, notes, names=app.names(*chosen), **form.settings(values)):
                if isinstance(event, Finished):
                    yield finished(event, values[past], notes)
                    notes.clear()  # they stand in the status
                elif isinstance(event, Waiting):
                    yield {status: html.waiting(event.ahead)}
                elif (now := time.monotonic()) - shown_at >= YIELD_S or event.preview is not None:
                    shown_at = now
                    yield {status: steps_of(event), gallery: gr.update(visible=False)}
            return
        yield {status: html.words("Stopped before it began.")}

    def steps_of(event: StepDone) -> str:
        return html.progress(event.step, event.steps, "Drawing, step", event.eta_s, event.preview)

    def finished(event: Finished, earlier: list[Any], notes: list[str]) -> dict[Any, Any]:
        pictures = [(app.keep(picture), _caption(picture.recipe)) for picture in event.pictures]
        first = event.pictures[0].recipe
        text = f"{len(pictures)} picture{'s' * (len(pictures) > 1)} in {event.seconds:.1f} s, seed {first.seed}"
        if first.stopped_after is not None:
            text = (
                f"Stopped after {first.stopped_after} of {counted(first.steps, 'step')}; the unfinished picture "
                f"is kept. Seed {first.seed}"
            )
        text = f"{text}. {sentences_of([*notes, *event.pictures[0].notes])}".strip()
        total = (pictures + earlier)[:HISTORY]
        return {
            status: html.words(text),
            gallery: gr.update(value=pictures, visible=True, columns=1 if len(pictures) == 1 else 2, selected_index=None),
            download: gr.update(value=pictures[0][0], interactive=True),
            history: total, past: total, chosen: pictures[0][0], last_seed: first.seed,
        }  # fmt: skip

    inputs = {*form.inputs, past}
    outputs = [status, gallery, download, history, chosen, past, last_seed]
    drawing = gr.on(
        [form.run.click, form.prompt.submit], draw, inputs, outputs, show_progress="hidden", trigger_mode="once", **HEAVY
    )
    drawing.failure(said_why(app, "Nothing was drawn."), None, [status], **LIGHT)
    wire_stop(app, form.stop)


def _wire_form(app: App, form: Form, last_seed: gr.State, state: gr.HTML) -> None:
    def look(model: str, vae: str, adapter: str, request: gr.Request) -> Iterator[tuple[str, str, str]]:
        with toast_errors():
            yield (
                html.light("wait", "Measuring whether this VAE fits ..."),
                "",
                html.light("wait", f"Looking at the VAE '{vae}' ..."),
            )
            for event in app.jobs.run(request, lambda report: verdict_of(app, model, vae, adapter)):
                if isinstance(event, Done):
                    yield event.result

    outputs = [form.light, form.in_use, state]
    for field in (form.model, form.vae, form.adapter):
        looked = field.change(look, [form.model, form.vae, form.adapter], outputs, show_progress="hidden", **HEAVY)
        looked.failure(_not_usable, None, outputs, **LIGHT)
    form.refresh.click(
        lambda: _refreshed(app, form),
        None,
        [form.model, form.vae, form.adapter, *(row[1] for row in form.rows), form.embeddings],
        **LIGHT,
    )
    for on, *told in form.rows:  # who turns a row's knobs wants its LoRA
        gr.on([field.input for field in told], lambda: True, None, [on], **LIGHT)  # type: ignore[attr-defined]
    form.dice.click(lambda: secrets.randbelow(MAX_SEED + 1), None, [form.seed], **LIGHT)
    form.reuse.click(_seed_again, [last_seed], [form.seed], **LIGHT)


def _refreshed(app: App, form: Form) -> list[Any]:
    """The fields with the names that are installed now."""
    models, vaes, loras, embeddings = (app.choices(kind) for kind in ("models", "vae", "lora", "embeddings"))
    gr.Info(f"Found: {counted(len(models), 'model')}, {counted(len(vaes), 'VAE')}, {len(loras)} LoRA.", duration=5)
    return [
        gr.update(choices=models),
        gr.update(choices=[BUILT_IN, *vaes]),
        gr.update(choices=[NO_ADAPTER, *own_adapters()]),
        *(gr.update(choices=loras) for _ in form.rows),
        gr.update(choices=embeddings),
    ]


def _seed_again(seed: int) -> Any:
    """The seed of the last picture, for the field."""
    if seed < 0:
        gr.Info("Nothing is drawn yet, so there is no seed to use again.", duration=5)
        return gr.skip()
    gr.Info(f"The next picture has the seed {seed} too.", duration=5)
    return seed


def _not_usable() -> tuple[str, str, str]:
    light = html.light("red", "it cannot be opened.", "Not usable")
    return light, "", html.light("red", "the VAE that is chosen cannot be opened; choose another one.", "Not ready")


def verdict_of(app: App, model: str, vae: str, adapter: str = NO_ADAPTER) -> tuple[str, str, str]:
    """As HTML: the light with its sentence, the line that says which VAE is in use, and the page's first line."""
    decoder = False
    if vae == BUILT_IN:
        light = html.light("green", "the model's own VAE.", "Fits")
    elif adapter != NO_ADAPTER:
        light = html.light("amber", f"decodes through the adapter '{adapter}'.", "Adapted")
    else:
        verdict = app.models.verdict(app.named("models", model), app.named("vae", vae))
        light = html.verdict(verdict)
        decoder = not verdict.encodes
        if not verdict.fits:
            first = f"the VAE '{vae}' does not fit the model '{model}', and drawing with it is refused. Choose another one."
            return light, html.words("This VAE is not in use: drawing with it is refused."), html.light("red", first, "Not ready")
    pipe = app.pipe(model, vae, None if adapter == NO_ADAPTER else adapter)
    words = in_use(pipe, decoder)
    return light, html.words(f"{words} {takes(app, model, pipe)}"), html.light("green", words, "Ready")


def takes(app: App, model: str, pipe: Any) -> str:
    """What drawing with a model takes of the memory, in a sentence."""
    place = find_model(app.named("models", model))
    layout = layout_of(place, app.models.stated.get(place))
    own = sum(weight.nbytes for part in pipe.loras.fuser.components.values() for weight in part.parameters())
    free = available(pipe.stage.device) + own  # which the model holds already
    return f"Memory: {need_of(layout, model, pipe.stage.dtype, pipe.stage.device, free=free)}."


def in_use(pipe: Any, decoder: bool = False) -> str:
    """VAE in use: name, hash, space, dtype. `decoder`: that alone of it, as its encoder makes other latents."""
    space = pipe.stage.space
    dtype = str(pipe.stage.dtype).removeprefix("torch.")
    name = pipe.vae_name or f"{pipe.name} (built-in)"
    name += f" through the adapter '{pipe.adapter_name}'" if pipe.adapter_name else " (its decoder)" if decoder else ""
    return f"VAE in use: {name}, {pipe.hashes['vae'][:10]}, {counted(space.channels, 'channel')} at 1/{space.downscale}, {dtype}."


def _choose(event: gr.SelectData) -> tuple[str | None, Any]:
    """The picture that was clicked on, for the buttons."""
    value = event.value["image"]["path"]
    return value, gr.update(value=value, interactive=True)


def _caption(recipe: Any) -> str:
    return f"{recipe.prompt.strip() or 'no prompt'}, seed {recipe.seed}"


NOTHING = "There is no picture yet: generate one first."


def _sent(path: str | None) -> tuple[Any, Any]:
    """The chosen picture for the field of img2img, which is unfolded."""
    if path is None:
        gr.Info(NOTHING)
        return gr.skip(), gr.skip()
    gr.Info(
        "The picture is in 'Begin from a picture (img2img)'. Change the prompt or the strength, and press Generate.", duration=6
    )
    return path, gr.update(open=True)


def _lora_rows_of(form: Form, path: str | None) -> list[Any]:
    """The adapters of the chosen picture, put into the rows, which are unfolded."""
    skip = [gr.skip()] * (1 + 3 * len(form.rows))
    if path is None:
        gr.Info(NOTHING)
        return skip
    with toast_errors():
        every = read(Path(path)).loras
        loras = {name: weight for name, weight in every.items() if not isinstance(weight, dict)}
        if not every:
            gr.Info("This picture was drawn without LoRA.")
        elif len(loras) < len(every):
            gr.Info("A LoRA with weights by block was left out; the rows take one weight each.")
        if not loras:
            return skip
        gr.Info(f"In the rows under LoRA: {', '.join(loras)[:200]}.", duration=6)
        filled = [(True, name, weight) for name, weight in list(loras.items())[: len(form.rows)]]
        rows = filled + [(False, gr.skip(), gr.skip())] * (len(form.rows) - len(filled))
        return [gr.update(open=True), *(value for row in rows for value in row)]
    return skip
