"""Beta schedules, free bits and the rate controller."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from hypothesis import given
from hypothesis import strategies as st

from latentpipe.train.vae.kl import BetaController, BetaSchedule, beta_at, kl_channels, per_pixel_value, with_free_bits

LN2 = math.log(2)
SCHEDULES: list[BetaSchedule] = ["constant", "linear", "cosine", "cyclical"]
RAMPS: list[BetaSchedule] = ["linear", "cosine"]
steps = st.integers(8, 500)
ramps = st.floats(0, 1)


def posterior(seed: int = 0, b: int = 3, c: int = 4, side: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of random posteriors, B C h w."""
    generator = torch.Generator().manual_seed(seed)
    mean, logvar = torch.randn(2, b, c, side, side, generator=generator)
    return mean, logvar


@given(st.sampled_from(SCHEDULES), st.floats(0, 100), steps, ramps, st.integers(1, 8), st.data())
def test_every_schedule_stays_between_zero_and_beta(schedule, beta, n, ramp, cycles, data) -> None:
    step = data.draw(st.integers(0, n - 1))
    assert 0 <= beta_at(schedule, beta, step, n, ramp, cycles) <= beta


@given(st.sampled_from(RAMPS), steps, st.floats(0.05, 1))
def test_ramps_rise_from_zero_and_stay_at_beta(schedule, n, ramp) -> None:
    values = [beta_at(schedule, 2.0, step, n, ramp) for step in range(n)]
    assert values[0] == 0
    assert all(later >= earlier for earlier, later in pairwise(values))
    assert all(value == 2.0 for step, value in enumerate(values) if step >= ramp * n)


def test_ramps_at_known_places() -> None:
    assert beta_at("constant", 3.0, 0, 100) == 3.0
    assert beta_at("linear", 4.0, 25, 100) == pytest.approx(2.0)
    assert beta_at("cosine", 4.0, 25, 100) == pytest.approx(2.0)
    assert beta_at("cosine", 4.0, 10, 100) == pytest.approx(2.0 * (1 - math.cos(math.pi * 0.2)))
    assert beta_at("linear", 4.0, 0, 100, ramp=0) == 4.0


@given(st.integers(1, 8), st.integers(2, 60), st.floats(0.05, 0.95))
def test_cycles_repeat_each_a_ramp_and_a_plateau(cycles, period, ramp) -> None:
    values = [beta_at("cyclical", 1.0, step, cycles * period, ramp, cycles) for step in range(cycles * period)]
    for cycle in range(1, cycles):
        assert values[cycle * period : (cycle + 1) * period] == values[:period]
    for step in range(period):
        assert values[step] == pytest.approx(min(1.0, step / period / ramp))


def test_more_cycles_than_steps_still_reach_beta() -> None:
    assert {beta_at("cyclical", 1.0, step, 4, cycles=4) for step in range(4)} == {0.0, 1.0}


@pytest.mark.parametrize(("ramp", "cycles", "n"), [(-0.1, 4, 10), (1.1, 4, 10), (0.5, 0, 10), (0.5, 4, 0)])
def test_what_is_no_schedule_is_refused(ramp, cycles, n) -> None:
    with pytest.raises(ValueError, match="Expected a ramp"):
        beta_at("linear", 1.0, 0, n, ramp, cycles)


def test_kl_of_channels_sums_to_that_of_diffusers() -> None:
    mean, logvar = posterior()
    theirs = DiagonalGaussianDistribution(torch.cat([mean, logvar], 1)).kl().mean()
    torch.testing.assert_close(kl_channels(mean, logvar).sum() * 25, theirs)
    torch.testing.assert_close(per_pixel_value(kl_channels(mean, logvar).sum(), 25, 300), theirs / 300)


