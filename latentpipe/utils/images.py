"""Pixels <-> images: the only place that knows [-1, 1] and 0..255.

pixels  PIL pictures or uint8 arrays, H W 3, 0..255
images  float tensors, B 3 H W, [-1, 1]
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from latentpipe.utils.errors import UserError
from latentpipe.utils.out_of_memory import refuse
from latentpipe.utils.reading import file_size

if TYPE_CHECKING:
    import torch

WHITE = (255, 255, 255)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # decoded in this process, by code that starts no other program
LONGEST, DEFLATE = 2**16, 1100  # pixels of a side; bytes in one of zlib's (1032 at most, zlib.net/zlib_tech.html)
MOST_PIXELS = 2**27  # 400 MB as RGB; the largest cameras make three quarters of that

# Pillow warns of large pictures and of odd tags; the limits here are our own. Once for all, and not around each picture: pictures
# are read in threads, and what `warnings.catch_warnings` restores in one of them is another one's.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Unreadable(UserError):
    """A file that cannot be read as a picture; `reason` is the sentence's end, without the file's name."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be read as a picture ({reason}).")
        self.reason = reason


@contextmanager
def picture_file(
    path: Path, formats: tuple[str, ...] = FORMATS, most: int = MOST_PIXELS, data: bytes | None = None
) -> Iterator[Image.Image]:
    """A picture file as PIL opens it, decoded when its pixels are asked for: the one way in for every verb, page and API.

    formats  of FORMATS; what a file is, its content says and not its name (EPS in a .png would start Ghostscript)
    most     pixels in all
    data     the file's bytes, where it lies in an archive and `path` only names it

    Unreadable, also for what its pixels turn out to be within the block: no such picture, damaged, larger than `most`, or a
    pipe or device. A UserError of the block goes through, and so does a mistake in this package's own code.
    """
    path = Path(path)
    if data is None and os.path.isdir(path):  # pathlib's raises for a name that is too long
        raise UserError(f"{path} is a folder; expected the file of a picture.")
    size = file_size(path, "a picture") if data is None else len(data)
    try:
        with Image.open(path if data is None else io.BytesIO(data), formats=formats) as picture:
            _check_size(picture, most, size)
            yield picture
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        kinds = [kind.replace("WEBP", "WebP") for kind in formats]
        raise Unreadable(path, f"expected {', '.join(kinds[:-1])} or {kinds[-1]}") from None
    except Exception as error:  # Pillow raises nearly every type for a damaged or hostile file
        if isinstance(error, AttributeError | NameError | TypeError) and _raised_here(error):
            raise
        refuse(error, str(path))
        raise Unreadable(path, (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")) from None


def _raised_here(error: BaseException) -> bool:
    """Whether an exception was raised by a line of this package, and not within a library that it called."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and str(place.tb_frame.f_globals.get("__name__", "")).startswith("latentpipe.")


def picture_of(data: bytes, formats: tuple[str, ...] = FORMATS, most: int = MOST_PIXELS) -> Image.Image:
    """The picture that these bytes are, decoded; ValueError or OSError where they are none, or one of more than `most` pixels."""
    with Image.open(io.BytesIO(data), formats=formats) as picture:
        _check_size(picture, most, len(data))
        return picture.copy()


def _check_size(picture: Image.Image, most: int, size: int) -> None:
    """ValueError where a picture has too many pixels, or a PNG fewer bytes than those can be packed into."""
    w, h = picture.size
    if w * h > most or max(w, h) > LONGEST:
        raise ValueError(f"{w} x {h} pixels; at most {most:,} in all and {LONGEST:,} to a side are read")
    bits = {"RGB": 24, "RGBA": 32, "LA": 16, "I;16": 16}.get(picture.mode, 1)
    if picture.format == "PNG" and w * h * bits / 8 > DEFLATE * size:  # Pillow would make the missing rows black
        raise ValueError(f"{w} x {h} pixels in {size:,} bytes; the file is cut off or damaged")


def flatten(picture: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Any PIL picture as upright 8-bit RGB: EXIF orientation applied, alpha laid on `background`.

    16-bit greys are scaled from 0..65535. Floats and 32-bit integers are taken as 0..1 (floats), 0..255 or 0..65535, the first
    that holds them all, a hundredth of overshoot aside; ValueError where none does, and for NaN: a scale would be a guess.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _scaled(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (*background, 255))
        picture = Image.alpha_composite(ground, layer)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _scaled(picture: Image.Image) -> Image.Image:
    """A grey picture of more than 8 bits as one of 8, where Pillow's own conversion clips at 255."""
    values = np.asarray(picture, dtype=np.float32 if picture.mode == "F" else np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite (NaN or infinity)")
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    # "I;16" is 16 bits by name; in "I" and "F" only the values tell.
    top = 65535.0 if picture.mode.startswith("I;16") or high > 255 else 1.0 if picture.mode == "F" and high < 2 else 255.0
    if low < -0.01 * top or high > 1.01 * top:
        raise ValueError(f"its values go from {low:g} to {high:g}; expected 0 to 1, to 255 or to 65535: scale them first")
    return Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8))


def open_picture(path: Path) -> Image.Image:
    """A file as upright 8-bit RGB; UserError where it is no readable picture."""
    with picture_file(path) as picture:
        return flatten(picture)


def dropped(path: Path) -> list[str]:
    """What a readable picture has beyond one upright 8-bit RGB picture, and what becomes of it, in words."""
    found = []
    with picture_file(path) as picture:
        transparent = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
        if transparent and np.asarray(picture.convert("RGBA"))[..., 3].min() < 255:
            found.append("is transparent in places and was laid on white")
        if (frames := getattr(picture, "n_frames", 1)) > 1:
            found.append(f"has {frames} frames, of which the first was taken")
        if picture.mode.startswith(("I", "F")):
            found.append("has more than 8 bits for a value and was reduced to 8")
    return found


def fit_square(picture: Image.Image, size: int) -> Image.Image:
    """The centred square of a picture, resized to `size` x `size` pixels (Lanczos, antialiased)."""
    if picture.size == (size, size):
        return picture
    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


def stack(pictures: Iterable[Image.Image]) -> np.ndarray:
    """RGB pictures of one size as one uint8 array, B H W 3."""
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])


