"""The named endpoints: /txt2img /img2img /png_info /vae_list /lora_list /stop /health (and /vae_compare, of the VAE lab).

Every picture that comes back is a PNG with its recipe. Names are those of installed files; no argument is a path on this machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr

from latentpipe import Finished
from latentpipe.checkpoints.registry import available
from latentpipe.checkpoints.vae_io import open_vae
from latentpipe.engine.jobs import Waiting
from latentpipe.lora.state_dict.describe import lora_facts
from latentpipe.pipelines.metadata.recipe import MAX_SEED
from latentpipe.ui import lab
from latentpipe.ui import png_info as reading
from latentpipe.ui.form import MAX_BATCH
from latentpipe.ui.state import App, json_field, public, toast_errors
from latentpipe.ui.uploads import picture_input, picture_of
from latentpipe.utils.defaults import GUIDANCE, STEPS, STRENGTH
from latentpipe.utils.errors import UserError
from latentpipe.vae.latent_space import LatentSpace
from latentpipe.version import VERSION

DRAWING_S, WAITING_S = 1.0, 5.0  # an event costs gradio some ms, which the job on the device has to share
LORAS = {
    "type": "object", "additionalProperties": {"anyOf": [{"type": "number"}, {"type": "string"}]},
    "description": 'names and weights; "0.7:partial" for one that may fit in part',
}  # fmt: skip
PUBLIC: dict[str, Any] = {"api_visibility": "public", "show_progress": "hidden"}


def build(app: App) -> None:
    """Add the endpoints to the page; their fields are not shown."""
    with gr.Row(visible=False):
        _drawing(app)
        _reading(app)
        lab.add_endpoint(app)
        _lists(app)


def _drawing(app: App) -> None:
    def txt2img(
        prompt: str, negative: str, steps: float, guidance: float, seed: float, n: float, width: float, height: float,
        scheduler: str, model: str, vae: str, loras: Any, request: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        """Draw pictures of a prompt.

        Returns the PNG files, and a list with the recipe of each. seed -1: a random one; width and height 0: the model's own;
        scheduler, model and vae "": the model's own; loras: {"name": weight}, beside <lora:name:weight> in the prompt. A LoRA
        that may fit in part: {"name": "0.7:partial"} or <lora:name:0.7:partial>; a message says what is left out.
        """
        settings = _settings(negative, steps, guidance, seed, n, width, height, scheduler, loras)
        yield from _draw(app, request, prompt, model, vae, settings)

    def img2img(
        image: str, strength: float, prompt: str, negative: str, steps: float, guidance: float, seed: float, n: float,
        width: float, height: float, scheduler: str, model: str, vae: str, loras: Any, request: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        """Draw pictures of a prompt that begin from a picture.

        As txt2img; strength, over 0 to 1, says how far they may move from it.
        """
        with toast_errors():
            settings = _settings(negative, steps, guidance, seed, n, width, height, scheduler, loras)
            settings |= {"image": picture_of(image), "strength": STRENGTH if strength is None else float(strength)}
        yield from _draw(app, request, prompt, model, vae, settings)

    def fields() -> list[Any]:
        return [
            gr.Textbox(label="prompt"), gr.Textbox("", label="negative"), gr.Number(STEPS, label="steps"),
            gr.Number(GUIDANCE, label="guidance"), gr.Number(-1, label="seed"), gr.Number(1, label="n"),
            gr.Number(0, label="width"), gr.Number(0, label="height"), gr.Textbox("", label="scheduler"),
            gr.Textbox("", label="model"), gr.Textbox("", label="vae"), json_field("loras", {}, LORAS),
        ]  # fmt: skip

    outputs = [gr.Files(label="pictures", type="filepath"), gr.JSON(label="recipes")]
    button = gr.Button()
    button.click(txt2img, fields(), outputs, api_name="txt2img", concurrency_limit=None, **PUBLIC)
    first = [picture_input("image", said=False), gr.Number(STRENGTH, label="strength")]
    button.click(img2img, [*first, *fields()], outputs, api_name="img2img", concurrency_limit=None, **PUBLIC)


def _settings(
    negative: str, steps: float, guidance: float, seed: float, n: float, width: float, height: float, scheduler: str, loras: Any
) -> dict[str, Any]:
    """Arguments of `Engine.run`, within the limits of the interface."""
    with toast_errors():
        numbers = {"steps": steps, "seed": seed, "n": n, "width": width, "height": height}
        for name, number in numbers.items():
            if number is None or not math.isfinite(number) or int(number) != number:
                raise UserError(f"{name} is {number}; expected a whole number.")
        if guidance is None:
            raise UserError("guidance is missing; expected 0 to 100.")
        if bool(width) != bool(height):
            raise UserError(f"width is {width:g} and height {height:g}; give both, or 0 for both: the model's own.")
        if not 1 <= n <= MAX_BATCH:
            raise UserError(f"n is {n}; expected 1 to {MAX_BATCH} pictures.")
        if not -1 <= seed <= MAX_SEED:
            raise UserError(f"seed is {seed}; expected 0 to {MAX_SEED}, or -1 for a random one.")
        weights = _weights(loras)
    return {
        "negative_prompt": negative or "", "num_inference_steps": int(steps), "guidance_scale": guidance,
        "seed": None if seed < 0 else int(seed),
        "n": int(n), "size": (int(width), int(height)) if width and height else None, "scheduler": scheduler or None,
        "loras": weights, "lora_partial": any(isinstance(weight, str) for weight in (loras or {}).values()),
    }  # fmt: skip


def _weights(loras: Any) -> dict[str, float]:
    """Names and weights of a request, where a weight is a number or, of a LoRA that may fit in part, "0.7:partial"."""
    found: dict[str, float] = {}
    try:
        for name, weight in (loras or {}).items():
            if isinstance(weight, bool) or not isinstance(weight, int | float | str):
                raise ValueError
            found[name] = float(weight.removesuffix(":partial") if isinstance(weight, str) else weight)
            if isinstance(weight, str) and not weight.endswith(":partial"):
                raise ValueError
    except (AttributeError, ValueError):
        raise UserError('loras is no object of names and weights; expected such as {"flat": 0.8}.') from None
    return found


def _draw(app: App, request: gr.Request, prompt: str, model: str, vae: str, settings: dict[str, Any]) -> Iterator[Any]:
    """Empty results now and then while it draws, so that a client that leaves is noticed; then the files and their recipes."""
    told_at = time.monotonic()
    with toast_errors() as notes:
        names = app.names(model, vae)
        for event in app.jobs.draw(request, lambda: app.pipe(model, vae), prompt or "", notes, False, names, **settings):
            if isinstance(event, Finished):
                recipes = [picture.recipe.model_dump(mode="json") for picture in event.pictures]
                yield [app.keep(picture) for picture in event.pictures], recipes
            elif (now := time.monotonic()) - told_at >= (WAITING_S if isinstance(event, Waiting) else DRAWING_S):
                told_at = now
                yield None, None


def _reading(app: App) -> None:
    def png_info(image: str | None) -> dict[str, Any]:
        """The settings inside a picture of latentpipe, A1111, ComfyUI, Fooocus, InvokeAI or NovelAI."""
        with toast_errors():
            if image is None:
                raise UserError("image is missing; give an uploaded file.")
            return reading.info_json(reading.info_of(image))
        raise AssertionError

    gr.Button().click(png_info, [picture_input("image", said=False)], [gr.JSON(label="settings")], api_name="png_info", **PUBLIC)


def _lists(app: App) -> None:
    def vae_list() -> list[dict[str, Any]]:
        """Installed VAEs: name, latent channels, downscale."""
        return [_vae_facts(name) for name in available("vae")]

    def lora_list() -> list[dict[str, Any]]:
        """Installed LoRA files: name, and what each says about itself."""
        return [{"name": name, **lora_facts(path)} for name, path in available("lora").items()]

    def stop(request: gr.Request) -> int:
        """Stop the jobs of this session (session_hash); returns how many there were. Pictures with steps done are returned."""
        return app.jobs.stop(request)

    def health() -> dict[str, Any]:
        """Whether the model is loaded, its name, how many jobs run or wait, and the version."""
        state = "failed" if app.failure else "ready" if app.models.is_open(app.model) else "loading"
        return {"status": state, "model": app.model, "jobs": app.jobs.length, "version": VERSION}

    for function in (vae_list, lora_list, stop, health):
        gr.Button().click(function, None, [gr.JSON(label="result")], api_name=function.__name__, queue=False, **PUBLIC)


def _vae_facts(name: str) -> dict[str, Any]:
    try:
        space: LatentSpace = open_vae(available("vae")[name]).space
    except UserError as error:
        return {"name": name, "error": public(error)}
    return {"name": name, "channels": space.channels, "downscale": space.downscale}
