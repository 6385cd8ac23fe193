"""NLPD against an implementation with scipy, and what makes it perceptual, on photographs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import some_images
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from scipy import ndimage
from skimage import data

from latentpipe.evaluate.metrics.lpips import DISTS, LPIPS
from latentpipe.train.vae.perceptual import CONSTANTS, NEIGHBOURS, nlpd, perceptual
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import to_images


def photograph(side: int = 128) -> Image.Image:
    return Image.fromarray(data.astronaut()).resize((side, side), Image.Resampling.LANCZOS)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mse(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first - second).square().mean().item()


def by_hand(first: np.ndarray, second: np.ndarray, levels: int) -> float:
    """The paper's distance of two planes H W in [0, 1] by scipy; powers of two only."""
    row = np.array([0.05, 0.25, 0.4, 0.25, 0.05])

    def smooth(values: np.ndarray) -> np.ndarray:
        return ndimage.correlate1d(ndimage.correlate1d(values, row, 0, mode="nearest"), row, 1, mode="nearest")

    def expand(low: np.ndarray) -> np.ndarray:
        low = np.pad(low, 1, "edge")
        wide = np.zeros((2 * low.shape[0], 2 * low.shape[1]))
        wide[::2, ::2] = low
        return 4 * smooth(wide)[2:-2, 2:-2]

    def divide(values: np.ndarray, level: int) -> np.ndarray:
        above, left, right, below = NEIGHBOURS[level]
        kernel = np.array([[0, above, 0], [left, 0, right], [0, below, 0]])
        return values / (CONSTANTS[level] + ndimage.correlate(np.abs(values), kernel, mode="nearest"))

    def pyramid(values: np.ndarray) -> list[np.ndarray]:
        found = []
        for level in range(levels - 1):
            low = smooth(values)[::2, ::2]
            found.append(divide(values - expand(low), level))
            values = low
        return [*found, divide(values, 5)]

    roots = [np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(pyramid(first), pyramid(second), strict=True)]
    return float(np.mean(roots))


@pytest.mark.parametrize(("side", "levels"), [(8, 2), (16, 2), (32, 3), (64, 4), (128, 5), (256, 6), (512, 6)])
def test_it_is_the_papers_distance(side: int, levels: int) -> None:
    images = to_images(photograph(side)).double()
    rebuilt = images + 0.1 * random(1, 3, side, side)
    yuv = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])  # JFIF 1.02
    planes = [np.einsum("pc,chw->phw", yuv, (each[0].numpy() + 1) / 2) for each in (images, rebuilt)]
    distances = [by_hand(planes[0][plane], planes[1][plane], levels) for plane in range(3)]
    expected = (6 * distances[0] + distances[1] + distances[2]) / 8
    assert nlpd(images, rebuilt).item() == pytest.approx(expected, abs=2e-4)


@given(st.integers(0, 2**31), st.integers(8, 40), st.integers(8, 40))
def test_zero_at_equality_symmetric_and_above_zero_elsewhere(seed: int, height: int, width: int) -> None:
    first, second = (random(2, 3, height, width, seed=seed + k).tanh().double() for k in (0, 1))
    assert nlpd(first, first).abs().max() == 0
    assert torch.allclose(nlpd(first, second), nlpd(second, first), rtol=1e-9)
    assert (nlpd(first, second) > 0).all()


def test_the_gradient_is_zero_at_equality_and_equals_finite_differences_elsewhere() -> None:
    images = some_images(2, 16).double()
    rebuilt = images.clone().requires_grad_()
    nlpd(images, rebuilt).sum().backward()
    assert rebuilt.grad is not None
    assert rebuilt.grad.abs().max() == 0
    images, near = images[:1, :, :9, :8], (images + 0.1 * random(2, 3, 16, 16))[:1, :, :9, :8]
    assert torch.autograd.gradcheck(lambda values: nlpd(images, values), near.requires_grad_())


def test_the_gradient_is_finite_on_flat_pictures() -> None:
    rebuilt = torch.zeros(1, 3, 32, 32, requires_grad=True)
    nlpd(torch.ones(1, 3, 32, 32), rebuilt).sum().backward()
    assert rebuilt.grad is not None
    assert rebuilt.grad.isfinite().all()
    assert rebuilt.grad.sum() < 0  # brighter is nearer


def test_one_value_for_each_picture_so_that_shards_average() -> None:
    images = some_images(4, 32)
    rebuilt = images + torch.tensor([0.1, 0.2, 0.3, 0.4]).view(-1, 1, 1, 1) * random(4, 3, 32, 32)
    whole = nlpd(images, rebuilt)
    assert whole.shape == (4,)
    single = torch.cat([nlpd(*pair) for pair in zip(images.split(1), rebuilt.split(1), strict=True)])
    assert torch.allclose(whole, single, rtol=1e-5)
    assert (whole.diff() > 0).all()


