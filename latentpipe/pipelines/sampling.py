"""How to draw: settings and their limits, and the host's step callback (guidance interval, events, stopping)."""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from latentpipe.utils.defaults import GUIDANCE, MAX_BATCH, MAX_SEED, STEPS, STRENGTH
from latentpipe.utils.errors import LatentpipeWarning, UserError, counted, expect, near
from latentpipe.utils.setting_names import IN_PYTHON, refuse_short

if TYPE_CHECKING:
    import torch

MAX_SIDE = 4096
STRETCH = 1.1  # how far a picture's sides may go apart before that is said
SCHEDULERS = {
    "dpm++": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
SCHEDULER_OPTIONS = {"DDIMScheduler": {"clip_sample": False}}  # its default clips latents to [-1, 1]


@dataclass(frozen=True)
class Settings:
    """How to draw; checked as a whole before anything is computed."""

    negative_prompt: str = ""
    """What the picture should not show."""
    num_inference_steps: int = STEPS
    """Denoising steps, 1 to 1000."""
    guidance_scale: float = GUIDANCE
    """Classifier-free guidance (arXiv:2207.12598); 1 and less turn it off."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Part of the steps that is guided (arXiv:2404.07724), as shares of the steps that are run."""
    scheduler: str | None = None
    """One of SCHEDULERS; None: the model's own."""
    size: tuple[int, int] | None = None
    """Width and height in pixels; None: what the model was trained at."""
    image: Image.Image | None = None
    """A picture to begin from (img2img)."""
    strength: float = STRENGTH
    """Share of the schedule that img2img runs, over 0 to 1."""
    controls: tuple[Any, ...] = ()
    """Pictures to follow: `latentpipe.pipelines.conditioning.Control`."""
    hires: Any = None
    """A second pass on enlarged latents: `latentpipe.pipelines.chains.Hires`; None: none."""
    refiner: Any = None
    """A second model for the last steps: `latentpipe.pipelines.chains.Refiner`; None: none."""

    if not TYPE_CHECKING:

        def __new__(cls, *args: Any, **given: Any) -> Settings:
            """UserError for a setting's short name, before the dataclass would raise a TypeError."""
            refuse_short(given)
            return super().__new__(cls)

    @property
    def steps_to_run(self) -> int:
        """Denoising steps that these settings run: img2img runs the last `strength` of the schedule."""
        steps = self.num_inference_steps
        return steps if self.image is None else min(int(steps * self.strength), steps)

    @property
    def all_steps(self) -> int:
        """Denoising steps of both passes, where hires asks for a second one."""
        again = int(self.num_inference_steps * self.hires.strength) if self.hires is not None else 0
        return self.steps_to_run + again


@dataclass(frozen=True)
class Step:
    """One denoising step is done: `step` of `steps`.

    `latents` is the estimate of the clean latents where the solver keeps one (DPM-Solver++, UniPC), else the noisy ones.
    """

    step: int
    steps: int
    latents: torch.Tensor


OnStep = Callable[[Step], bool | None]


TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "negative_prompt": (str, "a text"),
    "num_inference_steps": (int, "a whole number from 1 to 1000"),
    "guidance_scale": (float, "a number from 0 to 100"),
    "scheduler": ((str, type(None)), "a name or None"),
    "image": ((Image.Image, type(None)), "a PIL picture (PIL.Image.open opens one), or None"),
    "strength": (float, "a number over 0, at most 1"),
    "controls": (tuple, "a tuple of Control (open_control opens them)"),
}


def settings_of(given: Mapping[str, Any]) -> Settings:
    """Settings from names and values; UserError names one that there is not, or that has another type."""
    known = [one.name for one in fields(Settings)]
    refuse_short(given)
    for name in given:
        if name not in known:
            raise UserError(f"there is no setting '{name}'; expected some of {', '.join(known)}.{_near_setting(name, known)}")
    settings = Settings(**given)
    for name, (kinds, what) in TYPES.items():
        expect(name, getattr(settings, name), kinds, what)
    pairs = (("size", int, "width and height in whole pixels"), ("guidance_interval", float, "two shares, from 0 to 1"))
    for name, kind, what in pairs:
        pair = getattr(settings, name)
        if pair is None and name == "size":
            continue
        expect(name, pair, (tuple, list), what)
        if len(pair) != 2:
            raise UserError(f"{name} is {pair!r}; expected {what}.")
        for value in pair:
            expect(name, value, kind, what)
    return settings


def _near_setting(name: str, known: list[str]) -> str:
    """ " Did you mean 'guidance_scale'?", also for a misspelt short name."""
    said = near(name, [*known, *IN_PYTHON])
    return next((said.replace(f"'{short}'", f"'{full}'") for short, full in IN_PYTHON.items() if f"'{short}'" in said), said)


def drawn_seed(n: int, seed: int | None) -> int:
    """The seed of the first of `n` pictures, a random one for None and -1; UserError where there are no such seeds."""
    expect("n", n, int, f"a whole number from 1 to {MAX_BATCH}")
    expect("seed", seed, (int, type(None)), f"a whole number from 0 to {MAX_SEED}, or -1 or None for a random one")
    seed = secrets.randbelow(MAX_SEED + 1 - MAX_BATCH) if seed is None or seed == -1 else seed
    if not 1 <= n <= MAX_BATCH or not 0 <= seed <= MAX_SEED - n + 1:
        raise UserError(
            f"n is {n} and seed {seed}; expected 1 to {counted(MAX_BATCH, 'picture')} and seeds from 0 to {MAX_SEED}."
        )
    return seed


