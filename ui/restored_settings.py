"""Settings of a picture taken over into the form: fitted to the model and to the form's limits, each change said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from latentpipe.compatibility.latent_adapter import own_adapters
from latentpipe.pipelines.denoise import size_unit
from latentpipe.pipelines.metadata.reader import Info, read_info
from latentpipe.pipelines.sampling import SCHEDULERS
from latentpipe.ui import html
from latentpipe.ui.form import GUIDANCES, NO_ADAPTER, OWN, STEPS_OF, STRENGTHS, Form
from latentpipe.ui.state import BUILT_IN, App, sentences_of, toast_errors
from latentpipe.ui.uploads import check_picture, name_of_file
from latentpipe.utils.setting_names import SHORT

LIMITS = {"num_inference_steps": STEPS_OF, "guidance_scale": GUIDANCES, "strength": STRENGTHS}


def fields_of(form: Form) -> list[Any]:
    """The fields that `taken_over` has values for, in its order."""
    return [
        form.prompt, form.negative, form.model, form.vae, form.adapter, form.steps, form.guidance, form.low, form.high,
        form.scheduler, form.width, form.height, form.seed, form.strength, *(field for row in form.rows for field in row),
    ]  # fmt: skip


def taken_over(app: App, form: Form, path: str | None, model: str) -> list[Any]:
    """Values for `fields_of` and the status beside them; `model` is the one that is chosen in the form.

    What is not installed, does not fit the model or is beyond the form's limits is told.
    """
    fields = fields_of(form)
    with toast_errors():
        if path is None:
            gr.Info("Drop a picture first.")
            return [gr.skip()] * (len(fields) + 1)
        check_picture(path)
        info = read_info(Path(path))
        changes = list(info.changed)
        names = _names(app, info, changes)
        drawn_by = names[0] if isinstance(names[0], str) else model
        pipe = app.pipe(drawn_by)
        same = info.recipe is not None and info.model == drawn_by
        have = fitted(info.settings, pipe.native_size, size_unit(pipe.host, pipe.stage), same, changes)
        low, high = have.get("guidance_interval", (0.0, 1.0))
        width, height = have.get("size", (0, 0))
        rows = _rows(app, form, info, changes)
        words = (
            f"The settings of {name_of_file(path)} are in the fields; Generate draws with them. {sentences_of(changes)}".strip()
        )
        gr.Info(words if len(words) < 300 else "The settings are in the tab Generate; what was changed stands there.", duration=8)
        return [
            info.prompt, info.negative_prompt, *names, have.get("num_inference_steps", gr.skip()),
            have.get("guidance_scale", gr.skip()), low, high,
            have.get("scheduler") or OWN, width, height, -1 if info.seed is None else info.seed,
            have.get("strength", gr.skip()), *(value for row in rows for value in row), html.words(words),
        ]  # fmt: skip
    raise AssertionError


def fitted(settings: dict[str, Any], native: tuple[int, int], unit: int, same: bool, changes: list[str]) -> dict[str, Any]:
    """The settings within the form's limits and, unless the `same` model drew the picture, at a size that the model takes.

    native   width and height in pixels that it was trained at; larger sizes shrink to it with their proportions kept
    unit     the number that both sides are multiples of
    changes  a sentence for each change is added here
    """
    found = dict(settings)
    for name, (low, high) in LIMITS.items():
        if name in found and not low <= found[name] <= high:
            found[name] = min(max(found[name], low), high)
            changes.append(
                f"{SHORT.get(name, name)} {settings[name]:g} became {found[name]:g}; the field takes {low:g} to {high:g}"
            )
    if (size := found.get("size")) and not same:
        share = min(1.0, native[0] / size[0], native[1] / size[1])
        found["size"] = tuple(max(unit, round(side * share / unit) * unit) for side in size)
        if found["size"] != tuple(size):
            was, now, own = (f"{width} x {height}" for width, height in (size, found["size"], native))
            changes.append(f"the size {was} became {now}: the model was trained at {own} pixels, in steps of {unit}")
    if found.get("scheduler") not in (None, *SCHEDULERS):
        changes.append(f"the scheduler '{str(found.pop('scheduler'))[:40]}' became the model's own")
    return found


def _names(app: App, info: Info, changes: list[str]) -> list[Any]:
    """Model, VAE and adapter, where they are installed; else what stands there already, the built-in one, none."""
    found: list[Any] = []
    for kind, name, default in (("models", info.model, gr.skip()), ("vae", info.vae, BUILT_IN)):
        known = name is not None and name in app.choices(kind)
        if name is not None and not known:
            what, other = ("model", "the one that is chosen stays") if kind == "models" else ("VAE", "the built-in one is used")
            changes.append(f"the {what} '{name[:80]}' is not installed; {other}")
        found.append(name if known else default)
    adapter = info.recipe.adapter if info.recipe else None
    if adapter is not None and adapter not in own_adapters():
        changes.append(f"the adapter '{adapter[:80]}' is not installed and was left out")
        adapter = None
    return [*found, adapter or NO_ADAPTER]


def _rows(app: App, form: Form, info: Info, changes: list[str]) -> list[tuple[Any, Any, Any]]:
    """Values for the rows of LoRA."""
    known = app.choices("lora")
    low, high = form.rows[0][2].minimum, form.rows[0][2].maximum
    rows = [
        (True, name, min(max(weight, low), high))
        for name, weight in info.loras.items()
        if name in known and not isinstance(weight, dict)
    ][: len(form.rows)]
    if lost := sorted(set(info.loras) - {row[1] for row in rows}):
        changes.append(f"these LoRA are not installed, have weights by block, or are too many: {', '.join(lost)[:200]}")
    for _, name, weight in rows:
        if weight != info.loras[name]:
            changes.append(f"the weight of '{name}' became {weight:g}; the rows take {low:g} to {high:g}")
    return rows + [(False, gr.skip(), gr.skip())] * (len(form.rows) - len(rows))
