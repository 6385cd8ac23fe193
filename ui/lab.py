"""VAE lab: the same pictures through several VAEs, looked at and measured; whether they fit the model; adapters where not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from latentpipe import UserError
from latentpipe.checkpoints.registry import available
from latentpipe.engine.jobs import Done
from latentpipe.evaluate.vae_lab import MOST, Laboratory, compare_pictures, decode_same, example_pictures
from latentpipe.pipelines.metadata.recipe import save_png
from latentpipe.train.latent_adapter import fit_and_save
from latentpipe.ui import html as show
from latentpipe.ui.failures import remembered, said_why
from latentpipe.ui.lab_view import comparison_json, comparison_sheet, figures, pictures_html, pictures_of, summary, words_of
from latentpipe.ui.state import HEAVY, LIGHT, App, json_field, toast_errors, wire_stop
from latentpipe.ui.theme import RUN, SAID, STOP
from latentpipe.ui.uploads import readable
from latentpipe.utils.errors import counted
from latentpipe.utils.images import fit_square, to_images
from latentpipe.utils.progress import ProgressCallback

EMPTY = "Drop pictures, or press 'Use example pictures', choose VAEs, and press Compare."
SIDES = {"what suits all": 0, "64": 64, "128": 128, "256": 256, "512": 512}
ADAPTER_SIDE = 64
MOST_SIDE = 1024


@dataclass(frozen=True)
class Lab:
    """The tab: where other tabs send pictures to."""

    files: gr.File


def build(app: App, model: gr.Dropdown) -> Lab:
    """Lay the tab out and wire it; `model` is the one that verdicts and adapters are for."""
    names = app.choices("vae")
    usual = [name for name in (app.model, f"{app.model}-decoder-ft") if name in names]
    with gr.Row(elem_classes="lp-wide"):
        with gr.Column(scale=4, min_width=320):
            files = gr.File(label=f"Pictures (at most {MOST})", file_count="multiple", height=150, elem_id="lp-lab-files")
            examples = gr.Button("Use example pictures", size="sm", elem_id="lp-lab-examples")
            vaes = gr.Dropdown(
                names, value=usual if len(usual) > 1 else names[:2], multiselect=True, label="VAEs", elem_id="lp-lab-vaes"
            )
            with gr.Row():
                side = gr.Dropdown(list(SIDES), value="what suits all", label="Side in pixels", scale=2, min_width=120)
                refresh = gr.Button("↻ New files", size="sm", scale=1, min_width=80, elem_id="lp-lab-refresh")
            with gr.Row():
                run = gr.Button("Compare", variant="primary", scale=3, min_width=120, elem_id="lp-lab-run", elem_classes=RUN)
                stop = gr.Button("Stop", scale=1, min_width=60, elem_classes=STOP)
            same = gr.Button("Decode the same latents with each", elem_id="lp-lab-same")
            with gr.Accordion("An adapter, where a VAE has another space", open=False, elem_id="lp-lab-adapter"):
                gr.Markdown("Fitted from the model's own VAE to the VAE below, on the pictures above (at least 10).")
                target = gr.Dropdown(names, value=names[-1] if names else None, label="To this VAE")
                fit = gr.Button("Fit an adapter", elem_id="lp-lab-fit")
                ladder = gr.HTML(elem_id="lp-lab-ladder")
        with gr.Column(scale=8, min_width=320):
            status = gr.HTML(show.empty(EMPTY), elem_id="lp-lab-status", elem_classes=SAID, padding=False)
            verdicts = gr.HTML(elem_id="lp-lab-verdicts")
            numbers = gr.HTML(elem_id="lp-lab-numbers")
            with gr.Row(visible=False, elem_id="lp-lab-pair") as pair:
                first = gr.Dropdown([], label="Left", min_width=120)
                second = gr.Dropdown([], label="Right", min_width=120)
                which = gr.Number(1, label="Picture", precision=0, minimum=1, maximum=MOST, min_width=80)
            slider = gr.ImageSlider(
                label="Left and right of the handle (both stand below as well)", format="png", visible=False, interactive=False,
                height=420, elem_id="lp-lab-slider",
            )  # fmt: skip
            pictures = gr.HTML(elem_id="lp-lab-pictures")
    found = gr.State(None)
    wired = _Parts(files, vaes, side, model, status, verdicts, numbers, pair, first, second, which, slider, pictures, found)
    files.upload(readable, [files], [files], **LIGHT)
    examples.click(lambda: _example_files(app), None, [files], **LIGHT)
    refresh.click(lambda: _refreshed(app), None, [vaes, target], **LIGHT)
    _wire_compare(app, run, wired)
    _wire_decode(app, same, wired)
    _wire_fit(app, fit, wired, target, ladder)
    wire_stop(app, stop)
    gr.on([first.change, second.change, which.change], _slid, [found, first, second, which], [slider], **LIGHT)
    return Lab(files)


def _refreshed(app: App) -> list[Any]:
    """The two fields with the VAEs that are installed now."""
    names = app.choices("vae")
    gr.Info(f"Found: {counted(len(names), 'VAE')}.", duration=5)
    return [gr.update(choices=names)] * 2


@dataclass(frozen=True)
class _Parts:
    files: Any
    vaes: Any
    side: Any
    model: Any
    status: Any
    verdicts: Any
    numbers: Any
    pair: Any
    first: Any
    second: Any
    which: Any
    slider: Any
    pictures: Any
    found: Any


def _wire_compare(app: App, run: gr.Button, parts: _Parts) -> None:
    def compare(files: list[str] | None, vaes: list[str], side: str, model: str, request: gr.Request) -> Iterator[dict[Any, Any]]:
        with remembered(app, request), toast_errors() as notes:
            given, names = pictures_of(files), [app.named("vae", name) for name in vaes or []]
            if len(names) < 2:
                raise UserError("Choose two or more VAEs to compare.")

            def work(report: ProgressCallback) -> tuple[Laboratory, str]:
                lab = compare_pictures(given, names, SIDES[side] or None, report, app.models.stage)
                return lab, _verdicts(app, model, names)

            for event in app.jobs.run(request, work, notes):
                if isinstance(event, Done):
                    yield compared(*event.result)
                else:
                    yield {parts.status: words_of(event)}
            return
        yield {parts.status: show.words("Stopped.")}

    def compared(lab: Laboratory, verdicts: str) -> dict[Any, Any]:
        names = [vae.name for vae in lab.vaes]
        kept = (lab.originals, {vae.name: vae.pictures for vae in lab.vaes})
        return {
            parts.status: show.words(summary(lab)), parts.verdicts: verdicts, parts.numbers: figures(lab), parts.found: kept,
            parts.pair: gr.update(visible=True), parts.pictures: pictures_html(lab), parts.which: gr.update(value=1),
            parts.first: gr.update(choices=["original", *names], value=names[0]),
            parts.second: gr.update(choices=["original", *names], value=names[1]),
            parts.slider: gr.update(value=(lab.vaes[0].pictures[0], lab.vaes[1].pictures[0]), visible=True),
        }  # fmt: skip

    inputs = [parts.files, parts.vaes, parts.side, parts.model]
    outputs = [
        parts.status, parts.verdicts, parts.numbers, parts.pair, parts.first, parts.second, parts.which, parts.slider,
        parts.pictures, parts.found,
    ]  # fmt: skip
    done = run.click(compare, inputs, outputs, show_progress="hidden", trigger_mode="once", **HEAVY)
    done.failure(said_why(app, "Nothing was compared."), None, [parts.status], **LIGHT)


def _wire_decode(app: App, same: gr.Button, parts: _Parts) -> None:
    def decode(files: list[str] | None, vaes: list[str], side: str, model: str, request: gr.Request) -> Iterator[dict[Any, Any]]:
        with remembered(app, request), toast_errors() as notes:
            given, names = pictures_of(files), [app.named("vae", name) for name in vaes or []]
            source = _own_vae(app, model)

            def work(report: ProgressCallback) -> Any:
                return decode_same(given, source, names, SIDES[side] or None, report, app.models.stage)

            for event in app.jobs.run(request, work, notes):
                if isinstance(event, Done):
                    yield decoded(model, *event.result)
                else:
                    yield {parts.status: words_of(event)}
            return
        yield {parts.status: show.words("Stopped.")}

    def decoded(source: str, originals: list[Image.Image], found: Any) -> dict[Any, Any]:
        entries = [(picture, f"original {i}") for i, picture in enumerate(originals, 1)]
        lines = [
            show.words(f"The latents that the VAE of '{source}' makes of the pictures, decoded by each VAE:"),
            show.pictures(entries),
        ]
        for name, result in found:
            if isinstance(result, str):
                lines.append(show.words(f"{name}: not decoded. {result}"))
            else:
                lines.append(show.pictures([(picture, f"{name}, picture {i}") for i, picture in enumerate(result, 1)]))
        hidden = gr.update(visible=False)
        return {
            parts.status: show.words("Decoded."), parts.pictures: "".join(lines), parts.verdicts: "", parts.numbers: "",
            parts.pair: hidden, parts.slider: hidden, parts.found: None,
        }  # fmt: skip

    inputs = [parts.files, parts.vaes, parts.side, parts.model]
    outputs = [parts.status, parts.verdicts, parts.numbers, parts.pair, parts.slider, parts.pictures, parts.found]
    done = same.click(decode, inputs, outputs, show_progress="hidden", trigger_mode="once", **HEAVY)
    done.failure(said_why(app, "Nothing was decoded."), None, [parts.status], **LIGHT)


def _own_vae(app: App, model: str) -> Path:
    """The folder of a model's own VAE, which not every model shares its name with."""
    return available("models")[app.named("models", model)] / "vae"


