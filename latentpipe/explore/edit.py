"""Edits of latents, and of a part of a picture: what lies outside a feathered mask keeps its bytes.

picture -> encode -> mix, add, scale, noise, blend by a mask -> decode -> laid over the picture where the mask says

latents  B C h w, normalized
mask     PIL, "L", of the picture's size: 255 where it is edited, 0 where it stays, between them feathered
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from latentpipe.data.image_set import decode, encode
from latentpipe.evaluate.metrics.latents import slerp
from latentpipe.explore import traverse
from latentpipe.explore.directions import Direction
from latentpipe.utils.errors import LatentpipeWarning, UserError
from latentpipe.utils.images import flatten, picture_file, to_images, to_pixels
from latentpipe.utils.progress import ProgressCallback
from latentpipe.vae.protocol import Stage

MAX_SEED = 2**32 - 1
ONE_COLOUR, TWO_TONE = 16, 0.9  # grey levels that strokes of one colour differ by; share of a mask that is black or white
FEATHER_SHARE = 16  # of the shorter side, is feathered where nothing is said


def mix(first: torch.Tensor, second: torch.Tensor, share: float) -> torch.Tensor:
    """Latents with `share` (0 to 1) of the second, by slerp; the ends are themselves, to the bit."""
    _within("share", share, 0, 1)
    if share in (0, 1):
        return second if share else first
    return slerp(first, second, share).to(first)


def add(latents: torch.Tensor, direction: Direction, amount: float) -> torch.Tensor:
    """Latents (1 C h w) moved along a direction by `amount` standard deviations, -10 to 10."""
    _within("amount", amount, -10, 10)
    return traverse.moved(latents, direction, [amount])


def scale(latents: torch.Tensor, factor: float) -> torch.Tensor:
    """Latents times `factor`, 0 to 3; 0 is the middle of the space."""
    _within("scale", factor, 0, 3)
    return latents * factor


def noise(latents: torch.Tensor, amount: float, seed: int = 0) -> torch.Tensor:
    """Latents plus normal noise of standard deviation `amount`, 0 to 3 (their own is about 1), drawn from `seed` on the CPU."""
    _within("noise", amount, 0, 3)
    _within("seed", seed, 0, MAX_SEED)
    if not amount:
        return latents
    drawn = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    return latents + amount * drawn.to(latents)


def blend(first: torch.Tensor, second: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Latents with `share` (1 1 h w, 0 to 1) of the second at each position; where it is 0 or 1 they are one of the two, exactly.

    Blended diffusion does so at every step (Avrahami et al., arXiv:2206.02779); here it is done once.
    """
    return torch.where(share <= 0, first, torch.where(share >= 1, second, torch.lerp(first, second, share)))


def edited(
    stage: Stage,
    picture: Image.Image,
    change: Callable[[torch.Tensor], torch.Tensor],
    mask: Image.Image | None = None,
    feather: int | None = None,
    report: ProgressCallback | None = None,
) -> Image.Image:
    """A picture of any size whose latents (1 C h w) went through `change`, everywhere or where a mask is white.

    The VAE sees the picture at the nearest size that it takes; the result has the picture's own. With a mask the changed latents
    are blended with the old ones, then the pixels: RGB, or RGBA for a transparent picture, byte for byte the picture's outside
    the feathered mask (`feathered`). Without one it is RGB. Errors as for `canvas` and `hole_of`.
    """
    old = canvas(picture)
    soft = None if mask is None else feathered(hole_of(mask, old.size), feather)
    latents = encode(stage, to_images(sized(old, work_size(stage, old.size))), report)
    changed = change(latents)
    if soft is not None:
        changed = blend(latents, changed, latent_share(soft, (latents.shape[-2], latents.shape[-1])))
    new = to_pixels(decode(stage, changed, report))[0].resize(old.size, Image.Resampling.LANCZOS)
    return new if soft is None else composite(old, new, soft)


