"""Loss terms against torch.distributions and closed forms, and which weights each of them trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from helpers import some_images, tiny_vae
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import dctn
from torch.distributions import Normal, kl_divergence

from latentpipe import VAEStage
from latentpipe.evaluate.metrics.ssim import ms_ssim
from latentpipe.train import losses
from latentpipe.train.vae.kl import kl_channels, per_pixel_value
from latentpipe.utils.errors import UserError


def kl_of(posterior: Any, pixel_values: int) -> torch.Tensor:
    """The KL term as the trainer computes it: summed over latents, divided by the values of a picture."""
    h, w = posterior.mean.shape[-2:]
    return per_pixel_value(kl_channels(posterior.mean, posterior.logvar).sum(), h * w, pixel_values)


@given(st.integers(0, 2**31), st.integers(1, 4))
def test_kl_equals_torch_distributions(seed: int, batch: int) -> None:
    parameters = torch.randn(batch, 6, 3, 2, generator=torch.Generator().manual_seed(seed)) * 2
    posterior = DiagonalGaussianDistribution(parameters)
    exact = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).sum((1, 2, 3)).mean() / 48
    assert kl_of(posterior, 48).item() == pytest.approx(exact.item(), rel=1e-4)


def test_kl_of_the_prior_is_zero() -> None:
    assert kl_of(DiagonalGaussianDistribution(torch.zeros(2, 8, 3, 3)), 10).item() == 0


def test_kl_of_half_precision_is_computed_in_fp32() -> None:
    posterior = DiagonalGaussianDistribution(torch.full((1, 2, 16, 16), 3.0, dtype=torch.bfloat16))
    exact = kl_divergence(Normal(3.0, float(torch.tensor(1.5).exp())), Normal(0.0, 1.0)) * 256
    assert kl_of(posterior, 1).dtype == torch.float32
    assert kl_of(posterior, 1).item() == pytest.approx(exact.item(), rel=1e-3)


def test_l1_and_l2_are_means() -> None:
    first, second = some_images(3, seed=1), some_images(3, seed=2)
    assert losses.l1(first, second).item() == pytest.approx((first - second).abs().double().mean().item(), rel=1e-5)
    assert losses.l2(first, second).item() == pytest.approx(((first - second) ** 2).double().mean().item(), rel=1e-5)
    assert losses.l1(first, first) == losses.l2(first, first) == 0


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ON_LATENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "outliers": lambda mean: losses.outliers(mean, limit=0.5),
    "spectrum": losses.spectrum,
    "latent_match": lambda mean: losses.latent_match(mean, torch.zeros_like(mean)),
}
ON_PICTURES = {
    "l1": losses.l1,
    "l2": losses.l2,
    "charbonnier": losses.charbonnier,
    "edges": losses.edges,
    "structure": losses.ms_ssim_loss,
}


@pytest.mark.parametrize("name", ON_LATENTS)
def test_the_gradient_of_a_latent_term_equals_finite_differences(name: str) -> None:
    assert torch.autograd.gradcheck(ON_LATENTS[name], doubles(2, 3, 4, 5).requires_grad_())


@pytest.mark.parametrize("name", ["l1", "l2", "charbonnier", "edges"])
def test_the_gradient_of_a_picture_term_equals_finite_differences(name: str) -> None:
    images, rebuilt = doubles(2, 3, 3, 4, seed=1), doubles(2, 3, 3, 4, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: ON_PICTURES[name](images, values), rebuilt)


@pytest.mark.parametrize("name", ON_LATENTS)
def test_two_half_batches_average_to_the_batch_on_latents(name: str) -> None:
    mean = doubles(6, 4, 8, 8) * torch.arange(1, 7).view(-1, 1, 1, 1)  # pictures of unlike power
    halves = [ON_LATENTS[name](part).item() for part in mean.split(3)]
    assert ON_LATENTS[name](mean).item() == pytest.approx(sum(halves) / 2, rel=1e-9)
    assert halves[0] != pytest.approx(halves[1], rel=1e-3)


@pytest.mark.parametrize("name", ON_PICTURES)
def test_two_half_batches_average_to_the_batch_on_pictures(name: str) -> None:
    images = some_images(4, side=48, seed=3)
    rebuilt = images + torch.tensor([0.1, 0.2, 0.3, 0.4]).view(-1, 1, 1, 1) * some_images(4, side=48, seed=4)
    halves = [ON_PICTURES[name](*pair).item() for pair in zip(images.split(2), rebuilt.split(2), strict=True)]
    assert ON_PICTURES[name](images, rebuilt).item() == pytest.approx(sum(halves) / 2, rel=1e-5)
    assert halves[0] != pytest.approx(halves[1], rel=1e-3)


@given(st.floats(-2, 2), st.floats(1e-3, 1))
def test_charbonnier_is_its_formula_and_its_epsilon_at_zero(error: float, epsilon: float) -> None:
    images = doubles(1, 3, 2, 2)
    assert losses.charbonnier(images, images + error, epsilon).item() == pytest.approx((error**2 + epsilon**2) ** 0.5, rel=1e-6)
    assert losses.charbonnier(images, images, epsilon).item() == pytest.approx(epsilon)


def test_edges_compare_differences_along_both_axes() -> None:
    images, rebuilt = some_images(2, side=7, seed=1), some_images(2, side=7, seed=2)
    error = (rebuilt - images).numpy()
    wanted = [np.abs(error[:, :, step:] - error[:, :, :-step]).mean() for step in (1, 2)]
    wanted += [np.abs(error[..., step:] - error[..., :-step]).mean() for step in (1, 2)]
    assert losses.edges(images, rebuilt).item() == pytest.approx(np.mean(wanted), rel=1e-5)
    assert losses.edges(images, images + 0.3).item() == pytest.approx(0, abs=1e-6)  # brightness alone costs nothing


def test_structure_is_zero_at_equality_with_a_finite_gradient_and_grows_with_the_error() -> None:
    images = some_images(2, side=64, seed=5)
    rebuilt = images.clone().requires_grad_()
    losses.ms_ssim_loss(images, rebuilt).backward()
    assert losses.ms_ssim_loss(images, images).item() == pytest.approx(0, abs=1e-5)
    assert rebuilt.grad is not None
    assert rebuilt.grad.isfinite().all()
    noise = some_images(2, side=64, seed=6)
    errors = [losses.ms_ssim_loss(images, images + size * noise).item() for size in (0.1, 0.3, 1.0)]
    assert 0 < errors[0] < errors[1] < errors[2] <= 1


@pytest.mark.parametrize(("side", "scales"), [(11, 1), (21, 1), (22, 2), (43, 2), (44, 3), (175, 3), (176, 5)])
def test_structure_has_the_scales_that_fit(side: int, scales: int) -> None:
    images, rebuilt = some_images(1, side=side, seed=1), some_images(1, side=side, seed=2)
    rebuilt = 0.7 * images + 0.3 * rebuilt
    expected = 1 - ms_ssim(images, rebuilt, 2.0, scales).item()
    assert losses.ms_ssim_loss(images, rebuilt).item() == pytest.approx(expected, rel=1e-5)


def test_structure_refuses_pictures_without_a_window() -> None:
    with pytest.raises(UserError, match="11 pixels"):
        losses.ms_ssim_loss(some_images(1, side=10), some_images(1, side=10))


def test_the_gradient_of_structure_equals_finite_differences() -> None:
    images = some_images(1, side=12, seed=1).double()
    rebuilt = (0.7 * images + 0.3 * some_images(1, side=12, seed=2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: losses.ms_ssim_loss(images, values), rebuilt)


def test_the_gradient_of_structure_is_finite_where_the_structures_oppose() -> None:
    images = some_images(2, side=64, seed=5)
    rebuilt = (-images).requires_grad_()
    losses.ms_ssim_loss(images, rebuilt).backward()
    assert rebuilt.grad is not None
    assert rebuilt.grad.isfinite().all()


def test_outliers_are_what_lies_beyond_the_limit() -> None:
    mean = torch.tensor([0.0, 2.9, -3.0, 5.0, -4.0, 1.0]).view(1, 1, 2, 3).requires_grad_()
    term = losses.outliers(mean)
    term.backward()
    assert term.item() == pytest.approx((2**2 + 1**2) / 6)
    assert mean.grad is not None
    assert mean.grad.flatten().tolist() == pytest.approx([0, 0, 0, 2 * 2 / 6, -2 * 1 / 6, 0])


@given(st.integers(0, 2**31), st.integers(3, 9), st.integers(3, 9))
def test_the_spectrum_is_the_share_of_scipys_transform(seed: int, height: int, width: int) -> None:
    mean = doubles(2, 3, height, width, seed=seed)
    energy = (dctn(mean.numpy(), axes=(2, 3), norm="ortho") ** 2).sum(1)
    energy[:, 0, 0] = 0
    rows, columns = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
    share = energy[:, np.maximum(rows, columns) >= 0.5].sum(1) / energy.sum((1, 2))
    assert losses.spectrum(mean).item() == pytest.approx(share.mean(), rel=1e-4)


def test_the_spectrum_knows_smooth_from_rough_and_no_offset_helps() -> None:
    line = torch.linspace(0, torch.pi, 16)
    smooth = torch.cos(line).view(1, 1, 16, 1).expand(2, 4, 16, 16)
    rough = torch.tensor([1.0, -1.0]).repeat(8).expand(2, 4, 16, 16)
    assert losses.spectrum(smooth).item() < 0.01
    assert losses.spectrum(rough).item() > 0.8
    assert losses.spectrum(doubles(8, 4, 16, 16)).item() == pytest.approx(0.75, abs=0.03)
    assert losses.spectrum(rough + 100).item() == pytest.approx(losses.spectrum(rough).item(), rel=1e-3)
    assert losses.spectrum(torch.full((1, 2, 8, 8), 3.0)).item() == pytest.approx(0, abs=1e-4)


def test_latent_match_trains_the_student_only() -> None:
    student, teacher = doubles(2, 4, 3, 3, seed=1).requires_grad_(), doubles(2, 4, 3, 3, seed=2).requires_grad_()
    term = losses.latent_match(student, teacher)
    term.backward()
    assert term.item() == pytest.approx((student - teacher).square().mean().item())
    assert teacher.grad is None
    assert torch.allclose(student.grad, 2 * (student - teacher).detach() / student.numel())


@pytest.mark.parametrize("name", ON_LATENTS)
def test_half_precision_is_computed_in_fp32(name: str) -> None:
    mean = (3 * doubles(2, 4, 16, 16)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = ON_LATENTS[name](mean)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(ON_LATENTS[name](mean.double()).item(), rel=1e-4)


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
    from latentpipe.train.config import Diffusion
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
    rebuilt, posterior = VAEStage(vae)(images, noise=torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    return vae, images, rebuilt, posterior


def reached(module: Any) -> set[bool]:
    """Whether each weight has a gradient that is not zero."""
    return {parameter.grad is not None and bool(parameter.grad.abs().sum() > 0) for parameter in module.parameters()}


def like_structure(images: torch.Tensor, rebuilt: torch.Tensor) -> torch.Tensor:
    """The term where the structures agree: an untrained VAE's may oppose the pictures', which has no gradient."""
    return losses.ms_ssim_loss(images, images + 0.5 * rebuilt)


@pytest.mark.parametrize("term", [losses.l1, losses.l2, losses.charbonnier, like_structure])
def test_reconstruction_trains_encoder_and_decoder(trained: Any, term: Any) -> None:
    vae, images, rebuilt, _ = trained
    term(images, rebuilt).backward()
    for part in ("encoder", "quant_conv", "post_quant_conv", "decoder"):
        assert reached(getattr(vae, part)) == {True}, part


def test_kl_trains_the_encoder_only(trained: Any) -> None:
    vae, images, _, posterior = trained
    kl_of(posterior, images[0].numel()).backward()
    for part in ("encoder", "quant_conv"):
        assert reached(getattr(vae, part)) == {True}, part
    for part in ("post_quant_conv", "decoder"):
        assert reached(getattr(vae, part)) == {False}, part


@pytest.mark.parametrize("name", ON_LATENTS)
def test_a_latent_term_trains_the_encoder_only(trained: Any, name: str) -> None:
    vae, _, _, posterior = trained
    term = {"outliers": lambda mean: losses.outliers(mean, limit=0.0)}.get(name, ON_LATENTS[name])
    term(posterior.mean).backward()
    assert reached(vae.encoder) == {True}
    for part in ("post_quant_conv", "decoder"):
        assert reached(getattr(vae, part)) == {False}, part


def test_the_warped_term_trains_encoder_and_decoder() -> None:
    from latentpipe.train.vae.equivariance import Warp

    vae, images, warp = tiny_vae(), some_images(), Warp(mirror=True, turns=1, to=4, of=8)
    rebuilt, _ = VAEStage(vae)(images, warp=warp)
    assert rebuilt.shape == (4, 3, 8, 8)
    losses.l2(warp(images), rebuilt).backward()
    assert reached(vae.encoder) == reached(vae.decoder) == {True}
