"""The health of a VAE against closed forms on constructed posteriors, and the words that alarms find for it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from helpers import some_images, tiny_vae
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from latentpipe.checkpoints.vae_io import save_vae
from latentpipe.cli.evaluate import health as verb
from latentpipe.evaluate import diagnosis as words
from latentpipe.evaluate.health import Health, gradient_shares, measure, watch
from latentpipe.evaluate.metrics.posterior import Moments, gaussian_gap, kl_values, mutual_information
from latentpipe.evaluate.metrics.spectrum import Patches, high_energy
from latentpipe.utils.errors import UserError
from latentpipe.vae.latent_space import LatentSpace
from latentpipe.vae.stage import VAEStage

LN2 = math.log(2)


class Colours(nn.Module):
    """An autoencoder whose latents are the picture times `gain`, with `sigma` around it (None: no posterior)."""

    def __init__(self, gain: float = 1.0, sigma: float | None = None) -> None:
        super().__init__()
        self.gain, self.sigma, self.decoder = nn.Parameter(torch.tensor(gain)), sigma, nn.Identity()

    def encode(self, images: torch.Tensor) -> Any:
        mean = images * self.gain
        if self.sigma is None:
            return SimpleNamespace(latents=mean)
        logvar = torch.full_like(mean, 2 * math.log(self.sigma))
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(torch.cat([mean, logvar], 1)))

    def decode(self, raw: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        return (self.decoder(raw / self.gain),)


def colours(gain: float = 1.0, sigma: float | None = None) -> VAEStage:
    """A stage around `Colours`."""
    return VAEStage(Colours(gain, sigma), LatentSpace(3, 1, (1 / gain,) * 3, (0.0,) * 3))


@torch.no_grad()
def set_channel(vae: Any, channel: int, mean: float, sigma: float) -> None:
    """Make one channel's posterior the same for every picture."""
    conv, c = vae.quant_conv, vae.config.latent_channels
    for row, value in ((channel, mean), (c + channel, 2 * math.log(sigma))):
        conv.weight[row] = 0
        conv.bias[row] = value


@torch.no_grad()
def half_collapsed() -> Any:
    """A tiny VAE of which two of four channels say nothing: one is the prior, one is another constant."""
    vae = tiny_vae()
    vae.quant_conv.weight[:4] *= 3
    set_channel(vae, 0, 0.0, 1.0)
    set_channel(vae, 1, 2.0, 0.5)
    return vae


def test_constant_channels_are_inactive_and_have_the_closed_forms() -> None:
    found = measure(VAEStage(half_collapsed()), some_images(24).split(8))
    assert found.n == 24
    assert found.shape == (4, 8, 8)
    assert found.active == (False, False, True, True)
    assert found.active_share == 0.5
    assert found.kl_nats is not None
    assert found.mutual_bits is not None
    assert found.marginal_gap_bits is not None
    assert found.sigma is not None
    expected = 0.5 * (4 + 0.25 - 1 - math.log(0.25))
    assert found.kl_nats[:2] == pytest.approx((0.0, expected), abs=1e-5)
    assert found.mean[:2] == pytest.approx((0.0, 2.0), abs=1e-5)
    assert found.std[:2] == pytest.approx((1.0, 0.5), abs=1e-5)
    assert found.sigma[:2] == pytest.approx((1.0, 0.5), abs=1e-5)
    assert found.skewness[:2] == pytest.approx((0.0, 0.0), abs=1e-4)
    assert found.kurtosis[:2] == pytest.approx((0.0, 0.0), abs=1e-4)
    assert found.mutual_bits[:2] == pytest.approx((0.0, 0.0), abs=1e-5)
    assert found.gaussian_gap_bits[:2] == pytest.approx((0.0, expected / LN2), abs=1e-5)
    assert found.marginal_gap_bits[:2] == pytest.approx((0.0, expected / LN2), abs=1e-5)
    assert min(found.mutual_bits[2:]) > 0.001


