"""Adapters: from the latents of one VAE to those of another, so that its decoder serves a denoiser of the first."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn import functional

from latentpipe.checkpoints.registry import find_adapter as find_adapter
from latentpipe.checkpoints.registry import own_adapter as own_adapter
from latentpipe.checkpoints.registry import own_adapters as own_adapters
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.io import HASH_LENGTH, atomic_file, content_hash, load_strictly, read_header, read_tensors
from latentpipe.utils.reading import parse_object
from latentpipe.vae.latent_space import LatentSpace
from latentpipe.vae.stage import VAEStage

FORMAT = "latentpipe.adapter.1"
Candidate = Literal["per channel", "linear 1x1", "linear 3x3", "convolution"]
CANDIDATES: tuple[Candidate, ...] = ("per channel", "linear 1x1", "linear 3x3", "convolution")
HIDDEN = 64
MOST = 4096  # channels or downscale that a file may name


class LatentAdapter(nn.Module):
    """Latents B C h w to latents B C' h' w' of the same picture.

    A linear map over 1x1 or 3x3 positions; the rung "convolution" adds two 3x3 convolutions with a SiLU between. Where the
    target is coarser, squares of positions become channels first (pixel unshuffle); where it is finer, channels become
    squares afterwards (pixel shuffle; arXiv:1609.05158).
    """

    def __init__(self, source: tuple[int, int], target: tuple[int, int], rung: Candidate) -> None:
        super().__init__()
        (channels, downscale), (wanted, finer) = source, target
        self.source, self.target, self.rung = source, target, rung
        if downscale % finer and finer % downscale:
            raise UserError(f"An adapter changes the scale by a whole number; 1/{downscale} to 1/{finer} does not.")
        self.down, self.up = max(1, finer // downscale), max(1, downscale // finer)
        inputs, outputs = channels * self.down**2, wanted * self.up**2
        side = 3 if rung == "linear 3x3" else 1
        self.linear = nn.Conv2d(inputs, outputs, side)
        self.curve = (
            nn.Sequential(nn.Conv2d(inputs, HIDDEN, 3, padding=1), nn.SiLU(), nn.Conv2d(HIDDEN, outputs, 3, padding=1))
            if rung == "convolution"
            else None
        )

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents of the source to latents of the target."""
        return self.unfold(self.mapped(self.fold(latents)))

    def mapped(self, folded: torch.Tensor) -> torch.Tensor:
        """The map between the folded sides, which have the same number of positions."""
        edge = self.linear.kernel_size[0] // 2
        padded = functional.pad(folded, (edge,) * 4, mode="replicate") if edge else folded
        out = self.linear(padded)
        return out if self.curve is None else out + self.curve(folded)

    def fold(self, latents: torch.Tensor) -> torch.Tensor:
        """Source latents with squares of positions as channels, where the target is coarser."""
        if latents.ndim != 4 or latents.shape[1] != self.source[0] or any(side % self.down for side in latents.shape[2:]):
            raise UserError(
                f"This adapter takes {self.source[0]}-channel latents (B C h w) whose sides {self.down} divides; "
                f"given {tuple(latents.shape)}."
            )
        return functional.pixel_unshuffle(latents, self.down)

    def unfold(self, mapped: torch.Tensor) -> torch.Tensor:
        """The other way for the target."""
        return functional.pixel_shuffle(mapped, self.up)


