"""What a step sees: random crops, drawn for the whole batch before any process or part takes its share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from latentpipe.train.config import Crops
from latentpipe.utils.images import bytes_to_images


@dataclass(frozen=True)
class CropParams:
    """One square for all pictures of a step (None: whole), and which of them (B) are mirrored."""

    box: tuple[int, int, int] | None
    mirrored: torch.Tensor
    size_px: int

    def apply(self, pixels: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """Uint8 pictures (those of `rows`, B 3 H W) as images B 3 size size, on the pictures' device."""
        if self.box is not None:
            top, left, side = self.box
            pixels = pixels[:, :, top : top + side, left : left + side]
        mirrored = self.mirrored[rows].to(pixels.device).view(-1, 1, 1, 1)
        pixels = torch.where(mirrored, pixels.flip(3), pixels)
        images = bytes_to_images(pixels.contiguous())  # channels_last is slower here, and crashes partly frozen GroupNorms
        if images.shape[-1] != self.size_px:
            images = functional.interpolate(images, size=self.size_px, mode="bicubic", antialias=True).clamp(-1, 1)
        return images


def draw_crop(batch: int, side: int, crops: Crops, generator: torch.Generator) -> CropParams:
    """A random square of pictures of `side` pixels, and a random half of them to mirror."""
    box, size = None, crops.size_px
    inside = torch.rand((), generator=generator).item() >= crops.whole
    if inside and crops.cut_px is not None and side > crops.cut_px:
        size = crops.cut_px
        top, left = (int(torch.randint(0, side - size + 1, (), generator=generator)) for _ in range(2))
        box = (top, left, size)
    elif inside and side > crops.size_px:
        cut = int(torch.randint(crops.size_px, side + 1, (), generator=generator))
        top, left = (int(torch.randint(0, side - cut + 1, (), generator=generator)) for _ in range(2))
        box = (top, left, cut)
    mirrored = torch.rand(batch, generator=generator) < 0.5 if crops.flip else torch.zeros(batch, dtype=torch.bool)
    return CropParams(box, mirrored, size)