def test_the_kl_of_all_channels_is_that_of_diffusers() -> None:
    vae, images = half_collapsed(), some_images(6)
    found = measure(VAEStage(vae), images.split(4))
    with torch.no_grad():
        theirs = vae.encode(images).latent_dist.kl().mean().item()
    assert found.kl_nats is not None
    assert sum(found.kl_nats) * 64 == pytest.approx(theirs, rel=1e-5)


def test_raw_units_count_whatever_the_normalization() -> None:
    images = some_images(8)
    plain, scaled = (measure(VAEStage(tiny_vae(scaling_factor=factor)), [images]) for factor in (1.0, 0.1))
    assert plain.kl_bits == scaled.kl_bits
    assert plain.mean_variance == scaled.mean_variance
    assert plain.psnr_mode_db == pytest.approx(scaled.psnr_mode_db, abs=0.01)


def test_an_identity_has_the_figures_of_its_pictures() -> None:
    images = some_images(40, 8)
    images[:, 2] *= 0.5
    found = measure(colours(gain=2.0, sigma=0.2), images.split(16))
    variance = images.transpose(0, 1).flatten(1).var(1, correction=0)
    assert found.mean_variance == pytest.approx((4 * variance).tolist(), rel=1e-5)
    assert found.std == pytest.approx((4 * variance + 0.04).sqrt().tolist(), rel=1e-5)
    assert found.psnr_mode_db == 99.0
    assert found.high_frequency == pytest.approx(1.0)
    assert found.rms == pytest.approx(0.0, abs=1e-6)
    assert found.sigma_histogram is not None
    assert [share for share in found.sigma_histogram if share] == [1.0]
    assert found.use_db is not None
    assert found.psnr_zeroed_db is not None
    for channel in range(3):  # the channel's own energy is lost
        expected = 10 * torch.log10(4 / images[:, channel].square().mean((1, 2)).div(3)).mean().item()
        assert found.psnr_zeroed_db[channel] == pytest.approx(expected, abs=0.05)
        assert found.use_db[channel] == pytest.approx(99 - expected, abs=0.05)
    assert found.ablated == 40
    # sigma 0.2 in raw units is 0.1 in the picture's, less what is cut off at black and white
    assert found.psnr_sample_db == pytest.approx(10 * math.log10(4 / 0.1**2), abs=0.6)
    assert words.alarms(found) == []


def test_measuring_in_other_batches_changes_nothing() -> None:
    vae, images = half_collapsed(), some_images(12)
    once, often = (measure(VAEStage(vae), images.split(size)) for size in (12, 5))
    for field in dataclasses.fields(Health):
        first, second = getattr(once, field.name), getattr(often, field.name)
        if field.name != "psnr_sample_db":  # other noise
            assert first == pytest.approx(second, rel=1e-4, abs=1e-5), field.name


def test_an_autoencoder_without_a_posterior_says_so() -> None:
    found = measure(colours(), [some_images(6)])
    assert (found.kl_bits, found.kl_nats, found.sigma, found.mutual_bits, found.psnr_sample_db) == (None,) * 5
    assert found.active == (True, True, True)
    assert "no posterior" in str(found)
    assert words.alarms(found) == words.notes(found) == []


def test_an_encoder_alone_has_no_figures_of_pictures() -> None:
    stage = colours(sigma=0.5)
    stage.vae.decoder = None
    found = measure(stage, [some_images(6)])
    assert found.psnr_mode_db is found.use_db is found.high_frequency is None
    assert found.kl_bits is not None
    assert words.alarms(found) == []


def test_nothing_to_measure_on_is_told() -> None:
    with pytest.raises(UserError, match="no picture"):
        measure(colours(), [])


