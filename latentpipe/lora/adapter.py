"""An adapter in memory: for each module of each component, the tensors by peft's own names, their rank and their alpha."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from latentpipe.checkpoints.embedding import Embedding
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import content_hash

Kind = Literal["lora", "loha", "lokr"]
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")


@dataclass(frozen=True)
class LoraLayer:
    """The change of one module's weight.

    kind     "lora" (arXiv:2106.09685; with "lora_magnitude_vector" it is DoRA, arXiv:2402.09353), "loha" (arXiv:2108.06098)
             or "lokr" (arXiv:2309.14859)
    tensors  lora_A (r in [kh kw]), lora_B (out r [1 1]), lora_magnitude_vector (out, or 1 out 1 1 of a convolution);
             hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, hada_t1, hada_t2;
             lokr_w1 or lokr_w1_a and lokr_w1_b, lokr_w2 or lokr_w2_a and lokr_w2_b, lokr_t2; shapes as in peft
    rank     r
    alpha    the update is multiplied by alpha / rank, with `rslora` by alpha / sqrt(rank) (arXiv:2312.03732)
    """

    kind: Kind
    tensors: Mapping[str, torch.Tensor]
    rank: int
    alpha: float
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"A LoRA layer has rank {self.rank}; expected 1 or more.")

    @property
    def scale(self) -> float:
        """What the product of the tensors is multiplied by at weight 1."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def dora(self) -> bool:
        """Whether it also sets the length of the weight's rows."""
        return "lora_magnitude_vector" in self.tensors

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(tensor.numel() for tensor in self.tensors.values())


@dataclass(frozen=True)
class Lora:
    """An adapter: layers by component ("unet", "text_encoder", "vae", ...) and module path within it.

    Paths are those of diffusers' and transformers' modules; a text encoder's have no leading ``text_model.``.

    metadata    of its file (safetensors: strings by name)
    unread      keys of its file that belong to no layer that is known here
    embeddings  textual inversions that its file brings along
    """

    parts: Mapping[str, Mapping[str, LoraLayer]]
    name: str = "lora"
    metadata: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    embeddings: tuple[Embedding, ...] = ()

    def layers(self) -> Iterator[tuple[str, str, LoraLayer]]:
        """Component, path and layer of each."""
        for component, layers in self.parts.items():
            for path, layer in layers.items():
                yield component, path, layer

    @property
    def hash(self) -> str:
        """Content hash over component, path, tensors and scale (alpha and rank): the same in every file format."""
        named: dict[str, torch.Tensor] = {}
        for component, path, layer in self.layers():
            named |= {f"{component}.{path}.{name}": value for name, value in layer.tensors.items()}
            named[f"{component}.{path}.scale"] = torch.tensor(layer.scale, dtype=torch.float64)
        return content_hash(named)
