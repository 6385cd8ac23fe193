"""Folders of captioned pictures: every file people have, and every file that is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import draw_shape
from PIL import Image

from latentpipe import UserError
from latentpipe.data.image_folder import read_index, read_pictures

SIDE = 16


def write_jsonl(folder: Path, *rows: Any) -> None:
    """metadata.jsonl."""
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures without metadata."""
    draw_shape("red", "circle").save(tmp_path / "b.png")
    draw_shape("blue", "bar").save(tmp_path / "a.png")
    return tmp_path


def test_jsonl_gives_order_and_captions(folder: Path) -> None:
    write_jsonl(folder, {"file_name": "b.png", "text": "red circle"}, {"file_name": "a.png", "text": "blue bar"})
    pictures = read_pictures(folder, 32)
    assert pictures.names == ["b.png", "a.png"]
    assert pictures.captions == [("red circle",), ("blue bar",)]
    assert pictures.pixels.shape == (2, 32, 32, 3)
    assert pictures.pixels.dtype == np.uint8
    assert np.array_equal(pictures.pixels[0], np.asarray(draw_shape("red", "circle")))


def test_csv_gives_order_and_captions(folder: Path) -> None:
    (folder / "metadata.csv").write_text('file_name,text\nb.png,"red, round"\na.png,\n')
    pictures = read_pictures(folder, SIDE)
    assert pictures.names == ["b.png", "a.png"]
    assert pictures.captions == [("red, round",), ()]


def test_without_metadata_every_picture_is_read_by_name(folder: Path) -> None:
    (folder / "sub").mkdir()
    draw_shape("green", "bar").save(folder / "sub" / "c.JPG", format="JPEG")
    (folder / "notes.txt").write_text("not a picture")
    pictures = read_pictures(folder, SIDE)
    assert pictures.names == ["a.png", "b.png", "sub/c.JPG"]
    assert pictures.captions == [(), (), ()]
    assert not pictures.skipped


def test_a_file_named_twice_has_two_captions(folder: Path) -> None:
    write_jsonl(
        folder, {"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": "x"}, {"file_name": "a.png", "text": "two"}
    )
    pictures = read_pictures(folder, SIDE)
    assert pictures.names == ["a.png", "b.png"]
    assert pictures.captions == [("one", "two"), ("x",)]


def test_missing_empty_and_odd_captions_are_none(folder: Path) -> None:
    write_jsonl(folder, {"file_name": "a.png"}, {"file_name": "b.png", "text": 3})
    assert read_pictures(folder, SIDE).captions == [(), ()]


def test_line_separators_inside_a_caption_are_kept(folder: Path) -> None:
    caption = "two\u2028lines\u0085here\x0b"
    row = json.dumps({"file_name": "a.png", "text": caption}, ensure_ascii=False).replace("\\u000b", "\\u000b")
    (folder / "metadata.jsonl").write_text(row + "\n", encoding="utf-8")
    assert read_index(folder)[0].captions == (caption,)


@pytest.mark.parametrize("mark", ["\ufeff", ""])
def test_a_byte_order_mark_does_not_matter(folder: Path, mark: str) -> None:
    (folder / "metadata.csv").write_text(mark + "file_name,text\r\na.png,x\r\n", encoding="utf-8")
    assert read_index(folder)[0].captions == ("x",)
    (folder / "metadata.jsonl").write_text(mark + '{"file_name": "a.png", "text": "y"}\r\n', encoding="utf-8")
    assert read_index(folder)[0].captions == ("y",)


def test_bad_files_are_skipped_and_listed(folder: Path) -> None:
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "folder.png").mkdir()  # no file, so nothing that was skipped
    (folder / "broken.gif").write_bytes(b"GIF89a\xff\xff")
    pictures = read_pictures(folder, SIDE)
    assert pictures.names == ["a.png", "b.png"]
    assert set(pictures.skipped) == {"empty.png", "text.png", "cut.png", "broken.gif"}
    assert all(pictures.skipped.values())
    assert pictures.report().startswith("2 pictures read, 4 skipped\n")
    assert all(f"skipped {name}: " in pictures.report() for name in pictures.skipped)


def test_a_named_file_that_is_missing_is_skipped(folder: Path) -> None:
    write_jsonl(folder, {"file_name": "none.png", "text": "x"}, {"file_name": "a.png", "text": "y"})
    pictures = read_pictures(folder, SIDE)
    assert pictures.names == ["a.png"]
    assert pictures.captions == [("y",)]
    assert set(pictures.skipped) == {"none.png"}


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"text\.png"):
        read_pictures(tmp_path, SIDE)