def test_kl_of_known_posteriors_and_precisions() -> None:
    mean = torch.tensor([0.0, 2.0]).view(1, 2, 1, 1).expand(2, 2, 3, 3)
    logvar = torch.tensor([0.0, math.log(0.25)]).view(1, 2, 1, 1).expand(2, 2, 3, 3)
    expected = torch.tensor([0.0, 0.5 * (4 + 0.25 - 1 - math.log(0.25))])
    torch.testing.assert_close(kl_channels(mean, logvar), expected)
    assert kl_channels(mean.bfloat16(), logvar.bfloat16()).dtype == torch.float32
    assert kl_channels(mean.double(), logvar.double()).dtype == torch.float64


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.floats(0, 4))
def test_free_bits_are_the_sum_of_maxima(values, bits) -> None:
    kl = torch.tensor(values, dtype=torch.float64)
    assert with_free_bits(kl, bits).item() == pytest.approx(sum(max(value, bits * LN2) for value in values))
    assert with_free_bits(kl, 0).item() == pytest.approx(sum(values))


def test_free_bits_push_only_channels_above() -> None:
    kl = (torch.tensor([0.1, 0.5, 2.0]) * LN2).requires_grad_()
    with_free_bits(kl, 0.25).backward()
    assert kl.grad is not None
    assert kl.grad.tolist() == [0.0, 1.0, 1.0]


def test_free_bits_of_two_processes_have_the_gradient_of_one() -> None:
    mean, logvar = (value.double() * 0.7 for value in posterior(1, b=6))
    logvar = logvar - 0.3
    whole = kl_channels(mean, logvar)
    # lambda between the channels, where the halves disagree about one of them
    halves = [kl_channels(mean[part], logvar[part]) for part in (slice(0, 3), slice(3, 6))]
    channel = int((halves[0] - halves[1]).abs().argmax())
    bits = (halves[0][channel] + halves[1][channel]).item() / 2 / LN2 * 1.0001
    free = bits * LN2
    assert ((halves[0] > free) != (halves[1] > free)).any()

    def gradient(parts: list[slice], reduced: torch.Tensor | None) -> torch.Tensor:
        given = mean.clone().requires_grad_()
        (sum(with_free_bits(kl_channels(given[part], logvar[part]), bits, reduced) for part in parts) / len(parts)).backward()
        assert given.grad is not None
        return given.grad

    one = gradient([slice(0, 6)], None)
    torch.testing.assert_close(gradient([slice(0, 3), slice(3, 6)], whole), one)
    assert not torch.allclose(gradient([slice(0, 3), slice(3, 6)], None), one)


@pytest.mark.slow
def test_a_rate_is_reached_on_a_gaussian_model() -> None:
    """One latent of data with variance 3: rate(beta) is known, and training with the controller arrives at the target."""
    variance, noise, target = 3.0, 0.1, 1.5
    encoder, decoder, logvar = (torch.tensor(value, requires_grad=True) for value in (0.3, 0.3, 0.0))
    optimizer = torch.optim.Adam([encoder, decoder, logvar], 0.01)
    rate = BetaController(target, beta=0.01, gain=0.02)
    for _ in range(1500):
        error = (1 - decoder * encoder).square() * variance + decoder.square() * logvar.exp()
        kl = 0.5 * (encoder.square() * variance + logvar.exp() - 1 - logvar)
        optimizer.zero_grad()
        (error / (2 * noise) + rate.beta * kl).backward()
        optimizer.step()
        rate.update(kl.item() / LN2)
    assert kl.item() / LN2 == pytest.approx(target, rel=0.05)
    assert rate.beta == pytest.approx(variance / noise * 2 ** (-2 * target), rel=0.05)  # rate = log2(l / (beta s2)) / 2


@given(st.floats(0, 1e6), st.floats(0.01, 10), st.floats(1e-8, 1e4))
def test_a_rate_turns_beta_the_right_way_within_its_limits(measured, target, beta) -> None:
    rate = BetaController(target, beta, gain=0.05)
    after = rate.update(measured)
    assert 1e-8 <= after <= 1e4
    assert abs(math.log(after / beta)) <= 0.05 + 1e-9
    assert (after - beta) * (measured - target) >= 0


def test_a_rate_goes_on_from_its_state() -> None:
    first, second = BetaController(0.5, 1.0), BetaController(0.5, 1.0)
    first.update(2.0)
    second.restore(first.state())
    assert second.update(0.1) == first.update(0.1)


@pytest.mark.parametrize("wrong", [{"target_bits": 0.0, "beta": 1.0}, {"target_bits": 1.0, "beta": 1e5}])
def test_what_is_no_rate_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match="Expected target_bits"):
        BetaController(**wrong)