class BridgedStage(nn.Module):
    """A stage in two halves: it encodes by the host's VAE and decodes by another one, through an adapter where there is one.

    It has the host's space, so a denoiser cannot tell; what comes out is the other VAE's picture. Without an adapter
    (None) the other VAE's decoder reads the host's latents as they are.
    """

    def __init__(self, encoder: VAEStage, adapter: LatentAdapter | None, decoder: VAEStage) -> None:
        super().__init__()
        self.encoder, self.adapter, self.decoder = encoder, adapter, decoder
        # a decoder alone may make larger or smaller pictures of the host's latents
        self.space: LatentSpace = (
            encoder.space if adapter is not None else replace(encoder.space, downscale=decoder.space.downscale)
        )

    @property
    def decodes(self) -> bool:
        """True: one without a decoder cannot be bridged."""
        return True

    @property
    def decoding(self) -> VAEStage:
        """The half that decodes."""
        return self.decoder

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoder's weights."""
        return self.decoder.dtype

    @property
    def device(self) -> torch.device:
        """Where the decoder's weights are."""
        return self.decoder.device

    def check_memory(self, n: int, height: int, width: int) -> None:
        """As `VAEStage.check_memory`, of the decoder."""
        self.decoder.check_memory(n, height, width)

    def encode(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Images, of the size that the decoder makes, to the host's latents."""
        factor = self.encoder.space.downscale / self.space.downscale
        if factor < 1:
            images = nn.functional.avg_pool2d(images, round(1 / factor))
        elif factor > 1:
            images = nn.functional.interpolate(images, scale_factor=factor, mode="bicubic", antialias=True).clamp(-1, 1)
        return self.encoder.encode(images, generator)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The host's latents to images."""
        if self.adapter is None:
            return self.decoder.decode(latents)
        weight = self.adapter.linear.weight
        return self.decoder.decode(self.adapter(latents.to(weight.device, weight.dtype)))


@dataclass(frozen=True)
class AdapterCard:
    """What an adapter file says about itself: the two VAEs by content hash, and how it was fitted."""

    source_hash: str
    target_hash: str
    source: tuple[int, int]
    target: tuple[int, int]
    rung: Candidate
    report: dict[str, Any]


Size = Annotated[int, Field(ge=1, le=MOST, strict=True)]


class _StoredCard(BaseModel):
    """An `AdapterCard` as a file has it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    source_hash: Annotated[str, Field(max_length=64)]
    target_hash: Annotated[str, Field(max_length=64)]
    source: tuple[Size, Size]
    target: tuple[Size, Size]
    rung: Candidate
    report: dict[str, Any]


def save_adapter(adapter: LatentAdapter, card: AdapterCard, path: Path) -> str:
    """Write a safetensors file with the card as metadata, atomically; returns its content hash."""
    from safetensors.torch import save_file

    if path.suffix != ".safetensors":
        raise UserError(f"--out {path}: an adapter is a safetensors file; give it that ending.")
    tensors = {name: value.detach().float().contiguous() for name, value in adapter.state_dict().items()}
    with atomic_file(path) as part:
        save_file(tensors, part, metadata={"format": FORMAT, "card": json.dumps(asdict(card))})
    return content_hash(tensors)


def is_adapter(path: Path) -> bool:
    """Whether a safetensors file says that it is an adapter."""
    return read_header(path).metadata.get("format") == FORMAT


def read_card(path: Path) -> AdapterCard:
    """The card of an adapter file; UserError where the file is none."""
    metadata = read_header(path).metadata
    try:
        if metadata.get("format") != FORMAT:
            raise ValueError
        return AdapterCard(**dict(_StoredCard.model_validate(parse_object(metadata.get("card", "")))))
    except ValueError:
        raise UserError(f"{path} is not an adapter of this version; make one with 'latentpipe fit-adapter'.") from None


def open_adapter(path: Path, source: Collection[str], target: Collection[str]) -> LatentAdapter:
    """Read an adapter; UserError where it was fitted for another pair of VAEs than these (content hashes that each may have)."""
    card = read_card(path)
    for side, wanted, given in (("from", card.source_hash, source), ("to", card.target_hash, target)):
        if wanted not in given:
            raise UserError(
                f"{path} was fitted {side} VAE {wanted[:HASH_LENGTH]}, but the one given is {min(given)[:HASH_LENGTH]}; "
                "fit one for this pair with 'latentpipe fit-adapter'."
            )
    adapter = LatentAdapter(card.source, card.target, card.rung)
    load_strictly(adapter, read_tensors(path), path)
    return adapter.eval()


def bridged(host: VAEStage, vae: VAEStage, adapter: LatentAdapter) -> BridgedStage:
    """The stage that encodes by `host` and decodes by `vae`; UserError where the adapter's shapes are not theirs."""
    shapes = tuple((stage.space.channels, stage.space.downscale) for stage in (host, vae))
    if (tuple(adapter.source), tuple(adapter.target)) != shapes:
        raise UserError(
            f"This adapter maps {_words(adapter.source)} to {_words(adapter.target)}; "
            f"given VAEs of {_words(shapes[0])} and {_words(shapes[1])}."
        )
    return BridgedStage(host, adapter.to(vae.device), vae)


def _words(shape: tuple[int, int]) -> str:
    return f"{counted(shape[0], 'channel')} at 1/{shape[1]}"