def work_size(stage: Stage, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height in pixels nearest to `size` that a VAE takes."""
    unit = stage.space.downscale
    width, height = (max(1, round(side / unit)) * unit for side in size)
    return width, height


def sized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture as RGB at exactly this size (Lanczos), its sides stretched if they must be."""
    flat = flatten(picture)
    return flat if flat.size == size else flat.resize(size, Image.Resampling.LANCZOS)


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The centre of a picture as RGB, cut to the shape of `size` and resized to it (Lanczos)."""
    return ImageOps.fit(flatten(picture), size, Image.Resampling.LANCZOS)


def canvas(picture: Image.Image) -> Image.Image:
    """A picture upright as 8-bit RGB, or RGBA where it may be transparent, without texts that it carried.

    UserError for more than 8 bits: what is not edited could not keep its values.
    """
    if picture.mode.startswith("I") or picture.mode == "F":
        raise UserError(f"The picture's values have more than 8 bits (mode {picture.mode}); save it with 8 bits and give that.")
    upright = ImageOps.exif_transpose(picture)
    clear = upright.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info
    found = upright.convert("RGBA" if clear else "RGB")
    if found is picture:
        found = found.copy()
    profile = picture.info.get("icc_profile")
    found.info = {} if profile is None or picture.mode not in ("RGB", "RGBA") else {"icc_profile": profile}
    return found


def open_canvas(path: Path) -> Image.Image:
    """`canvas` of a file; UserError where it is no readable picture."""
    with picture_file(path) as picture:
        return canvas(picture)


def open_mask(path: Path) -> Image.Image:
    """A mask from a file, with its transparency (`hole_of` reads it); UserError where it is no readable picture."""
    with picture_file(path) as picture:
        deep = picture.mode.startswith("I") or picture.mode == "F"
        return flatten(picture) if deep else canvas(picture)


def hole_of(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Where a picture of `size` is edited ("L", 0 or 255): white in the mask, from grey level 128 on.

    A mask with transparent parts is one of two things. A layer of strokes, black and white or of one colour: where it is
    opaque, and white if any of it is. Or a picture with a hole: where it is transparent, which a warning says.
    UserError: another size, or nothing white.
    """
    upright = _layer(mask) or flatten(mask, (0, 0, 0)).convert("L")
    if upright.size != size:
        given, wanted = (f"{width} x {height}" for width, height in (upright.size, size))
        raise UserError(f"The mask is {given} pixels and the picture {wanted}; give a mask of the picture's size.")
    hole = upright.point(lambda level: 255 if level >= 128 else 0)
    if hole.getbbox() is None:
        raise UserError("The mask has no white pixel, so nothing would change; paint what is to be redrawn white.")
    return hole


def _layer(mask: Image.Image) -> Image.Image | None:
    """A mask with transparent parts as grey levels; None for one without, and for black and white on transparency."""
    if mask.mode.startswith("I") or mask.mode == "F":
        return None
    layer = canvas(mask)
    clear = clear_part(layer)
    opaque = None if clear is None else np.array(clear) == 0
    if clear is None or opaque is None or not opaque.any():
        return None
    levels = np.array(layer.convert("RGB"), np.int16)[opaque]
    if (levels.max(0) - levels.min(0)).max() <= ONE_COLOUR:
        return Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8))
    if ((levels <= 32).all(1) | (levels >= 223).all(1)).mean() >= TWO_TONE:
        return None
    warnings.warn(LatentpipeWarning("the mask is a picture with a transparent part, which is taken as the hole"), stacklevel=4)
    return clear


def clear_part(picture: Image.Image) -> Image.Image | None:
    """The transparent part of a `canvas` as a mask (alpha below 128 is white); None where there is none."""
    if picture.mode != "RGBA":
        return None
    mask = picture.getchannel("A").point(lambda alpha: 255 if alpha < 128 else 0)
    return mask if mask.getbbox() is not None else None


def feathered(hole: Image.Image, feather: int | None = None) -> Image.Image:
    """A mask ("L") that is 255 in the hole and falls to 0 over about `feather` pixels outside it.

    feather  0 to 256; None: a sixteenth of the shorter side. 0 leaves the hole as it is.

    The hole is widened by half of that and then averaged over a square window as wide.
    """
    if feather is None:
        feather = max(1, min(hole.size) // FEATHER_SHARE)
    _within("feather", feather, 0, 256)
    half = -(-feather // 2)
    if not half:
        return hole
    values = torch.from_numpy(np.array(hole, np.float32))[None, None] / 255
    for size, pad in (((2 * half + 1, 1), (half, 0)), ((1, 2 * half + 1), (0, half))):
        values = F.max_pool2d(values, size, 1, pad)
    for size, pad in (((2 * half + 1, 1), (half, 0)), ((1, 2 * half + 1), (0, half))):
        values = F.avg_pool2d(values, size, 1, pad, count_include_pad=False)
    return Image.fromarray((values[0, 0] * 255).round().to(torch.uint8).numpy())


def latent_share(soft: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """A feathered mask at the height and width of latents, 1 1 h w, 0 to 1: the largest value of each position's pixels.

    So that every pixel that is laid over the picture was decoded from latents that were free to change.
    """
    values = torch.from_numpy(np.array(soft, np.float32))[None, None] / 255
    return F.adaptive_max_pool2d(values, size)


def composite(old: Image.Image, new: Image.Image, soft: Image.Image) -> Image.Image:
    """`new` (RGB) over `old` (a `canvas`) by a mask: in bytes: old untouched where the mask is 0, new where it is 255."""
    return Image.composite(new.convert(old.mode), old, soft)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also where it is not a number
        raise UserError(f"{name} is {value}; expected {low:g} to {high:g}.")
