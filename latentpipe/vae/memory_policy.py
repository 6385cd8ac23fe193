"""Whole or in bands: how a stage keeps the memory of one pass within what is free."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from latentpipe.utils.errors import LatentpipeWarning, UserError
from latentpipe.utils.system import release_freed_memory
from latentpipe.vae import memory
from latentpipe.vae.offload import device_of, in_layers

Tile = int | Literal["auto"] | None
SMALL = 256 * 256  # pixels of a batch whose memory needs no prediction
ROOM = 0.25  # of the free memory: what takes less may keep its freed blocks, which saves the time for fresh pages


@dataclass(frozen=True)
class MemoryPolicy:
    """What is decided on images to encode, or raw latents to decode, before an autoencoder gets them.

    tile  height in pixels of the bands in which pictures are computed, exactly (`latentpipe.vae.tiling.tiled`); "auto": bands
          where the prediction of the memory says that the whole picture does not fit; None: never

    A pass with gradients is always computed whole.
    """

    tile: Tile = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.tile, int) and self.tile < 1:
            raise UserError(f"tile is {self.tile}; expected a height of at least 1 pixel, auto or None.")

    def rows(self, vae: Any, direction: memory.Direction, given: torch.Tensor, downscale: int) -> int | None:
        """The height of the bands for an input, in pixels; None: the whole picture at once. Bands are told in a warning."""
        if self.tile is None or torch.is_grad_enabled() or (self.tile == "auto" and is_small(direction, given, downscale)):
            return None
        if in_layers(vae) or getattr(vae, "use_tiling", False):  # bands read weights without their layers' hooks
            return None
        if self.tile != "auto":
            return self.tile
        free = memory.available(device_of(vae))
        n, channels, height, width = given.shape
        shape = (n, channels, height, width)
        rows = memory.choose(vae, direction, shape, free)
        if rows is not None:
            whole, part = (memory.predict(vae, direction, shape, high) // 2**20 for high in (None, rows))
            warnings.warn(
                f"to {direction} at once would take {whole:,} MB of the {free // 2**20:,} MB that are free: "
                f"it is done in bands of {rows} rows ({part:,} MB), with the same result",
                LatentpipeWarning,
                stacklevel=2,
            )
        return rows

    def as_predicted(
        self, vae: Any, direction: memory.Direction, given: torch.Tensor, downscale: int
    ) -> AbstractContextManager[None]:
        """Freed blocks go back to the system at once, where a whole picture takes much of the free memory as predicted."""
        if self.tile != "auto" or torch.is_grad_enabled() or is_small(direction, given, downscale):
            return nullcontext()
        n, channels, height, width = given.shape
        whole = memory.predict(vae, direction, (n, channels, height, width))
        device = device_of(vae)
        return release_freed_memory(device) if whole > ROOM * memory.available(device) else nullcontext()

    def check(self, vae: Any, shape: memory.Shape, downscale: int) -> None:
        """UserError where raw latents of a shape (B C h w) can be decoded neither whole nor in bands in the free memory."""
        if self.tile == "auto" and shape[0] * shape[2] * shape[3] * downscale**2 > SMALL:
            memory.choose(vae, "decode", shape, memory.available(device_of(vae)))


def is_small(direction: memory.Direction, given: torch.Tensor, downscale: int) -> bool:
    """Whether an input's memory needs no prediction."""
    area = given.shape[0] * given.shape[-1] * given.shape[-2]
    return area * (1 if direction == "encode" else downscale**2) <= SMALL
