"""VAEStage and the folded normalization, against the plain autoencoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import some_images, tiny_vae
from torch import nn

from latentpipe import LatentSpace, VAEStage
from latentpipe.train.vae.training_pass import TrainingPass
from latentpipe.vae.stage import fold_normalization

pytestmark = pytest.mark.numeric

SPACE = LatentSpace(4, 2, (0.5, 2.0, 1.3, 0.9), (0.2, -1.0, 0.0, 3.0))


@torch.no_grad()
def test_encode_and_decode_are_the_autoencoder_and_the_affine() -> None:
    vae, images = tiny_vae(), some_images()
    stage = VAEStage(vae, SPACE)
    raw = vae.encode(images).latent_dist.mode()
    assert torch.equal(stage.encode(images), SPACE.normalize(raw))
    latents = torch.randn(2, 4, 8, 8)
    assert torch.equal(stage.decode(latents), vae.decode(SPACE.denormalize(latents)).sample)
    mean, std = stage.posterior(images)
    assert torch.equal(mean, SPACE.normalize(raw))
    assert torch.allclose(std, vae.encode(images).latent_dist.std * torch.tensor(SPACE.scale).view(1, 4, 1, 1))


@torch.no_grad()
def test_a_generator_samples_the_posterior() -> None:
    vae, images = tiny_vae(), some_images()
    stage = VAEStage(vae, SPACE)
    first, again, other = (stage.encode(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    raw = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(1))
    assert torch.equal(first, SPACE.normalize(raw))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_space_is_the_autoencoders_own_by_default() -> None:
    assert VAEStage(tiny_vae(scaling_factor=0.3)).space == LatentSpace(4, 2, (0.3,) * 4, (0.0,) * 4)


@torch.no_grad()
def test_forward_reconstructs_one_posterior_sample() -> None:
    vae, images = tiny_vae(), some_images()
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    rebuilt, posterior = VAEStage(vae, SPACE)(images, noise=noise)
    raw = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(3))
    assert torch.equal(rebuilt, vae.decode(raw).sample)
    assert torch.equal(posterior.mean, vae.encode(images).latent_dist.mean)


@torch.no_grad()
def test_the_warp_acts_on_the_sampled_raw_latents() -> None:
    vae, images = tiny_vae(), some_images()
    rebuilt, _ = VAEStage(vae, SPACE)(images, warp=lambda raw: raw.flip(3))
    assert torch.equal(rebuilt, vae.decode(vae.encode(images).latent_dist.mode().flip(3)).sample)


@torch.no_grad()
def test_given_latents_are_decoded_in_place_of_the_sample() -> None:
    vae, images = tiny_vae(), some_images()
    given = torch.randn(4, 4, 8, 8)
    rebuilt, posterior = TrainingPass(VAEStage(vae, SPACE))(images, given=given)
    assert torch.equal(rebuilt, vae.decode(given).sample)
    assert torch.equal(posterior.mean, vae.encode(images).latent_dist.mean)


def test_forward_carries_gradients_to_encoder_and_decoder() -> None:
    vae = tiny_vae()
    rebuilt, _ = VAEStage(vae)(some_images())
    rebuilt.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in vae.encoder.parameters())
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in vae.decoder.parameters())


def test_sides_that_do_not_divide_are_refused() -> None:
    stage = VAEStage(tiny_vae())
    with pytest.raises(ValueError, match="multiples of 2"):
        stage.encode(torch.zeros(1, 3, 15, 16))


@torch.no_grad()
def test_autoencoders_without_a_posterior_work() -> None:
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    ).eval()  # fmt: skip
    stage, images = VAEStage(vae), some_images()
    latents = stage.encode(images)
    assert torch.equal(latents, vae.encode(images).latents)
    assert torch.equal(stage.decode(latents), vae.decode(latents).sample)
    mean, std = stage.posterior(images)
    assert torch.equal(mean, latents)
    assert not std.any()


def test_something_else_is_a_type_error() -> None:
    class Odd(nn.Linear):
        def encode(self, images: torch.Tensor) -> object:
            return object()

    with pytest.raises(TypeError, match="Odd"):
        VAEStage(Odd(1, 1), SPACE).encode(torch.zeros(1, 3, 4, 4))


def test_half_precision_latents_reach_a_float_vae() -> None:
    stage = VAEStage(tiny_vae(), SPACE)
    assert stage.dtype == torch.float32
    assert stage.device.type == "cpu"
    assert stage.decode(torch.zeros(1, 4, 4, 4, dtype=torch.bfloat16)).dtype == torch.float32


@torch.no_grad()
def test_folding_equals_normalizing() -> None:
    plain, folded, images = tiny_vae(5), tiny_vae(5), some_images()
    fold_normalization(folded, SPACE)
    before = plain.encode(images).latent_dist
    after = folded.encode(images).latent_dist
    assert torch.allclose(after.mean, SPACE.normalize(before.mean), atol=1e-5)
    assert torch.allclose(after.std, before.std * torch.tensor(SPACE.scale).view(1, 4, 1, 1), rtol=1e-4)
    latents = torch.randn(2, 4, 8, 8)
    assert torch.allclose(folded.decode(latents).sample, plain.decode(SPACE.denormalize(latents)).sample, atol=1e-5)


def test_a_folded_vae_declares_factor_1() -> None:
    vae = tiny_vae(scaling_factor=0.4, shift_factor=0.2, latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    fold_normalization(vae, SPACE)
    assert LatentSpace.of(vae) == LatentSpace(4, 2, (1.0,) * 4, (0.0,) * 4)
    assert vae.config.scaling_factor == 1


@torch.no_grad()
def test_folded_latents_have_mean_0_and_std_1_in_plain_diffusers(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    from latentpipe.checkpoints.vae_io import save_vae

    vae, images = tiny_vae(7), some_images(64)
    stage = VAEStage(vae)
    measured = LatentSpace.measure([stage.raw_posterior(images)], 2)
    fold_normalization(vae, measured.space)
    vae.half().float()
    ours = VAEStage(vae).encode(images)
    save_vae(vae, tmp_path / "vae", {})
    stock = AutoencoderKL.from_pretrained(tmp_path / "vae", torch_dtype=torch.float32)
    theirs = stock.encode(images).latent_dist
    assert torch.equal(theirs.mode() * stock.config.scaling_factor, ours)
    assert stock.config.scaling_factor == 1
    again = LatentSpace.measure([(theirs.mean, theirs.std)], 2).space
    assert again.shift == pytest.approx([0] * 4, abs=5e-3)  # fp16 weights
    assert again.scale == pytest.approx([1] * 4, abs=5e-3)
    latents = theirs.sample(torch.Generator().manual_seed(0))
    assert latents.mean((0, 2, 3)).tolist() == pytest.approx([0] * 4, abs=5 / 64)  # 4096 values a channel: 5 standard errors
    assert latents.std((0, 2, 3)).tolist() == pytest.approx([1] * 4, abs=5 / 64)


def test_a_vae_without_quant_conv_cannot_be_folded() -> None:
    with pytest.raises(ValueError, match="quant_conv"):
        fold_normalization(tiny_vae(use_quant_conv=False, use_post_quant_conv=False), SPACE)


@torch.no_grad()
def test_without_quant_convs_the_normalization_goes_into_the_config() -> None:
    from latentpipe.vae.stage import declare_normalization

    vae, images = tiny_vae(use_quant_conv=False, use_post_quant_conv=False), some_images(8)
    before = VAEStage(vae).decode(VAEStage(vae).encode(images))
    mean, std = VAEStage(vae).raw_posterior(images)
    measured = LatentSpace.measure([(mean, std)], 2)
    declare_normalization(vae, measured.space)
    after = VAEStage(vae)
    latents = after.encode(images)
    drawn = (mean.square() + std.square()).mean().item() - mean.mean().item() ** 2  # the variance of all latents, raw
    assert latents.mean().item() == pytest.approx(0, abs=1e-4)
    assert after.space.scale[0] == pytest.approx(drawn**-0.5, rel=1e-4)
    assert len(set(after.space.scale)) == len(set(after.space.shift)) == 1
    assert torch.allclose(after.decode(latents), before, atol=1e-5)


def test_a_class_that_knows_a_scale_alone_gets_that() -> None:
    from diffusers import AutoencoderDC

    from latentpipe.vae.stage import declare_normalization

    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
    )  # fmt: skip
    declare_normalization(vae, LatentSpace(4, 2, (0.5,) * 4, (1.0,) * 4))
    assert LatentSpace.of(vae).scale == pytest.approx((0.5,) * 4)
    assert LatentSpace.of(vae).shift == (0.0,) * 4
