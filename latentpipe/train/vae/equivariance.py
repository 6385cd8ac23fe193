"""The warps of the equivariance term: mirror, quarter turns and down-scaling, alike for latents and for images.

The term asks that decoding warped latents gives the warped picture (Kouzelis et al., "EQ-VAE", arXiv:2502.09509: scale and
quarter turns; Skorokhodov et al., arXiv:2502.14831: scale alone).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from latentpipe.train.losses import widened

SCALES = (0.5, 0.625, 0.75, 0.875, 1.0)
SMALLEST = 4  # latents a side


@dataclass(frozen=True)
class Warp:
    """One warp: first the mirror (left to right), then quarter turns (counter-clockwise), then the scale ``to / of``.

    Acts on latents and images, B C h w, whose sides are multiples of `of` (latents a side); returns their dtype.
    """

    mirror: bool
    turns: int
    to: int
    of: int

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """The warped values, B C (h to/of) (w to/of); ValueError where a side is no multiple of `of`."""
        if self.mirror:
            values = values.flip(3)
        values = values.rot90(self.turns, (2, 3))
        if self.to == self.of:
            return values
        if any(side % self.of for side in values.shape[-2:]):
            raise ValueError(f"This warp scales by {self.to}/{self.of}; the sides {tuple(values.shape[-2:])} are no multiples.")
        size = [side // self.of * self.to for side in values.shape[-2:]]
        # antialiased scaling does not exist for half precision on a CPU
        scaled = functional.interpolate(widened(values), size=size, mode="bilinear", antialias=True, align_corners=False)
        return scaled.to(values.dtype)


def draw_warp(
    generator: torch.Generator,
    side_px: int,
    downscale: int,
    scales: Sequence[float] = SCALES,
    rotate: bool = True,
    flip: bool = True,
) -> Warp:
    """One random warp for a batch of square pictures of `side_px` pixels and their latents, at 1/`downscale` of that size.

    The mirror comes with probability 1/2, 0 to 3 quarter turns and each of the `scales` (above 0, at most 1) with equal ones.
    A scale below 1 is rounded down to an even number of latents a side, at least 4, so that both sides stay whole numbers in one
    ratio; latents of 4 a side and fewer keep their size. The generator advances alike whatever is switched off.
    """
    if side_px <= 0 or side_px % downscale:
        raise ValueError(f"Pictures of {side_px} pixels have no whole number of latents at 1/{downscale}.")
    if not scales or not all(0 < scale <= 1 for scale in scales):
        raise ValueError(f"Scales are above 0 and at most 1; given {tuple(scales)}.")
    side = side_px // downscale
    mirror, turns, index = (_below(n, generator) for n in (2, 4, len(scales)))
    scale = scales[index]
    to = side if scale == 1 else min(side, max(SMALLEST, int(side * scale) // 2 * 2))
    return Warp(flip and mirror == 1, turns if rotate else 0, to, side)


def _below(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=generator, device=generator.device))
