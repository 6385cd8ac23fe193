"""Pixels <-> images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import draw_shape
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from skimage.metrics import peak_signal_noise_ratio

from latentpipe import images


def test_every_grey_level_survives_the_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(images.to_bytes(images.bytes_to_images(levels)), levels)


def test_the_range_is_minus_one_to_one() -> None:
    ends = images.bytes_to_images(torch.tensor([0, 255], dtype=torch.uint8))
    assert ends.tolist() == [-1.0, 1.0]
    assert ends.dtype == torch.float32


def test_values_beyond_the_range_are_clamped() -> None:
    wild = torch.tensor([-7.0, -1.0, 1.0, 7.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert images.to_bytes(wild)[0, 0].flatten().tolist() == [0, 0, 255, 255]


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=20))
def test_to_bytes_is_the_nearest_level(values: list[float]) -> None:
    given_ = torch.tensor(values).view(1, 1, 1, -1).expand(1, 3, 1, -1)
    exact = (given_.double().clamp(-1, 1) / 2 + 0.5) * 255
    assert (images.to_bytes(given_).double() - exact).abs().max() <= 0.5 + 1e-4


def test_pictures_and_arrays_agree() -> None:
    pictures = [draw_shape("red", "circle"), draw_shape("blue", "bar")]
    tensor = images.to_images(pictures)
    assert tensor.shape == (2, 3, 32, 32)
    assert torch.equal(tensor, images.to_images(images.stack(pictures)))
    assert torch.equal(tensor[:1], images.to_images(pictures[0]))
    for before, after in zip(pictures, images.to_pixels(tensor), strict=True):
        assert np.array_equal(np.asarray(before), np.asarray(after))


@pytest.mark.parametrize("wrong", [np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((2, 2), np.uint8)])
def test_other_arrays_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        images.to_images(wrong)


def test_psnr_equals_scikit_image() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, 256, (3, 3, 8, 8), generator=generator, dtype=torch.uint8) for _ in range(2))
    ours = images.psnr(first, second)
    theirs = [peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=255) for a, b in zip(first, second, strict=True)]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-10)
    assert images.psnr(first, first).isinf().all()


def test_alpha_is_laid_on_the_background() -> None:
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert images.flatten(clear).getpixel((0, 0)) == (255, 255, 255)
    assert images.flatten(clear, (1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)
    assert images.flatten(Image.new("RGBA", (2, 2), (10, 20, 30, 255))).getpixel((0, 0)) == (10, 20, 30)
    half = images.flatten(Image.new("LA", (1, 1), (0, 128))).getpixel((0, 0))
    assert half[0] == pytest.approx(127, abs=1)


def test_transparent_palette_is_laid_on_white() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 0, 0, 200, 10, 10])
    picture.putpixel((1, 0), 1)
    picture.info["transparency"] = 0
    flat = images.flatten(picture)
    assert [flat.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (200, 10, 10)]


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    picture = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert [images.flatten(picture).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_a_dark_16_bit_picture_stays_dark() -> None:
    picture = Image.fromarray(np.full((2, 2), 200, np.uint16))
    assert picture.mode == "I;16"
    assert images.flatten(picture).getpixel((0, 0))[0] <= 1


def test_exif_rotation_is_applied() -> None:
    picture = draw_shape("green", "bar")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 270 degrees
    picture.getexif().update(exif)
    turned = picture.copy()
    turned.info["exif"] = exif.tobytes()
    expected = picture.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(images.flatten(turned)), np.asarray(expected))


def test_fit_square_is_the_centred_square() -> None:
    wide = Image.new("RGB", (90, 30), (255, 0, 0))
    wide.paste((0, 255, 0), (30, 0, 60, 30))
    square = images.fit_square(wide, 10)
    assert square.size == (10, 10)
    assert np.abs(np.asarray(square, int)[:, 2:-2] - [0, 255, 0]).max() <= 2
    assert images.fit_square(square, 10) is square
    assert images.fit_square(Image.new("RGB", (1, 1), (9, 8, 7)), 16).getpixel((8, 8)) == (9, 8, 7)


def test_sheet_holds_every_picture_at_its_place() -> None:
    pictures = [draw_shape(colour, "square") for colour in ("red", "green", "blue")]
    page = images.sheet(pictures, 2, ["one", "two words that are long enough to wrap", "three"])
    for index, picture in enumerate(pictures):
        rows = page.height // 2
        left, top = 4 + index % 2 * 36, 4 + index // 2 * (rows - 2)
        cut = page.crop((left, top, left + 32, top + 32))
        assert np.array_equal(np.asarray(cut), np.asarray(picture)), index
    plain = images.sheet(pictures, 3)
    assert plain.size == (3 * 36 + 4, 40)


@given(st.text(alphabet="ab ", max_size=60), st.integers(1, 200))
def test_wrap_keeps_every_word(text: str, width: int) -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(11)
    lines = images.wrap(text, width, font)
    assert " ".join(lines).split() == text.split()
    assert all(font.getlength(line) <= width or " " not in line for line in lines)


def test_flatten_leaves_rgb_alone() -> None:
    picture = draw_shape("yellow", "circle")
    assert ImageOps.grayscale(images.flatten(picture)).tobytes() == ImageOps.grayscale(picture).tobytes()
