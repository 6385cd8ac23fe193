"""latentpipe train-lora."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from latentpipe.train.config.base import Run, Side, SplitSteps, Strict, Weight, Width


class LoraData(Strict):
    """Pictures with captions (imagefolder convention); their latents are cached by the hash of the model's VAE."""

    train: Path | None = None
    """Folder of training pictures; captions are in metadata.jsonl or .csv, or in NAME.txt beside each picture."""
    cache: Path | None = None
    """In its place: their latents by the model's VAE, a file or a folder of shards that `latentpipe encode` wrote."""
    caption_column: str | None = None
    """Column of the metadata that holds the captions; left out: text, caption or prompt."""
    size_px: Side | None = None
    """Side of the training pictures; left out: what the model was trained at."""
    exclude: Path | None = None
    """Text file with a caption in each line: pictures with one of them are left out, as the emoji set's held-out ones are."""
    trigger: str = ""
    """Words that are put before every caption, and named in the file as its trigger words."""

    @model_validator(mode="after")
    def _one_source(self) -> LoraData:
        if (self.train is None) == (self.cache is None):
            raise ValueError("give either train, a folder of pictures, or cache, latents that 'latentpipe encode' wrote")
        return self

    @property
    def source(self) -> Path:
        """Whichever of the two is given."""
        found = self.train or self.cache
        assert found is not None
        return found


class Prior(Strict):
    """Prior preservation: pictures that the model should go on drawing as before (DreamBooth, arXiv:2208.12242, section 3.3)."""

    train: Path | None = None
    """Folder of pictures with captions, which get no trigger words; each step sees as many of them as of the others."""
    caption_column: str | None = None
    """As data.caption_column, of this folder."""
    weight: float = Field(1.0, gt=0)
    """Weight of their term."""


class AdapterShape(Strict):
    """What is attached, and where."""

    sites: Annotated[tuple[str, ...], Field(min_length=1)] = ("unet.attention",)
    """unet.attention, unet.conv, unet.all, text, vae.decoder, or regular expressions over component.path."""
    kind: Literal["lora", "dora"] = "lora"
    """lora (arXiv:2106.09685), or dora, which also trains the length of the weights' rows (arXiv:2402.09353)."""
    rank: Width = 8
    """Rank of every layer that rank_pattern does not name."""
    alpha: float | None = Field(None, gt=0)
    """The change is multiplied by alpha / rank; left out: the rank, so by 1."""
    rank_pattern: dict[str, Width] = Field(default_factory=dict)
    """Ranks by site or regular expression, the last that matches counts; alpha keeps its ratio to the rank."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732)."""


class LoraLoss(Strict):
    """Denoising on the model's own schedule and prediction type; pixels for sites in the VAE's decoder."""

    min_snr_gamma: float | None = Field(None, gt=0)
    """Weight each step by min(SNR, gamma), written for the model's prediction type (arXiv:2303.09556; 5 is usual)."""
    noise_offset: Weight = 0.0
    """Standard deviation of an offset that all positions of a channel share in the noise."""
    noisy_share: float = Field(0.25, gt=0, lt=1)
    """Share of samples from the noisiest quarter of the schedule; 0.25: uniform."""
    caption_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of samples trained on the empty prompt, for guidance."""
    l1: Weight = 1.0
    """Weight of the decoder's mean absolute error."""
    l2: Weight = 0.0
    """Weight of the decoder's mean squared error."""


class Distillation(Strict):
    """Guidance distillation (arXiv:2210.03142, section 3.1): the adapter draws without guidance what the base draws with it."""

    guidance: float | None = Field(None, gt=1, le=100)
    """Guidance of the base that the adapter learns to do without; left out: it learns from the pictures."""
    steps: Annotated[int, Field(ge=1, le=100)] = 4
    """Denoising steps that the adapter is drawn with."""
    path_share: float = Field(0.5, ge=0, le=1)
    """Share of each batch that lies on the base's guided path at those steps; the rest are noised pictures."""


class LoraRun(Run):
    """As for the denoiser; the result is a file."""

    out: Path
    """The LoRA to write, a .safetensors file."""
    warm_start: Path | None = None
    """Name or file of an earlier LoRA of the same sites and ranks that this run begins with."""
    gradient_checkpointing: bool = False
    """Compute activations of the denoiser and the decoder again in the backward pass: less memory, more time."""


class TrainLora(Strict):
    """latentpipe train-lora"""

    data: LoraData
    run: LoraRun
    optim: SplitSteps
    model: Path = Path("emoji")
    """Name or folder of the model (Stable Diffusion 1, 2, XL, 3, FLUX.1, Sana, PixArt; any for the VAE's decoder alone)."""
    adapter: AdapterShape = AdapterShape()
    loss: LoraLoss = LoraLoss()
    prior: Prior = Prior()
    distillation: Distillation = Distillation()
    sample_prompts: tuple[str, ...] = ()
    """Prompts drawn on each sheet, each beside the base's picture; empty: the first eight captions."""

    @model_validator(mode="after")
    def _out_is_a_file(self) -> TrainLora:
        if self.run.out.suffix != ".safetensors":
            raise ValueError(f"run.out {self.run.out} is a LoRA, a safetensors file; give it the ending .safetensors")
        return self

    @model_validator(mode="after")
    def _one_source_of_targets(self) -> TrainLora:
        if self.distillation.guidance is not None and self.prior.train is not None:
            raise ValueError("distillation.guidance takes its targets from the base alone; leave prior.train out")
        return self