@given(st.integers(0, 1000), st.integers(1, 5))
def test_moments_are_those_of_scipy(seed: int, size: int) -> None:
    values = np.random.default_rng(seed).gamma(2.0, 1.5, (6, 2, 4, 4)) + 100
    moments = Moments()
    for part in torch.from_numpy(values).split(size):
        moments.add(part, torch.zeros_like(part))
    found = {name: value.numpy() for name, value in moments.result().items()}
    flat = values.transpose(1, 0, 2, 3).reshape(2, -1)
    np.testing.assert_allclose(found["mean"], flat.mean(1))
    np.testing.assert_allclose(found["std"], flat.std(1))
    np.testing.assert_allclose(found["mean_variance"], flat.var(1))
    np.testing.assert_allclose(found["skewness"], stats.skew(flat, axis=1), rtol=1e-6)
    np.testing.assert_allclose(found["kurtosis"], stats.kurtosis(flat, axis=1), rtol=1e-6, atol=1e-8)


def test_moments_of_a_mixture_are_exact() -> None:
    mean, std = torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    moments = Moments()
    moments.add(mean, std)
    assert moments.result()["kurtosis"].item() == pytest.approx(3 * (1 + 81) / 2 / 25 - 3)
    moments = Moments()
    moments.add(torch.tensor([-2.0, 2.0]).view(2, 1, 1, 1), torch.ones(2, 1, 1, 1))  # third and fourth of two bells
    assert moments.result()["std"].item() == pytest.approx(math.sqrt(5))
    assert moments.result()["kurtosis"].item() == pytest.approx((16 + 6 * 4 + 3) / 25 - 3)


def test_information_of_gaussians_is_the_closed_form_and_adds_up() -> None:
    """Means N(0, t^2), noise s: I = ln(1 + t^2 / s^2) / 2, and KL = I + KL(q(z) || p) with q(z) = N(0, t^2 + s^2)."""
    t, s = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, 0.5, 0.6])
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2000, 3, generator=generator) * t
    std = s.expand_as(mean)
    information = mutual_information(mean, std, generator)
    closed = 0.5 * torch.log(1 + (t / s) ** 2).double()
    torch.testing.assert_close(information, closed, atol=0.05, rtol=0.05)
    kl = kl_values(mean, 2 * std.log()).mean(0).double()
    torch.testing.assert_close(kl - information, gaussian_gap(torch.zeros(3), (t**2 + s**2).sqrt()).double(), atol=0.1, rtol=0.05)


def test_information_is_nothing_for_one_posterior_and_at_most_the_number_of_pictures() -> None:
    same = mutual_information(torch.zeros(50, 2), torch.ones(50, 2))
    torch.testing.assert_close(same, torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    apart = mutual_information(torch.arange(50.0)[:, None], torch.full((50, 1), 1e-3))
    assert apart.item() == pytest.approx(math.log(50))


@given(st.floats(-5, 5), st.floats(0.01, 5))
def test_the_gap_is_the_kl_of_torch(mean: float, std: float) -> None:
    normal = torch.distributions.Normal
    theirs = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0)).item()
    assert gaussian_gap(torch.tensor([mean]), torch.tensor([std])).item() == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_detail_is_the_energy_above_half_nyquist() -> None:
    noise = some_images(8, 64)
    assert (high_energy(noise / 2) / high_energy(noise)).item() == pytest.approx(0.25, rel=1e-5)
    # white noise of variance 1/3 (Hann: mean square 9/64), on the frequencies outside a circle of radius 1/4
    expected = 8 * 3 * 64 * 64 / 3 * (9 / 64) * (1 - math.pi / 16)
    assert high_energy(noise).item() == pytest.approx(expected, rel=0.05)
    x = torch.arange(64.0)

    def wave(frequency: float) -> torch.Tensor:
        return torch.cos(2 * math.pi * frequency * x).expand(1, 3, 64, 64)

    assert high_energy(wave(0.15)) < 1e-6 * high_energy(wave(0.35))


def test_patches_have_the_covariance_of_numpy() -> None:
    images = some_images(20, 8)
    images[:, 1] = 0.5 * images[:, 0] + 0.1 * images[:, 1]
    patches = Patches(2)
    for part in images.split(7):
        patches.add(part)
    rows = nn.functional.unfold(images, 2, stride=2).transpose(1, 2).reshape(-1, 12).double().numpy()
    expected = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[::-1]
    np.testing.assert_allclose(patches.largest(5), expected[:5], rtol=1e-8)
    large = Patches(32)
    large.add(some_images(1, 32))
    assert large.largest(4) is None


