"""Parts of the playground: where its pictures come from, and where what comes out is shown."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from latentpipe.engine.jobs import Progress, Waiting
from latentpipe.explore import playground
from latentpipe.ui import html
from latentpipe.ui.state import BUILT_IN, LIGHT, App
from latentpipe.ui.theme import SAID
from latentpipe.ui.uploads import picture_input

PAIRS = [("red apple", "green apple"), ("cat face", "dog face"), ("smiling face", "full moon face"), ("tomato", "lemon")]


@dataclass(frozen=True)
class PlaygroundInputs:
    """The pictures and the VAE that everything here begins from."""

    first: gr.Image
    second: gr.Image
    vae: gr.Dropdown

    def stage(self, app: App, vae: str) -> Any:
        """The stage of the chosen VAE; of an installed name only."""
        return app.pipe().stage if vae == BUILT_IN else app.models.stage(app.named("vae", vae))


def build_inputs(app: App) -> PlaygroundInputs:
    """Two places for pictures, examples for both, and the VAE."""
    with gr.Row():
        first = picture_input("First", height=200, min_width=140, alt_text="First picture", elem_id="lp-play-first")
        second = picture_input("Second", height=200, min_width=140, alt_text="The second picture", elem_id="lp-play-second")
    gr.Markdown("**Examples** fill both places:")
    with gr.Row():
        for pair in PAIRS:
            gr.Button(" → ".join(pair), size="sm", min_width=140).click(partial(_pair, app, pair), None, [first, second], **LIGHT)
    vae = gr.Dropdown([BUILT_IN, *app.choices("vae")], value=BUILT_IN, label="VAE whose latents are moved", elem_id="lp-play-vae")
    return PlaygroundInputs(first, second, vae)


def _pair(app: App, captions: tuple[str, str]) -> list[str]:
    """Files of two emoji."""
    paths = [app.place(f"{caption.replace(' ', '-')}.png") for caption in captions]
    for path, caption in zip(paths, captions, strict=True):
        playground.bank_picture(caption).save(path)
    return [str(path) for path in paths]


def shown_event(event: Waiting | Progress) -> str:
    """The status of a job that waits or works."""
    if isinstance(event, Waiting):
        return html.waiting(event.ahead)
    return html.progress(event.done, event.total, event.what.capitalize(), event.eta_s)


def result(elem_id: str, empty: str) -> tuple[gr.HTML, gr.Image, gr.DownloadButton]:
    """Where a sheet is shown: status, picture, download."""
    status = gr.HTML(html.empty(empty), elem_id=f"{elem_id}-status", elem_classes=SAID)
    picture = gr.Image(
        label="Sheet", show_label=False, format="png", interactive=False, visible=False, elem_id=elem_id, buttons=["fullscreen"],
    )  # fmt: skip
    return status, picture, gr.DownloadButton("Download", size="sm", interactive=False, elem_id=f"{elem_id}-download")
