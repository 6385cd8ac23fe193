"""A codec's rate term: its bits are those of a distribution, and no latent's model sees what is coded later."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_vae, vae_run

from latentpipe.checkpoints.vae_io import load_vae
from latentpipe.train.config import TrainVAE
from latentpipe.train.vae import train as training
from latentpipe.train.vae.export import keep_steps
from latentpipe.train.vae.rate import RateModel
from latentpipe.train.vae.training_pass import rounded
from latentpipe.vae.entropy_model import ContextModel, bits, group_of


@pytest.mark.parametrize(("mean", "scale"), [(0.3, 1.0), (-7.8, 0.2), (2.0, 4.0)])
def test_probabilities_of_all_integers_sum_to_one(mean: float, scale: float) -> None:
    values = torch.arange(-200.0, 201.0, dtype=torch.float64)
    cost = bits(values, torch.full_like(values, mean), torch.full_like(values, math.log(scale)))
    assert float((2.0**-cost).sum()) == pytest.approx(1.0, abs=1e-6)


def test_bits_are_finite_and_have_a_gradient_far_out() -> None:
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    cost = bits(far, torch.zeros(2), torch.full((2,), -3.0))
    cost.sum().backward()  # type: ignore[no-untyped-call]
    assert bool(cost.isfinite().all())
    assert far.grad is not None
    assert bool(far.grad.isfinite().all())
    assert far.grad[0] > 0 > far.grad[1]


def test_the_model_sees_only_what_is_coded_before() -> None:
    torch.manual_seed(0)
    channels, groups, side = 6, 3, 7
    net = ContextModel(channels, hidden=12, groups=groups).double()
    torch.nn.init.normal_(net.state.weight)
    latents = torch.randn(1, channels, side, side, dtype=torch.float64, requires_grad=True)
    order = group_of(channels, groups)
    for channel, row, column in ((0, 3, 3), (3, 2, 0), (5, 6, 6), (2, 0, 6)):
        mean, log_scale = net(latents)
        (found,) = torch.autograd.grad((mean + log_scale)[0, channel, row, column], latents)
        seen = found[0] != 0
        for other, i, j in seen.nonzero().tolist():
            assert (i, j, int(order[other])) < (row, column, int(order[channel]))
            assert abs(i - row) <= 2
            assert abs(j - column) <= 2
        assert seen.any() == ((row, column, int(order[channel])) > (0, 0, 0))


def test_the_model_learns_from_the_gradient_that_the_loss_leaves() -> None:
    torch.manual_seed(0)
    rate = RateModel(4)
    latents = 3.0 + 0.5 * torch.randn(64, 4, 4, 4)
    before = rate(latents).item()
    for _ in range(150):
        (1e-3 * rate(latents)).backward()
        rate.update()
    assert rate(latents).item() < 0.6 * before
    copy = RateModel(4)
    copy.restore(rate.tensors())
    assert copy(latents).item() == rate(latents).item()


def test_uniform_noise_is_added_to_the_mean() -> None:
    noise = torch.rand(1, 2, 3, 3) - 0.5
    assert torch.equal(rounded(torch.ones(1, 2, 3, 3), noise), 1 + noise)


def test_a_run_with_a_rate_keeps_its_steps(tmp_path: Path, pictures: Path) -> None:
    loss: dict[str, Any] = {"kl": 0.0, "rate": 0.01, "equivariance": 0.0}
    config = vae_run(tmp_path, pictures, loss=loss)
    training.train_vae(config)
    vae = load_vae(tmp_path / "vae")
    assert vae.config.scaling_factor == 1.0
    c = vae.config.latent_channels
    assert bool((vae.quant_conv.bias[c:] + math.log(12)).abs().max() < 2e-3)
    assert not vae.quant_conv.weight[c:].any()
    with pytest.raises(ValueError, match="set kl and free_bits to 0"):
        TrainVAE.model_validate(config.model_dump() | {"loss": {**loss, "kl": 0.1}})


def test_steps_leave_the_means_as_they_are() -> None:
    vae = tiny_vae()
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        before = vae.encode(images).latent_dist.mean
        keep_steps(vae, 0.5)
        after = vae.encode(images).latent_dist
    assert torch.equal(before, after.mean)
    assert vae.config.scaling_factor == 2.0
    assert torch.allclose(after.var, torch.full_like(after.var, 1 / 48))
