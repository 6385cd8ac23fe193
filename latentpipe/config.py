"""Configs: pydantic models <-> YAML; strict, and every problem of a file is reported at once."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from latentpipe.errors import UserError

Precision = Literal["auto", "fp32", "bf16"]
Positive = Annotated[int, Field(ge=1)]
Widths = Annotated[tuple[Positive, ...], Field(min_length=1)]


class Strict(BaseModel):
    """A model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class PictureData(Strict):
    """Folders of pictures (imagefolder convention) and the size in pixels that they are read at."""

    train: Path
    """Folder of training pictures, with metadata.jsonl or metadata.csv."""
    validation: Path | None = None
    """Folder of pictures that are measured and never trained on."""
    read_size_px: Positive = 128
    """Side at which pictures are kept in memory; crops are cut from this."""


class Optimization(Strict):
    """AdamW with a linear warm-up and a cosine decay to zero, EMA of the weights."""

    steps: Positive
    """Optimizer steps in all."""
    batch_size: Positive = 32
    """Pictures in each step."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    warmup_steps: int = Field(100, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decoupled weight decay."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest norm of the whole gradient."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Decay of the moving average of the weights, which is what gets saved."""


class Run(Strict):
    """Where a run writes and how it is computed."""

    out: Path
    """Folder of the finished model."""
    work: Path
    """Folder of checkpoints, log.jsonl, sheets and the resolved config."""
    seed: int = Field(0, ge=0)
    """Seed of weights, data order, crops and noise."""
    precision: Precision = "auto"
    """bf16 autocast, fp32, or auto: bf16 where the processor has it."""
    save_every_steps: Positive = 250
    """Steps between checkpoints; the last two are kept."""
    sample_every_steps: Positive = 500
    """Steps between sheets of pictures and validation figures."""
    resume: bool = False
    """Go on from the newest checkpoint in `work`."""
    warm_start: Path | None = None
    """Folder of an earlier model of the same shape whose weights this run begins with."""


class VAEShape(Strict):
    """An AutoencoderKL; downscale is 2 ** (blocks - 1)."""

    channels: Positive = 4
    """Latent channels."""
    blocks: Widths = (32, 64, 128)
    """Width of each resolution level."""
    layers_per_block: Positive = 1
    """Residual blocks at each level."""
    attention: bool = False
    """Self-attention in the middle block."""
    norm_groups: Positive = 8
    """Groups of GroupNorm; divides every width."""

    @model_validator(mode="after")
    def _groups_divide(self) -> VAEShape:
        odd = [width for width in self.blocks if width % self.norm_groups]
        if odd:
            raise ValueError(f"norm_groups {self.norm_groups} does not divide block widths {odd}")
        return self


class VAELoss(Strict):
    """Weights of the loss terms; every term is a mean over pixel values (3HW) and pictures."""

    l1: float = Field(1.0, ge=0)
    """Mean absolute error of [-1, 1] values."""
    l2: float = Field(1.0, ge=0)
    """Mean squared error of [-1, 1] values."""
    kl: float = Field(1e-4, ge=0)
    """Beta: KL to N(0, I), summed over latents and divided by 3HW."""
    equivariance: float = Field(0.25, ge=0, le=1)
    """Share of the steps that decode half-size latents and compare with half-size pictures."""


class Crops(Strict):
    """Random crops: a share of whole pictures, else a square of random side, always resized to `size_px`."""

    size_px: Positive = 64
    """Side of the training pictures."""
    whole: float = Field(0.6, ge=0, le=1)
    """Share of the steps that see whole pictures."""
    flip: bool = True
    """Mirror half of the pictures."""


class TrainVAE(Strict):
    """latentpipe train-vae"""

    data: PictureData
    run: Run
    optim: Optimization
    model: VAEShape = VAEShape()
    loss: VAELoss = VAELoss()
    crops: Crops = Crops()


class CacheData(Strict):
    """The latent cache that `latentpipe encode` wrote, and the VAE it belongs to."""

    cache: Path
    """The .safetensors file with the latents of the training pictures."""
    vae: Path
    """Folder of the VAE; its hash must be the cache's."""


