"""Masks as painting programs save them."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentpipe.explore.edit import hole_of, open_mask
from latentpipe.utils.errors import LatentpipeWarning

SIZE = (64, 64)
BOX = (24, 24, 40, 40)
HOLE = Image.new("L", SIZE)
HOLE.paste(255, BOX)


def photo() -> Image.Image:
    y, x = np.mgrid[0:64, 0:64]
    return Image.fromarray(np.stack([x * 3 + 20, y * 3, (x + y) * 2], -1).astype(np.uint8))


def strokes(colour: tuple[int, int, int], ground: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    layer = Image.new("RGBA", SIZE, (*ground, 0))
    layer.paste((*colour, 255), BOX)
    return layer


def cut(picture: Image.Image) -> Image.Image:
    found, alpha = picture.convert("RGBA"), Image.new("L", SIZE, 255)
    alpha.paste(0, BOX)
    found.putalpha(alpha)
    return found


def two_tone() -> Image.Image:
    layer = Image.new("RGBA", SIZE, (0, 0, 0, 0))
    layer.paste((0, 0, 0, 255), (10, 10, 60, 60))
    layer.paste((255, 255, 255, 255), BOX)
    return layer


MASKS = {
    "white strokes": strokes((255, 255, 255)), "white strokes on clear white": strokes((255, 255, 255), (255, 255, 255)),
    "black strokes": strokes((0, 0, 0)), "red strokes": strokes((250, 20, 20)), "a hole": cut(photo()),
    "a hole in grey": cut(photo().convert("L")), "black and white": two_tone(), "a palette": strokes((255, 255, 255)).quantize(4),
    "a plain mask": HOLE, "a plain mask in colours": HOLE.convert("RGB"),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_case_47_every_kind_of_mask_is_the_same_hole(tmp_path: Path, name: str) -> None:
    MASKS[name].save(tmp_path / "mask.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LatentpipeWarning)
        found = hole_of(open_mask(tmp_path / "mask.png"), SIZE)
    assert found.tobytes() == HOLE.tobytes()
    assert ["taken as the hole" in str(note.message) for note in caught] == ([True] if "hole" in name else [])


def test_case_47_sixteen_bits_and_a_turned_mask_are_read(tmp_path: Path) -> None:
    Image.fromarray(np.array(HOLE, np.uint16) * 257).save(tmp_path / "deep.png")
    assert hole_of(open_mask(tmp_path / "deep.png"), SIZE).tobytes() == HOLE.tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    tall = Image.new("L", (32, 64))
    tall.paste(255, (0, 0, 16, 16))
    tall.save(tmp_path / "turned.png", exif=exif)
    assert hole_of(open_mask(tmp_path / "turned.png"), (64, 32)).getbbox() == (48, 0, 64, 16)


@pytest.mark.parametrize("name", ["white strokes", "a hole"])
def test_case_47_the_verbs_redraw_that_hole_alone(model_folder: Path, vae_folder: Path, tmp_path: Path, name: str) -> None:
    from latentpipe.cli.app import main

    photo().save(tmp_path / "photo.png")
    MASKS[name].save(tmp_path / "mask.png")
    for verb in (
        ["inpaint", "--prompt", "red", "--steps", "1", "--model", str(model_folder)],
        ["edit", "--vae", str(vae_folder)],
    ):
        out = tmp_path / f"{verb[0]}.png"
        asked = [verb[0], str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png"), "--feather", "0", *verb[1:]]
        assert main([*asked, "--out", str(out)]) == 0
        changed = (np.asarray(Image.open(out)) != np.asarray(photo())).any(-1)
        assert changed[24:40, 24:40].mean() > 0.5
        assert not changed[np.asarray(HOLE) == 0].any()