def _wire_fit(app: App, fit: gr.Button, parts: _Parts, target: gr.Dropdown, ladder: gr.HTML) -> None:
    def run(files: list[str] | None, model: str, name: str | None, request: gr.Request) -> Iterator[str]:
        with remembered(app, request), toast_errors() as notes:
            given = pictures_of(files)
            source, to = _own_vae(app, model), app.named("vae", name or "")

            def work(report: ProgressCallback) -> Any:
                images = to_images([fit_square(picture, ADAPTER_SIDE) for picture in given])
                return fit_and_save(source, to, images, "pictures given in the VAE lab", report=report)

            for event in app.jobs.run(request, work, notes):
                if not isinstance(event, Done):
                    yield words_of(event)
                    continue
                scores, path = event.result
                rows = [
                    (one.name, f"{one.psnr_db:.1f} dB ({one.low:.1f} to {one.high:.1f})", f"{one.r2:.3f}", f"{one.parameters:,}")
                    for one in [*scores.scores, scores.bound]
                ]
                caption = f"{counted(scores.fitted_on, 'picture')} fitted, {scores.held_out} others scored, {scores.size_px} px"
                words = f"Chosen: {scores.chosen}. Saved as the adapter '{path.stem}'; the tab Generate offers it."
                yield show.words(words) + show.table(caption, ["Rung", "PSNR, 95 %", "R²", "Parameters"], rows)
            return
        yield show.words("Stopped; nothing was saved.")

    done = fit.click(run, [parts.files, parts.model, target], [ladder], show_progress="hidden", trigger_mode="once", **HEAVY)
    done.failure(said_why(app, "No adapter was fitted."), None, [ladder], **LIGHT)


