"""latentpipe train-denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from latentpipe.train.config.base import Layers, Run, SplitSteps, Strict, Width, Widths


class CacheData(Strict):
    """The latents that `latentpipe encode` wrote, and the VAE they belong to."""

    cache: Path
    """The .safetensors file with the latents of the training pictures, or the folder of their shards."""
    vae: Path
    """Folder of the VAE; its hash must be the cache's."""
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """How often pictures of a kind are drawn (column `kind` of the metadata), relative to all others' 1; empty: all alike."""


class UNetShape(Strict):
    """A UNet2DConditionModel."""

    blocks: Widths = (64, 128, 192)
    """Width of each level."""
    layers_per_block: Layers = 1
    """Residual blocks at each level."""
    attention: tuple[bool, ...] = (False, True, True)
    """Which levels attend to the text."""
    heads_dim: Width = 32
    """Width of an attention head."""
    norm_groups: Width = 16
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

    width: Width = 192
    """Hidden size."""
    layers: Layers = 3
    """Transformer layers."""
    heads: Width = 6
    """Attention heads."""
    vocabulary: int = Field(2048, ge=514, le=2**20)
    """Largest number of tokens; 514 are the letters and the two ends."""
    length: int = Field(24, ge=3, le=65_536)
    """Tokens that the encoder reads."""
    new_vocabulary: bool = False
    """With run.warm_start: train the vocabulary anew on these captions; the vectors of words that both know are taken over."""

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
    optim: SplitSteps
    unet: UNetShape = UNetShape()
    text: TextShape = TextShape()
    diffusion: Diffusion = Diffusion()
    sample_prompts: tuple[str, ...] = ()
    """Prompts drawn on each sheet; empty: the first eight captions."""
