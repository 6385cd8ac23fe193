"""Numbers of a model's configs that reach its pictures: finite and in range, before anything is drawn with them.

A wrong number makes no error by itself: a scheduler whose last beta is NaN draws noise.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latentpipe.utils.errors import UserError

MOST_STEPS = 100_000  # of a schedule that a denoiser was trained on; 1,000 is usual
LARGEST_SCALE = 1e6  # of a VAE's latents; published ones lie between 0.1 and 10

# keys of a scheduler: the least and the largest value, and whether these two are allowed themselves
_SCHEDULE: dict[str, tuple[float, float, bool]] = {
    "num_train_timesteps": (1, MOST_STEPS, True),
    "original_inference_steps": (1, MOST_STEPS, True),
    "beta_start": (0, 1, False),
    "beta_end": (0, 1, False),
    "steps_offset": (0, MOST_STEPS, True),
    "solver_order": (1, 4, True),
    "shift": (0, 1e4, False),
    "flow_shift": (0, 1e4, False),
    "base_shift": (-1e4, 1e4, True),
    "max_shift": (-1e4, 1e4, True),
    "base_image_seq_len": (1, 1e9, True),
    "max_image_seq_len": (1, 1e9, True),
    "shift_terminal": (0, 1, True),
    "sigma_min": (0, 1e6, True),
    "sigma_max": (0, 1e6, False),
    "sigma_data": (0, 1e6, False),
    "rho": (0, 1e3, False),
    "eta": (0, 1e3, True),
    "stochasticity": (0, 1e3, True),
    "timestep_scaling": (0, 1e9, False),
    "clip_sample_range": (0, 1e6, False),
    "dynamic_thresholding_ratio": (0, 1, True),
    "sample_max_value": (0, 1e6, False),
}
_MINUS_INFINITY = ("lambda_min_clipped",)  # diffusers' own default

# keys of a UNet, a transformer or a text encoder that the shapes of its weights do not confirm
_NETWORK: tuple[tuple[str, float, float, bool], ...] = (
    (r"(.*_)?(eps|epsilon)", 0, 1, True),
    (r".*(dropout|drop_rate).*", 0, 1, True),
    (r"(resnet_out|mid_block|downsample|resnet)?_?scale_factor", 0, 1e6, False),
    (r"(num_attention|num_key_value|num)_heads|attention_head_dim|d_kv|norm_num_groups", 0, 2**16, False),
)


def check_scheduler_config(config: Mapping[str, Any], source: Path) -> None:
    """UserError where a scheduler's config (scheduler_config.json) lacks its betas, or holds a number that makes no schedule."""
    import diffusers

    name = config.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        version = f"diffusers {diffusers.__version__}"
        raise UserError(f"{source}: _class_name is {str(name)[:80]!r}; expected a scheduler of {version}.")
    known = inspect.signature(cls.__init__).parameters
    betas = config.get("trained_betas")
    for key in ("num_train_timesteps", *(("beta_start", "beta_end", "beta_schedule") if betas is None else ())):
        if key in known and config.get(key) is None:
            raise UserError(f"{source}: {key} is missing, so the noise that the model was trained on is unknown; fetch it again.")
    for key, value in config.items():
        default = known[key].default if key in known else None
        if isinstance(default, int | float) and not isinstance(default, bool) and value is not None:
            _check_number(source, key, value, *_SCHEDULE.get(key, (-1e12, 1e12, True)), key in _MINUS_INFINITY)
        elif isinstance(value, float) and not math.isfinite(value) and key not in _MINUS_INFINITY:
            raise UserError(f"{source}: {key} is {value}; expected a finite number.")
    if betas is not None:
        if not isinstance(betas, list) or len(betas) != config["num_train_timesteps"]:
            raise UserError(f"{source}: trained_betas is no list of {config['num_train_timesteps']} numbers.")
        for value in betas:
            _check_number(source, "trained_betas", value, 0, 1, True)


def check_schedule(scheduler: Any, source: Path) -> None:
    """UserError where what a scheduler made of its config is no schedule: values that are not finite, or shares out of 0..1."""
    import torch

    everything = (-math.inf, math.inf)
    for name, (low, high) in {
        "betas": (0, 1),
        "alphas_cumprod": (0, 1),
        "sigmas": (0, math.inf),
        "timesteps": everything,
    }.items():
        values = getattr(scheduler, name, None)
        if values is None or not len(values):
            continue
        values = torch.as_tensor(values).double()
        if not (values.isfinite().all() and values.min() >= low and values.max() <= high):
            raise UserError(
                f"{source}: its numbers make {name} from {values.min().item():.6g} to {values.max().item():.6g}; expected finite "
                f"values{'' if math.isinf(low) else f' of at least {low}'}{'' if math.isinf(high) else f', at most {high}'}. "
                "Fetch or export the model again."
            )


def check_network_config(config: Mapping[str, Any], source: Path) -> None:
    """UserError where a network's config.json holds a number that is not finite, or one beyond its range."""
    for place, value in leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{source}: {place} is {value}; expected a finite number.")
        key = re.sub(r"\.\d+", "", place).rpartition(".")[2]
        for pattern, low, high, ends in _NETWORK:
            if value is not None and not isinstance(value, str) and re.fullmatch(pattern, key):
                _check_number(source, place, value, low, high, ends)


def check_space(scale: tuple[float, ...], shift: tuple[float, ...], source: Path) -> None:
    """UserError where the normalization of a VAE's latents is beyond what any VAE has."""
    for name, values in (("scale", scale), ("shift", shift)):
        for value in values:
            least = 1 / LARGEST_SCALE if name == "scale" else 0
            if not least <= abs(value) <= LARGEST_SCALE:
                raise UserError(
                    f"{source}: the {name} of its latents is {value:.6g}; expected a size of {least:g} to {LARGEST_SCALE:g}. See "
                    "scaling_factor, shift_factor, latents_mean and latents_std in its config."
                )


def _check_number(source: Path, key: str, value: Any, low: float, high: float, ends: bool, infinite: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{source}: {key} is {str(value)[:40]!r}; expected a number.")
    if infinite and value == -math.inf:
        return
    above, below = (value >= low, value <= high) if ends else (value > low, value < high)
    if not (above and below):
        bounds = f"from {low:g} to {high:g}" if ends else f"above {low:g}, below {high:g}"
        raise UserError(f"{source}: {key} is {value}; expected a number {bounds}.")


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is neither a mapping nor a list, with its place."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from leaves(inner, f"{place}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{place}.{index}")
    else:
        yield place, value
