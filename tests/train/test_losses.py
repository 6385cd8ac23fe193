"""Loss terms against torch.distributions and closed forms, and which weights each of them trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from helpers import some_images, tiny_vae
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from latentpipe import VAEStage
from latentpipe.train import losses


@given(st.integers(0, 2**31), st.integers(1, 4))
def test_kl_equals_torch_distributions(seed: int, batch: int) -> None:
    parameters = torch.randn(batch, 6, 3, 2, generator=torch.Generator().manual_seed(seed)) * 2
    posterior = DiagonalGaussianDistribution(parameters)
    exact = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).sum((1, 2, 3)).mean() / 48
    assert losses.kl(posterior, 48).item() == pytest.approx(exact.item(), rel=1e-4)


def test_kl_of_the_prior_is_zero() -> None:
    assert losses.kl(DiagonalGaussianDistribution(torch.zeros(2, 8, 3, 3)), 10).item() == 0


def test_kl_of_half_precision_is_computed_in_fp32() -> None:
    posterior = DiagonalGaussianDistribution(torch.full((1, 2, 16, 16), 3.0, dtype=torch.bfloat16))
    exact = kl_divergence(Normal(3.0, float(torch.tensor(1.5).exp())), Normal(0.0, 1.0)) * 256
    assert losses.kl(posterior, 1).dtype == torch.float32
    assert losses.kl(posterior, 1).item() == pytest.approx(exact.item(), rel=1e-3)


def test_l1_and_l2_are_means() -> None:
    first, second = some_images(3, seed=1), some_images(3, seed=2)
    assert losses.l1(first, second).item() == pytest.approx((first - second).abs().double().mean().item(), rel=1e-5)
    assert losses.l2(first, second).item() == pytest.approx(((first - second) ** 2).double().mean().item(), rel=1e-5)
    assert losses.l1(first, first) == losses.l2(first, first) == 0


@given(st.floats(0, 1), st.integers(0, 2**31))
def test_the_velocity_gives_clean_and_noise_back(a: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    alpha_bar = torch.tensor([a, 1 - a], dtype=torch.float64)
    root, rest = (value.view(-1, 1, 1, 1) for value in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    noisy = root * clean + rest * noise
    v = losses.velocity_target(clean, noise, alpha_bar)
    assert torch.allclose(root * noisy - rest * v, clean, atol=1e-9)
    assert torch.allclose(rest * noisy + root * v, noise, atol=1e-9)


def test_the_velocity_is_the_schedulers() -> None:
    from latentpipe.config import Diffusion
    from latentpipe.train.denoiser import build_scheduler

    diffusers_own = __import__("diffusers").DDPMScheduler.from_config(build_scheduler(Diffusion()).config)
    clean, noise = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    times = torch.tensor([0, 400, 900, 998])
    expected = diffusers_own.get_velocity(clean, noise, times)
    ours = losses.velocity_target(clean, noise, diffusers_own.alphas_cumprod[times])
    assert torch.allclose(ours, expected, atol=1e-6)


@pytest.fixture
def trained() -> Any:
    """A stage with fresh gradients, its input, its reconstruction and its posterior."""
    vae, images = tiny_vae(), some_images()
    rebuilt, posterior = VAEStage(vae)(images, generator=torch.Generator().manual_seed(0))
    return vae, images, rebuilt, posterior


def reached(module: Any) -> set[bool]:
    """Whether each weight has a gradient that is not zero."""
    return {parameter.grad is not None and bool(parameter.grad.abs().sum() > 0) for parameter in module.parameters()}


@pytest.mark.parametrize("term", [losses.l1, losses.l2])
def test_reconstruction_trains_encoder_and_decoder(trained: Any, term: Any) -> None:
    vae, images, rebuilt, _ = trained
    term(images, rebuilt).backward()
    for part in ("encoder", "quant_conv", "post_quant_conv", "decoder"):
        assert reached(getattr(vae, part)) == {True}, part


def test_kl_trains_the_encoder_only(trained: Any) -> None:
    vae, images, _, posterior = trained
    losses.kl(posterior, images[0].numel()).backward()
    for part in ("encoder", "quant_conv"):
        assert reached(getattr(vae, part)) == {True}, part
    for part in ("post_quant_conv", "decoder"):
        assert reached(getattr(vae, part)) == {False}, part


def test_the_warped_term_trains_encoder_and_decoder() -> None:
    from latentpipe.train.vae import halve

    vae, images = tiny_vae(), some_images()
    rebuilt, _ = VAEStage(vae)(images, warp=halve)
    assert rebuilt.shape == (4, 3, 8, 8)
    losses.l2(halve(images), rebuilt).backward()
    assert reached(vae.encoder) == reached(vae.decoder) == {True}
