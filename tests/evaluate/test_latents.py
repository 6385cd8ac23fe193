"""Moments, rate, round trips, equivariance and interpolation against closed forms and loops by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import some_images, tiny_vae
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from latentpipe import LatentSpace, VAEStage
from latentpipe.evaluate.metrics import latents
from latentpipe.evaluate.protocol import PROTOCOLS, find_protocol, round_images
from latentpipe.evaluate.speed import measure_cost
from latentpipe.utils.images import bytes_to_images, psnr
from latentpipe.vae.memory import MB, predict

MODE, SAMPLE = PROTOCOLS["latentpipe"], find_protocol("latentpipe", posterior="sample")


class Box(nn.Module):
    """A real autoencoder whose equivariance is known: means of 2 x 2 pixels, and each value repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Conv2d(1, 1, 1)  # holds the dtype

    def encode(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(latents=torch.nn.functional.avg_pool2d(x, 2))

    def decode(self, z: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        return (z.repeat_interleave(2, 2).repeat_interleave(2, 3),)


@pytest.fixture(scope="module")
def stage() -> VAEStage:
    return VAEStage(tiny_vae(scaling_factor=0.5, shift_factor=0.25))


@pytest.fixture
def box() -> VAEStage:
    return VAEStage(Box(), LatentSpace(3, 2, (1.0,) * 3, (0.0,) * 3))


def some_latents(n: int = 6, seed: int = 0, side: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_statistics_are_those_of_all_values() -> None:
    values = some_latents(8).exp() + torch.tensor([0.0, 2.0, -1.0]).view(1, 3, 1, 1)
    found = latents.statistics(latents.powers(values, torch.zeros_like(values)).numpy())
    flat = values.movedim(1, 0).flatten(1).numpy()
    assert found["mean per channel"] == pytest.approx(flat.mean(1))
    assert found["std per channel"] == pytest.approx(flat.std(1))
    assert found["skewness per channel"] == pytest.approx(stats.skew(flat, 1))
    assert found["excess kurtosis per channel"] == pytest.approx(stats.kurtosis(flat, 1))


def test_statistics_of_posteriors_are_those_of_their_mixture() -> None:
    """Gauss-Hermite quadrature with 8 nodes integrates fourth powers exactly."""
    mean, std = some_latents(8), some_latents(8, 1).abs()
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    values = np.stack([(mean + std * node).movedim(1, 0).flatten(1).numpy() for node in nodes], 2)
    share = weights / weights.sum() / values.shape[1]
    centre = (values * share).sum((1, 2))
    central = [((values - centre[:, None, None]) ** power * share).sum((1, 2)) for power in range(5)]
    found = latents.statistics(latents.powers(mean, std).numpy())
    assert found["mean per channel"] == pytest.approx(centre)
    assert found["std per channel"] == pytest.approx(np.sqrt(central[2]))
    assert found["skewness per channel"] == pytest.approx(central[3] / central[2] ** 1.5)
    assert found["excess kurtosis per channel"] == pytest.approx(central[4] / central[2] ** 2 - 3)


def test_the_error_of_a_mean_is_that_of_the_pictures_means() -> None:
    values = some_latents(60) + 3 * some_latents(60, 1, 1)  # most of the spread is between pictures
    found = latents.statistics(latents.powers(values, torch.zeros_like(values)).numpy())
    wanted = values.mean((2, 3)).std(0) / math.sqrt(60)
    assert found["standard error of mean per channel"] == pytest.approx(wanted.numpy(), rel=0.2)


def test_one_picture_has_no_error_and_a_constant_channel_no_shape() -> None:
    found = latents.statistics(latents.powers(torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)).numpy())
    assert all(math.isnan(value) for value in found["standard error of mean per channel"])
    assert found["skewness per channel"] == found["excess kurtosis per channel"] == [0.0] * 3


def test_the_rate_is_the_kl_to_the_standard_normal() -> None:
    mean, std = some_latents(), some_latents(seed=1).abs() + 0.01
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(mean, std), normal(torch.zeros(()).double(), torch.ones(()).double()))
    assert torch.allclose(latents.rate_bits(mean, std), wanted.sum((2, 3)) / math.log(2))


def test_a_sample_does_not_depend_on_the_batch() -> None:
    mean, std = some_latents().float(), some_latents(seed=1).abs().float()
    whole = latents.draw_latents(mean, std, SAMPLE, range(6))
    parts = [latents.draw_latents(mean[i : i + 2], std[i : i + 2], SAMPLE, range(i, i + 2)) for i in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, mean)
    assert torch.equal(latents.draw_latents(mean, std, MODE, range(6)), mean)
    noise = (latents.draw_latents(torch.zeros(200, 3, 4, 4), torch.ones(200, 3, 4, 4), SAMPLE, range(200))).numpy()
    assert stats.kstest(noise.ravel(), "norm").pvalue > 0.01


@torch.no_grad()
def test_round_trips_are_a_loop_with_bytes_between(stage: VAEStage) -> None:
    images = some_images()
    found = latents.cycles(stage, images, MODE, range(4))
    assert list(found) == ["PSNR after 1 cycle", "PSNR after 2 cycles", "PSNR after 5 cycles", "PSNR after 10 cycles"]
    first = now = round_images(images, "nearest")
    now = images
    for cycle in range(1, 11):
        saved = (stage.decode(stage.encode(now)).clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
        now = saved.float() / 127.5 - 1
        if cycle in (1, 2, 5, 10):
            assert found[f"PSNR after {cycle} cycle{'s' * (cycle > 1)}"] == pytest.approx(psnr(saved, first).tolist(), abs=0.01)


@torch.no_grad()
def test_sampled_round_trips_draw_anew_each_time(stage: VAEStage) -> None:
    images = some_images()
    found = latents.cycles(stage, images, SAMPLE, range(4))
    assert found == latents.cycles(stage, images, SAMPLE, range(4))
    assert found != latents.cycles(stage, images, MODE, range(4))


@torch.no_grad()
def test_round_trips_of_an_exact_autoencoder_stay_at_the_top(box: VAEStage) -> None:
    images = bytes_to_images(round_images(some_images(side=8), "nearest").repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert all(values == [latents.TOP_DB] * 4 for values in latents.cycles(box, images, MODE, range(4)).values())


@torch.no_grad()
def test_an_equivariant_autoencoder_has_no_error(box: VAEStage) -> None:
    images = some_images()
    found = latents.equivariance(box, images, MODE)
    for name in ("half size", "quarter turn"):
        assert max(found[f"equivariance error ({name})"]) < 1e-6
    plain = psnr(round_images(box.decode(box.encode(images)), "nearest"), round_images(images, "nearest"))
    assert found["equivariance PSNR (quarter turn)"] == pytest.approx(plain.tolist(), abs=0.05)


@torch.no_grad()
def test_equivariance_by_hand(stage: VAEStage) -> None:
    images = some_images()
    found = latents.equivariance(stage, images, MODE)
    z = stage.encode(images)
    small, small_z = (torch.nn.functional.avg_pool2d(part, 2) for part in (images, z))
    turned, turned_z = (part.transpose(2, 3).flip(2) for part in (images, z))
    for name, target, warped in (("half size", small, small_z), ("quarter turn", turned, turned_z)):
        again = stage.encode(target)
        error = [float((a - b).norm() / a.norm()) for a, b in zip(again, warped, strict=True)]
        assert found[f"equivariance error ({name})"] == pytest.approx(error, rel=1e-4)
        assert min(error) > 0.01
        wanted = psnr(round_images(stage.decode(warped), "nearest"), round_images(target, "nearest"))
        assert found[f"equivariance PSNR ({name})"] == pytest.approx(wanted.tolist(), abs=0.01)


@torch.no_grad()
def test_half_size_is_left_out_where_a_side_is_odd(stage: VAEStage) -> None:
    assert not any("half size" in name for name in latents.equivariance(stage, some_images(side=18), MODE))


def test_neighbours_are_those_of_all_distances() -> None:
    rows = torch.randn(600, 5, generator=torch.Generator().manual_seed(0))
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
    found = latents.nearest(rows)
    assert (distances[torch.arange(600), found] - distances.min(1).values).abs().max() < 1e-5  # two may be as near
    assert (found == distances.argmin(1)).float().mean() > 0.99
    assert latents.nearest(rows[:2]).tolist() == [1, 0]


@given(share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_slerp_keeps_the_length_and_divides_the_angle(share: float, seed: int) -> None:
    a, b = (torch.nn.functional.normalize(some_latents(1, seed + k).flatten(), dim=0) for k in (0, 5000))
    found = latents.slerp(a.view(1, 3, 4, 4), b.view(1, 3, 4, 4), share).flatten().double()
    assert float(found.norm()) == pytest.approx(1, abs=1e-5)
    angle = math.acos(float(a @ b))
    assert float(found @ a) == pytest.approx(math.cos(share * angle), abs=1e-5)
    assert float(found @ b) == pytest.approx(math.cos((1 - share) * angle), abs=1e-5)


def test_slerp_of_parallel_latents_is_their_mean() -> None:
    a = some_latents(2).float()
    assert torch.allclose(latents.slerp(a, 3 * a), 2 * a, atol=1e-4)
    assert torch.allclose(latents.slerp(a, -a), torch.zeros_like(a), atol=1e-6)
    assert torch.isfinite(latents.slerp(a, torch.zeros_like(a))).all()


@pytest.mark.slow
def test_the_cost_is_complete_and_near_the_predicted_memory() -> None:
    code = (  # in a process of its own: the peak is one of the whole process, and earlier tests leave threads and a torn heap
        "import json, helpers, torch; from latentpipe import VAEStage; from latentpipe.evaluate.speed import measure_cost; "
        f"torch.set_num_threads({torch.get_num_threads()}); "
        "print(json.dumps(measure_cost(VAEStage(helpers.tiny_vae(), tile=None), 512, 512, repeats=1)))"
    )
    folder = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True)
    cost, vae = json.loads(done.stdout), tiny_vae()
    assert (cost["size_px"], cost["device"], cost["dtype"], cost["threads"]) == (512, "cpu", "fp32", torch.get_num_threads())
    for direction, shape in (("encode", (1, 3, 512, 512)), ("decode", (1, 4, 256, 256))):
        one = cost[direction]
        assert 0 < one["least"] <= one["ms"] <= one["most"]
        if one["peak_mb"] is None:
            assert cost["memory"] == "cannot be measured on this system"
        else:
            assert 0.5 < one["peak_mb"] * MB / predict(vae, direction, shape) < 2  # type: ignore[arg-type]


def test_the_cost_of_no_square_names_both_sides() -> None:
    assert measure_cost(VAEStage(tiny_vae()), 16, 32, repeats=1)["size_px"] == [16, 32]


def test_pairs_of_equal_pictures_count_as_the_top() -> None:
    same = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert latents.decibels(same, same).tolist() == [latents.TOP_DB] * 2
    assert np.isclose(float(latents.decibels(same, same + 1)[0]), 20 * math.log10(255))
