"""Edits: the algebra of latents, and the promise that bytes outside a feathered mask stay, for any mask and picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import draw_shape, grey_levels, tiny_vae
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latentpipe import UserError, VAEStage
from latentpipe.cli.app import main
from latentpipe.data.image_set import decode, encode
from latentpipe.explore import edit
from latentpipe.explore.directions import Direction
from latentpipe.pipelines.metadata.recipe import text_in
from latentpipe.utils.images import to_images, to_pixels

RED = draw_shape("red", "circle", 32)


@pytest.fixture(scope="module")
def stage() -> VAEStage:
    return VAEStage(tiny_vae()).eval()


def latents(n: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 4, 3, 5, generator=torch.Generator().manual_seed(seed))


def noisy(size: tuple[int, int], mode: str, seed: int) -> Image.Image:
    """A picture of noise in a mode."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), np.uint8)
    picture = Image.fromarray(values)
    return picture if mode == "RGBA" else picture.convert("RGB").convert(mode) if mode != "LA" else picture.convert("LA")


def some_mask(size: tuple[int, int], seed: int, share: float) -> Image.Image:
    """White pixels here and there, one at least."""
    values = np.random.default_rng(seed).random((size[1], size[0])) < share
    values.flat[seed % values.size] = True
    return Image.fromarray(values.astype(np.uint8) * 255)


@given(seed=st.integers(0, 99), share=st.floats(0, 1), amount=st.floats(-10, 10), factor=st.floats(0, 3))
def test_the_algebra(seed: int, share: float, amount: float, factor: float) -> None:
    a, b = latents(2, seed).split(1)
    assert torch.equal(edit.mix(a, b, 0), a)
    assert torch.equal(edit.mix(a, b, 1), b)
    assert torch.allclose(edit.mix(a, b, share), edit.mix(b, a, 1 - share), atol=1e-5)
    one = Direction("one", latents(1, seed + 1)[0], 0.0)
    assert torch.allclose(edit.add(edit.add(a, one, amount), one, -amount), a, atol=1e-4)
    assert torch.equal(edit.add(a, one, 0), a)
    assert torch.equal(edit.scale(a, factor), a * factor)
    drawn = edit.noise(a, 0.5, seed) - a
    assert torch.allclose(drawn, edit.noise(torch.zeros_like(a), 0.5, seed), atol=1e-6)
    assert torch.equal(edit.noise(a, 0.0, seed), a)
    assert not torch.equal(edit.noise(a, 0.5, seed + 1), edit.noise(a, 0.5, seed))


def test_noise_has_the_size_that_is_asked_for() -> None:
    zeros = torch.zeros(1, 4, 64, 64)
    assert edit.noise(zeros, 0.7, 3).std().item() == pytest.approx(0.7, rel=0.03)


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf"), 11.0])
def test_amounts_have_limits(wrong: float) -> None:
    a = latents()
    for call in (edit.mix, lambda first, _, far: edit.scale(first, far), lambda first, _, far: edit.noise(first, far)):
        with pytest.raises(UserError, match="expected 0 to"):
            call(a, a, wrong)
    with pytest.raises(UserError, match="expected -10 to 10"):
        edit.add(a, Direction("one", a[0], 0.0), 11.0)


def test_blending_keeps_either_side_exactly() -> None:
    a, b = latents(2).split(1)
    share = torch.zeros(1, 1, 3, 5)
    share[..., 1], share[..., 2] = 0.25, 1
    found = edit.blend(a, b, share)
    assert torch.equal(found[..., [0, 3, 4]], a[..., [0, 3, 4]])
    assert torch.equal(found[..., 2], b[..., 2])
    assert torch.allclose(found[..., 1], 0.75 * a[..., 1] + 0.25 * b[..., 1])


