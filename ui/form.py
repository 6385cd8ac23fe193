"""The fields that say what to draw, and what they mean for `LatentPipeline`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from latentpipe import UserError
from latentpipe.compatibility.latent_adapter import own_adapters
from latentpipe.pipelines.metadata.recipe import MAX_PROMPT, MAX_SEED
from latentpipe.pipelines.sampling import MAX_SIDE, SCHEDULERS
from latentpipe.ui.state import BUILT_IN, App
from latentpipe.ui.theme import RUN, STOP
from latentpipe.ui.uploads import picture_input, picture_of
from latentpipe.utils.defaults import GUIDANCE, STEPS, STRENGTH

OWN = "the model's own"
NO_ADAPTER = "none"
MAX_BATCH = 16
LORA_ROWS = 4
STEPS_OF, GUIDANCES, STRENGTHS = (1, 100), (0.0, 15.0), (0.05, 1.0)  # least and most of the fields
Values = Mapping[Any, Any]  # the fields' values by field


@dataclass(frozen=True)
class Form:
    """The fields, and the places around them that say what is in use."""

    prompt: gr.Textbox
    run: gr.Button
    stop: gr.Button
    negative: gr.Textbox
    model: gr.Dropdown
    vae: gr.Dropdown
    adapter: gr.Dropdown
    steps: gr.Slider
    guidance: gr.Slider
    low: gr.Slider
    high: gr.Slider
    scheduler: gr.Dropdown
    width: gr.Number
    height: gr.Number
    seed: gr.Number
    dice: gr.Button
    reuse: gr.Button
    batch: gr.Slider
    begin: gr.Accordion
    """The folded part that holds the picture to begin from."""
    image: gr.Image
    strength: gr.Slider
    lora: gr.Accordion
    rows: tuple[tuple[gr.Checkbox, gr.Dropdown, gr.Slider], ...]
    partial: gr.Checkbox
    embeddings: gr.Dropdown
    refresh: gr.Button
    light: gr.HTML
    in_use: gr.HTML

    @property
    def inputs(self) -> set[Any]:
        """Every field that a drawing depends on."""
        named = (
            self.prompt, self.negative, self.model, self.vae, self.adapter, self.steps, self.guidance, self.low, self.high,
            self.scheduler, self.width, self.height, self.seed, self.batch, self.image, self.strength, self.partial,
            self.embeddings,
        )  # fmt: skip
        return {*named, *(field for row in self.rows for field in row)}

    def settings(self, values: Values) -> dict[str, Any]:
        """Arguments of `Engine.run` but the prompt; UserError for fields that do not go together, or a bad picture."""
        width, height, seed, low, high = (values[one] for one in (self.width, self.height, self.seed, self.low, self.high))
        if bool(width) != bool(height):
            raise UserError(f"Width is {width or 0} and Height {height or 0}; give both, or 0 for both: the model's own.")
        if low > high:
            raise UserError(f"Guidance from is {low:g} and Guidance to {high:g}; expected an end after the beginning.")
        return {
            "negative_prompt": values[self.negative] or "",
            "num_inference_steps": int(values[self.steps]),
            "guidance_scale": float(values[self.guidance]),
            "guidance_interval": (float(low), float(high)),
            "scheduler": None if values[self.scheduler] == OWN else values[self.scheduler],
            "size": (int(width), int(height)) if width and height else None,
            "seed": None if seed is None or int(seed) < 0 else int(seed),
            "n": int(values[self.batch]),
            "image": picture_of(values[self.image]) if values[self.image] else None,
            "strength": float(values[self.strength]),
            "loras": self.loras(values),
            "lora_partial": bool(values[self.partial]),
            "embeddings": list(values[self.embeddings] or ()),
        }

    def loras(self, values: Values) -> dict[str, float]:
        """Names and weights of the rows that are on."""
        found: dict[str, float] = {}
        for on, name, weight in self.rows:
            if values[on] and values[name]:
                if values[name] in found:
                    raise UserError(f"The LoRA '{values[name]}' is chosen in two rows; switch one of them off.")
                found[values[name]] = float(values[weight])
        return found


def build_prompt() -> tuple[gr.Textbox, gr.Button, gr.Button]:
    """The prompt with its buttons, where they shall stand."""
    prompt = gr.Textbox(
        label="Prompt", placeholder="What to draw, such as: red apple", lines=2, max_lines=6, autofocus=True,
        max_length=MAX_PROMPT, elem_id="lp-prompt",
        info="Ctrl+Enter draws. (word:1.3) weighs a part, <lora:name:0.7> adds a LoRA.",
    )  # fmt: skip
    with gr.Row():
        run = gr.Button("Generate", variant="primary", scale=3, min_width=120, elem_id="lp-generate", elem_classes=RUN)
        stop = gr.Button("Stop", scale=1, min_width=60, elem_id="lp-stop-generate", elem_classes=STOP)
    return prompt, run, stop


def build_form(app: App, prompt: gr.Textbox, run: gr.Button, stop: gr.Button) -> Form:
    """All the other fields, folded, where they shall stand."""
    with gr.Accordion("Advanced", open=False, elem_id="lp-advanced"):
        negative = gr.Textbox(label="Negative prompt", placeholder="What it should not show", lines=1, max_length=MAX_PROMPT)
        with gr.Row():
            steps = gr.Slider(*STEPS_OF, STEPS, step=1, label="Steps")
            guidance = gr.Slider(*GUIDANCES, GUIDANCE, step=0.1, label="Guidance", info="1 and less turn it off")
        with gr.Row():
            low = gr.Slider(0, 1, 0.0, step=0.01, label="Guidance from", info="share of the steps")
            high = gr.Slider(0, 1, 1.0, step=0.01, label="Guidance to")
        with gr.Row():
            scheduler = gr.Dropdown([OWN, *SCHEDULERS], value=OWN, label="Scheduler")
            batch = gr.Slider(1, MAX_BATCH, 1, step=1, label="Pictures", info="picture i has the seed + i")
        with gr.Row():
            width = gr.Number(0, label="Width", precision=0, minimum=0, maximum=MAX_SIDE, info="0: the model's own")
            height = gr.Number(0, label="Height", precision=0, minimum=0, maximum=MAX_SIDE, info="0: the model's own")
        with gr.Row():
            seed = gr.Number(
                -1,
                label="Seed",
                scale=2,
                min_width=200,
                precision=0,
                minimum=-1,
                maximum=MAX_SEED,
                info="-1: another one each time",
            )
            dice = gr.Button("🎲 Random", elem_id="lp-dice", size="sm", min_width=90)
            reuse = gr.Button("♻ Reuse last", elem_id="lp-reuse", size="sm", min_width=90)
    with gr.Accordion("Begin from a picture (img2img)", open=False, elem_id="lp-img2img") as begin:
        image = picture_input("Picture to begin from", height=220, elem_id="lp-image")
        strength = gr.Slider(*STRENGTHS, STRENGTH, step=0.01, label="Strength", info="how far it may move from the picture")
    model, vae, adapter, refresh, light, in_use = _vae_fields(app)
    lora, rows, partial, embeddings = _lora_rows(app)
    return Form(
        prompt, run, stop, negative, model, vae, adapter, steps, guidance, low, high, scheduler, width, height, seed, dice,
        reuse, batch, begin, image, strength, lora, rows, partial, embeddings, refresh, light, in_use,
    )  # fmt: skip


def _vae_fields(app: App) -> tuple[gr.Dropdown, gr.Dropdown, gr.Dropdown, gr.Button, gr.HTML, gr.HTML]:
    with gr.Accordion("Model and VAE", open=False, elem_id="lp-vae"):
        with gr.Row():
            model = gr.Dropdown(app.choices("models"), value=app.model, label="Model")
            vae = gr.Dropdown([BUILT_IN, *app.choices("vae")], value=BUILT_IN, label="VAE", elem_id="lp-vae-choice")
            adapter = gr.Dropdown([NO_ADAPTER, *own_adapters()], value=NO_ADAPTER, label="Adapter", info="from the VAE lab")
        light = gr.HTML(elem_id="lp-verdict")
        in_use = gr.HTML(elem_id="lp-in-use")
        refresh = gr.Button("↻ Look for new files", size="sm", elem_id="lp-refresh")
    return model, vae, adapter, refresh, light, in_use


def _lora_rows(
    app: App,
) -> tuple[gr.Accordion, tuple[tuple[gr.Checkbox, gr.Dropdown, gr.Slider], ...], gr.Checkbox, gr.Dropdown]:
    names = app.choices("lora")
    rows = []
    with gr.Accordion("LoRA and embeddings", open=False, elem_id="lp-lora") as lora:
        for index in range(LORA_ROWS):
            with gr.Row():
                on = gr.Checkbox(False, label=f"LoRA {index + 1} on", min_width=100)
                name = gr.Dropdown(names, value=names[index] if index < len(names) else None, label=f"LoRA {index + 1}")
                weight = gr.Slider(-2, 2, 1.0, step=0.05, label=f"Weight of LoRA {index + 1}")
            rows.append((on, name, weight))
        partial = gr.Checkbox(
            False, label="Take LoRA that fit in part", info="what is left out is told; also of those in the prompt",
            elem_id="lp-lora-partial",
        )  # fmt: skip
        embeddings = gr.Dropdown(
            app.choices("embeddings"), value=[], multiselect=True, label="Embeddings", elem_id="lp-embeddings",
            info="textual inversion: their names in a prompt count; as <name> they do so without being chosen here",
        )  # fmt: skip
    return lora, tuple(rows), partial, embeddings
