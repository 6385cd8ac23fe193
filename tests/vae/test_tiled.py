"""Bands against the whole picture: the oracle is diffusers' own encode and decode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import tiny_vae
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from latentpipe.utils.errors import UserError
from latentpipe.utils.io import content_hash
from latentpipe.vae.latent_space import downscale_of
from latentpipe.vae.tiling import tiled
from latentpipe.vae.tiling.feature_map import GroupMoments, source, store, upsample_conv
from latentpipe.vae.tiny import TinyVAE

pytestmark = pytest.mark.numeric

ROWS = (1, 3, 8, 17, 10**6)
KINDS = ("plain", "attention", "three", "one", "bare", "asymmetric", "tiny", "pool", "own")


class PoolBlock(nn.Module):
    """An AutoencoderTinyBlock with a normalized branch before its convolutions."""

    def __init__(self, block: Any, channels: int) -> None:
        super().__init__()
        self.conv, self.skip, self.fuse = block.conv, block.skip, block.fuse
        self.pool = nn.Sequential(nn.Conv2d(channels, 16, 1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.pool(x)
        return self.fuse(self.conv(x) + self.skip(x))


def small_tiny(pool: bool = False) -> Any:
    """An AutoencoderTiny of 1/4 size with one to three blocks per level."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(1)
    widths = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
    vae = AutoencoderTiny(**widths, num_encoder_blocks=(1, 2, 3), num_decoder_blocks=(3, 2, 1)).eval()
    for part in (vae.encoder, vae.decoder) if pool else ():
        for index, layer in enumerate(part.layers):
            if hasattr(layer, "skip"):
                part.layers[index] = PoolBlock(layer, 8)
    return vae


def build(kind: str) -> Any:
    """One of KINDS, with biases and normalizations that are not trivial."""
    from diffusers import AsymmetricAutoencoderKL

    three = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    if kind == "asymmetric":
        torch.manual_seed(2)
        widths = {"down_block_out_channels": (8, 8, 16), "up_block_out_channels": (8, 16, 16)}
        vae = AsymmetricAutoencoderKL(**three, **widths, layers_per_up_block=2, norm_num_groups=4).eval()
    elif kind == "own":
        torch.manual_seed(3)
        up = [["up"], ["conv", 8, 8, 1, False]]
        encoder = [["conv", 3, 8, 1, True], ["conv", 8, 8, 2, False], ["block", 8, 12, True], ["conv", 12, 8, 2, False]]
        decoder = [
            ["conv", 4, 8, 1, True],
            ["relu"],
            ["block", 8, 8, True],
            *up,
            ["block", 8, 8, True],
            ["block", 8, 8, True],
            *up,
        ]
        last = [["conv", 8, 4, 1, True]]
        vae = TinyVAE(4, 4, [*encoder, *last], [*decoder, ["block", 8, 8, False], ["conv", 8, 3, 1, True]]).eval()
    elif kind in ("tiny", "pool"):
        vae = small_tiny(kind == "pool")
    else:
        one = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",), "block_out_channels": (8,)}
        vae = {
            "plain": lambda: tiny_vae(layers_per_block=2),
            "attention": lambda: tiny_vae(mid_block_add_attention=True),
            "three": lambda: tiny_vae(**three, block_out_channels=(8, 8, 16), layers_per_block=3, mid_block_add_attention=True),
            "one": lambda: tiny_vae(**one),
            "bare": lambda: tiny_vae(use_quant_conv=False, use_post_quant_conv=False),
        }[kind]()
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return vae


@pytest.fixture(scope="module")
def vaes() -> dict[str, Any]:
    """Every kind; tests leave them as they are."""
    return {kind: build(kind) for kind in KINDS}


def factor(vae: Any) -> int:
    """Picture side / latent side."""
    return downscale_of(vae.config)


def values(encoded: Any) -> torch.Tensor:
    """Mean and log-variance, or latents."""
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.parameters


