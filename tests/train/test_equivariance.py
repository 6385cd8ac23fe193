"""The equivariance warps: the same on latents and images, whole numbers, and the draws."""

from __future__ import annotations

import pytest
import torch
from helpers import some_images
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from latentpipe.train.vae.equivariance import SCALES, Warp, draw_warp


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth_images(side: int) -> torch.Tensor:
    """Pictures without detail, 2 3 H W."""
    return functional.interpolate(some_images(2, 3, seed=4), size=side, mode="bicubic", align_corners=True)


@given(st.integers(0, 2**31), st.integers(1, 40), st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_latents_and_images_keep_their_ratio_in_whole_numbers(seed: int, side: int, downscale: int) -> None:
    warp = draw_warp(seeded(seed), side * downscale, downscale)
    assert warp(torch.zeros(1, 1, side, side)).shape[-2:] == (warp.to, warp.to)
    if side * downscale <= 256:
        image = warp(torch.zeros(1, 1, side * downscale, side * downscale))
        assert image.shape[-2:] == (warp.to * downscale, warp.to * downscale)
    assert warp.to <= side
    assert warp.to == side or (warp.to % 2 == 0 and warp.to >= 4)


@given(st.integers(0, 2**31))
def test_the_prototypes_sides_are_those_of_sixteen_latents(seed: int) -> None:
    assert draw_warp(seeded(seed), 64, 4).to in {8, 10, 12, 14, 16}


def test_every_warp_is_drawn_about_as_often_and_the_same_by_the_same_seed() -> None:
    generator, again = seeded(0), seeded(0)
    drawn = [draw_warp(generator, 64, 4) for _ in range(2000)]
    assert drawn == [draw_warp(again, 64, 4) for _ in range(2000)]
    for values, n in (({w.mirror for w in drawn}, 2), ({w.turns for w in drawn}, 4), ({w.to for w in drawn}, 5)):
        assert len(values) == n
    counts = [sum(warp.to == side for warp in drawn) for side in (8, 10, 12, 14, 16)]
    assert min(counts) > 320  # of 400; five standard deviations are 90
    assert 880 < sum(warp.mirror for warp in drawn) < 1120


def test_what_is_switched_off_does_not_happen_and_leaves_the_draws_alone() -> None:
    for seed in range(30):
        full, bare = seeded(seed), seeded(seed)
        first = draw_warp(full, 64, 4)
        second = draw_warp(bare, 64, 4, rotate=False, flip=False)
        assert second == Warp(False, 0, first.to, 16)
        assert torch.equal(full.get_state(), bare.get_state())
    assert draw_warp(seeded(1), 64, 4, scales=(1.0,), rotate=False, flip=False)(some_images()).equal(some_images())


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_mirrors_and_turns_commute_with_an_equivariant_encoder_and_decoder(mirror: bool, turns: int) -> None:
    images, warp = some_images(2, 32).double(), Warp(mirror, turns, 8, 8)
    latents = functional.avg_pool2d(images, 4)
    assert torch.allclose(functional.avg_pool2d(warp(images), 4), warp(latents), atol=1e-12)
    up = functional.interpolate(latents, scale_factor=4, mode="nearest")
    assert torch.equal(warp(up), functional.interpolate(warp(latents), scale_factor=4, mode="nearest"))


def test_a_mirror_comes_before_the_turns() -> None:
    values = torch.arange(4.0).view(1, 1, 2, 2)
    assert Warp(True, 1, 2, 2)(values).tolist() == values.flip(3).rot90(1, (2, 3)).tolist()
    assert Warp(True, 1, 2, 2)(values).tolist() != values.rot90(1, (2, 3)).flip(3).tolist()


@pytest.mark.parametrize("to", [8, 10, 12, 14])
def test_scaling_commutes_with_area_averages_of_smooth_pictures(to: int) -> None:
    images, warp = smooth_images(64), Warp(True, 3, to, 16)
    away = functional.avg_pool2d(warp(images), 4) - warp(functional.avg_pool2d(images, 4))
    assert away.abs().max() < 0.15 * images.std()  # at the borders
    assert away[..., 2:-2, 2:-2].abs().max() < 0.06 * images.std()
    wrong = functional.avg_pool2d(Warp(False, 3, to, 16)(images), 4) - warp(functional.avg_pool2d(images, 4))
    assert wrong.abs().max() > 0.5 * images.std()


@given(st.floats(-2, 2), st.sampled_from([8, 10, 12, 14]))
def test_scaling_keeps_a_constant_and_the_places_of_a_ramp(value: float, to: int) -> None:
    warp = Warp(False, 0, to, 16)
    assert torch.allclose(warp(torch.full((1, 2, 16, 16), value)), torch.tensor(value), atol=1e-6)
    places = (torch.arange(16, dtype=torch.float64) + 0.5) / 16  # a pixel's centre, of the whole side
    scaled = warp(places.expand(1, 1, 16, 16))[0, 0, 0]
    away = (scaled - (torch.arange(to, dtype=torch.float64) + 0.5) / to)[2:-2].abs() * to  # in pixels of the result
    assert away.max() < (1e-9 if to == 8 else 0.06)  # corners aligned instead of centres: 0.2 and more


def test_halving_is_the_antialiased_triangle() -> None:
    values = some_images(1, 16).double()
    columns = (values[..., 1:13:2] + 3 * values[..., 2:14:2] + 3 * values[..., 3:15:2] + values[..., 4:16:2]) / 8
    rows = (columns[:, :, 1:13:2] + 3 * columns[:, :, 2:14:2] + 3 * columns[:, :, 3:15:2] + columns[:, :, 4:16:2]) / 8
    assert torch.allclose(Warp(False, 0, 8, 16)(values)[..., 1:-1, 1:-1], rows, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_stays_and_the_scaling_is_computed_in_fp32(dtype: torch.dtype) -> None:
    values, warp = some_images(2).to(dtype), Warp(True, 1, 10, 16)
    assert warp(values).dtype == dtype
    assert torch.equal(warp(values), warp(values.double() if dtype == torch.float64 else values.float()).to(dtype))


def test_the_gradient_equals_finite_differences() -> None:
    values = some_images(1, 8).double()[:, :1].requires_grad_()
    assert torch.autograd.gradcheck(Warp(True, 1, 6, 8), values)


def test_sides_that_do_not_fit_are_errors() -> None:
    with pytest.raises(ValueError, match="30 pixels have no whole number"):
        draw_warp(seeded(0), 30, 4)
    with pytest.raises(ValueError, match="no multiples"):
        Warp(False, 0, 8, 16)(torch.zeros(1, 1, 24, 24))
    for scales in ((), (0.5, 1.5), (0.0,)):
        with pytest.raises(ValueError, match="above 0"):
            draw_warp(seeded(0), 64, 4, scales=scales)
    assert max(SCALES) == 1
