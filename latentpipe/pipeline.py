"""LatentPipeline: prompt -> latents (host) -> images (VAEStage) -> pixels."""

from __future__ import annotations

import hashlib
import math
import secrets
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from latentpipe import recipe as recipes
from latentpipe.errors import UserError
from latentpipe.images import flatten, to_pixels
from latentpipe.vae import VAEStage
from latentpipe.weights import PREVIEW_FILE, find_model, hashes, load_pipeline, load_vae, read_json, vae_hash

SCHEDULERS = {
    "dpm++": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """How to draw; checked as a whole before anything is computed."""

    negative: str = ""
    """What the picture should not show."""
    steps: int = 20
    """Denoising steps, 1 to 1000."""
    guidance: float = 3.0
    """Classifier-free guidance (arXiv:2207.12598); 1 and less turn it off."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Part of the steps that is guided (arXiv:2404.07724), as shares of the schedule."""
    scheduler: str | None = None
    """One of SCHEDULERS; None: the model's own."""
    size: tuple[int, int] | None = None
    """Width and height in pixels; None: what the model was trained at."""
    image: Image.Image | None = None
    """A picture to begin from (img2img)."""
    strength: float = 0.6
    """Share of the schedule that img2img runs, over 0 to 1."""


@dataclass(frozen=True)
class Step:
    """One denoising step is done: `step` of `steps`; `latents` is the current estimate of the clean latents."""

    step: int
    steps: int
    latents: torch.Tensor


@dataclass(frozen=True)
class Picture:
    """A picture and the recipe that makes it again."""

    image: Image.Image
    recipe: recipes.Recipe

    def save(self, path: str | Path) -> Path:
        """Write a PNG that carries the recipe."""
        recipes.save_png(self.image, Path(path), self.recipe)
        return Path(path)


OnStep = Callable[[Step], bool | None]


@dataclass
class LatentPipeline:
    """A diffusers Stable Diffusion pipeline whose pictures are decoded by a VAEStage.

    host     the pipeline; it draws latents and is never changed
    stage    the VAE that decodes them; default: the host's own
    """

    host: Any
    stage: VAEStage = None  # type: ignore[assignment]
    name: str = "model"
    vae_name: str | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    preview_map: dict[str, list] | None = None

    def __post_init__(self) -> None:
        self.stage = self.stage or VAEStage(self.host.vae)
        self.host.set_progress_bar_config(disable=True)
        wanted = self.host.unet.config.in_channels
        if self.stage.space.channels != wanted or self.stage.space.downscale != self.host.vae_scale_factor:
            raise UserError(
                f"VAE {self.vae_name or 'given'} makes {self.stage.space.channels}-channel latents at "
                f"1/{self.stage.space.downscale} size; this UNet takes {wanted} channels at 1/{self.host.vae_scale_factor}. "
                "Choose a VAE of the same space, or train a denoiser for this one."
            )

    @classmethod
    def from_pretrained(
        cls, model: str | Path = "emoji", vae: str | Path | None = None, device: str | None = None, dtype: str = "fp32"
    ) -> LatentPipeline:
        """Open a model by name or folder (offline); `vae` replaces the VAE that decodes.

        device  "cpu", "cuda", "mps"; None: the best that is present
        dtype   "fp32", "bf16" or "fp16"
        """
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
        device = device or best_device()
        folder = find_model(model)
        host = load_pipeline(folder, DTYPES[dtype])
        found, vae_folder, stage = hashes(folder), folder / "vae", None
        if vae is not None:
            vae_folder = find_model(vae, "vae")
            stage = VAEStage(load_vae(vae_folder, DTYPES[dtype]))
            found["vae"] = vae_hash(vae_folder)
        try:
            host.to(device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
        preview = vae_folder / PREVIEW_FILE
        return cls(
            host,
            stage.to(device) if stage else None,  # type: ignore[arg-type]
            name=folder.name,
            vae_name=vae_folder.name if vae is not None else None,
            hashes=found,
            preview_map=read_json(preview) if preview.is_file() else None,
        )

    @property
    def native_size(self) -> tuple[int, int]:
        """Width and height in pixels that the denoiser was trained at."""
        side = self.host.unet.config.sample_size * self.stage.space.downscale
        return side, side

    def __call__(
        self, prompt: str, n: int = 1, seed: int | None = None, on_step: OnStep | None = None, **settings: Any
    ) -> list[Picture]:
        """Draw `n` pictures of a prompt; picture i has the seed `seed` + i (None: a random one).

        on_step(Step)  is called after each step; returning True stops there and keeps the partial pictures
        settings       the fields of `Settings`
        """
        chosen = self.check(Settings(**settings))
        seed = secrets.randbelow(recipes.MAX_SEED - n) if seed is None else seed
        if n < 1 or not 0 <= seed <= recipes.MAX_SEED - n + 1:
            raise UserError(f"n is {n} and seed {seed}; expected n >= 1 and seeds from 0 to {recipes.MAX_SEED}.")
        done = 0

        def watch(step: Step) -> bool:
            nonlocal done
            done = step.step
            return bool(on_step and on_step(step))

        images = self.draw([prompt] * n, list(range(seed, seed + n)), chosen, watch)
        total = self.steps_to_run(chosen)
        base = self._recipe(prompt, seed, n, chosen, done if done < total else None)
        return [Picture(image, base.model_copy(update={"seed": seed + i, "batch_index": i})) for i, image in enumerate(images)]

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings, on_step: OnStep | None = None
    ) -> list[Image.Image]:
        """One picture for each prompt and seed, in one batch; the straight line."""
        with torch.no_grad():
            latents = self.denoise(prompts, seeds, settings, on_step)  # B C h w
            images = self.stage.decode(latents)  # B 3 H W, [-1, 1]
            if not torch.isfinite(images).all():
                raise UserError("The VAE decoded to values that are not finite; try --dtype fp32.")
            if getattr(self.host, "safety_checker", None) is not None:
                images, _ = self.host.run_safety_checker(images, images.device, images.dtype)
            return to_pixels(images)

    def denoise(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings, on_step: OnStep | None = None
    ) -> torch.Tensor:
        """Prompts to latents (B C h w) through the host; noise comes from one CPU generator for each seed."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        guided = settings.guidance > 1
        positive, negative = self.host.encode_prompt(
            list(prompts), self.host.device, 1, guided, [settings.negative] * len(prompts) if guided else None
        )
        width, height = settings.size or self.native_size
        guide = _Guide(settings, positive, negative, self.steps_to_run(settings), on_step)
        arguments: dict[str, Any] = {"num_inference_steps": settings.steps, "generator": generators, "output_type": "latent"}
        if settings.image is None:
            host, arguments = self._host(settings), arguments | {"width": width, "height": height}
        else:
            host = self._image_host(settings)
            picture = flatten(settings.image).resize((width, height), Image.Resampling.LANCZOS)
            arguments |= {"image": picture, "strength": settings.strength}
        latents = host(
            **guide.start(), callback_on_step_end=guide, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], **arguments
        ).images
        return guide.estimate if guide.stopped else latents

    def check(self, settings: Settings) -> Settings:
        """The settings with the size filled in; UserError says what is wrong, warnings say what is unusual."""
        low, high = settings.guidance_interval
        if not 1 <= settings.steps <= 1000:
            raise UserError(f"steps is {settings.steps}; expected 1 to 1000.")
        if not (math.isfinite(settings.guidance) and 0 <= settings.guidance <= 100):
            raise UserError(f"guidance is {settings.guidance}; expected 0 to 100.")
        if not 0 <= low <= high <= 1:
            raise UserError(f"guidance_interval is {low} {high}; expected two shares of the schedule, 0 <= low <= high <= 1.")
        if settings.scheduler is not None and settings.scheduler not in SCHEDULERS:
            raise UserError(f"scheduler is {settings.scheduler!r}; expected one of {', '.join(SCHEDULERS)}.")
        if settings.image is not None and not 0 < settings.strength <= 1:
            raise UserError(f"strength is {settings.strength}; expected more than 0 and at most 1.")
        if settings.image is not None and self.steps_to_run(settings) < 1:
            raise UserError(f"{settings.steps} steps at strength {settings.strength} run no step; raise one of them.")
        width, height = settings.size or self.native_size
        if max(width, height) > 4096:
            raise UserError(f"The size is {width} x {height} pixels; at most 4096 x 4096 can be drawn.")
        # Halving inside the UNet needs whole numbers too; the host itself asks for multiples of 8.
        unit = math.lcm(8, self.stage.space.downscale * 2 ** (len(self.host.unet.config.block_out_channels) - 1))
        if width <= 0 or height <= 0 or width % unit or height % unit:
            near = [max(unit, round(side / unit) * unit) for side in (width, height)]
            raise UserError(f"The size is {width} x {height} pixels; sides must be multiples of {unit}. Try {near[0]} x {near[1]}.")
        if (width, height) != self.native_size:
            warnings.warn(
                f"the model was trained at {self.native_size[0]} x {self.native_size[1]} pixels; "
                f"{width} x {height} may look wrong",
                stacklevel=3,
            )
        return replace(settings, size=(width, height))

    def cut_words(self, prompt: str) -> str:
        """The end of a prompt that is too long for the text encoder to read; empty when all of it is read."""
        tokenizer = self.host.tokenizer
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        return tokenizer.decode(ids[tokenizer.model_max_length - 2 :]).strip()

    def steps_to_run(self, settings: Settings) -> int:
        """Denoising steps that these settings run."""
        return settings.steps if settings.image is None else min(int(settings.steps * settings.strength), settings.steps)

    def preview(self, latents: torch.Tensor, side: int = 256) -> Image.Image | None:
        """A quick picture of the first latents by the VAE's linear latent-to-RGB map; None where it has no map."""
        if self.preview_map is None:
            return None
        factors = torch.tensor(self.preview_map["factors"])
        colours = torch.einsum("chw,cr->rhw", latents[0].float().cpu(), factors)
        colours += torch.tensor(self.preview_map["bias"]).view(3, 1, 1)
        return to_pixels(colours[None])[0].resize((side, side), Image.Resampling.BICUBIC)

    def _host(self, settings: Settings) -> Any:
        """The host with a fresh scheduler, so that the lent one keeps its state."""
        import diffusers

        name = SCHEDULERS[settings.scheduler] if settings.scheduler else type(self.host.scheduler).__name__
        scheduler = getattr(diffusers, name).from_config(self.host.scheduler.config)
        parts = {**self.host.components, "scheduler": scheduler}
        host = type(self.host)(**parts, requires_safety_checker=False)
        host.set_progress_bar_config(disable=True)
        return host

    def _image_host(self, settings: Settings) -> Any:
        """The host's img2img twin, whose start is our own encoding: the stock one reads 4-channel latents only."""
        from diffusers import StableDiffusionImg2ImgPipeline
        from diffusers.utils.torch_utils import randn_tensor

        stage = self.stage

        class Img2Img(StableDiffusionImg2ImgPipeline):
            def prepare_latents(self, image, timestep, batch_size, n, dtype, device, generator=None):
                clean = stage.encode(image).to(device, dtype).expand(batch_size * n, -1, -1, -1)
                noise = randn_tensor(clean.shape, generator=generator, device=device, dtype=dtype)
                return self.scheduler.add_noise(clean, noise, timestep)

        host = Img2Img(**self._host(settings).components, requires_safety_checker=False)
        host.set_progress_bar_config(disable=True)
        return host

    def _recipe(self, prompt: str, seed: int, n: int, settings: Settings, stopped: int | None) -> recipes.Recipe:
        cut = self.cut_words(prompt)
        if cut:
            warnings.warn(
                f"the prompt is longer than the {self.host.tokenizer.model_max_length - 2} tokens that the text encoder "
                f"reads; cut: '{cut}'",
                stacklevel=3,
            )
        source = None
        if settings.image is not None:
            source = recipes.Source(sha256=pixel_hash(settings.image), strength=settings.strength)
        assert settings.size is not None
        return recipes.Recipe(
            prompt=prompt,
            negative=settings.negative,
            seed=seed,
            steps=settings.steps,
            guidance=settings.guidance,
            guidance_interval=settings.guidance_interval,
            scheduler=settings.scheduler or type(self.host.scheduler).__name__,
            width=settings.size[0],
            height=settings.size[1],
            batch_size=n,
            model=self.name,
            vae=self.vae_name,
            source=source,
            stopped_after=stopped,
            hashes=self.hashes,
            machine=recipes.this_machine(
                str(self.host.device), str(self.host.unet.dtype).removeprefix("torch."), torch.get_num_threads()
            ),
        )


class _Guide:
    """The host's step callback: guidance inside its interval, step events, and stopping."""

    def __init__(self, settings: Settings, positive: torch.Tensor, negative: torch.Tensor | None, steps: int, on_step) -> None:
        self.settings, self.steps, self.on_step = settings, steps, on_step
        self.single = positive
        self.double = positive if negative is None else torch.cat([negative, positive])
        self.negative = negative
        self.stopped = False
        self.estimate = positive  # replaced by the first step

    def guided(self, step: int) -> bool:
        """Whether step `step` (from 0) lies in the guidance interval."""
        low, high = self.settings.guidance_interval
        return self.negative is not None and low <= step / self.steps < high

    def start(self) -> dict[str, Any]:
        """Arguments for the first step."""
        if self.guided(0):
            return {"prompt_embeds": self.single, "negative_prompt_embeds": self.negative, "guidance_scale": self.settings.guidance}
        return {"prompt_embeds": self.single, "guidance_scale": 1.0}

    def __call__(self, host: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.estimate = clean_estimate(host.scheduler, tensors["latents"])
        if self.on_step is not None and self.on_step(Step(step + 1, self.steps, self.estimate)) and step + 1 < self.steps:
            self.stopped = True
            host._interrupt = True
        guided = self.guided(step + 1)
        host._guidance_scale = self.settings.guidance if guided else 1.0
        return {"prompt_embeds": self.double if guided else self.single}


def clean_estimate(scheduler: Any, latents: torch.Tensor) -> torch.Tensor:
    """The solver's latest estimate of the clean latents where it keeps one, else the current noisy latents."""
    config = scheduler.config
    if str(config.get("algorithm_type", "")).startswith("dpmsolver++") or config.get("predict_x0"):
        kept = [output for output in getattr(scheduler, "model_outputs", []) if output is not None]
        if kept:
            return kept[-1]
    return latents


def best_device() -> str:
    """"cuda", "mps" or "cpu", whichever is present first."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pixel_hash(picture: Image.Image) -> str:
    """sha256 of a picture's size and upright RGB pixels."""
    picture = flatten(picture)
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
