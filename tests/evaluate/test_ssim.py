"""SSIM and MS-SSIM against scikit-image and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import some_images
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
from torchmetrics.functional.image.ssim import _ssim_update

from latentpipe.evaluate.metrics.ssim import WEIGHTS, ms_ssim, ms_ssim_name, ssim
from latentpipe.utils.errors import UserError

VALID = slice(5, -5)


def smooth(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth images in [-1, 1], as photographs rather than noise."""
    small = torch.rand(n, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(small, (height, width), mode="bicubic", align_corners=False).clamp(-1, 1)


def noisy(images: torch.Tensor, sigma: float, seed: int = 1) -> torch.Tensor:
    return images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("height", "width"), [(11, 11), (32, 47), (64, 64)])
@pytest.mark.parametrize("data_range", [1.0, 2.0, 255.0])
def test_ssim_equals_scikit_image(height: int, width: int, data_range: float) -> None:
    first = (some_images(2, 64) + 1)[:, :, :height, :width] / 2 * data_range
    second = noisy(first, 0.1 * data_range)
    expected = [
        structural_similarity(
            a, b, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=data_range
        )
        for a, b in zip(first.double().numpy(), second.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(ssim(first.double(), second.double(), data_range).numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(ssim(first, second, data_range).numpy(), expected, atol=1e-5)  # float32


def test_ssim_equals_torchmetrics_on_windows_inside() -> None:
    first = smooth(3, 48, 64)
    second = noisy(first, 0.2)
    _, full = _ssim_update(first, second, data_range=2.0, return_full_image=True)
    expected = full[:, :, VALID, VALID].mean((1, 2, 3))
    torch.testing.assert_close(ssim(first, second, 2.0), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("side", "scales"), [(176, 5), (201, 5), (64, 3), (45, 3)])
def test_ms_ssim_is_the_product_of_torchmetrics_scales(side: int, scales: int) -> None:
    first = smooth(2, 208, 208)[:, :, :side, : side + 3]
    second = noisy(first, 0.3)
    weights = torch.tensor(WEIGHTS[:scales]) / (1.0 if scales == 5 else sum(WEIGHTS[:scales]))
    expected, a, b = torch.ones(2), first, second
    for scale in range(scales):
        _, term = _ssim_update(a, b, data_range=2.0, return_contrast_sensitivity=True)
        if scale == scales - 1:
            _, full = _ssim_update(a, b, data_range=2.0, return_full_image=True)
            term = full[:, :, VALID, VALID].mean((1, 2, 3))
        expected = expected * term.relu() ** weights[scale]
        a, b = torch.nn.functional.avg_pool2d(a, 2), torch.nn.functional.avg_pool2d(b, 2)
    torch.testing.assert_close(ms_ssim(first, second, 2.0), expected, atol=1e-5, rtol=0)


def test_ms_ssim_differs_from_torchmetrics_by_its_mirrored_borders_only() -> None:
    first = smooth(2, 256, 256)
    second = noisy(first, 0.1)
    theirs = multiscale_structural_similarity_index_measure(first, second, data_range=2.0, reduction="none", normalize="relu")
    torch.testing.assert_close(ms_ssim(first, second, 2.0), theirs, atol=3e-3, rtol=0)


def test_the_name_says_how_many_scales() -> None:
    assert [ms_ssim_name(*size) for size in ((176, 300), (175, 300), (44, 44))] == ["MS-SSIM", "MS-SSIM-3", "MS-SSIM-3"]
    images = smooth(1, 176, 176)
    assert ms_ssim(images, noisy(images, 0.3), 2.0, scales=3) != ms_ssim(images, noisy(images, 0.3), 2.0)


def test_sides_too_short_are_refused() -> None:
    for call in (lambda: ms_ssim_name(43, 500), lambda: ms_ssim(some_images(1, 43), some_images(1, 43), 2.0)):
        with pytest.raises(UserError, match="44 pixels"):
            call()
    with pytest.raises(UserError, match="11 pixels"):
        ssim(some_images(1, 10), some_images(1, 10), 2.0)
    with pytest.raises(UserError, match="176 pixels"):
        ms_ssim(some_images(1, 100), some_images(1, 100), 2.0, scales=5)
    with pytest.raises(ValueError, match="one shape"):
        ssim(some_images(1, 16), some_images(2, 16), 2.0)
    with pytest.raises(UserError, match="1 to 5"):
        ms_ssim(some_images(1, 64), some_images(1, 64), 2.0, scales=0)


@given(st.integers(0, 1000), st.floats(0.1, 300))
def test_ssim_is_symmetric_bounded_and_knows_its_range(seed: int, data_range: float) -> None:
    first, second = some_images(2, 16, seed).double(), some_images(2, 16, seed + 1).double()
    value = ssim(first, second, 2.0)
    torch.testing.assert_close(value, ssim(second, first, 2.0))
    torch.testing.assert_close(value, ssim(first * data_range, second * data_range, 2.0 * data_range))
    torch.testing.assert_close(ssim(first, first, 2.0), torch.ones(2, dtype=torch.float64))
    assert (value < 1).all()


@pytest.mark.parametrize("metric", [ssim, ms_ssim])
@pytest.mark.parametrize("kind", ["equal", "constant", "opposite"])
def test_gradients_are_finite(metric: object, kind: str) -> None:
    images = torch.full((2, 3, 48, 48), 0.25) if kind == "constant" else some_images(2, 48)
    other = -images if kind == "opposite" else images.clone()
    images.requires_grad_(True)
    value = metric(images, other, 2.0)  # type: ignore[operator]
    value.sum().backward()
    assert value.isfinite().all()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    if kind == "opposite" and metric is ms_ssim:
        assert (value == 0).all()  # negative contrast counts as 0


def test_a_step_up_the_gradient_raises_both() -> None:
    for metric in (ssim, ms_ssim):
        images = smooth(1, 48, 48)
        other = noisy(images, 0.2).requires_grad_(True)
        before = metric(images, other, 2.0)
        before.sum().backward()
        assert metric(images, other + 0.01 * other.grad / other.grad.abs().max(), 2.0) > before


def test_half_precision_and_autocast_change_nothing_but_the_input() -> None:
    images, other = smooth(1, 48, 48), noisy(smooth(1, 48, 48), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssim(images, other, 2.0), ssim(images, other, 2.0).float())
        inside = ms_ssim(images, other, 2.0)
    torch.testing.assert_close(inside, ms_ssim(images, other, 2.0))
    torch.testing.assert_close(ssim(images.bfloat16(), other.bfloat16(), 2.0), ssim(images, other, 2.0), atol=0.01, rtol=0)
