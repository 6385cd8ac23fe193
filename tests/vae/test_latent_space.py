"""LatentSpace against the affine pairs that diffusers' pipelines apply."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import tiny_vae
from hypothesis import assume, given
from hypothesis import strategies as st

from latentpipe import LatentSpace

FACTORS = st.floats(0.05, 20)
SHIFTS = st.floats(-10, 10)


@st.composite
def spaces(draw: Any, channels: int | None = None) -> LatentSpace:
    c = channels or draw(st.integers(1, 6))
    scale = tuple(draw(st.lists(FACTORS, min_size=c, max_size=c)))
    shift = tuple(draw(st.lists(SHIFTS, min_size=c, max_size=c)))
    return LatentSpace(c, draw(st.sampled_from([1, 2, 4, 8])), scale, shift)


@given(spaces(), st.integers(0, 2**31))
def test_normalize_and_denormalize_are_inverse(space: LatentSpace, seed: int) -> None:
    raw = torch.randn(2, space.channels, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5
    assert torch.allclose(space.denormalize(space.normalize(raw)), raw, atol=1e-9)
    assert torch.allclose(space.normalize(space.denormalize(raw)), raw, atol=1e-9)


@given(spaces())
def test_normalize_is_the_stated_affine(space: LatentSpace) -> None:
    raw = torch.randn(1, space.channels, 2, 2, dtype=torch.float64)
    latents = space.normalize(raw)
    for c in range(space.channels):
        assert torch.allclose(latents[:, c], (raw[:, c] - space.shift[c]) * space.scale[c])
    assert space.normalize(raw.float()).dtype == torch.float32


@given(spaces(channels=3), spaces(channels=3))
def test_difference_is_empty_exactly_for_equal_spaces(first: LatentSpace, second: LatentSpace) -> None:
    assert first.difference(LatentSpace(3, first.downscale, first.scale, first.shift)) == ""
    assert (first.difference(second) == "") == (first == second)
    assert (second.difference(first) == "") == (first == second)


@given(spaces(), st.data())
def test_difference_names_the_channel(space: LatentSpace, data: Any) -> None:
    channel = data.draw(st.integers(0, space.channels - 1))
    value = data.draw(SHIFTS)
    assume(value != space.shift[channel])
    shift = list(space.shift)
    shift[channel] = value
    other = LatentSpace(space.channels, space.downscale, space.scale, tuple(shift))
    assert f"shift of channel {channel}" in space.difference(other)


def test_difference_of_shapes_is_said_in_words() -> None:
    small = LatentSpace(4, 8, (1.0,) * 4, (0.0,) * 4)
    assert small.difference(LatentSpace(16, 8, (1.0,) * 16, (0.0,) * 16)) == (
        "4-channel latents at 1/8 size are not 16-channel latents at 1/8 size."
    )
    assert "1/4" in small.difference(LatentSpace(4, 4, (1.0,) * 4, (0.0,) * 4))


@pytest.mark.parametrize(
    ("scale", "shift"),
    [((1.0,), (0.0, 0.0)), ((1.0, 1.0), (0.0,)), ((0.0, 1.0), (0.0, 0.0)), ((-1.0, 1.0), (0.0, 0.0)),
     ((math.nan, 1.0), (0.0, 0.0)), ((math.inf, 1.0), (0.0, 0.0)), ((1.0, 1.0), (0.0, math.nan))],
)  # fmt: skip
def test_impossible_spaces_are_refused(scale: tuple[float, ...], shift: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"scale|shift"):
        LatentSpace(2, 8, scale, shift)


def test_of_one_factor_is_the_stable_diffusion_affine() -> None:
    vae = tiny_vae(scaling_factor=0.3)
    space, raw = LatentSpace.of(vae), torch.randn(2, 4, 3, 3)
    assert torch.equal(space.normalize(raw), raw * vae.config.scaling_factor)  # pipelines: latents = scaling_factor * latents
    assert torch.equal(space.denormalize(raw), raw / vae.config.scaling_factor)
    assert (space.channels, space.downscale) == (4, 2)


def test_of_scale_and_shift_is_the_sd3_and_flux_affine() -> None:
    vae = tiny_vae(scaling_factor=1.5, shift_factor=0.06)
    space, raw = LatentSpace.of(vae), torch.randn(2, 4, 3, 3)
    assert torch.allclose(space.normalize(raw), (raw - vae.config.shift_factor) * vae.config.scaling_factor, atol=1e-6)
    assert torch.allclose(space.denormalize(raw), raw / vae.config.scaling_factor + vae.config.shift_factor, atol=1e-6)


def test_of_mean_and_std_is_the_sdxl_affine() -> None:
    vae = tiny_vae(scaling_factor=0.5, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.8, 1.2, 2.0, 1.0])
    space, latents = LatentSpace.of(vae), torch.randn(2, 4, 3, 3)
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    # StableDiffusionXLPipeline.__call__: latents = latents * latents_std / scaling_factor + latents_mean
    expected = latents * std / vae.config.scaling_factor + mean
    assert torch.allclose(space.denormalize(latents), expected, atol=1e-6)
    assert torch.allclose(space.normalize(expected), latents, atol=1e-5)


def test_a_missing_factor_is_an_error() -> None:
    with pytest.raises(ValueError, match="scaling_factor"):
        LatentSpace.from_config({"latent_channels": 4, "block_out_channels": [1, 2]})


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 1.0, "block_out_channels": [1, 2]},
        {"latent_channels": 4, "scaling_factor": 1.0},
        {"latent_channels": 4, "scaling_factor": 1.0, "block_out_channels": [1], "latents_mean": [0] * 4, "latents_std": [0] * 4},
        {"latent_channels": 4, "scaling_factor": "one", "block_out_channels": [1, 2]},
    ],
)
def test_damaged_configs_are_value_errors(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w{4}"):
        LatentSpace.from_config(config)


def test_other_autoencoders_know_their_downscale() -> None:
    from diffusers import AutoencoderDC, AutoencoderTiny

    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1), latent_channels=3,
    )  # fmt: skip
    images = torch.rand(1, 3, 16, 16)
    assert images.shape[-1] // tiny.encode(images).latents.shape[-1] == LatentSpace.of(tiny).downscale == 4
    deep = AutoencoderDC(
        latent_channels=4, attention_head_dim=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        scaling_factor=0.4,
    )  # fmt: skip
    assert images.shape[-1] // deep.encode(images).latent.shape[-1] == LatentSpace.of(deep).downscale


@given(spaces(channels=2), st.integers(1, 5), st.integers(1, 7), st.integers(1, 7))
def test_shape_is_the_latents_shape(space: LatentSpace, batch: int, h: int, w: int) -> None:
    assert space.shape(batch, h * space.downscale, w * space.downscale) == (batch, 2, h, w)


@pytest.mark.parametrize("side", [0, -8, 7, 12])
def test_shape_refuses_other_sides(side: int) -> None:
    space = LatentSpace(1, 8, (1.0,), (0.0,))
    with pytest.raises(ValueError, match=f"height is {side} pixels"):
        space.shape(1, side, 8)
    with pytest.raises(ValueError, match=f"width is {side} pixels"):
        space.shape(1, 8, side)


def test_other_channel_counts_are_refused() -> None:
    space = LatentSpace(4, 8, (1.0,) * 4, (0.0,) * 4)
    for wrong in (torch.zeros(1, 3, 2, 2), torch.zeros(4, 2, 2)):
        with pytest.raises(ValueError, match="4 channels"):
            space.normalize(wrong)


@given(st.integers(1, 9), st.integers(1, 4))
def test_measure_is_the_law_of_total_variance(n: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(n)
    mean = torch.randn(n, 2, 3, 3, generator=generator) * 3 + 1
    std = torch.rand(n, 2, 3, 3, generator=generator)
    measured = LatentSpace.measure(zip(mean.split(batch), std.split(batch), strict=True), 4)
    spread = (mean.double().var((0, 2, 3), correction=0) + std.double().square().mean((0, 2, 3))).sqrt()
    assert measured.n == n
    assert measured.space.downscale == 4
    assert measured.space.shift == pytest.approx(mean.double().mean((0, 2, 3)).tolist())
    assert measured.space.scale == pytest.approx((1 / spread).tolist())
    if n > 1:
        error = mean.double().mean((2, 3)).std(0) / math.sqrt(n) / spread
        assert measured.standard_error == pytest.approx(error.tolist())


def test_measured_latents_have_mean_0_and_std_1() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(500, 3, 4, 4, generator=generator) * torch.tensor([1.0, 3.0, 0.1]).view(3, 1, 1) + 2
    std = torch.full_like(mean, 0.5)
    space = LatentSpace.measure([(mean, std)], 8).space
    latents = space.normalize(mean + std * torch.randn(mean.shape, generator=generator))
    assert latents.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=0.03)
    assert latents.std((0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=0.03)


def test_nothing_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="no readable picture"):
        LatentSpace.measure([], 8)
