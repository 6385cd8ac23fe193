"""The playground's pictures: nothing done is the round trip, the ends of a path are the pictures themselves, limits are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import draw_shape, grey_levels, tiny_vae
from PIL import Image

from latentpipe import LatentPipeline, UserError, VAEStage
from latentpipe.data.image_set import decode, encode
from latentpipe.evaluate.metrics.latents import slerp
from latentpipe.explore import playground
from latentpipe.utils.images import fit_square, to_images, to_pixels

RED, BLUE = draw_shape("red", "circle", 64), draw_shape("blue", "square", 64)


@pytest.fixture(scope="module")
def stage() -> VAEStage:
    """A tiny VAE with random weights, whose directions are known."""
    stage = VAEStage(tiny_vae()).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(playground, "PICTURES", 40)
        playground.directions(stage)
    return stage


def rebuilt(stage: VAEStage, picture: Image.Image) -> Image.Image:
    return to_pixels(decode(stage, encode(stage, to_images(picture))))[0]


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and first.tobytes() == second.tobytes()


def test_an_edit_that_does_nothing_is_the_round_trip(stage: VAEStage) -> None:
    assert same(playground.edited_picture(stage, RED, None, playground.Edit()), rebuilt(stage, RED))
    assert same(playground.edited_picture(stage, RED, BLUE, playground.Edit(moves={"channel 0": 0.0})), rebuilt(stage, RED))
    assert same(playground.edited_picture(stage, RED, BLUE, playground.Edit(share=1.0)), rebuilt(stage, BLUE))


def test_an_edit_is_what_its_parts_do_in_order(stage: VAEStage) -> None:
    edit = playground.Edit(share=0.25, moves={"channel 1": -2.0, "component 1": 1.0}, scale=1.5, noise=0.5, seed=3)
    latents = slerp(*(encode(stage, to_images(one)) for one in (RED, BLUE)), 0.25)
    latents = latents - 2 * playground.direction(stage, "channel 1").vector + playground.direction(stage, "component 1").vector
    latents = latents * 1.5 + 0.5 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    assert (
        grey_levels(playground.edited_picture(stage, RED, BLUE, edit), to_pixels(decode(stage, latents))[0]) <= 1
    )  # sums in another order
    assert not same(playground.edited_picture(stage, RED, BLUE, edit), rebuilt(stage, RED))


@pytest.mark.parametrize(
    "wrong",
    [{"share": 1.1}, {"scale": -1}, {"noise": 4}, {"noise": float("nan")}, {"seed": -1}, {"moves": {"channel 0": 11.0}}],
)
def test_amounts_have_limits(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="expected"):
        playground.Edit(**wrong)


def test_what_is_missing_is_told(stage: VAEStage) -> None:
    with pytest.raises(UserError, match="no second picture"):
        playground.edited_picture(stage, RED, None, playground.Edit(share=0.5))
    with pytest.raises(UserError, match="No direction 'warmth' is known"):
        playground.edited_picture(stage, RED, None, playground.Edit(moves={"warmth": 1.0}))
    with pytest.raises(UserError, match="none yet"):
        playground.direction(VAEStage(tiny_vae(seed=3)), "channel 0")
    with pytest.raises(UserError, match="no picture of 'xyzzy'"):
        playground.bank_picture("xyzzy")


def test_directions_are_learned_once_and_ranked(stage: VAEStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playground, "read_set", lambda *_: pytest.fail("learned again"))
    names = playground.directions(stage)
    assert {f"channel {index}" for index in range(4)} <= set(names)
    assert "component 1" in names


def test_sheets_have_a_picture_for_each_amount(stage: VAEStage) -> None:
    sheet = playground.traversal(stage, RED, ["channel 0", "component 1"], columns=3)
    plane = playground.plane(stage, RED, ("channel 0", "component 1"), side=3)
    middle = np.asarray(rebuilt(stage, RED))
    for page, row, above in ((sheet, 0, 0), (plane, 1, playground.TITLE_PX)):
        array = np.asarray(page)
        left, top = 112 + 1 * 67, 18 + row * 67 + above
        assert np.abs(array[top : top + 64, left : left + 64].astype(int) - middle).max() <= 1  # decoded in another batch
    with pytest.raises(UserError, match="2 to 15"):
        playground.traversal(stage, RED, ["channel 0"], columns=100)


@pytest.mark.parametrize("way", playground.WAYS)
def test_a_path_begins_and_ends_with_its_pictures(stage: VAEStage, way: str) -> None:
    path = playground.between_pictures(stage, RED, BLUE, 3, way)
    assert len(path) == 3
    assert grey_levels(path[0], rebuilt(stage, RED)) <= 1
    assert grey_levels(path[2], rebuilt(stage, BLUE)) <= 1
    ends = [encode(stage, to_images(one)) for one in (RED, BLUE)]
    middle = slerp(*ends) if way == "slerp" else (ends[0] + ends[1]) / 2
    assert grey_levels(path[1], to_pixels(decode(stage, middle))[0]) <= 1


@pytest.mark.parametrize("way", playground.WAYS)
def test_a_path_between_prompts_has_the_pictures_of_the_prompts_at_its_ends(pipe: LatentPipeline, way: str) -> None:
    calls: list[tuple[int, int, str]] = []
    path = playground.between_prompts(pipe, "red circle", "(blue:1.3) bar", 3, way, 5, 2, lambda *call: calls.append(call))
    for end, prompt in ((path[0], "red circle"), (path[2], "(blue:1.3) bar")):
        assert same(end, pipe(prompt, seed=5, num_inference_steps=2)[0].image)
    assert not same(path[1], path[0])
    assert not same(path[1], path[2])
    assert calls == [(step, 6, "draw") for step in range(1, 7)]


@pytest.mark.parametrize(("n", "way"), [(1, "slerp"), (49, "lerp"), (-1, "lerp"), (3, "cubic"), (3, ""), (3, "slerp ")])
def test_a_path_has_two_to_forty_eight_pictures(stage: VAEStage, n: int, way: str) -> None:
    with pytest.raises(UserError, match="expected 2 to 48 by one of slerp, lerp"):
        playground.between_pictures(stage, RED, BLUE, n, way)


def test_a_clip_goes_there_and_back(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (0, 100, 200)]
    playground.write_clip(pictures, tmp_path / "clip.gif")
    with Image.open(tmp_path / "clip.gif") as clip:
        reds = []
        for index in range(clip.n_frames):
            clip.seek(index)
            reds.append(clip.convert("RGB").getpixel((0, 0))[0])
        assert reds == [0, 100, 200, 100]
        assert clip.info["loop"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["clip.gif"]


def test_pictures_of_any_shape_are_taken(stage: VAEStage) -> None:
    wide = draw_shape("red", "bar", 64).resize((150, 40))
    assert same(playground.edited_picture(stage, wide, None, playground.Edit()), rebuilt(stage, fit_square(wide, 64)))
    assert playground.bank_picture("red apple").size == (128, 128)
