"""Frechet and kernel distances against scipy, torchmetrics and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from latentpipe.evaluate.metrics import frechet as distances
from latentpipe.evaluate.metrics.frechet import (
    frechet,
    frechet_score,
    kernel_distance,
    kernel_score,
    paired_frechet,
    paired_kernel,
    resamples,
)
from latentpipe.utils.errors import UserError


def drawn(n: int, size: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    """Correlated features (n, size)."""
    random = np.random.default_rng(seed)
    return (
        spread * random.normal(size=(n, size)) @ np.random.default_rng(99).normal(size=(size, size)) / np.sqrt(size) + 0.1 * seed
    )


def exactly(mean: np.ndarray, deviations: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Features whose sample mean and sample covariance (diagonal) are exactly those given."""
    rows = np.random.default_rng(seed).normal(size=(n, len(mean)))
    rows -= rows.mean(0)
    white = np.linalg.qr(rows)[0] * np.sqrt(n - 1)
    return white * deviations + mean


def test_frechet_equals_scipys_matrix_root() -> None:
    a, b = drawn(300, 12, 0), drawn(250, 12, 1, 1.3)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    gap = np.square(a.mean(0) - b.mean(0)).sum()
    expected = gap + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_equals_torchmetrics() -> None:
    a, b = (torch.from_numpy(drawn(200, 20, seed, spread)) for seed, spread in ((0, 1.0), (2, 0.7)))
    expected = _compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()).item()
    assert frechet(a.numpy(), b.numpy()) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_two_gaussians_has_its_closed_form() -> None:
    random = np.random.default_rng(3)
    means, deviations = random.normal(size=(2, 6)), random.uniform(0.2, 2, (2, 6))
    a, b = exactly(means[0], deviations[0], 50, 0), exactly(means[1], deviations[1], 80, 1)
    expected = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    assert frechet(a, b) == pytest.approx(expected, rel=1e-10)


@given(st.integers(3, 30), st.integers(1, 40), st.floats(0.1, 3), st.integers(0, 99))
def test_frechet_of_a_scaled_set_needs_no_more_pictures_than_features(n: int, size: int, scale: float, seed: int) -> None:
    # C_b = s^2 C_a, so the distance is (1 - s)^2 (|mean|^2 + Tr C), also where N < D and both are singular.
    a = drawn(n, size, seed)
    expected = (1 - scale) ** 2 * (np.square(a.mean(0)).sum() + a.var(0, ddof=1).sum())
    assert frechet(a, scale * a) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(st.integers(0, 99))
def test_frechet_is_symmetric_and_blind_to_turns_and_shifts(seed: int) -> None:
    a, b = drawn(12, 9, seed), drawn(15, 9, seed + 1)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(9, 9)))[0]
    value = frechet(a, b)
    assert value == pytest.approx(frechet(b, a), rel=1e-8)
    assert value == pytest.approx(frechet(a @ turn + 5, b @ turn + 5), rel=1e-8)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_is_biased_upwards_by_few_pictures() -> None:
    few, many = (np.mean([frechet(other(n, s), other(n, s + 100)) for s in range(20)]) for n in (20, 400))
    assert few > 5 * many


def other(n: int, seed: int) -> np.ndarray:
    """A second sample of the population of ``drawn(n, 8, 0)``."""
    return np.random.default_rng(seed + 500).normal(size=(n, 8)) @ np.random.default_rng(99).normal(size=(8, 8)) / np.sqrt(8)


def test_counts_are_repeated_rows() -> None:
    a, b = drawn(10, 30, 0), drawn(10, 30, 1)
    counts = np.array([3.0, 0, 1, 2, 0, 0, 1, 1, 2, 0])
    rows = np.repeat(np.arange(10), counts.astype(int))
    assert distances._frechet(a, b, counts, counts) == pytest.approx(frechet(a[rows], b[rows]), rel=1e-9)


@pytest.mark.parametrize("n", [5, 60])
def test_kernel_distance_equals_torchmetrics(n: int) -> None:
    a, b = drawn(n, 16, 0), drawn(n, 16, 1)
    expected = poly_mmd(torch.from_numpy(a), torch.from_numpy(b)).item()
    mean, deviation = kernel_distance(a, b, subsets=3)
    assert mean == pytest.approx(expected, rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9)  # each subset is the whole set


