"""Numbers of a model's configs: what makes wrong pictures is refused in a sentence, what diffusers itself writes is taken."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
from helpers import edit_json

from latentpipe import UserError
from latentpipe.checkpoints.config_ranges import check_network_config, check_schedule, check_scheduler_config, check_space
from latentpipe.checkpoints.pipeline_io import load_pipeline
from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import open_vae

HERE = Path("here.json")
SCHEDULERS = sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and name != "AysSchedules")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_diffusers_writes_is_taken(name: str, tmp_path: Path) -> None:
    try:
        scheduler = getattr(diffusers, name)()
    except (TypeError, ImportError, ValueError):
        pytest.skip("it has no defaults")
    scheduler.save_pretrained(tmp_path)
    check_scheduler_config(json.loads((tmp_path / "scheduler_config.json").read_text()), HERE)
    check_schedule(scheduler, HERE)


GOOD = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"beta_end": math.nan}, "beta_end is nan"),
        ({"beta_start": -1.0}, "beta_start is -1.0; expected a number above 0, below 1"),
        ({"beta_end": math.inf}, "beta_end is inf"),
        ({"beta_end": "0.012"}, "beta_end is '0.012'"),
        ({"beta_end": True}, "beta_end is 'True'"),
        ({"beta_end": None}, "beta_end is missing"),
        ({"beta_schedule": None}, "beta_schedule is missing"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ({"num_train_timesteps": None}, "num_train_timesteps is missing"),
        ({"dynamic_thresholding_ratio": math.nan}, "dynamic_thresholding_ratio"),
        ({"lambda_min_clipped": math.nan}, "lambda_min_clipped"),
        ({"lambda_min_clipped": math.inf}, "lambda_min_clipped"),
        ({"something_new": math.nan}, "something_new"),
        ({"trained_betas": [0.1] * 3}, "no list of 1000 numbers"),
        ({"trained_betas": [0.1] * 999 + [math.nan]}, "trained_betas is nan"),
        ({"_class_name": None}, "expected a scheduler"),
        ({"_class_name": "UNet2DConditionModel"}, "expected a scheduler"),
    ],
)
def test_a_schedule_of_wrong_numbers_is_refused(change: dict[str, Any], words: str) -> None:
    check_scheduler_config(GOOD, HERE)
    with pytest.raises(UserError, match=rf"^here\.json: .*{words}"):
        check_scheduler_config(GOOD | change, HERE)


def test_a_flow_needs_no_betas() -> None:
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    check_scheduler_config(flow, HERE)
    with pytest.raises(UserError, match="shift is nan"):
        check_scheduler_config(flow | {"shift": math.nan}, HERE)


def test_a_schedule_is_looked_at_as_it_was_made() -> None:
    scheduler = diffusers.DDIMScheduler(beta_start=0.5, beta_end=0.9)
    check_schedule(scheduler, HERE)
    scheduler.alphas_cumprod[3] = math.nan
    with pytest.raises(UserError, match="alphas_cumprod"):
        check_schedule(scheduler, HERE)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("scheduler/scheduler_config.json", {"beta_end": math.nan}, "NaN"),
        ("unet/config.json", {"norm_eps": -1e-5}, "norm_eps is -1e-05"),
        ("unet/config.json", {"mid_block_scale_factor": 0.0}, "mid_block_scale_factor is 0.0"),
        ("text_encoder/config.json", {"layer_norm_eps": 7.0}, "layer_norm_eps is 7.0"),
        ("vae/config.json", {"scaling_factor": 1e9}, "scale of its latents is 1e"),
    ],
)
def test_a_model_with_a_wrong_number_does_not_open(model_copy: Path, part: str, change: dict[str, Any], words: str) -> None:
    edit_json(model_copy / part, **change)
    edit_json(model_copy / "card.json", vae_hash=None)
    with pytest.raises(UserError, match=words):
        load_pipeline(model_copy)


def test_spaces_and_networks_of_any_size_are_checked() -> None:
    check_space((0.18215,), (0.0,), HERE)
    for scale, shift in (((1e9,), (0.0,)), ((1e-9,), (0.0,)), ((1.0,), (-1e9,))):
        with pytest.raises(UserError, match="of its latents is"):
            check_space(scale, shift, HERE)
    check_network_config({"a": [{"eps": 1e-6}], "attention_head_dim": [5, 10], "dropout": 0.0, "x_eps": None}, HERE)
    for wrong in ({"a": [{"eps": 3}]}, {"attention_head_dim": [5, 0]}, {"dropout": -0.1}, {"deep": {"x": math.inf}}):
        with pytest.raises(UserError, match=r"^here\.json"):
            check_network_config(wrong, HERE)


def test_the_shipped_models_open() -> None:
    assert open_vae(find_model("emoji", "vae")).space.channels
