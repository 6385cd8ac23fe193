"""Decoders that make larger or smaller pictures of the same latents: the verdict, and pictures at the decoder's own size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional

from latentpipe import LatentPipeline, UserError, VAEStage, check_swap, swap_vae
from latentpipe.checkpoints.pipeline_io import load_pipeline
from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import load_vae
from latentpipe.compatibility.latent_adapter import BridgedStage
from latentpipe.compatibility.measure import comparable
from latentpipe.vae.probe_images import probe_images


class Doubled(AutoencoderKL):
    """A VAE that halves what it encodes and repeats each pixel that it decodes: the same latents, twice the size."""

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        return super().encode(functional.avg_pool2d(x, 2), return_dict)

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        images = super().decode(z, return_dict=False)[0]
        return (images.repeat_interleave(2, 2).repeat_interleave(2, 3),)


def doubled() -> VAEStage:
    vae = load_vae(find_model("emoji", "vae"))
    space = VAEStage(vae).space
    vae.__class__ = Doubled
    return VAEStage(vae, replace(space, downscale=8), tile=None)


@pytest.fixture(scope="module")
def host() -> Any:
    return load_pipeline(find_model("emoji"))


def pixels(picture: Any) -> np.ndarray:
    return np.asarray(picture)


def test_the_same_latents_at_twice_the_size_fit(host: Any) -> None:
    verdict = check_swap(host, doubled())
    assert verdict.outcome == "same space"
    assert "2 times as wide" in verdict.reason
    seen = verdict.evidence
    assert seen is not None
    assert seen.linear is not None
    assert seen.linear.identity == pytest.approx(1, abs=1e-6)
    assert seen.host == pytest.approx(seen.vae_of_host, abs=1e-3)  # compared at the smaller size
    assert seen.decoders == 99
    assert seen.side_px == 64


def test_its_pictures_are_those_of_the_host_at_twice_the_size(host: Any) -> None:
    own = LatentPipeline(host)
    large = LatentPipeline(host, doubled())
    assert (own.native_size, large.native_size) == ((64, 64), (128, 128))
    one, two = (pipe("red apple", seed=7, num_inference_steps=2)[0].image for pipe in (own, large))
    assert np.array_equal(pixels(two), pixels(one).repeat(2, 0).repeat(2, 1))


def test_img2img_reads_the_picture_at_the_decoders_size(host: Any) -> None:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    large = small.resize((128, 128), Image.Resampling.NEAREST)
    one = LatentPipeline(host)("red apple", seed=7, num_inference_steps=4, image=small, strength=0.5)[0].image
    two = LatentPipeline(host, doubled())("red apple", seed=7, num_inference_steps=4, image=large, strength=0.5)[0].image
    difference = np.abs(pixels(two).astype(int) - pixels(one).astype(int).repeat(2, 0).repeat(2, 1))
    assert difference.max() <= 1  # means of equal pixels are rounded once more


def test_a_smaller_decoder_fits_a_larger_host_too(host: Any) -> None:
    large = swap_vae(LatentPipeline(host), doubled())
    assert large.native_size == (128, 128)
    back = check_swap(large, load_vae(find_model("emoji", "vae")))
    assert back.outcome == "same space"


def test_stock_pipelines_are_built_anew_at_the_new_size(host: Any) -> None:
    swapped = swap_vae(host, doubled())
    generator = torch.Generator().manual_seed(7)
    picture = swapped("red apple", num_inference_steps=2, generator=generator, height=128, width=128).images[0]
    assert picture.size == (128, 128)


@pytest.mark.parametrize(("host", "vae", "is_comparable"), [
    ((8, 4), (8, 4), True), ((8, 4), (8, 8), True), ((8, 8), (8, 4), True), ((8, 4), (8, 16), True), ((8, 4), (8, 32), False),
    ((8, 4), (4, 4), False), ((8, 4), (8, 12), False)])  # fmt: skip
def test_shapes_that_can_be_compared(host: tuple[int, int], vae: tuple[int, int], is_comparable: bool) -> None:
    assert comparable(host, vae) is is_comparable


def test_eight_times_is_another_shape(host: Any) -> None:
    stage = doubled()
    stage.space = replace(stage.space, downscale=32)
    assert check_swap(host, stage).outcome == "other shape"
    with pytest.raises(UserError, match="Not even force"):
        swap_vae(host, stage, force=True)


def test_with_the_hosts_own_encoder_pictures_come_at_the_decoders_size(host: Any) -> None:
    own, large = VAEStage(host.vae), doubled()
    images = probe_images(2, 128)
    bridged = BridgedStage(own, None, large)
    latents = bridged.encode(images)
    assert torch.equal(latents, own.encode(functional.avg_pool2d(images, 2)))
    assert torch.equal(bridged.decode(latents), large.decode(latents))
    small = BridgedStage(large, None, own)  # the other way round: the encoder's pictures are the larger ones
    assert small.space.downscale == 4
    assert small.encode(images[..., :64, :64]).shape == (2, 8, 16, 16)
