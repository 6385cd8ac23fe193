"""Where a picture does not come back from a VAE: the map, the picture under it, and the sheet of many."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from latentpipe.utils.images import sheet, to_arrays

SHARE = 1 / 32  # of the side: the width (sd) of the smoothing
STOPS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # of the colour map "inferno"
TOP = 4.0  # on the colour bar, in units of the level that 1 % of normal pixels exceed
SHOWN_PX = 128


def error_map(images: torch.Tensor, rebuilt: torch.Tensor) -> torch.Tensor:
    """Squared error of each pixel, mean over the colours, smoothed by a Gaussian of sd H / 32: B H W.

    images, rebuilt  B 3 H W, [-1, 1]; `rebuilt` is clamped to it
    """
    error = (images - rebuilt.clamp(-1, 1)).square().mean(1, keepdim=True)
    sd = error.shape[-1] * SHARE
    reach = min(max(1, math.ceil(3 * sd)), min(error.shape[-2:]) - 1)
    steps = torch.arange(-reach, reach + 1, dtype=error.dtype, device=error.device)
    kernel = torch.exp(-0.5 * (steps / sd).square())
    kernel = kernel / kernel.sum()
    error = F.pad(error, (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(error, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))[:, 0]


def colours(values: np.ndarray) -> np.ndarray:
    """Values in 0..1 (clipped) as uint8 colours, dark to bright: the shape given, and 3."""
    at = np.linspace(0, 1, len(STOPS))
    stops = np.array(STOPS, np.float64)
    return np.stack([np.interp(values, at, stops[:, channel]) for channel in range(3)], -1).round().astype(np.uint8)


def overlay(image: torch.Tensor, heat: torch.Tensor, top: float = TOP, px: int = SHOWN_PX) -> Image.Image:
    """A picture in grey with its heat on it, px x px: 3 H W in [-1, 1] and H W; `top` and more is the brightest colour."""
    grey = to_arrays(image[None])[0].mean(-1, keepdims=True).repeat(3, -1)
    share = (heat.double().cpu().numpy() / top).clip(0, 1)
    opacity = (0.35 + 0.65 * np.sqrt(share))[..., None]
    mixed = (1 - opacity) * grey + opacity * colours(share)
    return Image.fromarray(mixed.round().astype(np.uint8)).resize((px, px), Image.Resampling.NEAREST)


def colour_bar(width: int, top: float = TOP) -> Image.Image:
    """The colours with their values, to stand under a sheet."""
    bar = Image.new("RGB", (width, 34), (255, 255, 255))
    long = min(300, width - 8)
    bar.paste(Image.fromarray(colours(np.linspace(0, 1, long))[None].repeat(12, 0)), (4, 2))
    draw, font = ImageDraw.Draw(bar), ImageFont.load_default(11)
    for share in (0, 0.25, 0.5, 0.75, 1):
        more = "+" if share == 1 else ""
        draw.text((4 + share * (long - 14), 16), f"{share * top:g}{more}", fill=(60, 60, 60), font=font)
    text = "error, x the level that 1 % of normal pixels exceed"
    if long + 16 + font.getlength(text) <= width:
        draw.text((long + 16, 2), text, fill=(60, 60, 60), font=font)
    return bar


def heatmap_page(images: torch.Tensor, heats: torch.Tensor, labels: Sequence[str], columns: int = 3) -> Image.Image:
    """A sheet: each picture beside its heat map (in units of the normal level), its label beneath; the colour bar at the foot."""
    cells = []
    for image, heat, array in zip(images, heats, to_arrays(images), strict=True):
        cell = Image.new("RGB", (2 * SHOWN_PX + 2, SHOWN_PX), (255, 255, 255))
        cell.paste(Image.fromarray(array).resize((SHOWN_PX, SHOWN_PX), Image.Resampling.NEAREST))
        cell.paste(overlay(image, heat), (SHOWN_PX + 2, 0))
        cells.append(cell)
    top = sheet(cells, min(columns, len(cells)), list(labels), gap=8)
    whole = Image.new("RGB", (top.width, top.height + 36), (255, 255, 255))
    whole.paste(top)
    whole.paste(colour_bar(top.width), (0, top.height))
    return whole