def inputs(vae: Any, n: int, height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw latents and images of `height` x `width` latent positions."""
    numbers = torch.Generator().manual_seed(seed)
    f = factor(vae)
    images = torch.rand(n, 3, height * f, width * f, generator=numbers) * 2 - 1
    return torch.randn(n, 4, height, width, generator=numbers), images


def error(vae: Any, raw: torch.Tensor, images: torch.Tensor, rows: int) -> tuple[float, float]:
    """The largest difference of decode and of encode from the untiled ones."""
    with torch.no_grad():
        decoded, encoded = vae.decode(raw, return_dict=False)[0], values(vae.encode(images))
    banded = tiled.decode(vae, raw, rows)
    assert banded.shape == decoded.shape
    assert banded.dtype == decoded.dtype
    assert banded.is_contiguous()
    again = values(tiled.encode(vae, images, rows))
    assert again.shape == encoded.shape
    return (banded - decoded).abs().max().item(), (again - encoded).abs().max().item()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_bands_equal_the_whole_picture(vaes: dict[str, Any], kind: str, rows: int) -> None:
    height, width = {1: (3, 2), 3: (5, 7), 8: (9, 3), 17: (11, 1)}.get(rows, (4, 6))
    assert max(error(vaes[kind], *inputs(vaes[kind], 2, height, width), rows)) <= 2e-5


@given(
    kind=st.sampled_from(KINDS),
    height=st.integers(1, 12),
    width=st.integers(1, 6),
    rows=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_any_size_and_any_band(vaes: dict[str, Any], kind: str, height: int, width: int, rows: int, seed: int) -> None:
    assert max(error(vaes[kind], *inputs(vaes[kind], 1, height, width, seed), rows)) <= 2e-5


def test_sides_that_no_downscale_divides_are_encoded_too(vaes: dict[str, Any]) -> None:
    for kind in ("three", "tiny"):
        for height, width in ((13, 9), (10, 23), (5, 6)):
            images = torch.rand(1, 3, height, width) * 2 - 1
            with torch.no_grad():
                whole = values(vaes[kind].encode(images))
            assert (values(tiled.encode(vaes[kind], images, 3)) - whole).abs().max() <= 2e-5


def test_statistics_of_each_band_alone_would_be_wrong(vaes: dict[str, Any]) -> None:
    # the picture's halves differ, so whoever normalizes each half by itself is far off
    raw, images = inputs(vaes["plain"], 1, 8, 4)
    raw[:, :, 4:] *= 5
    images[:, :, 8:] *= 0.1
    with torch.no_grad():
        whole = vaes["plain"].decode(raw, return_dict=False)[0]
        halves = torch.cat([vaes["plain"].decode(half, return_dict=False)[0] for half in raw.split(4, 2)], 2)
    assert (halves - whole).abs().max() > 1e-2
    assert (halves - whole)[:, :, [0, 1, -2, -1]].abs().max() > 1e-2  # far from the seam as well
    assert max(error(vaes["plain"], raw, images, 8)) <= 2e-5


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.06), (torch.float16, 0.008), (torch.float64, 1e-9)])
@pytest.mark.parametrize("kind", ["attention", "pool"])
def test_other_precisions_stay_within_their_rounding(kind: str, dtype: torch.dtype, allowed: float) -> None:
    vae = build(kind)
    raw, images = inputs(vae, 1, 5, 4)
    exact = build(kind).double()
    with torch.no_grad():
        decoded, encoded = exact.decode(raw.double(), return_dict=False)[0], values(exact.encode(images.double()))
    vae.to(dtype)
    banded, again = tiled.decode(vae, raw.to(dtype), 3), values(tiled.encode(vae, images.to(dtype), 3))
    assert banded.dtype == again.dtype == dtype
    for ours, truth in ((banded, decoded), (again, encoded)):
        assert (ours - truth).norm() <= allowed * truth.norm()


def test_moments_survive_a_large_mean() -> None:
    numbers = torch.Generator().manual_seed(0)
    band = torch.randn(1, 4, 30, 50, generator=numbers) + 3000
    moments = GroupMoments()
    for part in band.split(7, 2):
        moments.add(part)
    exact = band.double()
    assert torch.allclose(moments.mean, exact.mean((0, 2, 3)), rtol=1e-9)
    variance = exact.var((0, 2, 3), correction=0)
    assert torch.allclose(moments.square / moments.n, variance, rtol=1e-6)
    naive = band.square().mean((0, 2, 3)) - band.mean((0, 2, 3)).square()
    assert (naive / variance - 1).abs().max() > 1e-3  # so this test can fail


def test_activations_of_a_large_mean() -> None:
    vae = build("plain")
    for part in (vae.encoder, vae.decoder):
        nn.init.constant_(part.conv_in.bias, 300.0)
    assert max(error(vae, *inputs(vae, 1, 6, 5), 3)) <= 1e-4


def test_an_enlarging_convolution_is_four_small_ones() -> None:
    module = nn.Conv2d(3, 5, 3, padding=1)
    x = torch.randn(1, 3, 5, 4)
    with torch.no_grad():
        whole = module(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        for rows in (1, 3, 4, 99):
            banded = store(upsample_conv(source(x), module), rows).tensor
            assert banded is not None
            assert (banded - whole).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_was_given_is_changed(vaes: dict[str, Any], kind: str) -> None:
    vae = vaes[kind]
    raw, images = inputs(vae, 2, 4, 3)
    before = content_hash(vae.state_dict()), content_hash({"raw": raw, "images": images})
    tiled.decode(vae, raw, 3)
    tiled.encode(vae, images, 3)
    assert (content_hash(vae.state_dict()), content_hash({"raw": raw, "images": images})) == before


def test_autoencoders_that_cannot_are_refused_with_a_reason(vaes: dict[str, Any]) -> None:
    from diffusers import VQModel

    assert all(tiled.untileable_reason(vae) == "" for vae in vaes.values())
    other = VQModel(block_out_channels=(8,), norm_num_groups=4)
    assert "VQModel cannot work in bands" in tiled.untileable_reason(other)
    with pytest.raises(UserError, match="without bands"):
        tiled.decode(other, torch.zeros(1, 3, 4, 4), 8)
    attending = tiny_vae(down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"))
    assert "AttnDownEncoderBlock2D" in tiled.untileable_reason(attending)
    around = tiny_vae()
    around.decoder.conv_out.padding_mode = "circular"
    assert "decoder.conv_out" in tiled.untileable_reason(around)

    class Own(type(tiny_vae())):  # type: ignore[misc]
        def _decode(self, z: Any, return_dict: bool = True) -> Any:
            return super()._decode(z, return_dict) * 2

    own = tiny_vae()
    own.__class__ = Own
    assert "_decode() of its own" in tiled.untileable_reason(own)


def test_impossible_requests_are_refused(vaes: dict[str, Any]) -> None:
    raw, images = inputs(vaes["plain"], 1, 4, 3)
    with pytest.raises(UserError, match="0 rows"):
        tiled.decode(vaes["plain"], raw, 0)
    with pytest.raises(UserError, match="empty batch"):
        tiled.encode(vaes["plain"], images[:0], 8)
