"""The page: one tab for each thing to do. Prompt -> latents -> pictures happens in latentpipe; here are blocks and callbacks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from latentpipe import UserError
from latentpipe.ui import api, generate, grid, html, lab, playground, png_info
from latentpipe.ui.state import LIGHT, App, public
from latentpipe.version import VERSION

HEAD = f"""<div class="lp-head"><h1>latentpipe</h1>
<p>Draw, swap the VAE with proof, and see what a latent space can do. Version {VERSION}, on this machine only.</p></div>"""


def build(app: App) -> gr.Blocks:
    """All tabs, wired; the model loads in the background from here on."""
    loading = _load_in_background(app)
    with gr.Blocks(title="latentpipe", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(HEAD, padding=False)
        state = gr.HTML(html.light("wait", f"Loading the model '{app.model}' ..."), elem_id="lp-state", padding=False)
        with gr.Tabs(elem_id="lp-tabs") as tabs:
            with gr.Tab("Generate", id="generate"):
                drawing = generate.build(app, state)
            with gr.Tab("VAE lab", id="lab"):
                laboratory = lab.build(app, drawing.form.model)
            with gr.Tab("Playground", id="playground"):
                playground.build(app)
            with gr.Tab("Grid", id="grid"):
                grid.build(app)
            with gr.Tab("PNG info", id="info"):
                info = png_info.build(app, drawing.form, drawing.status)
        drawing.to_replay.click(lambda path: _sent(path, path, "info"), [drawing.chosen], [info.image, tabs], **LIGHT)
        drawing.to_lab.click(lambda path: _sent(path, [path], "lab"), [drawing.chosen], [laboratory.files, tabs], **LIGHT)
        info.restored.success(lambda path: gr.Tabs(selected="generate") if path else gr.skip(), [info.image], [tabs], **LIGHT)
        api.build(app)

        async def ready() -> AsyncIterator[str]:
            while loading.is_alive():
                yield html.light("wait", f"Loading the model '{app.model}' ...")
                await asyncio.sleep(0.5)
            yield _state_of(app)

        page.load(ready, None, [state], show_progress="hidden", concurrency_limit=None, api_visibility="private")
        page.unload(app.jobs.leave)
    return page


def _sent(path: str | None, value: Any, tab: str) -> tuple[Any, Any]:
    """The chosen picture for a field of another tab, and that tab."""
    if path is None:
        gr.Info(generate.NOTHING)
        return gr.skip(), gr.skip()
    return value, gr.Tabs(selected=tab)


def _load_in_background(app: App) -> threading.Thread:
    def load() -> None:
        try:
            app.pipe()
        except UserError as error:
            app.failure = public(error)

    thread = threading.Thread(target=load, name="latentpipe_load", daemon=True)
    thread.start()
    return thread


def _state_of(app: App) -> str:
    """Ready, with the VAE in use; or why not."""
    if app.failure:
        return html.light("red", app.failure, "Not loaded")
    return html.light("green", generate.in_use(app.pipe()), "Ready")