def test_watching_a_batch() -> None:
    mean, logvar = torch.zeros(2, 2, 3, 3), torch.zeros(2, 2, 3, 3)
    mean[0, 0], mean[1, 0] = 1.0, -1.0
    logvar[:, 1] = math.log(0.25)
    seen = watch(mean, logvar)
    assert seen["kl_bits_per_latent"] == pytest.approx((0.5 + 0.5 * (0.25 - 1 + math.log(4))) / 2 / LN2)
    assert seen["active_share"] == 0.5
    assert seen["sigma_mean"] == pytest.approx(0.75)


def test_shares_of_the_last_layer_are_gradient_norms_and_leave_the_graph() -> None:
    last = nn.Parameter(torch.ones(4))
    other = nn.Parameter(torch.ones(4))
    losses = {"a": 3 * last.sum(), "b": -last.sum(), "c": other.sum(), "d": torch.tensor(1.0)}
    assert gradient_shares(losses, last) == pytest.approx({"a": 0.75, "b": 0.25, "c": 0.0, "d": 0.0})
    assert last.grad is None
    sum(losses.values()).backward()
    assert last.grad is not None
    assert last.grad.tolist() == [2.0] * 4
    assert gradient_shares({"c": other.sum()}, last) == {"c": 0.0}


def well(c: int = 8, **changes: Any) -> Health:
    """The health of a VAE that has nothing, with changes."""
    return Health(
        **{
            "n": 100,
            "shape": (c, 8, 8),
            "mean_variance": (0.9,) * c,
            "active": (True,) * c,
            "mean": (0.0,) * c,
            "std": (1.0,) * c,
            "skewness": (0.0,) * c,
            "kurtosis": (0.0,) * c,
            "gaussian_gap_bits": (0.0,) * c,
            "kl_bits": (1.7,) * c,
            "sigma": (0.3,) * c,
            "high_frequency": 0.9,
            "use_db": (3.0,) * c,
            "rms": 0.1,
            "patch_variances": (2.0,) * c,
            **changes,
        }
    )


def test_a_healthy_vae_has_no_alarm() -> None:
    assert words.alarms(well()) == words.notes(well()) == []


ILL: list[tuple[str, dict[str, Any], list[str]]] = [
    ("collapse", {"active": (True, True, *(False,) * 6), "kl_bits": (2.0, 2.0, *(0.01,) * 6)}, ["6 of 8", "loss.free_bits 0.25"]),
    ("dead", {"c": 16, "active": (*(True,) * 15, False)}, ["channel 15 of 16 is dead", "with 15 channels"]),
    ("constant", {"active": (False, *(True,) * 7), "kl_bits": None, "sigma": None}, ["channel 0", "optim.learning_rate"]),
    ("unused", {"use_db": (3.0, 0.005, -0.1, 0.02, *(3.0,) * 4)}, ["use channels 1, 2,", "0.01 dB"]),
    ("blur", {"high_frequency": 0.31}, ["blurred", "31%", "loss.structure", "adversarial.weight"]),
    ("std", {"std": (1.0, 27.0, *(1.0,) * 6)}, ["channel 1", "std 27", "loss.kl"]),
    ("kurtosis", {"kurtosis": (*(0.0,) * 7, 40.0)}, ["channel 7", "excess kurtosis 40"]),
    ("sigma", {"sigma": (0.3, 0.3, 5.0, *(0.3,) * 5)}, ["sigma explodes", "channel 2", "5"]),
]