class UNetShape(Strict):
    """A UNet2DConditionModel."""

    blocks: Widths = (64, 128, 192)
    """Width of each level."""
    layers_per_block: Positive = 1
    """Residual blocks at each level."""
    attention: tuple[bool, ...] = (False, True, True)
    """Which levels attend to the text."""
    heads_dim: Positive = 32
    """Width of an attention head."""
    norm_groups: Positive = 16
    """Groups of GroupNorm."""

    @model_validator(mode="after")
    def _levels_agree(self) -> UNetShape:
        if len(self.attention) != len(self.blocks):
            raise ValueError(f"attention names {len(self.attention)} levels, blocks {len(self.blocks)}")
        odd = [width for width in self.blocks if width % self.norm_groups or width % self.heads_dim]
        if odd:
            raise ValueError(f"norm_groups {self.norm_groups} or heads_dim {self.heads_dim} does not divide {odd}")
        return self


class TextShape(Strict):
    """A CLIPTextModel and its byte-pair vocabulary, trained on the captions."""

    width: Positive = 192
    """Hidden size."""
    layers: Positive = 3
    """Transformer layers."""
    heads: Positive = 6
    """Attention heads."""
    vocabulary: int = Field(2048, ge=514)
    """Largest number of tokens; 514 are the letters and the two ends."""
    length: int = Field(24, ge=3)
    """Tokens that the encoder reads."""

    @model_validator(mode="after")
    def _heads_divide(self) -> TextShape:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        return self


class Diffusion(Strict):
    """v-prediction on a schedule with zero terminal SNR (Lin et al., arXiv:2305.08891)."""

    caption_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of samples trained on the empty prompt, for guidance."""
    noisy_share: float = Field(0.25, gt=0, lt=1)
    """Share of samples from the noisiest quarter of the schedule, where the prompt decides; 0.25: uniform."""
    beta_start: float = Field(0.00085, gt=0)
    """First beta of the scaled-linear schedule."""
    beta_end: float = Field(0.012, gt=0)
    """Last beta of the scaled-linear schedule."""


class TrainDenoiser(Strict):
    """latentpipe train-denoiser"""

    data: CacheData
    run: Run
    optim: Optimization
    unet: UNetShape = UNetShape()
    text: TextShape = TextShape()
    diffusion: Diffusion = Diffusion()
    sample_prompts: tuple[str, ...] = ()
    """Prompts drawn on each sheet; empty: the first eight captions."""


Config = TypeVar("Config", bound=Strict)


def load(path: Path, schema: type[Config]) -> Config:
    """Read a YAML file into `schema`; UserError lists every problem, with the nearest known key."""
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file. The shipped ones are listed by 'latentpipe ls configs'.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a config ({error}).") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return parse(raw, schema, str(path))


def parse(raw: Any, schema: type[Config], source: str) -> Config:
    """A plain mapping as a `schema`; UserError names `source` and every problem."""
    if not isinstance(raw, dict):
        raise UserError(f"{source}: expected a mapping of {sorted(schema.model_fields)}; given {type(raw).__name__}.")
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        problems = [_sentence(problem, schema) for problem in error.errors()]
        raise UserError("\n".join(f"{source}: {problem}" for problem in problems)) from None


def dump(config: Strict) -> str:
    """A config as YAML that `load` reads back to the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _sentence(problem: Any, schema: type[BaseModel]) -> str:
    """One pydantic error in the reader's words."""
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = [f"{prefix}{name}" for prefix, name in _keys(schema)]
        near = difflib.get_close_matches(place, known, n=1)
        return f"unknown key '{place}'." + (f" Did you mean '{near[0]}'?" if near else f" Known keys: {', '.join(known)}.")
    if problem["type"] == "missing":
        return f"missing key '{place}'."
    given = problem.get("input")
    shown = "" if isinstance(given, dict) else f" (given: {given!r})"
    return f"{place or 'config'}: {problem['msg']}{shown}."


def _keys(schema: type[BaseModel], prefix: str = "") -> list[tuple[str, str]]:
    keys: list[tuple[str, str]] = []
    for name, field in schema.model_fields.items():
        keys.append((prefix, name))
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys(field.annotation, f"{prefix}{name}.")
    return keys