def test_empty_folders_and_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no picture"):
        read_index(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        read_index(tmp_path / "none")
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no picture"):
        read_index(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        read_index(tmp_path / "metadata.jsonl")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "sub/../../secret.png", "..", "a/../../b.png"])
def test_names_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    draw_shape("red", "bar").save(tmp_path / "secret.png")
    draw_shape("red", "bar").save(inside / "a.png")
    write_jsonl(inside, {"file_name": "a.png", "text": "x"}, {"file_name": name, "text": "y"})
    with pytest.raises(UserError, match="outside the folder"):
        read_index(inside)


@pytest.mark.parametrize("line", ["{", "3", "[]", '{"text": "x"}', '{"file_name": 3}', '{"file_name": null}'])
def test_broken_metadata_names_the_place(folder: Path, line: str) -> None:
    (folder / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": "x"}}\n{line}\n')
    with pytest.raises(UserError, match="metadata"):
        read_index(folder)


@pytest.mark.parametrize("content", [b"name,text\na.png,x\n", b"\xff\xfe\x00", b'file_name,text\n"' + b"x" * 200_000])
def test_broken_tables_are_user_errors(folder: Path, content: bytes) -> None:
    (folder / "metadata.csv").write_bytes(content)
    with pytest.raises(UserError, match="metadata"):
        read_index(folder)


# --- kinds of pictures --------------------------------------------------------------------------------------


def only(folder: Path, side: int = SIDE) -> np.ndarray:
    """The pixels of the one picture there is."""
    pictures = read_pictures(folder, side)
    assert not pictures.skipped
    assert pictures.pixels.shape == (1, side, side, 3)
    return pictures.pixels[0]


def test_16_bit_grey(tmp_path: Path) -> None:
    Image.fromarray(np.full((SIDE, SIDE), 32768, np.uint16)).save(tmp_path / "x.png")
    assert set(only(tmp_path).ravel()) == {128}


def test_8_bit_grey_and_palette_and_1_bit(tmp_path: Path) -> None:
    for mode, value in (("L", 77), ("1", 1)):
        Image.new(mode, (SIDE, SIDE), value).save(tmp_path / "x.png")
        assert set(only(tmp_path).ravel()) == {77 if mode == "L" else 255}
    picture = draw_shape("blue", "bar", SIDE)
    picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=8).save(tmp_path / "x.png")
    assert np.abs(only(tmp_path).astype(int) - np.asarray(picture)).max() <= 8


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=95)
    red, green, blue = only(tmp_path).reshape(-1, 3).mean(0)
    assert red > 200
    assert max(green, blue) < 50


def test_alpha_is_laid_on_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    picture.paste((200, 0, 0, 255), (0, 0, SIDE, SIDE // 2))
    picture.save(tmp_path / "x.png")
    pixels = only(tmp_path)
    assert pixels[0, 0].tolist() == [200, 0, 0]
    assert pixels[-1, 0].tolist() == [255, 255, 255]


def test_exif_rotation(tmp_path: Path) -> None:
    picture = draw_shape("green", "bar", SIDE)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(only(tmp_path), np.asarray(picture.rotate(180)))


def test_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "x.png")
    assert set(map(tuple, only(tmp_path).reshape(-1, 3))) == {(9, 8, 7)}


def test_a_very_long_picture_keeps_its_centre(tmp_path: Path) -> None:
    picture = Image.new("RGB", (SIDE * 9, SIDE), (255, 0, 0))
    picture.paste((0, 0, 255), (SIDE * 4, 0, SIDE * 5, SIDE))
    picture.save(tmp_path / "x.png")
    assert set(map(tuple, only(tmp_path).reshape(-1, 3))) == {(0, 0, 255)}


def test_an_animation_is_its_first_frame(tmp_path: Path) -> None:
    frames = [draw_shape(colour, "square", SIDE) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=100)
    assert np.abs(only(tmp_path).astype(int) - np.asarray(frames[0])).max() <= 8


@pytest.mark.parametrize("suffix", ["bmp", "tif", "tiff", "webp", "jpeg"])
def test_other_formats(tmp_path: Path, suffix: str) -> None:
    picture = Image.new("RGB", (SIDE, SIDE), (200, 100, 50))
    picture.save(tmp_path / f"x.{suffix}")
    assert np.abs(only(tmp_path).astype(int) - np.asarray(picture)).max() <= 6


def test_a_bomb_is_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (200, 200)).save(folder / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32)
    pictures = read_pictures(folder, SIDE)
    assert pictures.names == ["a.png", "b.png"]
    assert "bomb.png" in pictures.skipped
