"""Probe images: pictures made by code that look like pictures to an encoder, to measure a VAE with when no data is at hand.

Natural images have a 1/f amplitude spectrum (Field, JOSA A 4, 1987), channels that mostly agree, and edges where one
thing hides another (the dead leaves model: Lee, Mumford and Huang, IJCV 41, 2001). The probes have all three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from latentpipe.utils.images import to_images

if TYPE_CHECKING:
    import torch

Draw = Callable[[np.random.Generator, int], np.ndarray]  # -> side side 3, about [-1, 1]


def probe_images(n: int = 16, side: int = 128, seed: int = 0) -> torch.Tensor:
    """`n` made images, B 3 H W in [-1, 1]: textures, gradients, shapes, strokes and compositions in turn.

    Deterministic; each depends on the seed and its own index only, so the first k of n are the same for any n.
    """
    if n < 1 or side < 8:
        raise ValueError(f"Probes are at least 1 image of 8 pixels; given n={n}, side={side}.")
    kinds = (_leaves, _landscape, _shapes, _still_life, _texture, _page, _leaves, _gradient)
    arrays = [kinds[index % len(kinds)](np.random.default_rng([seed, index]), side) for index in range(n)]
    return to_images(np.stack([_pixels(array) for array in arrays]))


def _pixels(array: np.ndarray) -> np.ndarray:
    return np.asarray(((array.clip(-1, 1) + 1) * 127.5).round(), np.uint8)


def _pink(random: np.random.Generator, side: int, slope: float = 1.45, std: float = 0.4) -> np.ndarray:
    """A field with a 1/f^slope amplitude spectrum, mean 0, side side."""
    rows, columns = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    frequency = np.maximum(np.hypot(rows, columns), 1 / side)
    field = np.fft.irfft2(np.fft.rfft2(random.standard_normal((side, side))) / frequency**slope, s=(side, side))
    field -= field.mean()
    return field * (std / max(float(field.std()), 1e-9))


def _colour(random: np.random.Generator) -> np.ndarray:
    """A colour as photographs have them: a grey level, dark ones a little more often, and a modest tint; shape 3."""
    tint = random.normal(0, 0.17) * np.array([1, 0, -1]) + random.normal(0, 0.08) * np.array([1, -2, 1])
    return np.asarray((random.uniform(-0.98, 0.6) + tint).clip(-1, 1))


def _tinted(random: np.random.Generator, side: int, slope: float = 1.45, std: float = 0.4) -> np.ndarray:
    """Pink noise in three channels that mostly agree, about a random colour, side side 3."""
    light = _pink(random, side, slope, std)[..., None]
    warm = _pink(random, side, slope, std * 0.14)[..., None] * np.array([1, 0, -1])
    green = _pink(random, side, slope, std * 0.06)[..., None] * np.array([1, -2, 1])
    return light + warm + green + _colour(random) * 0.6


def _mask(side: int, draw: Callable[[ImageDraw.ImageDraw, float], None], blur: float = 0.0) -> np.ndarray:
    """What `draw` paints on a canvas of four times the side, as coverage 0..1, side side 1."""
    canvas = Image.new("L", (side * 4, side * 4))
    draw(ImageDraw.Draw(canvas), side * 4)
    small = canvas.resize((side, side), Image.Resampling.BOX)
    if blur:
        small = small.filter(ImageFilter.GaussianBlur(blur))
    return np.asarray(small, np.float64)[..., None] / 255


def _over(ground: np.ndarray, mask: np.ndarray, paint: np.ndarray) -> np.ndarray:
    return np.asarray(ground * (1 - mask) + paint * mask)


def _ramp(random: np.random.Generator, side: int) -> np.ndarray:
    """A field that rises from -1 to 1 in a random direction, side side 1."""
    angle = random.uniform(0, 2 * np.pi)
    line = np.linspace(-1, 1, side)
    return np.asarray((np.cos(angle) * line[:, None] + np.sin(angle) * line[None])[..., None] / 1.2)


def _polygon(random: np.random.Generator, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    corners = int(random.integers(3, 8))
    turns = np.sort(random.uniform(0, 2 * np.pi, corners))
    reach = radius * random.uniform(0.6, 1.0, corners)
    return [(x + r * np.cos(t), y + r * np.sin(t)) for r, t in zip(reach, turns, strict=True)]


def _texture(random: np.random.Generator, side: int) -> np.ndarray:
    return _tinted(random, side, random.uniform(1.2, 1.8), random.uniform(0.3, 0.5))


def _gradient(random: np.random.Generator, side: int) -> np.ndarray:
    """Two colours that fade into each other, a soft light, and a little grain."""
    first, second = _colour(random), _colour(random)
    blend = (_ramp(random, side) + 1) / 2
    light = _pink(random, side, 2.2, 0.2)[..., None]
    return first * (1 - blend) + second * blend + light + random.normal(0, 0.01, (side, side, 1))


def _leaves(random: np.random.Generator, side: int) -> np.ndarray:
    """Dead leaves: discs and polygons of power-law sizes that hide one another, each with its own shade and grain."""
    picture = _tinted(random, side)
    for radius in np.sort(0.08 / random.uniform(0.1, 1.0, 24) ** 1.1)[::-1]:
        x, y = random.uniform(0, 1, 2)
        corners = _polygon(random, x, y, radius) if random.uniform() < 0.5 else None

        def paint(pen: ImageDraw.ImageDraw, size: float, x=x, y=y, radius=radius, corners=corners) -> None:
            if corners:
                pen.polygon([(a * size, b * size) for a, b in corners], fill=255)
            else:
                box = ((x - radius) * size, (y - radius * 0.8) * size, (x + radius) * size, (y + radius * 0.8) * size)
                pen.ellipse(box, fill=255)

        grain = _pink(random, side, random.uniform(1.2, 1.9), random.uniform(0.01, 0.1))[..., None]
        shade = _ramp(random, side) * random.uniform(0, 0.25)
        picture = _over(picture, _mask(side, paint), _colour(random) + grain + shade)
    return picture


def _shapes(random: np.random.Generator, side: int) -> np.ndarray:
    """Flat hard-edged shapes in strong colours, on a plain or a textured ground."""
    plain = random.uniform() < 0.5
    picture = np.broadcast_to(_colour(random), (side, side, 3)) if plain else _tinted(random, side, std=0.25)
    for _ in range(int(random.integers(3, 7))):
        x, y = random.uniform(0.1, 0.9, 2)
        radius = random.uniform(0.08, 0.3)
        corners = _polygon(random, x, y, radius)

        def paint(pen: ImageDraw.ImageDraw, size: float, corners=corners) -> None:
            pen.polygon([(a * size, b * size) for a, b in corners], fill=255)

        picture = _over(picture, _mask(side, paint), random.uniform(-1, 1, 3))
    return picture


def _page(random: np.random.Generator, side: int) -> np.ndarray:
    """Lines of strokes as wide and as dense as writing, light on dark or dark on light, with a picture among them."""
    paper = _colour(random) * 0.2 + (0.8 if random.uniform() < 0.6 else -0.8)
    picture = np.broadcast_to(paper, (side, side, 3)) + _pink(random, side, 1.5, 0.03)[..., None]

    def write(pen: ImageDraw.ImageDraw, size: float) -> None:
        height = random.uniform(0.05, 0.09) * size
        for top in np.arange(0.06 * size, 0.94 * size, height * 1.8):
            left = 0.06 * size
            while left < random.uniform(0.7, 0.95) * size:
                for _ in range(int(random.integers(1, 4))):
                    ends = random.uniform(0, 1, 4) * [height * 0.7, height, height * 0.7, height]
                    pen.line((left + ends[0], top + ends[1], left + ends[2], top + ends[3]), 255, max(1, round(height / 6)))
                left += height * (0.8 if random.uniform() < 0.8 else 1.6)

    picture = _over(picture, _mask(side, write), -paper)
    x, y = random.uniform(0, 0.5, 2)
    figure = _mask(side, lambda pen, size: pen.rectangle((x * size, y * size, (x + 0.5) * size, (y + 0.45) * size), fill=255))
    return _over(picture, figure, _tinted(random, side))


def _landscape(random: np.random.Generator, side: int) -> np.ndarray:
    """Sky with clouds, hills one before the other, each nearer one darker and rougher."""
    down = np.linspace(-1, 1, side)[:, None, None]
    sky = np.array([0.1, 0.3, 0.6]) + random.normal(0, 0.25, 3)
    picture = sky + down * random.uniform(0.1, 0.4) + np.maximum(_pink(random, side, 1.6, 0.3), 0)[..., None]
    depth = int(random.integers(2, 5))
    for layer in range(depth):
        base = 0.35 + 0.5 * (layer + random.uniform(0, 0.8)) / depth
        ridge = (base + _pink(random, side, 1.6, 0.08)[0]) * side
        mask = (np.arange(side)[:, None] - ridge[None] + 0.5).clip(0, 1)[..., None]
        ground = np.array([-0.1, 0.0, -0.25]) + random.normal(0, 0.15, 3) - 0.35 * layer / depth
        rough = _tinted(random, side, 1.5 - 0.4 * layer / depth, 0.1 + 0.15 * layer / depth) * 0.7
        picture = _over(picture, mask, ground + rough)
    return picture


def _still_life(random: np.random.Generator, side: int) -> np.ndarray:
    """Round things lit from one side before an unsharp ground: shading, highlights, cast shadows."""
    picture = _tinted(random, side, 1.9, 0.3)
    light = random.normal(0, 1, 2)
    light /= np.linalg.norm(light)
    grid = np.linspace(0, 1, side)
    for _ in range(int(random.integers(2, 5))):
        x, y, radius = random.uniform(0.15, 0.85), random.uniform(0.3, 0.85), random.uniform(0.12, 0.32)
        across, along = (grid[None] - x) / radius, (grid[:, None] - y) / (radius * random.uniform(0.7, 1.3))
        squared = across**2 + along**2
        shadow = np.exp(-((across + light[0] * 0.6) ** 2 + (along + 0.2) ** 2))[..., None]
        picture = _over(picture, shadow * 0.6, np.full(3, -0.95))
        bulge = np.sqrt((1 - squared).clip(0, 1))
        lit = (across * light[0] + along * light[1]) * 0.5 + bulge * 0.7
        gloss = np.maximum(lit, 0) ** 12 * random.uniform(0, 0.8)
        skin = _pink(random, side, 1.2, random.uniform(0.02, 0.15))
        mask = ((1 - np.sqrt(squared)) * radius * side + 0.5).clip(0, 1)[..., None]
        body = _colour(random) * 0.7 + (lit[..., None] - 0.4) * 0.7 + (gloss + skin)[..., None]
        picture = _over(picture, mask, body)
    return picture
