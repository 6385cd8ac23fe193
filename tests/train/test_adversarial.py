"""The adversarial losses against closed forms, and a critic that trains itself alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import some_images, tiny_vae
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from latentpipe import VAEStage
from latentpipe.train import checkpoint
from latentpipe.train.vae.adversarial import (
    Anchors,
    DiscriminatorTrainer,
    PatchDiscriminator,
    adaptive_weight,
    hinge_discriminator,
    hinge_generator,
    last_layer,
    lecam,
)
from latentpipe.utils.errors import UserError


def critic(seed: int = 0, **settings: Any) -> DiscriminatorTrainer:
    torch.manual_seed(seed)
    return DiscriminatorTrainer(**({"width": 8, "layers": 1, "learning_rate": 1e-2, "lecam_weight": 0.1} | settings))


def logits(seed: int, n: int = 4) -> torch.Tensor:
    return 2 * torch.randn(n, 1, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("layers", "side", "expected"), [(2, 64, 14), (3, 64, 6), (3, 256, 30), (1, 16, 6), (2, 12, 1)])
def test_a_logit_for_each_patch(layers: int, side: int, expected: int) -> None:
    assert PatchDiscriminator(8, layers)(some_images(2, side)).shape == (2, 1, expected, expected)


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch_alone_but_for_the_norms(layers: int, field: int) -> None:
    net = PatchDiscriminator(8, layers).double()
    parts = [part for part in net.net if not isinstance(part, torch.nn.GroupNorm)]
    images = some_images(1, 128).double().requires_grad_()
    out = torch.nn.Sequential(*parts)(images)
    out[0, 0, out.shape[2] // 2, out.shape[3] // 2].backward()
    assert images.grad is not None
    assert images.grad[0].abs().sum((0, 1)).count_nonzero() == field


def test_no_statistic_is_shared_between_pictures() -> None:
    net, images = PatchDiscriminator(8, 2), some_images(4, 32)
    assert torch.allclose(net(images), torch.cat([net(each) for each in images.split(1)]), atol=1e-6)


def test_what_a_discriminator_cannot_take_is_refused() -> None:
    with pytest.raises(UserError, match=r"12 pixels a side and more; given \(8, 8\)"):
        PatchDiscriminator(8, 2)(some_images(1, 8))
    for width, layers in ((12, 2), (0, 2), (8, 0)):
        with pytest.raises(UserError, match="multiple of 8"):
            PatchDiscriminator(width, layers)


def test_the_hinges_are_their_formulas() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_discriminator(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert hinge_generator(fake).item() == pytest.approx(2 / 3)
    assert lecam(real, fake, 0.5, -0.5).item() == pytest.approx(
        (2.5**2 + 1 + 0.5**2) / 3 + (3.5**2 + 0.5**2 + 0.5**2) / 3,
    )


TERMS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "hinge_discriminator": hinge_discriminator,
    "hinge_generator": lambda _, fake: hinge_generator(fake),
    "lecam": lambda real, fake: lecam(real, fake, 0.3, -0.7),
}


@pytest.mark.parametrize("name", TERMS)
def test_the_gradient_of_a_term_equals_finite_differences(name: str) -> None:
    assert torch.autograd.gradcheck(TERMS[name], (logits(1).requires_grad_(), logits(2).requires_grad_()))


@pytest.mark.parametrize("name", TERMS)
def test_two_half_batches_average_to_the_batch(name: str) -> None:
    real, fake = logits(1), logits(2)
    halves = [TERMS[name](*pair).item() for pair in zip(real.split(2), fake.split(2), strict=True)]
    assert TERMS[name](real, fake).item() == pytest.approx(sum(halves) / 2)
    assert halves[0] != pytest.approx(halves[1], rel=1e-3)


@given(st.floats(0, 0.999), st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), max_size=10))
def test_anchors_follow_their_moving_mean(decay: float, means: list[tuple[float, float]]) -> None:
    anchors, n = Anchors(decay), len(means)
    for real, fake in means:
        anchors.update(real, fake)
    shares = [(1 - decay) * decay ** (n - 1 - k) for k in range(n)]
    assert anchors.real == pytest.approx(sum(share * real for share, (real, _) in zip(shares, means, strict=True)), abs=1e-9)
    assert anchors.fake == pytest.approx(sum(share * fake for share, (_, fake) in zip(shares, means, strict=True)), abs=1e-9)


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_the_adaptive_weight_is_its_formula(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(3, 4, 3, 3, generator=generator) for _ in range(2))
    weight = adaptive_weight(first.requires_grad_(), size * second)
    expected = first.square().sum().sqrt() / ((size * second).square().sum().sqrt() + 1e-4)
    assert weight.item() == pytest.approx(min(expected.item(), 1e4), rel=1e-4)
    assert not weight.requires_grad


def test_the_adaptive_weight_is_bounded() -> None:
    one = torch.ones(2, 2, 3, 3)
    assert adaptive_weight(one, 0 * one) == 1e4
    assert adaptive_weight(one, 0 * one, most=5.0) == 5
    assert adaptive_weight(0 * one, one) == 0


def test_the_last_layer_of_each_kind_of_decoder() -> None:
    from diffusers import AutoencoderTiny, VQModel

    vae = tiny_vae()
    assert last_layer(vae) is vae.decoder.conv_out.weight
    quantized = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=2, num_vq_embeddings=4)
    assert last_layer(quantized) is quantized.decoder.conv_out.weight
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    assert last_layer(tiny) is tiny.decoder.layers[-1].weight
    assert last_layer(tiny).shape[0] == 3


def test_the_last_layer_is_one_that_trains() -> None:
    vae = tiny_vae()
    vae.decoder.conv_out.requires_grad_(False)
    found = last_layer(vae)
    assert found.requires_grad
    assert any(found is parameter for parameter in vae.decoder.parameters())
    vae.decoder.requires_grad_(False)
    with pytest.raises(UserError, match="fixed weight"):
        last_layer(vae)


def test_the_critics_step_leaves_the_vae_untouched() -> None:
    vae, images, its = tiny_vae(), some_images(), critic()
    rebuilt, _ = VAEStage(vae)(images)
    before, own = weights(vae), weights(its.net)
    its.update(images, rebuilt)
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert same(before, weights(vae))
    assert not any(torch.equal(own[name], value) for name, value in weights(its.net).items() if name.endswith("weight"))
    (rebuilt - images).square().mean().backward()  # the graph is still there
    assert all(parameter.grad is not None for parameter in vae.decoder.parameters())


def test_the_generators_term_trains_the_vae_and_leaves_the_critic_untouched() -> None:
    vae, images, its = tiny_vae(), some_images(), critic()
    rebuilt, _ = VAEStage(vae)(images)
    own = weights(its.net)
    term = its.generator_term(rebuilt)
    assert term.item() == pytest.approx(hinge_generator(its.net(rebuilt)).item(), rel=1e-5)
    term.backward()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in its.net.parameters())
    assert same(own, weights(its.net))
    for part in (vae.encoder, vae.decoder):
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in part.parameters())


def test_the_generators_term_equals_finite_differences() -> None:
    its = critic()
    its.net.double()
    net = its.net
    rebuilt = some_images(1, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: hinge_generator(net(values)), rebuilt)
    exact = torch.autograd.grad(hinge_generator(net(rebuilt)), rebuilt)[0]
    its.net.float()
    rebuilt = rebuilt.detach().float().requires_grad_()
    its.generator_term(rebuilt).backward()
    assert rebuilt.grad is not None
    assert torch.allclose(rebuilt.grad.double(), exact, atol=1e-4 * exact.abs().max().item())


@pytest.mark.parametrize(("anchor", "long"), [(20.0, True), (0.0, False)])  # a far anchor makes the gradient long
def test_a_step_is_the_plain_step_with_a_long_gradient_clipped(anchor: float, long: bool) -> None:
    its, images, rebuilt = critic(), some_images(4, seed=1), some_images(4, seed=2)
    its.anchors.real, its.anchors.fake = anchor, -anchor
    other = critic()
    real, fake = other.net(images), other.net(rebuilt)
    loss = hinge_discriminator(real, fake) + 0.1 * lecam(real, fake, anchor, -anchor)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(other.net.parameters(), 1.0).item()
    assert (norm > 1) == long
    other.optimizer.step()
    logged = its.update(images, rebuilt)
    for name, value in weights(its.net).items():
        assert torch.allclose(value, other.net.state_dict()[name], atol=1e-5), name
    # The first step of Adam forgets the gradient's length; its moment does not: 1 - 0.5 of the gradient.
    moments = [state["exp_avg"].flatten() for state in its.optimizer.state.values()]
    assert torch.cat(moments).norm().item() == pytest.approx(0.5 * min(norm, 1.0), rel=1e-4)
    assert logged["critic"] == pytest.approx(loss.item(), rel=1e-4)
    assert logged["critic_real"] == pytest.approx(real.mean().item(), abs=1e-5)
    assert logged["critic_fake"] == pytest.approx(fake.mean().item(), abs=1e-5)
    assert its.anchors.real == pytest.approx(0.99 * anchor + 0.01 * logged["critic_real"])
    assert its.anchors.fake == pytest.approx(-0.99 * anchor + 0.01 * logged["critic_fake"])


def test_it_learns_to_tell_blurred_from_sharp() -> None:
    its, images = critic(layers=2, lecam_weight=0.0), some_images(8, 32)
    blurred = functional.avg_pool2d(images, 3, 1, 1)
    for _ in range(40):
        logged = its.update(images, blurred)
    assert logged["critic_real"] > 0.8
    assert logged["critic_fake"] < -0.8
    assert its.generator_term(blurred) > its.generator_term(images)


def steps(its: DiscriminatorTrainer, first: int, last: int) -> None:
    for step in range(first, last):
        its.update(some_images(2, seed=step), some_images(2, seed=1000 + step))


def test_resuming_is_exact_to_the_bit(tmp_path: Any) -> None:
    whole, half = critic(), critic()
    steps(whole, 0, 6)
    steps(half, 0, 3)
    checkpoint.save(tmp_path, 3, {**half.tensors(), "model.weight": torch.ones(2)}, {})
    stored = checkpoint.newest(tmp_path)
    assert stored is not None
    resumed = critic(seed=9)
    resumed.restore(stored[0])
    steps(resumed, 3, 6)
    assert same(resumed.tensors(), whole.tensors())
    assert resumed.anchors.real == whole.anchors.real != 0
    assert {name for name in whole.tensors() if "optimizer" in name} >= {"critic.optimizer.0.step", "critic.optimizer.0.exp_avg"}


def test_rolling_back_twice_to_one_state_in_memory() -> None:
    its = critic()
    steps(its, 0, 2)
    kept = its.tensors()
    steps(its, 2, 4)
    after = its.tensors()
    for _ in range(2):
        its.restore(kept)
        steps(its, 2, 4)
        assert same(its.tensors(), after)


def test_a_critic_that_took_no_step_can_be_stored() -> None:
    first, second = critic(), critic(seed=1)
    second.restore(first.tensors())
    assert same(first.tensors(), second.tensors())


def test_two_processes_with_half_a_batch_each_are_one() -> None:
    images, rebuilt = some_images(4, seed=1), some_images(4, seed=2)
    one = critic()
    one.anchors.real = 0.5
    seen: list[list[torch.Tensor]] = []
    for half in (slice(0, 2), slice(2, 4)):  # each rank alone: what it would send
        rank = critic()
        rank.anchors.real, sent = 0.5, []
        rank.update(images[half], rebuilt[half], mean=lambda values, sent=sent: sent.append(values.clone()) or values)
        seen.append(sent)
    averages = iter([torch.stack(pair).mean(0) for pair in zip(*seen, strict=True)])
    rank = critic()
    rank.anchors.real = 0.5
    logged = rank.update(images[:2], rebuilt[:2], mean=lambda values: next(averages))
    expected = one.update(images, rebuilt)
    assert logged == pytest.approx(expected, abs=1e-5)
    assert rank.anchors.fake == pytest.approx(one.anchors.fake, abs=1e-7)
    for name, value in weights(rank.net).items():
        assert torch.allclose(value, one.net.state_dict()[name], atol=2e-4), name
    assert next(averages, None) is None


def test_a_gradient_that_is_not_finite_takes_no_step() -> None:
    its = critic()
    steps(its, 0, 1)
    before = its.tensors()
    assert its.update(some_images(2), torch.full((2, 3, 16, 16), torch.nan))["critic"] != 0
    assert same(its.tensors(), before)
