"""PNG info: what made a picture, ours or another program's; take its settings over, or draw it again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from latentpipe import replay
from latentpipe.adapters import own_adapters
from latentpipe.jobs import Done, Progress, Report, Waiting
from latentpipe.metadata import Info, read_info
from latentpipe.recipe import read
from latentpipe.ui import show
from latentpipe.ui.form import NO_ADAPTER, OWN, Form
from latentpipe.ui.state import BUILT_IN, HEAVY, LIGHT, App, told, wire_stop
from latentpipe.ui.theme import RUN, STOP
from latentpipe.ui.uploads import check_picture, picture_input

EMPTY = "Drop a picture of latentpipe, A1111, ComfyUI, Fooocus, InvokeAI or NovelAI: its settings appear here."


@dataclass(frozen=True)
class PngInfo:
    """The tab: where other tabs send a picture to, and the button that takes its settings over."""

    image: gr.Image
    restore: gr.Button


def build(app: App, form: Form) -> PngInfo:
    """Lay the tab out and wire it; `form` is the one that settings are taken over into."""
    with gr.Row(elem_classes="lp-wide"):
        with gr.Column(scale=4, min_width=320):
            image = picture_input("Picture with settings", height=300, elem_id="lp-info-image")
            with gr.Row():
                restore = gr.Button("Use these settings", elem_id="lp-restore")
                again = gr.Button("Draw it again (replay)", variant="primary", elem_id="lp-replay", elem_classes=RUN)
                stop = gr.Button("Stop", elem_classes=STOP)
            with gr.Accordion("It began from another picture (img2img)", open=False):
                source = picture_input("That picture", height=200, elem_id="lp-info-source")
        with gr.Column(scale=6, min_width=320):
            verdict = gr.HTML(elem_id="lp-replay-verdict")
            replayed = gr.Image(
                label="Drawn again", alt_text="the picture drawn again", format="png", interactive=False, visible=False,
                height=260, elem_id="lp-replayed", buttons=["download", "fullscreen"],
            )  # fmt: skip
            facts = gr.HTML(show.empty(EMPTY), elem_id="lp-facts")
            raw = gr.Textbox(label="As it stands in the file", lines=4, max_lines=12, interactive=False, buttons=["copy"])
    image.change(lambda path: look(path), [image], [facts, raw, verdict, replayed], **LIGHT)

    def run(path: str | None, other: str | None, request: gr.Request) -> Iterator[tuple[Any, Any]]:
        yield from _replay(app, path, other, request)

    done = again.click(run, [image, source], [verdict, replayed], show_progress="hidden", trigger_mode="once", **HEAVY)
    done.failure(lambda: show.words("It was not drawn again."), None, [verdict], **LIGHT)
    wire_stop(app, stop)
    fields = [
        form.prompt, form.negative, form.model, form.vae, form.adapter, form.steps, form.guidance, form.low, form.high,
        form.scheduler, form.width, form.height, form.seed, form.strength, *(field for row in form.rows for field in row),
    ]  # fmt: skip
    restore.click(lambda path: _restored(app, form, path), [image], fields, **LIGHT)
    return PngInfo(image, restore)


def info_of(path: str) -> Info:
    """The settings inside an uploaded picture; UserError says why there are none."""
    check_picture(path)
    return read_info(Path(path))


def look(path: str | None) -> tuple[str, str, str, Any]:
    """The settings as a table, and the text as it stands in the file."""
    hidden = gr.update(value=None, visible=False)
    if path is None:
        return show.empty(EMPTY), "", "", hidden
    with told():
        info = info_of(path)
        rows = [("Written by", info.source), ("Prompt", info.prompt), ("Negative prompt", info.negative or "-")]
        rows += [(name.replace("_", " ").capitalize(), _words(value)) for name, value in info.settings.items()]
        rows += [("Seed", "-" if info.seed is None else info.seed), ("Picture", f"{info.width} x {info.height} pixels")]
        rows += [("Model", info.model or "-"), ("VAE", info.vae or "built in")]
        rows += [("LoRA", ", ".join(f"{name}: {weight}" for name, weight in info.loras.items()) or "-")]
        rows += [("Note", sentence) for sentence in info.changed]
        if info.recipe is not None:
            rows += [(f"Hash of {part}", digest[:16]) for part, digest in info.recipe.hashes.items()]
        return show.table("Settings of this picture", ["Setting", "Value"], rows), info.raw, "", hidden
    return show.empty(EMPTY), "", "", hidden


def as_json(info: Info) -> dict[str, Any]:
    """The settings for a program."""
    found = asdict(info)
    found["recipe"] = info.recipe.model_dump(mode="json") if info.recipe else None
    return found


def _words(value: Any) -> str:
    return (" x " if isinstance(value[0], int) else " to ").join(map(str, value)) if isinstance(value, tuple) else str(value)


def _replay(app: App, path: str | None, source: str | None, request: gr.Request) -> Iterator[tuple[Any, Any]]:
    """Draw the picture again and say how far it is from the old one."""
    hidden = gr.update(visible=False)
    with told() as notes:
        if path is None:
            gr.Info("Drop a picture first.")
            return
        for each in (path, source):
            if each is not None:
                check_picture(each)
        other = Path(source) if source else None

        def work(report: Report) -> Any:
            old = read(Path(path))
            app.jobs.allow(old.width, old.height, old.steps, old.batch_size)
            return replay(Path(path), source=other, report=report, device=app.models.device)

        for event in app.jobs.run(request, work, notes):
            if isinstance(event, Done):
                yield _verdict(event.result), gr.update(value=app.keep(event.result.picture), visible=True)
            elif isinstance(event, Progress):
                yield show.progress(event.done, event.total, "Drawing again, step", event.eta_s), hidden
            elif isinstance(event, Waiting):
                yield show.words(f"In the queue: {event.ahead} before you."), hidden
        return
    yield "", hidden


def _verdict(result: Any) -> str:
    if result.difference == 0:
        return show.light("green", "every pixel is the same.", "Identical")
    cause = "; ".join(result.causes) or "no cause found: same machine, versions and threads"
    return show.light(
        "amber", f"largest difference {result.difference} of 255 grey levels. What has changed: {cause}.", "Differs"
    )


def _restored(app: App, form: Form, path: str | None) -> list[Any]:
    """Values for the form's fields; a name that is not installed here is told and left out."""
    skipped: list[Any] = [gr.skip()] * (14 + 3 * len(form.rows))
    with told():
        if path is None:
            gr.Info("Drop a picture first.")
            return skipped
        info = info_of(path)
        have = info.settings
        low, high = have.get("guidance_interval", (0.0, 1.0))
        width, height = have.get("size", (0, 0))
        loras = {name: weight for name, weight in info.loras.items() if not isinstance(weight, dict)}
        known = app.choices("lora")
        rows = [(True, name, weight) for name, weight in loras.items() if name in known][: len(form.rows)]
        if lost := sorted(set(info.loras) - {row[1] for row in rows}):
            gr.Info(f"These LoRA are not installed, have weights by block, or are too many; left out: {', '.join(lost)[:200]}.")
        rows += [(False, gr.skip(), gr.skip())] * (len(form.rows) - len(rows))
        gr.Info("The settings are in the tab Generate.")
        return [
            info.prompt, info.negative, _installed(app, "models", info.model), _installed(app, "vae", info.vae, BUILT_IN),
            _adapter(info),
            have.get("steps", gr.skip()), have.get("guidance", gr.skip()), low, high, have.get("scheduler") or OWN, width, height,
            -1 if info.seed is None else info.seed, have.get("strength", gr.skip()), *(value for row in rows for value in row),
        ]  # fmt: skip
    return skipped


def _adapter(info: Info) -> str:
    """The adapter of our own picture, where it is installed."""
    name = info.recipe.adapter if info.recipe else None
    if name is not None and name not in own_adapters():
        gr.Info(f"The adapter '{name[:80]}' is not installed and was left out.")
        return NO_ADAPTER
    return name or NO_ADAPTER


def _installed(app: App, kind: str, name: str | None, default: Any = None) -> Any:
    """The name, where it is installed; else the default, or what stands there already."""
    if name is not None and name in app.choices(kind):
        return name
    if name is not None:
        gr.Info(f"The {kind.removesuffix('s')} '{name[:80]}' is not installed; another one is used.")
    return default if default is not None else gr.skip()