@given(width=st.integers(1, 40), height=st.integers(1, 40), seed=st.integers(0, 999), feather=st.integers(0, 12))
def test_a_feathered_mask_fades_out_around_the_hole(width: int, height: int, seed: int, feather: int) -> None:
    hole = some_mask((width, height), seed, 0.05)
    soft = np.asarray(edit.feathered(hole, feather))
    white = np.argwhere(np.asarray(hole) == 255)
    assert (soft[np.asarray(hole) == 255] == 255).all()
    away = np.abs(np.indices((height, width)).transpose(1, 2, 0)[:, :, None] - white).max(-1).min(-1)
    assert (soft[away > 2 * -(-feather // 2)] == 0).all()
    if not feather:
        assert np.array_equal(soft, np.asarray(hole))


def test_the_fade_is_a_line() -> None:
    hole = Image.new("L", (41, 1))
    hole.putpixel((12, 0), 255)
    soft = np.asarray(edit.feathered(hole, 8))[0].astype(int)
    assert np.abs(np.diff(soft)[12:20] + 255 / 9).max() <= 1
    assert np.array_equal(soft[:25], soft[:25][::-1])
    assert not soft[21:].any()


@given(
    width=st.integers(1, 33),
    height=st.integers(1, 33),
    mode=st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "HSV"]),
    seed=st.integers(0, 999),
    share=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    feather=st.sampled_from([None, 0, 3]),
)
def test_bytes_outside_the_mask_stay(
    stage: VAEStage, width: int, height: int, mode: str, seed: int, share: float, feather: int | None
) -> None:
    picture = noisy((width, height), mode, seed)
    before = picture.tobytes()
    mask = some_mask((width, height), seed, share)
    found = edit.edited(stage, picture, lambda latents: edit.noise(latents, 2.0, seed), mask, feather)
    assert found.size == picture.size
    assert found.mode == ("RGBA" if mode in ("RGBA", "LA") else "RGB")
    outside = np.asarray(edit.feathered(mask, feather)) == 0
    assert np.array_equal(np.asarray(found)[outside], np.asarray(picture.convert(found.mode))[outside])
    assert picture.tobytes() == before


def test_inside_the_mask_it_is_the_edit(stage: VAEStage) -> None:
    mask = Image.new("L", RED.size)
    mask.paste(255, (8, 8, 24, 24))
    everywhere = edit.edited(stage, RED, lambda latents: edit.scale(latents, 0.0))
    found = edit.edited(stage, RED, lambda latents: edit.scale(latents, 0.0), mask, 0)
    assert grey_levels(found.crop((12, 12, 20, 20)), RED.crop((12, 12, 20, 20))) > 10
    white = Image.new("L", RED.size, 255)
    assert edit.edited(stage, RED, lambda latents: edit.scale(latents, 0.0), white).tobytes() == everywhere.tobytes()
    rebuilt = to_pixels(decode(stage, encode(stage, to_images(RED))))[0]
    assert edit.edited(stage, RED, lambda latents: latents).tobytes() == rebuilt.tobytes()


def test_what_is_no_picture_or_no_mask_is_refused(stage: VAEStage) -> None:
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    for picture in (deep, deep.convert("I"), deep.convert("F")):
        with pytest.raises(UserError, match="more than 8 bits"):
            edit.canvas(picture)
    with pytest.raises(UserError, match="3 x 4 pixels and the picture 4 x 4"):
        edit.hole_of(Image.new("L", (3, 4), 255), (4, 4))
    with pytest.raises(UserError, match="no white pixel"):
        edit.hole_of(Image.new("RGBA", (4, 4), (255, 255, 255, 0)), (4, 4))
    with pytest.raises(UserError, match="feather is 300"):
        edit.feathered(Image.new("L", (4, 4), 255), 300)


def test_a_picture_that_lies_on_its_side_is_turned(stage: VAEStage) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture = noisy((6, 4), "RGB", 0)
    picture.info["exif"] = exif.tobytes()
    picture._exif = exif  # type: ignore[attr-defined]
    assert edit.canvas(picture).size == (4, 6)


def test_the_transparent_part_is_a_mask() -> None:
    picture = Image.new("RGBA", (4, 1), (1, 2, 3, 255))
    assert edit.clear_part(picture) is None
    assert edit.clear_part(picture.convert("RGB")) is None
    picture.putpixel((2, 0), (9, 9, 9, 0))
    part = edit.clear_part(picture)
    assert part is not None
    assert list(part.tobytes()) == [0, 0, 255, 0]


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], vae_folder: Path) -> None:
    monkeypatch.chdir(tmp_path)
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", "a recipe of another picture")
    info.add_text("latentpipe", "{}")
    noisy((33, 21), "RGB", 0).save("a.png", pnginfo=info)
    draw_shape("blue", "square", 64).save("b.png")
    mask = Image.new("L", (33, 21))
    mask.paste(255, (10, 5, 14, 9))
    mask.save("m.png")
    for extra in (["--mix", "b.png", "--share", "0.5"], ["--noise", "0.3", "--mask", "m.png"], ["--scale", "1.2"], []):
        assert main(["edit", "a.png", "--vae", str(vae_folder), *extra]) == 0
        out, error = capsys.readouterr()
        assert out == "edit.png\n"
        assert ("nothing was asked for" in error) == (not extra)
        with Image.open("edit.png") as found, Image.open("a.png") as given:
            assert found.size == (33, 21)
            assert ("".join(extra).find("mask") >= 0) == (found.getpixel((32, 20)) == given.getpixel((32, 20)))
        assert text_in(Path("edit.png"), "parameters") is None
        assert text_in(Path("edit.png"), "latentpipe") is None
    for extra, message in (
        (["--mix", "b.png", "--share", "2"], "share is 2"),
        (["--mix", "none.png"], "none.png: no such file"),
        (["--mask", "b.png"], "64 x 64 pixels and the picture 33 x 21"),
        (["--out", "x.jpg"], "ends in .png"),
    ):
        assert main(["edit", "a.png", "--vae", str(vae_folder), *extra]) == 2
        assert message in capsys.readouterr().err
