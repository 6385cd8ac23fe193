"""Pixels <-> images."""

from __future__ import annotations

import os
import subprocess
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import draw_shape, grey_levels
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from skimage.metrics import peak_signal_noise_ratio

from latentpipe import UserError
from latentpipe.utils import images


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


def written(path: Path, values: Any) -> Path:
    """A TIFF of an array, as it is."""
    Image.fromarray(np.asarray(values)).save(path)
    return path


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[-0.005, 0.5, 1.005]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 128.0, 255.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 32768.0, 65535.0]], np.float32), [0, 128, 255]),
        (np.array([[0, 128, 255]], np.int32), [0, 128, 255]),
        (np.array([[0, 1, 1]], np.int32), [0, 1, 1]),
        (np.array([[0, 32768, 65535]], np.int32), [0, 128, 255]),
    ],
)
def test_deep_tiffs_are_scaled(tmp_path: Path, values: Any, expected: list[int]) -> None:
    picture = images.open_picture(written(tmp_path / "a.tif", values))
    assert [picture.getpixel((x, 0))[0] for x in range(3)] == expected


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0.0, 1.5]], np.float32), "s values go from 0 to 1.5"),
        (np.array([[-1.0, 1.0]], np.float32), "s values go from -1 to 1"),
        (np.array([[0.0, 1e6]], np.float32), "s values go from 0 to 1e"),
        (np.array([[0.0, np.nan]], np.float32), "not finite"),
        (np.array([[-70000, 5]], np.int32), "s values go from -70000 to 5"),
    ],
)
def test_deep_tiffs_without_a_scale_are_refused(tmp_path: Path, values: Any, reason: str) -> None:
    with pytest.raises(UserError, match=rf"a\.tif cannot be read as a picture \(it.*{reason}"):
        images.open_picture(written(tmp_path / "a.tif", values))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.eps", "a.tif"])
def test_no_other_program_is_started_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).write_bytes(EPS)
    with Image.open(tmp_path / name) as picture:
        assert picture.format == "EPS"  # Pillow alone would take it, whatever its name, and start Ghostscript for its pixels

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    for read in (images.open_picture, images.dropped):
        with pytest.raises(UserError, match=r"cannot be read as a picture \(expected PNG, JPEG, WebP, GIF, BMP or TIFF\)"):
            read(tmp_path / name)
    from latentpipe.data.image_folder import read_square
    from latentpipe.engine.xy_grid.plot import is_grid
    from latentpipe.evaluate.preprocessing import upright_size
    from latentpipe.pipelines.metadata.reader import read_info
    from latentpipe.pipelines.metadata.recipe import read
    from latentpipe.ui.uploads import check_picture

    for call in (read_info, read, upright_size, lambda path: read_square(path, 8), lambda path: check_picture(str(path))):
        with pytest.raises(UserError, match="cannot be read as a picture"):
            call(tmp_path / name)
    assert not is_grid(tmp_path / name)


def test_what_is_no_picture_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    for name, reason in (("pipe", "not a file"), ("device", "not a file"), ("folder", "is a folder"), ("none", "no such file")):
        with pytest.raises(UserError, match=reason):
            images.open_picture(tmp_path / f"{name}.png")


def test_a_picture_beyond_the_limit_is_not_decoded(tmp_path: Path) -> None:
    head = b"IHDR" + (60_000).to_bytes(4) + (60_000).to_bytes(4) + b"\x08\x02\0\0\0"
    chunk = (13).to_bytes(4) + head + zlib.crc32(head).to_bytes(4)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    with pytest.raises(UserError, match="cannot be read as a picture"):
        images.open_picture(tmp_path / "a.png")
    draw_shape("red", "bar", 32).save(tmp_path / "b.png")
    with (
        pytest.raises(UserError, match="32 x 32 pixels; at most 1,000"),
        images.picture_file(tmp_path / "b.png", most=1000),
    ):
        pass


@pytest.mark.parametrize("kind", images.FORMATS)
def test_every_format_of_the_list_is_read(tmp_path: Path, kind: str) -> None:
    draw_shape("red", "circle", 16).save(tmp_path / "x", format=kind, **({"lossless": True} if kind == "WEBP" else {}))
    picture = images.open_picture(tmp_path / "x")
    assert picture.mode == "RGB"
    assert grey_levels(picture, draw_shape("red", "circle", 16)) <= (120 if kind == "JPEG" else 0)


def test_a_png_without_most_of_its_rows_is_refused(tmp_path: Path) -> None:
    draw_shape("red", "bar", 24).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    head = b"IHDR" + (24).to_bytes(4) + (60_000).to_bytes(4) + data[24:29]
    (tmp_path / "b.png").write_bytes(data[:12] + head + zlib.crc32(head).to_bytes(4) + data[33:])
    with Image.open(tmp_path / "b.png") as picture:
        picture.load()  # Pillow alone takes it
    with pytest.raises(UserError, match=r"24 x 60000 pixels in \d+ bytes; the file is cut off or damaged"):
        images.open_picture(tmp_path / "b.png")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_the_emptiest_large_png_is_read(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (3000, 3000)).save(tmp_path / "a.png", optimize=True)
    assert images.open_picture(tmp_path / "a.png").size == (3000, 3000)


def test_reading_pictures_in_threads_leaves_other_warnings_alone(tmp_path: Path) -> None:
    """What one thread restores must not be another one's: notes of a training vanished that way."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    before = list(warnings.filters)
    entered, leave = threading.Event(), threading.Event()

    def slow() -> None:
        with images.picture_file(tmp_path / "a.png"):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=slow)
    with images.picture_file(tmp_path / "a.png"):
        thread.start()
        assert entered.wait(30)
    leave.set()
    thread.join()
    assert list(warnings.filters) == before


def test_a_mistake_of_our_own_is_not_blamed_on_the_picture(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(AttributeError, match="size"), images.picture_file(tmp_path / "a.png"):
        images.fit_square("a path", 8)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot be read as a picture"), images.picture_file(tmp_path / "a.png"):
        raise AttributeError("of a library")