@pytest.mark.parametrize(("changes", "expected"), [case[1:] for case in ILL], ids=[case[0] for case in ILL])
def test_each_illness_has_one_alarm_with_numbers_and_a_knob(changes: dict[str, Any], expected: list[str]) -> None:
    found = words.alarms(well(**changes))
    assert len(found) == 1
    assert all(part in found[0] for part in expected), found[0]
    keys = set(re.findall(r"(?:loss|optim)\.\w+", found[0]))
    known = {"kl", "schedule", "free_bits", "target_bits", "structure", "perceptual", "adversarial"}
    assert keys <= {f"loss.{name}" for name in known} | {"optim.learning_rate"}
    assert keys or "channels" in found[0]


def test_collapse_names_the_beta_of_the_linear_theory() -> None:
    ill = well(active=(True, True, *(False,) * 6))
    assert "lower beta (loss.kl) tenfold" in words.alarms(ill)[0]
    # l2 weight 0.125 is a decoder variance of 4; patches of variance 2 collapse at beta 0.5
    assert "from 4 to under 0.5," in words.alarms(ill, {"loss.kl": 4.0, "loss.l2": 0.125})[0]
    # a beta that theory finds harmless is not given back as advice
    assert "from 0.2 to under 0.02," in words.alarms(ill, {"loss.kl": 0.2, "loss.l2": 0.125})[0]


def test_the_threshold_counts_l1_as_the_slope_of_its_mean() -> None:
    found = words.linear_threshold(well(), {"loss.kl": 1.0, "loss.l1": 1.0})
    variance = torch.tensor(0.1**2, requires_grad=True)
    (2 * variance / math.pi).sqrt().backward()  # E|e| of a Gaussian error
    assert variance.grad is not None
    assert found == pytest.approx(2 * variance.grad.item() * 2.0)
    assert words.linear_threshold(well(patch_variances=None), {"loss.kl": 1.0, "loss.l2": 1.0}) is None
    assert words.linear_threshold(well(), {"loss.kl": 1.0}) is None


def test_a_point_posterior_is_a_note_with_the_beta_that_would_fill_the_space() -> None:
    points = well(sigma=(0.01,) * 8)
    assert words.alarms(points) == []
    assert "about 100-fold" in words.notes(points)[0]
    assert "from 1e-06 to about 0.0001" in words.notes(points, {"loss.kl": 1e-6})[0]
    assert words.notes(well(sigma=(0.01, 0.3, *(0.01,) * 6))) == []


def test_the_table_and_the_json_say_the_same() -> None:
    found = measure(VAEStage(half_collapsed()), [some_images(8)])
    table, data = str(found), json.loads(json.dumps(found.as_dict()))
    assert "2 of 4 channels active" in table
    assert table.count("inactive") == 2
    assert data["active"] == [False, False, True, True]
    assert f"{data['psnr_mode_db']:.3f} dB" in table
    assert data["kl_nats"] == pytest.approx([bits * LN2 for bits in data["kl_bits"]])


def test_the_verb_rings_for_a_collapsed_vae(tmp_path: Path, pictures: Path, capsys: Any) -> None:
    folder = tmp_path / "vae"
    save_vae(half_collapsed(), folder, {"loss": {"kl": 4.0, "l2": 1.0}})
    with pytest.raises(SystemExit) as stop:
        verb(str(folder), images=pictures, size=16)
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "ALARM: 2 of 4 channels are inactive" in printed
    assert "lower beta (loss.kl) from 4 to under" in printed
    with pytest.raises(SystemExit):
        verb(str(folder), images=pictures, size=16, most=5, json=True)
    data = json.loads(capsys.readouterr().out)
    assert data["n"] == 5
    assert data["size_px"] == 16
    assert any("2 of 4" in sentence for sentence in data["alarms"])


def test_the_verb_is_content_with_the_embedded_vae(pictures: Path, capsys: Any) -> None:
    verb("emoji", images=pictures, size=64, most=6)
    printed = capsys.readouterr().out
    assert "8 of 8 channels active" in printed
    assert "ALARM" not in printed


def test_the_verb_refuses_a_size_that_does_not_divide(vae_folder: Path, pictures: Path) -> None:
    with pytest.raises(UserError, match="multiple of 2"):
        verb(str(vae_folder), images=pictures, size=17)