def test_half_precision_is_computed_in_fp32() -> None:
    images, rebuilt = some_images(2, 32, seed=1).bfloat16(), some_images(2, 32, seed=2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = nlpd(images, rebuilt)
    assert value.dtype == torch.float32
    assert torch.allclose(value.double(), nlpd(images.double(), rebuilt.double()), rtol=1e-4)


def test_it_grows_with_noise_and_with_blur() -> None:
    images = to_images(photograph())
    noise = random(1, 3, 128, 128)
    noisy = [nlpd(images, images + size * noise).item() for size in (0.02, 0.05, 0.1, 0.3)]
    blurred = [to_images(ndimage.gaussian_filter(np.asarray(photograph()), (size, size, 0))) for size in (0.5, 1, 2, 4)]
    for values in (noisy, [nlpd(images, each).item() for each in blurred]):
        assert values == sorted(values)
        assert 0 < values[0] < values[-1] / 2


def test_a_shift_of_luminance_is_nearer_than_noise_of_the_same_error() -> None:
    images = to_images(photograph())
    noisy = images + 0.1 * random(1, 3, 128, 128)
    shifted = images + mse(images, noisy) ** 0.5
    assert mse(images, shifted) == pytest.approx(mse(images, noisy), rel=1e-3)
    assert nlpd(images, shifted).item() < nlpd(images, noisy).item() / 5


@pytest.mark.parametrize("quality", [5, 10, 20])
def test_blocks_of_jpeg_are_further_than_a_gamma_of_the_same_error(quality: int) -> None:
    images, file = to_images(photograph(256)), io.BytesIO()
    photograph(256).save(file, "JPEG", quality=quality)
    blocky = to_images(Image.open(file))
    low, high = 1.0, 3.0
    for _ in range(40):  # the gamma whose error is that of the blocks
        gamma = (low + high) / 2
        other = (images / 2 + 0.5).clamp(0, 1) ** gamma * 2 - 1
        low, high = (gamma, high) if mse(images, other) < mse(images, blocky) else (low, gamma)
    assert mse(images, other) == pytest.approx(mse(images, blocky), rel=1e-2)
    assert nlpd(images, blocky).item() > 1.5 * nlpd(images, other).item()


def test_an_error_on_a_flat_ground_costs_more_than_in_a_texture() -> None:
    texture = 0.5 * random(1, 3, 64, 64).sign()
    error = 0.05 * random(1, 3, 64, 64, seed=1)
    flat = torch.zeros(1, 3, 64, 64)
    assert nlpd(flat, flat + error).item() > 1.8 * nlpd(texture, texture + error).item()


def test_errors_of_colour_alone_are_seen() -> None:
    grey = torch.zeros(1, 3, 32, 32)
    tint = torch.tensor([0.114, 0.0, -0.299]).view(1, 3, 1, 1) * random(1, 1, 32, 32)  # luminance 0
    assert nlpd(grey, grey + tint).item() > 0.05


def test_too_small_pictures_are_refused() -> None:
    with pytest.raises(UserError, match="8 pixels and more; given 4"):
        nlpd(torch.zeros(1, 3, 4, 16), torch.zeros(1, 3, 4, 16))


def test_nlpd_is_chosen_by_name_and_takes_no_weights(tmp_path: Path) -> None:
    images, rebuilt = some_images(2, 32, seed=1), some_images(2, 32, seed=2)
    assert torch.equal(perceptual("nlpd")(images, rebuilt), nlpd(images, rebuilt))
    with pytest.raises(UserError, match="has no weights"):
        perceptual("nlpd", tmp_path / "some.safetensors")


@pytest.mark.parametrize("name", ["lpips-alex", "lpips-vgg", "lpips-squeeze", "dists"])
def test_a_learned_distance_without_its_weights_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="needs its own weights"):
        perceptual(name)


@pytest.mark.parametrize("name", ["lpips-squeeze", "dists"])
def test_a_learned_distance_trains_the_pictures_and_not_itself(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = DISTS() if name == "dists" else LPIPS("squeeze")
    for key, value in network.named_parameters():
        if "features" not in key:  # heads and weights of a distance are not negative
            value.data = torch.rand_like(value)
    save_file(network.state_dict(), tmp_path / "given.safetensors")
    images, rebuilt = some_images(2, 32, seed=1), some_images(2, 32, seed=2).requires_grad_()
    distance = perceptual(name, tmp_path / "given.safetensors")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = distance(images, rebuilt)
    assert values.shape == (2,)
    assert values.dtype == torch.float32
    assert torch.allclose(values, network(images, rebuilt), rtol=1e-5)
    half = [each.detach().bfloat16() for each in (images, rebuilt)]
    assert torch.equal(distance(*half), distance(*(each.float() for each in half)))
    values.mean().backward()
    assert rebuilt.grad is not None
    assert rebuilt.grad.abs().sum() > 0
    (opened,) = [cell.cell_contents for cell in distance.__closure__ or ()]
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in opened.parameters())
