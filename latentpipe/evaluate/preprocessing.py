"""The pictures that an evaluation feeds in: which files, at which size and by which filter, read in batches.

Every picture of one evaluation has one size, so that all figures are of the same pixels; what was chosen is said in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from latentpipe.data.image_folder import read_index
from latentpipe.evaluate.protocol import Protocol, Resize
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import bytes_to_images, fit_square, open_picture, picture_file

USUAL = 256  # pixels of a side, where the folder holds several sizes and nobody says one


@dataclass
class Plan:
    """What will be fed in.

    folder   of the files `names` (relative, in the order of the folder's index)
    height, width  of every picture, in pixels
    crop     the pictures have one size already: only a centre crop, no filter
    resize   the protocol's filter otherwise
    how      the choice in words
    skipped  the reason for each file that is left out; reading adds to it
    """

    folder: Path
    names: list[str]
    height: int
    width: int
    crop: bool
    resize: Resize
    how: str
    skipped: dict[str, str] = field(default_factory=dict)


def plan(folder: Path, protocol: Protocol, downscale: int, max_images: int | None = None) -> Plan:
    """Choose files (the first `most` of the index) and the size of the pictures, from the files' headers alone.

    The size is the protocol's; else the one that all pictures share, cropped to a multiple of the VAE's `downscale`; else a
    square of 256 pixels, or smaller where more than a tenth of the pictures are. Smaller pictures are skipped and named,
    unless the protocol enlarges them. UserError: no pictures, or a size that this VAE does not take.
    """
    if max_images is not None and max_images < 1:
        raise UserError(f"max_images is {max_images}; expected at least 1 picture.")
    size = protocol.size_px
    if size is not None and (size < 1 or size % downscale):
        near = max(downscale, round(size / downscale) * downscale)
        raise UserError(f"The size is {size} pixels; this VAE takes positive multiples of {downscale}. Give --size {near}.")
    folder = Path(folder)
    skipped: dict[str, str] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for item in read_index(folder, captions=False)[:max_images]:
        name = item.path.relative_to(folder).as_posix()
        try:
            sizes[name] = upright_size(item.path)
        except UserError as error:
            skipped[name] = str(error) or type(error).__name__
    if not sizes:
        raise UserError(f"No picture in {folder} could be read.\n{_list(skipped)}")
    height, width, crop, how = _choose(sizes.values(), protocol, downscale)
    names = []
    for name, (w, h) in sizes.items():
        if protocol.enlarge or (h >= height and w >= width):
            names.append(name)
        else:
            skipped[name] = f"{w} x {h} is smaller than {width} x {height}"
    if not names:
        small = min(max(min(size) for size in sizes.values()) // downscale * downscale, USUAL)
        advice = f"Give --size {small} or less." if small else f"This VAE needs at least {downscale} x {downscale}."
        raise UserError(f"Every picture in {folder} is smaller than {width} x {height} pixels. {advice}")
    return Plan(folder, names, height, width, crop, protocol.resize, how, skipped)


def _choose(sizes, protocol: Protocol, downscale: int) -> tuple[int, int, bool, str]:
    """(height, width, whether only to crop, the choice in words) for pictures of `sizes` (width, height)."""
    found = set(sizes)
    if protocol.size_px is not None:
        side = protocol.size_px
        return side, side, found == {(side, side)}, f"{side} x {side}, as asked for"
    if len(found) == 1:
        (w, h) = next(iter(found))
        height, width = h // downscale * downscale, w // downscale * downscale
        if not height or not width:
            raise UserError(f"The pictures are {w} x {h} pixels; this VAE needs at least {downscale} x {downscale}.")
        whole = (height, width) == (h, w)
        return height, width, True, f"{width} x {height}, " + ("as they are" if whole else f"centre crops of {w} x {h}")
    sides = sorted(min(size) for size in sizes if min(size) >= downscale)
    if not sides:
        raise UserError(f"Every picture is smaller than {downscale} x {downscale} pixels, the least that this VAE takes.")
    side = max(min(USUAL, sides[len(sides) // 10]) // downscale, 1) * downscale
    return side, side, False, f"{side} x {side}, chosen because the pictures differ in size (--size says another)"


def upright_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture file after its EXIF orientation, from its header."""
    with picture_file(path) as picture:
        w, h = picture.size
        # a square needs no look at the orientation, for which Pillow would decode a whole PNG
        turned = w != h and picture.getexif().get(0x0112) in (5, 6, 7, 8)
    return (h, w) if turned else (w, h)


def read(plan: Plan, names: Sequence[str], batch: int, again: bool = False) -> Iterator[tuple[list[str], torch.Tensor]]:
    """The named files in batches: (names, images B 3 H W). Broken files are left out and noted in `plan.skipped`.

    `again`: they were read before, so that a broken one has been changed meanwhile, which is a UserError.
    """
    kept: list[str] = []
    images: list[torch.Tensor] = []
    for name in names:
        try:
            picture = open_picture(plan.folder / name)
        except UserError as error:
            if again:
                raise UserError(
                    f"{name} was changed while it was measured ({error}). Leave the folder alone meanwhile."
                ) from None
            plan.skipped[name] = str(error)
            continue
        kept.append(name)
        images.append(fit(picture, plan))
        if len(kept) == batch:
            yield kept, torch.stack(images)
            kept, images = [], []
    if kept:
        yield kept, torch.stack(images)


def fit(picture: Image.Image, plan: Plan) -> torch.Tensor:
    """An upright RGB picture as one image (3 H W, [-1, 1]) of the plan's size."""
    if plan.crop:
        return _image(centre(picture, plan.width, plan.height))
    if plan.resize == "adm":
        return _image(adm_square(picture, plan.width))
    if plan.resize == "tensor":
        return tensor_square(_image(picture), plan.width)
    return _image(fit_square(picture, plan.width))


def centre(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The central `width` x `height` pixels."""
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def adm_square(picture: Image.Image, side: int) -> Image.Image:
    """Halved by box filters while at least twice `side`, then bicubic, then the central square (Dhariwal and Nichol, ADM)."""
    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    factor = side / min(picture.size)
    size = (round(picture.width * factor), round(picture.height * factor))
    return centre(picture.resize(size, Image.Resampling.BICUBIC), side, side)


def tensor_square(image: torch.Tensor, side: int) -> torch.Tensor:
    """3 H W: the shorter side to `side` by antialiased bilinear interpolation, then the central square; floats throughout."""
    h, w = image.shape[-2:]
    short = min(h, w)
    size = [int(side * h / short), int(side * w / short)]
    if size != [h, w]:
        image = torch.nn.functional.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return image[:, top : top + side, left : left + side]


def radial_spectrum(pixels: torch.Tensor) -> torch.Tensor:
    """Radially averaged power spectrum of grey pictures: uint8 B 3 H W to (B, R), R = min(H, W) // 2.

    Entry r is the mean of ``|FFT|^2 / (H W)`` over frequencies within half a step of ``r / min(H, W)`` cycles per pixel;
    the mean is taken off and a Hann window laid on first, so that the picture's borders do not look like edges.
    """
    grey = pixels.double().mean(1)
    h, w = grey.shape[-2:]
    window = torch.hann_window(h, dtype=torch.float64)[:, None] * torch.hann_window(w, dtype=torch.float64)
    window = (window / window.square().mean().sqrt()).to(grey.device)
    power = torch.fft.fft2((grey - grey.mean((1, 2), keepdim=True)) * window).abs().square() / (h * w)
    distance = torch.hypot(torch.fft.fftfreq(h)[:, None], torch.fft.fftfreq(w)[None])
    ring = (distance * min(h, w)).round().long().flatten().to(grey.device)
    rings = min(h, w) // 2
    inside = ring < rings
    sums = torch.zeros(len(grey), rings, dtype=torch.float64, device=grey.device)
    sums.index_add_(1, ring[inside], power.flatten(1)[:, inside])
    return sums / torch.bincount(ring[inside], minlength=rings)


def _image(picture: Image.Image) -> torch.Tensor:
    return bytes_to_images(torch.from_numpy(np.array(picture)).permute(2, 0, 1))


def _list(skipped: dict[str, str]) -> str:
    return "\n".join(f"  skipped {name}: {reason}" for name, reason in skipped.items())