def check_settings(settings: Settings, native: tuple[int, int], unit: int) -> Settings:
    """The settings with the size filled in; `native` width and height, `unit` the number that sides are multiples of."""
    low, high = settings.guidance_interval
    width, height = settings.size or native
    wrong = ""
    if not 1 <= settings.num_inference_steps <= 1000:
        wrong = f"num_inference_steps is {settings.num_inference_steps}; expected 1 to 1000."
    elif not (math.isfinite(settings.guidance_scale) and 0 <= settings.guidance_scale <= 100):
        wrong = f"guidance_scale is {settings.guidance_scale}; expected 0 to 100."
    elif not 0 <= low <= high <= 1:
        wrong = f"guidance_interval is {low} {high}; expected two shares of the schedule, 0 <= low <= high <= 1."
    elif settings.scheduler is not None and settings.scheduler not in SCHEDULERS:
        wrong = f"scheduler is {settings.scheduler!r}; expected one of {', '.join(SCHEDULERS)}."
    elif settings.image is not None and not 0 < settings.strength <= 1:
        wrong = f"strength is {settings.strength}; expected more than 0 and at most 1."
    elif settings.steps_to_run < 1:
        steps = counted(settings.num_inference_steps, "step")
        wrong = f"{steps} at strength {settings.strength} run no step; raise one of them."
    elif max(width, height) > MAX_SIDE:
        wrong = f"the size is {width} x {height} pixels; at most {MAX_SIDE} x {MAX_SIDE} can be drawn."
    elif width <= 0 or height <= 0 or width % unit or height % unit:
        near = [max(unit, round(side / unit) * unit) for side in (width, height)]
        wrong = f"the size is {width} x {height} pixels; sides must be multiples of {unit}. Try {near[0]} x {near[1]}."
    if wrong:
        raise UserError(wrong)
    if settings.image is not None and (told := stretched(settings.image.size, (width, height))):
        warnings.warn(told, LatentpipeWarning, stacklevel=4)
    if (width, height) != native:
        warnings.warn(
            f"the model was trained at {native[0]} x {native[1]} pixels; {width} x {height} may look wrong",
            LatentpipeWarning,
            stacklevel=4,
        )
    return replace(settings, size=(width, height))


def stretched(given: tuple[int, int], drawn: tuple[int, int]) -> str:
    """What to tell where img2img pulls a picture to another shape, sizes as width and height; "" up to a tenth."""
    ratio = (given[0] * drawn[1]) / (given[1] * drawn[0])
    if max(ratio, 1 / ratio) <= STRETCH:
        return ""
    sizes = [f"{width:,} x {height:,}" for width, height in (given, drawn)]
    return f"the picture of {sizes[0]} pixels is stretched to {sizes[1]}; crop it first, or draw at a size of its shape"


class GuidanceCallback:
    """The host's step callback: guidance inside its interval, step events, and stopping."""

    def __init__(self, settings: Settings, positive: torch.Tensor, negative: torch.Tensor | None, steps: int, on_step) -> None:
        self.settings, self.steps, self.on_step = settings, steps, on_step
        import torch  # not before: reading a recipe needs the names above alone

        self.single = positive
        self.double = positive if negative is None else torch.cat([negative, positive])
        self.negative = negative
        self.stopped = False
        self.last: Step | None = None
        self.estimate = positive  # replaced by the first step

    def guided(self, step: int) -> bool:
        """Whether step `step` (from 0) lies in the guidance interval."""
        low, high = self.settings.guidance_interval
        return self.negative is not None and low <= step / self.steps < high

    def start(self) -> dict[str, Any]:
        """Arguments for the first step."""
        if self.guided(0):
            return {
                "prompt_embeds": self.single,
                "negative_prompt_embeds": self.negative,
                "guidance_scale": self.settings.guidance_scale,
            }
        return {"prompt_embeds": self.single, "guidance_scale": 1.0}

    def __call__(self, host: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.estimate = clean_estimate(host.scheduler, tensors["latents"])
        self.last = Step(step + 1, self.steps, self.estimate)
        if self.on_step is not None and self.on_step(self.last) and step + 1 < self.steps:
            self.stopped = True
            host._interrupt = True
        guided = self.guided(step + 1)
        host._guidance_scale = self.settings.guidance_scale if guided else 1.0
        return {"prompt_embeds": self.double if guided else self.single}


def clean_estimate(scheduler: Any, latents: torch.Tensor) -> torch.Tensor:
    """The solver's latest estimate of the clean latents where it keeps one, else the current noisy latents."""
    config = scheduler.config
    if str(config.get("algorithm_type", "")).startswith("dpmsolver++") or config.get("predict_x0"):
        kept = [output for output in getattr(scheduler, "model_outputs", []) if output is not None]
        if kept:
            return kept[-1]
    return latents
