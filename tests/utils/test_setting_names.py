"""Settings have diffusers' names in Python, and short ones in files, on the command line and on the page."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline

from latentpipe.cli.generate import Generate
from latentpipe.engine.xy_grid.plot import Setup, plot
from latentpipe.evaluate.prompt_adherence import evaluate
from latentpipe.explore.inpaint import inpaint
from latentpipe.explore.interpolate import between_prompts
from latentpipe.pipelines.metadata.recipe import Recipe
from latentpipe.pipelines.sampling import Settings, settings_of
from latentpipe.utils.errors import UserError
from latentpipe.utils.setting_names import IN_PYTHON, in_python, shortened, with_short_names


def test_the_names_in_python_are_those_of_diffusers() -> None:
    theirs = set(inspect.signature(StableDiffusionPipeline.__call__).parameters)
    assert set(IN_PYTHON.values()) <= theirs
    assert set(IN_PYTHON.values()) <= {one.name for one in fields(Settings)}


@pytest.mark.parametrize("model", [Recipe, Setup])
def test_files_and_options_keep_the_short_names(model: Any) -> None:
    assert set(IN_PYTHON) <= set(model.model_fields)
    assert set(IN_PYTHON) <= {one.name for one in fields(Generate)}


def test_what_a_sheet_keeps_becomes_settings() -> None:
    kept = Setup(prompt="x", seed=1, negative="bar", steps=7, guidance=2.5)
    assert settings_of(kept.settings) == Settings(negative_prompt="bar", num_inference_steps=7, guidance_scale=2.5)
    assert shortened(kept.settings) == kept.model_dump(include=set(shortened(kept.settings)))
    assert in_python(shortened(kept.settings)) == kept.settings


@pytest.mark.parametrize("short", IN_PYTHON)
@pytest.mark.parametrize(
    "call",
    [
        lambda **given: Settings(**given),
        lambda **given: settings_of(given),
        lambda **given: replace(Settings(), **given),
        lambda **given: plot(None, "x", None, **given),  # type: ignore[arg-type]
        lambda **given: inpaint(None, None, None, **given),  # type: ignore[arg-type]
        lambda **given: between_prompts(None, "x", "y", **given),  # type: ignore[arg-type]
        lambda **given: evaluate(**given),
    ],
)
def test_a_short_name_in_python_is_told_in_one_sentence(call: Callable[..., Any], short: str) -> None:
    with pytest.raises(UserError, match=f"^there is no setting '{short}'; its name in Python is '{IN_PYTHON[short]}'.*\\.$"):
        call(**{short: 1})


def test_settings_are_copied_and_changed_as_before() -> None:
    settings = replace(Settings(num_inference_steps=3), guidance_scale=1.0)
    assert copy.deepcopy(settings) == settings == Settings(num_inference_steps=3, guidance_scale=1.0)


def test_sentences_for_the_page_have_its_names() -> None:
    said = with_short_names("num_inference_steps is 0; guidance_scale is nan; guidance_scales stay.")
    assert said == "steps is 0; guidance is nan; guidance_scales stay."
