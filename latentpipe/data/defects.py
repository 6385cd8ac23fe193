"""Local defects planted in pictures, with the mask of what changed: anomalies whose place is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

Planted = tuple[torch.Tensor, torch.Tensor]  # the image 3 H W with its defect, the mask H W


def plant(images: torch.Tensor, kind: str, seed: int = 0) -> Planted:
    """Images B 3 H W with one defect each, and where they changed (B H W, bool: by 0.1 of [-1, 1] or more somewhere).

    kind  one of KINDS; picture i depends on ``seed + i`` alone. A place is drawn again (32 times at most) while the mask
          would be smaller than 4 pixels, as for blur on plain white; such a picture's mask may be empty in the end.
    ValueError for other kinds.
    """
    if kind not in KINDS:
        raise ValueError(f"No defect '{kind}'; expected one of {', '.join(KINDS)}.")
    changed = []
    for index, image in enumerate(images):
        generator = torch.Generator().manual_seed(seed + index)
        other = images[(index + 1) % len(images)]
        for _ in range(32):
            result = KINDS[kind](image, other, generator)
            mask = (result - image).abs().amax(0) >= 0.1
            if int(mask.sum()) >= 4:
                break
        changed.append((result, mask))
    return torch.stack([image for image, _ in changed]), torch.stack([mask for _, mask in changed])


def _scratch(image: torch.Tensor, _: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A thin straight line of one colour."""
    side = image.shape[-1]
    x, y = _grid(image)
    (left, top), angle, colour = (
        _place(image, generator, 0.2),
        float(torch.rand(1, generator=generator)) * math.pi,
        _colour(generator),
    )
    along = (x - left) * math.cos(angle) + (y - top) * math.sin(angle)
    across = (y - top) * math.cos(angle) - (x - left) * math.sin(angle)
    line = (across.abs() <= side / 64) & (along.abs() <= side * 0.2)
    return torch.where(line, colour, image)


def _blob(image: torch.Tensor, _: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A disc of one colour."""
    x, y = _grid(image)
    left, top = _place(image, generator, 0.15)
    disc = (x - left).square() + (y - top).square() <= (image.shape[-1] * 0.07) ** 2
    return torch.where(disc, _colour(generator), image)


def _patch(image: torch.Tensor, other: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A square of the next picture, from the same place."""
    return torch.where(_square(image, generator), other, image)


def _blur(image: torch.Tensor, _: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A square that has lost its detail: means over 1/8 of the side."""
    width = max(3, image.shape[-1] // 8) | 1
    soft = F.avg_pool2d(F.pad(image[None], (width // 2,) * 4, mode="replicate"), width, 1)[0]
    return torch.where(_square(image, generator), soft, image)


def _colour_shift(image: torch.Tensor, _: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A square whose red, green and blue change places."""
    return torch.where(_square(image, generator), image.roll(1, 0), image)


KINDS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]] = {
    "scratch": _scratch,
    "blob": _blob,
    "swapped patch": _patch,
    "blur": _blur,
    "colour shift": _colour_shift,
}


def _grid(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y, x = torch.meshgrid(*(torch.arange(length) + 0.5 for length in image.shape[-2:]), indexing="ij")
    return x, y


def _place(image: torch.Tensor, generator: torch.Generator, margin: float) -> tuple[float, float]:
    x, y = (margin + (1 - 2 * margin) * torch.rand(2, generator=generator)).tolist()
    return x * image.shape[-1], y * image.shape[-2]


def _colour(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(3, 1, 1, generator=generator) * 2 - 1


def _square(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    x, y = _grid(image)
    left, top = _place(image, generator, 0.2)
    half = image.shape[-1] * 0.11
    return ((x - left).abs() <= half) & ((y - top).abs() <= half)