def test_a_kernel_score_leaves_out_pairs_of_a_picture_and_its_own_reconstruction() -> None:
    a, b = drawn(20, 16, 0), drawn(20, 16, 1)
    cross = distances._kernel(a, b)
    apart = cross[~np.eye(20, dtype=bool)].mean()
    expected = poly_mmd(torch.from_numpy(a), torch.from_numpy(b)).item() + 2 * cross.mean() - 2 * apart
    assert kernel_score(a, b)[0] == pytest.approx(expected, rel=1e-9)
    assert kernel_score(a, a) == pytest.approx((0, 0, 0), abs=1e-9)


def test_a_kernel_score_ranks_reconstructions_where_independent_sets_would_not() -> None:
    reference = np.random.default_rng(0).normal(size=(100, 64))
    near, far = reference + 0.1 * np.random.default_rng(1).normal(size=(100, 64)), 1.1 * reference
    assert kernel_distance(reference, near)[0] > kernel_distance(reference, far)[0]  # the bias of pairs
    assert kernel_score(reference, near)[0] < kernel_score(reference, far)[0]


def test_kernel_distance_of_subsets_keeps_the_mean() -> None:
    a, b = drawn(80, 6, 0), drawn(120, 6, 3)
    mean, deviation = kernel_distance(a, b, subsets=400, size=30)
    everything = distances._kernel(a, b).mean()
    within = [(distances._kernel(x, x).sum() - (distances._kernel(x, x)).trace()) / (len(x) * (len(x) - 1)) for x in (a, b)]
    assert mean == pytest.approx(sum(within) - 2 * everything, abs=4 * deviation / np.sqrt(400))
    assert kernel_distance(a, b, 10, 30, seed=1) == kernel_distance(a, b, 10, 30, seed=1) != kernel_distance(a, b, 10, 30, seed=2)


def test_kernel_distance_is_unbiased() -> None:
    values = [kernel_distance(other(15, seed), other(15, seed + 1000), subsets=1)[0] for seed in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)
    assert min(values) < 0


@pytest.mark.parametrize("score", [frechet_score, kernel_score])
@pytest.mark.parametrize(("n", "size"), [(2, 5), (30, 8), (30, 60)])
def test_intervals_hold_the_value_and_repeat(score: object, n: int, size: int) -> None:
    a, b = drawn(n, size, 0), drawn(n, size, 0) + 0.3 * drawn(n, size, 1)
    value, low, high = score(a, b)  # type: ignore[operator]
    assert low <= value + 1e-12
    assert high >= value - 1e-12
    assert np.isfinite([low, high]).all()
    assert (value, low, high) == score(a, b)  # type: ignore[operator]


def test_intervals_narrow_with_more_pictures() -> None:
    widths = []
    for n in (40, 640):
        _, low, high = frechet_score(other(n, 1), other(n, 1) * 1.2 + 0.1 * other(n, 2))
        widths.append(high - low)
    assert 2 < widths[0] / widths[1] < 8  # as the root of 16


@pytest.mark.parametrize("paired", [paired_frechet, paired_kernel])
def test_a_paired_interval_finds_the_nearer_one(paired: object) -> None:
    reference = other(200, 1)
    near, far = reference + 0.1 * other(200, 2), reference + 0.8 * other(200, 3)
    difference, low, high = paired(reference, near, far)  # type: ignore[operator]
    assert low < difference < high < 0
    assert paired(reference, far, near) == pytest.approx((-difference, -high, -low))  # type: ignore[operator]
    difference, low, high = paired(reference, near, reference + 0.1 * other(200, 4))  # type: ignore[operator]
    assert low < 0 < high


def test_a_paired_interval_is_narrower_than_two_apart() -> None:
    reference = other(60, 1)
    first, second = reference + 0.5 * other(60, 2), reference + 0.5 * other(60, 2) + 0.05 * other(60, 3)
    _, low, high = paired_frechet(reference, first, second)
    _, alone_low, alone_high = frechet_score(reference, first)
    assert high - low < 0.5 * (alone_high - alone_low)


def test_costly_intervals_have_fewer_resamples() -> None:
    assert [resamples(200, 512), resamples(5000, 128), resamples(5000, 512), resamples(5000, 2048)] == [500, 500, 100, 50]


def test_what_cannot_be_measured_is_refused() -> None:
    a = drawn(10, 4)
    with pytest.raises(UserError, match="2 pictures"):
        frechet(a[:1], a)
    with pytest.raises(ValueError, match="same pictures"):
        frechet_score(a, a[:9])
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        kernel_distance(a, a[:, :3])
    broken = a.copy()
    broken[3, 2] = np.nan
    with pytest.raises(UserError, match="not finite"):
        kernel_score(a, broken)