def to_images(pixels: np.ndarray | Image.Image | Iterable[Image.Image]) -> torch.Tensor:
    """Pixels to images.

    Takes one PIL picture, several of one size, or a uint8 array (H W 3 or B H W 3);
    returns float32, B 3 H W, [-1, 1]: ``pixel / 127.5 - 1``.
    """
    import torch

    if isinstance(pixels, Image.Image):
        pixels = stack([pixels])
    elif not isinstance(pixels, np.ndarray):
        pixels = stack(pixels)
    if pixels.ndim == 3:
        pixels = pixels[None]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"Pixels are uint8, B H W 3; given {pixels.dtype}, shape {pixels.shape}.")
    tensor = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)
    return bytes_to_images(tensor)


def bytes_to_images(pixels: torch.Tensor) -> torch.Tensor:
    """A uint8 tensor, B 3 H W, 0..255, as images (float32, [-1, 1])."""
    return pixels.float() / 127.5 - 1.0


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Images to a uint8 tensor B 3 H W: clamp to [-1, 1], then round to the nearest of 0..255."""
    import torch

    unit = (images.detach().float() / 2 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8)


def to_arrays(images: torch.Tensor) -> np.ndarray:
    """Images to uint8 pixels, B H W 3."""
    return to_bytes(images).permute(0, 2, 3, 1).cpu().numpy()


def to_pixels(images: torch.Tensor) -> list[Image.Image]:
    """Images (B 3 H W, [-1, 1], clamped) to a list of PIL pictures."""
    return [Image.fromarray(array) for array in to_arrays(images)]


def psnr(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """PSNR in dB for each pair of uint8 tensors B 3 H W: ``10 log10(255^2 / MSE)``; inf when equal."""
    import torch

    error = (first.double() - second.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / error)


def sheet(pictures: list[Image.Image], columns: int, labels: list[str] | None = None, gap: int = 4) -> Image.Image:
    """Pictures of one size in a grid on white, each with its label (wrapped) beneath."""
    from PIL import ImageDraw, ImageFont

    width, height = pictures[0].size
    lines = 0
    font = ImageFont.load_default(11)
    wrapped: list[list[str]] = []
    if labels is not None:
        wrapped = [wrap(label, width, font) for label in labels]
        lines = max(len(rows) for rows in wrapped)
    cell_w, cell_h = width + gap, height + gap + 13 * lines
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * cell_w + gap, rows * cell_h + gap), WHITE)
    draw = ImageDraw.Draw(page)
    for index, picture in enumerate(pictures):
        left, top = gap + index % columns * cell_w, gap + index // columns * cell_h
        page.paste(picture, (left, top))
        for row, text in enumerate(wrapped[index] if wrapped else []):
            draw.text((left, top + height + 13 * row), text, fill=(60, 60, 60), font=font)
    return page


def wrap(text: str, width: int, font) -> list[str]:
    """Break a caption into lines that are at most `width` pixels wide."""
    lines: list[str] = []
    for word in text.split():
        trial = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(trial) <= width:
            lines[-1] = trial
        else:
            lines.append(word)
    return lines or [""]


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """Uint8 pictures N H W 3 at `size` x `size` (Lanczos)."""
    return stack(fit_square(Image.fromarray(array), size) for array in pixels)
