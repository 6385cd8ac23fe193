"""LatentPipeline: prompt -> latents (host) -> images (VAEStage) -> pixels."""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from latentpipe import recipe as recipes
from latentpipe.errors import Note, UserError
from latentpipe.files import read_json
from latentpipe.images import flatten, to_pixels
from latentpipe.models import hashes, load_pipeline
from latentpipe.sampling import SCHEDULER_OPTIONS, SCHEDULERS, Guide, OnStep, Settings, Step, check_settings
from latentpipe.vae import VAEStage
from latentpipe.weights import PREVIEW_FILE, find_model, load_vae, name_of, quiet, vae_hash

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Picture:
    """A picture and the recipe that makes it again."""

    image: Image.Image
    recipe: recipes.Recipe

    def save(self, path: str | Path) -> Path:
        """Write a PNG that carries the recipe."""
        recipes.save_png(self.image, Path(path), self.recipe)
        return Path(path)


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
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
            raise UserError(f"device is {device!r}; expected cpu, mps, cuda or cuda:NUMBER.")
        folder = find_model(model)
        host = load_pipeline(folder, DTYPES[dtype])
        found, vae_folder, stage = hashes(folder), folder / "vae", None
        if vae is not None:
            vae_folder = find_model(vae, "vae")
            stage = VAEStage(load_vae(vae_folder, DTYPES[dtype]))
            trained_on, found["vae"] = found["vae"], vae_hash(vae_folder)
            if found["vae"] != trained_on:
                warnings.warn(
                    f"the denoiser of {folder.name} was trained on another VAE; "
                    f"nothing has proved yet that {vae} decodes its latents",
                    Note,
                    stacklevel=2,
                )
        try:
            host.to(device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
        preview = vae_folder / PREVIEW_FILE
        return cls(
            host,
            stage.to(device) if stage else None,  # type: ignore[arg-type]
            name=name_of(folder),
            vae_name=name_of(vae_folder, "vae") if vae is not None else None,
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
        seed = secrets.randbelow(2**32 - recipes.MAX_BATCH) if seed is None else seed
        if not 1 <= n <= recipes.MAX_BATCH or not 0 <= seed <= recipes.MAX_SEED - n + 1:
            raise UserError(
                f"n is {n} and seed {seed}; expected 1 to {recipes.MAX_BATCH} pictures and seeds from 0 to {recipes.MAX_SEED}."
            )
        if any(0xD800 <= ord(char) <= 0xDFFF for char in prompt + chosen.negative):
            raise UserError("the prompt holds bytes that are no text; expected UTF-8.")
        if max(len(prompt), len(chosen.negative)) > recipes.MAX_PROMPT:
            raise UserError(f"the prompt has {len(prompt):,} characters; at most {recipes.MAX_PROMPT:,} are taken.")
        done = 0

        def watch(step: Step) -> bool:
            nonlocal done
            done = step.step
            return bool(on_step and on_step(step))

        images = self.draw([prompt] * n, list(range(seed, seed + n)), chosen, watch)
        total = chosen.steps_to_run
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
        with quiet():  # what is cut from a long prompt is said once, by `_recipe`
            positive, negative = self.host.encode_prompt(
                list(prompts), self.host.device, 1, guided, [settings.negative] * len(prompts) if guided else None
            )
        width, height = settings.size or self.native_size
        guide = Guide(settings, positive, negative, settings.steps_to_run, on_step)
        arguments: dict[str, Any] = {"num_inference_steps": settings.steps, "generator": generators, "output_type": "latent"}
        if settings.image is None:
            host, arguments = self._host(settings), arguments | {"width": width, "height": height}
        else:
            host = self._image_host(settings)
            picture = flatten(settings.image).resize((width, height), Image.Resampling.LANCZOS)
            arguments |= {"image": picture, "strength": settings.strength}
        latents = host(
            **guide.start(),
            callback_on_step_end=guide,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
            **arguments,
        ).images
        return guide.estimate if guide.stopped else latents

    def check(self, settings: Settings) -> Settings:
        """The settings with the size filled in; UserError says what is wrong, a warning says what is unusual."""
        # Halving inside the UNet needs whole numbers too; the host itself asks for multiples of 8.
        unit = math.lcm(8, self.stage.space.downscale * 2 ** (len(self.host.unet.config.block_out_channels) - 1))
        return check_settings(settings, self.native_size, unit)

    def cut_words(self, prompt: str) -> str:
        """The end of a prompt that is too long for the text encoder to read; empty when all of it is read."""
        tokenizer = self.host.tokenizer
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return tokenizer.decode(ids[tokenizer.model_max_length - 2 :]).strip()

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
        scheduler = getattr(diffusers, name).from_config(self.host.scheduler.config, **SCHEDULER_OPTIONS.get(name, {}))
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
            def prepare_latents(self: Any, image, timestep, batch_size, n, dtype, device, generator=None):
                clean = stage.encode(image).to(device, dtype).expand(batch_size * n, -1, -1, -1)
                noise = randn_tensor(clean.shape, generator=generator, device=device, dtype=dtype)
                return self.scheduler.add_noise(clean, noise, timestep)

        host: Any = Img2Img(**self._host(settings).components, requires_safety_checker=False)
        host.set_progress_bar_config(disable=True)
        return host

    def _recipe(self, prompt: str, seed: int, n: int, settings: Settings, stopped: int | None) -> recipes.Recipe:
        for name, text in (("prompt", prompt), ("negative prompt", settings.negative)):
            if cut := self.cut_words(text):
                read = self.host.tokenizer.model_max_length - 2
                message = f"the {name} is longer than the {read} tokens that the text encoder reads; cut: '{cut}'"
                warnings.warn(message, Note, stacklevel=3)
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


def best_device() -> str:
    """ "cuda", "mps" or "cpu", whichever is present first."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pixel_hash(picture: Image.Image) -> str:
    """sha256 of a picture's size and upright RGB pixels."""
    picture = flatten(picture)
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