def _verdicts(app: App, model: str, names: Sequence[str]) -> str:
    """A light for each VAE: whether the chosen model can draw through it."""
    lights = [show.verdict(app.models.verdict(app.named("models", model), name), f"{name}: ") for name in names]
    return f"<p>For the model '{show.text(model)}':</p>" + "<br>".join(lights)


def _slid(found: Any, first: str, second: str, which: float) -> Any:
    if found is None:
        return gr.skip()
    originals, rebuilt = found
    if not {first, second} <= {"original", *rebuilt}:  # the fields are filled one after the other
        return gr.skip()
    index = min(max(int(which or 1), 1), len(originals)) - 1
    pair = [originals[index] if name == "original" else rebuilt[name][index] for name in (first, second)]
    return gr.update(value=tuple(pair))


def _example_files(app: App) -> list[str]:
    paths = []
    for index, picture in enumerate(example_pictures(12), 1):
        path = app.place(f"example-{index}.png")
        save_png(picture, path)
        paths.append(str(path))
    return paths


def add_endpoint(app: App) -> None:
    """/vae_compare: pictures and VAEs to figures and a sheet."""

    def vae_compare(pictures: list[str], vaes: list[str], side: float, request: gr.Request) -> Iterator[Any]:
        """Rebuild pictures by each of the VAEs (installed names), and measure.

        Returns the figures, and a PNG sheet of originals, reconstructions and differences. side 0: what suits all.
        """
        with toast_errors() as notes:
            if not isinstance(vaes, list) or not vaes or not all(isinstance(name, str) for name in vaes):
                raise UserError('vaes is no list of names; expected such as ["emoji", "emoji-tiny"].')
            names = [app.named("vae", name) for name in dict.fromkeys(vaes)]
            if side and not 1 <= side <= MOST_SIDE:
                raise UserError(f"side is {side:g}; expected 1 to {MOST_SIDE} pixels, or 0 for what suits all.")
            given = pictures_of(pictures)

            def work(report: ProgressCallback) -> Laboratory:
                return compare_pictures(given, names, int(side or 0) or None, report, app.models.stage)

            for event in app.jobs.run(request, work, notes):
                if isinstance(event, Done):
                    path = app.place("compare.png")
                    save_png(comparison_sheet(event.result), path)
                    yield comparison_json(event.result), str(path)
                else:
                    yield None, None

    names = json_field("vaes", [], {"type": "array", "items": {"type": "string"}, "description": "names"})
    fields = [gr.File(label="pictures", file_count="multiple"), names, gr.Number(0, label="side")]
    outputs = [gr.JSON(label="figures"), gr.File(label="sheet", type="filepath")]
    gr.Button().click(
        vae_compare, fields, outputs, api_name="vae_compare", concurrency_limit=None, api_visibility="public",
        show_progress="hidden",
    )  # fmt: skip
