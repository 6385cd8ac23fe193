"""A folder of any size as training pictures."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import draw_shape
from PIL import Image

from latentpipe import UserError
from latentpipe.data import streaming
from latentpipe.data.image_folder import read_pictures
from latentpipe.data.streaming import PictureStream
from latentpipe.utils.errors import LatentpipeWarning


def many(folder: Path, n: int) -> Path:
    """`n` pictures of 8 pixels whose red channel tells their number."""
    folder.mkdir(parents=True)
    for index in range(n):
        Image.new("RGB", (8, 8), (index % 256, index // 256, 0)).save(folder / f"{index:05d}.png")
    return folder


def numbers(pixels: torch.Tensor) -> list[int]:
    """Which pictures of `many` a batch holds."""
    return (pixels[:, 0, 0, 0].int() + 256 * pixels[:, 1, 0, 0].int()).tolist()


@pytest.mark.parametrize("eager", [0, 100])
def test_it_is_what_read_pictures_reads(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, eager: int) -> None:
    monkeypatch.setattr(streaming, "EAGER", eager)
    whole = read_pictures(pictures, 24)
    found = PictureStream(pictures, 24)
    order = [5, 0, 11, 5]
    batch = found.batch(order, ahead=[3, 4])
    assert batch.dtype == torch.uint8
    assert np.array_equal(batch.permute(0, 2, 3, 1).numpy(), whole.pixels[order])
    assert np.array_equal(found.batch([3, 4]).permute(0, 2, 3, 1).numpy(), whole.pixels[[3, 4]])
    assert np.array_equal(found.batch([1]).permute(0, 2, 3, 1).numpy(), whole.pixels[[1]])  # not what was read ahead


def test_five_thousand_files_are_not_read_before_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    original = streaming.read_square
    monkeypatch.setattr(streaming, "read_square", lambda path, size: opened.append(path) or original(path, size))
    found = PictureStream(many(tmp_path / "many", 5000), 8)
    assert len(found) == 5000
    assert len(opened) <= 1
    assert numbers(found.batch([4999, 17, 300])) == [4999, 17, 300]
    assert len(opened) <= 4
    assert numbers(found.batch([17, 300])) == [17, 300]
    assert len(opened) <= 4  # kept
    assert "5,000 pictures, read as they are needed" in found.report()
    assert found.sample(10) == sorted(set(found.sample(10)))
    assert found.sample(10) == found.sample(10)


def test_what_does_not_fit_into_memory_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming.memory, "available", lambda device: 8 * 8 * 3 * 4 * 5)  # room for five
    found = PictureStream(many(tmp_path / "many", 12), 8)
    for _ in range(2):
        assert numbers(found.batch(range(12))) == list(range(12))


def bad_pictures(folder: Path) -> dict[str, str]:
    """Files that are no pictures, and words of the reason for each."""
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    draw_shape("red", "bar", 64).save(folder / "whole.png")
    (folder / "truncated.png").write_bytes((folder / "whole.png").read_bytes()[:150])
    (folder / "whole.png").unlink()
    Image.fromarray(np.array([[1.0, np.nan]], np.float32)).save(folder / "nan.tiff")
    huge = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    (folder / "bomb.png").write_bytes(huge + b"\0\0\0\0")
    known = {"empty.png": "expected PNG", "text.png": "expected PNG", "nan.tiff": "not finite"}
    return known | {"truncated.png": "", "bomb.png": ""}


@pytest.mark.parametrize("eager", [0, 100])
def test_bad_files_are_named_once_and_replaced_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eager: int) -> None:
    monkeypatch.setattr(streaming, "EAGER", eager)
    folder = many(tmp_path / "many", 3)
    reasons = bad_pictures(folder)
    names = sorted(path.name for path in folder.iterdir())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = PictureStream(folder, 8)
        batch = found.batch(range(len(names)))
        found.batch(range(len(names)))
    following = [next(name for name in [*names[index:], *names] if name not in reasons) for index in range(len(names))]
    assert numbers(batch) == [int(name[:5]) for name in following]
    assert found.skipped.keys() == reasons.keys()
    assert all(words in found.skipped[name] for name, words in reasons.items())
    notes = [str(entry.message) for entry in caught if entry.category is LatentpipeWarning]
    assert len(notes) == (0 if eager else len(reasons))
    assert found.sample(100) == [names.index(name) for name in names if name not in reasons]


def test_unusual_pictures_are_read_upright_on_white(tmp_path: Path) -> None:
    tmp_path = tmp_path / "set"
    tmp_path.mkdir()
    Image.new("RGB", (1, 1), (9, 9, 9)).save(tmp_path / "a-pixel.png")
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "b-cmyk.jpg")
    Image.fromarray(np.full((20, 20), 65535, np.uint16)).save(tmp_path / "c-deep.png")
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("blue", "red")]
    frames[0].save(tmp_path / "d-animated.gif", save_all=True, append_images=frames[1:])
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "e-alpha.png")
    turned = Image.new("RGB", (20, 10), "white")
    turned.paste((0, 0, 0), (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer turns it clockwise
    turned.save(tmp_path / "f-turned.png", exif=exif)
    found = PictureStream(tmp_path, 8)
    batch = found.batch(range(6)).permute(0, 2, 3, 1).int().numpy()
    assert not found.skipped
    middle = [picture[4, 4].tolist() for picture in batch]
    assert middle[0] == [9, 9, 9]
    assert middle[1][0] > 200
    assert max(middle[1][1:]) < 60
    assert middle[2] == middle[4] == [255, 255, 255]
    assert middle[3][2] > 200  # the first frame, blue
    assert middle[3][0] < 60
    assert batch[5][1, 4].max() < 40  # dark at the top
    assert batch[5][6, 4].min() > 215


def test_a_folder_without_a_readable_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(UserError, match="No picture in"):
        PictureStream(tmp_path, 8)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="holds no picture"):
        PictureStream(tmp_path, 8)
