"""Verdicts: planted faults are each named, sound swaps raise no alarm, and nothing lent is changed."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_hosts
import torch
from helpers import grey_levels, some_images, tiny_vae

from latentpipe import LatentPipeline, LatentSpace, UserError, VAEStage, check_swap, swap_vae
from latentpipe.checkpoints.pipeline_io import load_pipeline
from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import load_vae, save_vae
from latentpipe.pipelines import families, hosting
from latentpipe.utils.io import content_hash
from latentpipe.vae.probe_images import probe_images
from latentpipe.vae.stage import fold_normalization

GAINS = (2.5, 0.8, 1.7, 0.5, 1.3, 3.0, 0.6, 1.1)
SHIFTS = (0.3, -0.8, 0.5, 1.0, -0.2, 0.7, -0.4, 0.1)


@pytest.fixture(scope="module")
def emoji() -> Any:
    """The embedded model as a diffusers pipeline; tests leave it as it is."""
    return load_pipeline(find_model("emoji"))


@pytest.fixture(scope="module")
def probes() -> torch.Tensor:
    return probe_images(8, 64)


def embedded() -> Any:
    return load_vae(find_model("emoji", "vae"))


def raw_of(factor: float, shift: float, **declared: Any) -> Any:
    """The embedded VAE whose raw values are ``factor * latents + shift``, with a config that declares `declared`."""
    vae = embedded()
    fold_normalization(vae, LatentSpace(8, 4, (factor,) * 8, (-shift / factor,) * 8))
    vae.register_to_config(**declared)
    return vae


def statistics_vae(twice: bool = False) -> Any:
    """The embedded VAE with raw values of another mean and std in each channel, declared; `twice`: folded in besides."""
    vae = embedded()
    if not twice:
        fold_normalization(vae, LatentSpace(8, 4, GAINS, tuple(-b / a for a, b in zip(GAINS, SHIFTS, strict=True))))
    vae.register_to_config(scaling_factor=1.0, latents_mean=list(SHIFTS), latents_std=list(GAINS))
    return vae


def _noise(vae: Any, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Standard normal of the latents' shape."""
    return torch.randn(VAEStage(vae).space.shape(len(images), *images.shape[-2:]), generator=generator)


def tuned(parts: tuple[str, ...], steps: int, rate: float) -> Any:
    """The embedded VAE after some steps of training of the named parts."""
    vae = embedded().train()
    chosen = [tensor for name, tensor in vae.named_parameters() if name.startswith(parts)]
    optimizer = torch.optim.Adam(chosen, rate)
    images = probe_images(12, 32, seed=9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rebuilt, _ = VAEStage(vae)(images, noise=_noise(vae, images, generator))
        loss = (rebuilt - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return vae.eval()


def unit_range() -> Any:
    """The embedded VAE for images in [0, 1]: ``x -> 2x - 1`` in front (away from the edges) and ``(y + 1) / 2`` behind."""
    vae = embedded()
    with torch.no_grad():
        first, last = vae.encoder.conv_in, vae.decoder.conv_out
        first.bias -= first.weight.sum((1, 2, 3))
        first.weight *= 2
        last.weight /= 2
        last.bias += 1
        last.bias /= 2
    return vae


def permuted() -> Any:
    """The embedded VAE with its latent channels in another order, encoder and decoder alike."""
    vae, order = embedded(), [3, 0, 2, 1, 7, 5, 4, 6]
    with torch.no_grad():
        both = order + [8 + channel for channel in order]
        vae.quant_conv.weight.copy_(vae.quant_conv.weight[both].clone())
        vae.quant_conv.bias.copy_(vae.quant_conv.bias[both].clone())
        vae.post_quant_conv.weight.copy_(vae.post_quant_conv.weight[:, order].clone())
    return vae


def random_weights() -> Any:
    torch.manual_seed(0)
    return type(embedded()).from_config(embedded().config).eval()


FAULTS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "scale off by 1.4": (lambda: raw_of(2.5, 0, scaling_factor=0.4 * 1.4), "broken", r"1\.4 times as large .* should be 0\.4"),
    "scale off by 1/1.4": (
        lambda: raw_of(2.5, 0, scaling_factor=0.4 / 1.4),
        "broken",
        r"0\.714 times as large .* should be 0\.4",
    ),
    "shift dropped": (lambda: raw_of(2.5, 0.3, scaling_factor=0.4), "broken", r"a shift of 0\.3 .*missing"),
    "a shift as small as FLUX's": (lambda: raw_of(2.77, 0.1159, scaling_factor=0.3611), "broken", r"a shift of 0\.11.* missing"),
    "mean and std twice": (lambda: statistics_vae(twice=True), "broken", "applied twice"),
    "[0, 1]": (unit_range, "broken", r"images in \[0, 1\] instead of \[-1, 1\]"),
    "channels permuted": (permuted, "same shape, other space", r"another order: \[3, 0, 2, 1, 7, 5, 4, 6\]"),
    "all tuned away": (lambda: tuned(("",), 25, 2e-3), "same shape, other space", "encoder has moved away"),
    "random weights": (random_weights, "broken", "does not rebuild pictures"),
    "another mean and std": (
        lambda: raw_of(2.5, 0.3, latents_mean=[0.0] * 8, latents_std=list(GAINS)),
        "broken",
        "normalization is not what the weights do",
    ),
    "other channels": (lambda: tiny_vae(), "other shape", "4-channel latents at 1/2 size; this denoiser takes 8 channels at 1/4"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.slow
def test_planted_faults_are_named(fault: str, emoji: Any, probes: torch.Tensor) -> None:
    build, outcome, reason = FAULTS[fault]
    vae = build()
    verdict = check_swap(emoji, vae, probes)
    assert verdict.outcome == outcome, verdict
    assert not verdict.fits
    assert re.search(reason, verdict.reason), verdict
    assert verdict.next_step
    with pytest.raises(UserError) as error:
        swap_vae(emoji, vae, images=probes)
    assert str(error.value) == str(verdict)


SOUND: dict[str, Callable[[], Any]] = {
    "the same": embedded,
    "fp16": lambda: torch.nn.Module.half(embedded()),
    "bf16": lambda: torch.nn.Module.bfloat16(embedded()),
    "stored in bf16": lambda: torch.nn.Module.float(torch.nn.Module.bfloat16(embedded())),
    "decoder tuned": lambda: tuned(("decoder", "post_quant"), 4, 3e-4),
    "decoder tuned at its end": lambda: tuned(("decoder.conv_out", "decoder.conv_norm_out"), 20, 1e-3),
    "scale declared": lambda: raw_of(2.5, 0, scaling_factor=0.4),
    "scale and shift declared": lambda: raw_of(2.5, 0.3, scaling_factor=0.4, shift_factor=0.3),
    "mean and std declared": statistics_vae,
    "no posterior": lambda: NoPosterior(),
}


class NoPosterior(torch.nn.Module):
    """The embedded VAE as an autoencoder that returns `latents`, as AutoencoderTiny does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = embedded()
        self.config, self.decoder = self.inner.config, self.inner.decoder

    def encode(self, images: torch.Tensor) -> Any:
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput

        return AutoencoderTinyOutput(latents=self.inner.encode(images).latent_dist.mode())

    def decode(self, raw: torch.Tensor, return_dict: bool = True) -> Any:
        return self.inner.decode(raw, return_dict)


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.slow
def test_sound_swaps_raise_no_alarm(name: str, emoji: Any, probes: torch.Tensor) -> None:
    verdict = check_swap(emoji, SOUND[name](), probes)
    assert verdict.outcome == "same space", verdict
    assert verdict.fits


@pytest.mark.slow
def test_other_probes_hosts_and_files_raise_no_alarm(emoji: Any, probes: torch.Tensor, tmp_path: Path) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    vae = raw_of(2.5, 0.3, scaling_factor=0.4, shift_factor=0.3)
    assert check_swap(emoji, vae, probe_images(8, 64, seed=1)).fits
    assert check_swap(emoji, vae, probe_images(4, 128, seed=2)).fits
    assert check_swap(emoji, vae, torch.stack([image.roll(9, -1) for image in probes])).fits
    for cls in (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline):
        assert check_swap(hosting.rebuild(emoji, cls), vae, probes).fits
    assert check_swap(LatentPipeline(emoji), vae, probes).fits
    assert check_swap(hosting.hosted(emoji), vae, probes).fits
    save_vae(vae, tmp_path / "copy", {})
    assert check_swap(emoji, tmp_path / "copy", probes).fits
    assert check_swap(hosting.rebuild(emoji, vae=vae), embedded(), probes).fits  # the other way round


def test_a_decoder_fits_without_its_encoder(emoji: Any, probes: torch.Tensor) -> None:
    """Pictures from prompts are the VAE's own; what begins from a picture is encoded by the host's."""
    vae = tuned(("encoder", "quant"), 25, 2e-3)
    verdict = check_swap(emoji, vae, probes)
    assert verdict.outcome == "decoder fits", verdict
    assert verdict.fits
    assert not verdict.encodes
    assert "pictures to begin from are encoded by the host's own VAE" in verdict.reason
    swapped = swap_vae(LatentPipeline(emoji), vae, images=probes)
    with torch.no_grad():
        assert torch.equal(swapped.stage.encode(probes), VAEStage(emoji.vae).encode(probes))
        latents = swapped.stage.encode(probes)
        assert torch.equal(swapped.stage.decode(latents), VAEStage(vae).decode(latents))
    call = {"prompt": "red apple", "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
    drawn = swap_vae(emoji, vae, images=probes)(**call, generator=torch.Generator().manual_seed(7)).images
    plain = emoji(**call, generator=torch.Generator().manual_seed(7)).images
    assert torch.equal(drawn, plain)  # the same decoder


def test_a_reduced_decoder_is_told_by_its_decibels(emoji: Any, probes: torch.Tensor) -> None:
    verdict = check_swap(emoji, embedded(), probes)
    assert verdict.evidence is not None
    assert verdict.evidence.host == verdict.evidence.vae == verdict.evidence.vae_of_host
    text = str(verdict)
    assert "this VAE decodes the host's latents" in text
    assert "8 pictures given, 64 px" in text
    json.dumps(verdict.as_dict())


def damaged(share: float) -> Any:
    """The embedded VAE with noise on its decoder's weights, as a share of their standard deviation."""
    vae, random = embedded(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in vae.decoder.parameters():
            if weight.ndim > 1:
                weight += torch.randn(weight.shape, generator=random) * weight.std() * share
    return vae


def test_a_damaged_decoder_behind_a_sound_encoder_is_broken(emoji: Any, probes: torch.Tensor) -> None:
    verdict = check_swap(emoji, damaged(1.0), probes)
    assert verdict.outcome == "broken"
    assert "its decoder is damaged, or another VAE's" in verdict.reason
    slight = check_swap(emoji, damaged(0.5), probes)
    assert slight.fits
    assert "worse than the host's own" in slight.reason


def test_an_encoder_near_the_hosts_is_not_taken_for_a_wrong_scale(emoji: Any, probes: torch.Tensor) -> None:
    vae, random = embedded(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in vae.encoder.parameters():
            if weight.ndim > 1:
                weight += torch.randn(weight.shape, generator=random) * weight.std() * 0.8
    verdict = check_swap(emoji, vae, probes)
    assert verdict.outcome == "decoder fits"
    assert not verdict.encodes
    assert "scale" not in verdict.reason


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (some_images(3, 64), "3 are too few to tell two VAEs apart; give at least 4"),
        (some_images(4, 64)[0], r"shape \(3, 64, 64\); expected a float tensor, B 3 H W"),
        ((some_images(4, 64) * 127 + 127).byte(), r"torch\.uint8"),
        (some_images(4, 64) * 255, r"expected \[-1, 1\]"),
        ([1, 2], "given list"),
    ],
)
def test_images_that_cannot_be_measured_on_are_refused(emoji: Any, images: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_swap(emoji, embedded(), images)


def test_what_is_no_vae_is_refused(emoji: Any) -> None:
    with pytest.raises(UserError, match="int is no VAE"):
        check_swap(emoji, 3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="of type str, has no VAE"):
        check_swap("emoji", "emoji")


def test_a_facade_is_never_saved_halfway(tmp_path: Path) -> None:
    pipe = tiny_hosts.sd15()
    vae = tiny_hosts.kl(4, seed=3)
    vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    with pytest.raises(UserError, match="swap --out"):
        swap_vae(pipe, vae, force=True).save_pretrained(tmp_path / "x")


def test_weights_that_are_not_finite_are_broken(emoji: Any, probes: torch.Tensor) -> None:
    vae = embedded()
    with torch.no_grad():
        vae.encoder.conv_in.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        check_swap(emoji, vae, probes)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "sana"])
def test_swapping_in_the_same_vae_changes_nothing(name: str) -> None:
    pipe = tiny_hosts.BUILDERS[name]()
    before = {key: content_hash(part.state_dict()) for key, part in pipe.components.items() if hasattr(part, "state_dict")}
    configs = {key: dict(part.config) for key, part in pipe.components.items() if part is not None}
    images = some_images(4, 64)
    verdict = check_swap(pipe, pipe.vae, images)
    assert verdict.fits
    assert "does not rebuild these pictures" in verdict.reason  # random weights, in both
    new = swap_vae(pipe, pipe.vae, images=images)
    assert type(new) is type(pipe)
    assert new is not pipe
    expected = pipe(**tiny_hosts.call(name), output_type="pt").images
    assert torch.equal(new(**tiny_hosts.call(name), output_type="pt").images, expected)
    assert {
        key: content_hash(part.state_dict()) for key, part in pipe.components.items() if hasattr(part, "state_dict")
    } == before
    assert {key: dict(part.config) for key, part in pipe.components.items() if part is not None} == configs


@pytest.mark.parametrize(
    ("name", "declared", "plain"),
    [
        ("sd15", {"scaling_factor": 0.3}, True),
        ("sd15", {"scaling_factor": 0.3, "shift_factor": 0.2}, False),
        ("sd15", {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 1.5, 2.0, 0.5]}, False),
        ("sd15", {"latents_mean": [0.0] * 4, "latents_std": [2.0] * 4}, True),
        ("sdxl", {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 1.5, 2.0, 0.5]}, True),
        ("sdxl", {"scaling_factor": 0.3, "shift_factor": 0.2}, True),
        ("sdxl", {"scaling_factor": 0.3}, True),
        ("sd3", {"scaling_factor": 0.3, "shift_factor": None}, True),
        ("flux", {"scaling_factor": 0.3, "shift_factor": 0.2}, True),
        ("flux", {"latents_mean": [0.1] * 16, "latents_std": [float(i + 1) for i in range(16)]}, False),
    ],
)
def test_a_swapped_pipeline_decodes_as_the_stage_does(name: str, declared: dict[str, Any], plain: bool) -> None:
    """Whatever the host's own code honours, the picture is that of the VAE's own normalization."""
    pipe = tiny_hosts.BUILDERS[name]()
    vae = tiny_hosts.kl(pipe.vae.config.latent_channels, seed=3)
    vae.register_to_config(**declared)
    config = dict(vae.config)
    new = swap_vae(pipe, vae, force=True)
    assert isinstance(new.vae, families.VAEFacade) != plain
    latents = hosting.unpack(pipe, pipe(**tiny_hosts.call(name), output_type="latent").images, tiny_hosts.SIDE, tiny_hosts.SIDE)
    with torch.no_grad():
        wanted = (VAEStage(vae).decode(latents) * 0.5 + 0.5).clamp(0, 1)
    assert (new(**tiny_hosts.call(name), output_type="pt").images - wanted).abs().max() <= 1e-5
    assert dict(vae.config) == config


def test_force_swaps_what_the_shape_allows_and_no_more(emoji: Any, probes: torch.Tensor) -> None:
    vae = permuted()
    new = swap_vae(emoji, vae, force=True)
    assert new.vae is vae
    assert emoji.vae is not vae
    with pytest.raises(UserError, match="Not even force"):
        swap_vae(emoji, tiny_vae(), force=True)


def test_a_latent_pipeline_swaps_its_stage(emoji: Any, probes: torch.Tensor) -> None:
    pipe = LatentPipeline(emoji, hashes={"vae": "old", "unet": "u"})
    new = swap_vae(pipe, raw_of(2.5, 0.3, scaling_factor=0.4, shift_factor=0.3), images=probes)
    assert new.host is pipe.host
    assert new.hashes["unet"] == "u"
    assert new.hashes["vae"] != "old" == pipe.hashes["vae"]
    assert (new.vae_name, pipe.vae_name) == ("(given)", None)
    old, other = (p("red apple", seed=3, num_inference_steps=2)[0].image for p in (pipe, new))
    assert grey_levels(old, other) <= 2


def test_a_pipeline_that_does_not_fit_itself_is_refused(emoji: Any) -> None:
    pipe = hosting.rebuild(emoji, vae=tiny_vae())
    with pytest.raises(UserError, match="does not fit itself: its VAE makes 4-channel"):
        check_swap(pipe, embedded())


def test_a_vae_without_factors_is_asked_for(emoji: Any) -> None:
    vae = copy.deepcopy(tiny_vae())
    vae.register_to_config(scaling_factor=None)
    with pytest.raises(UserError, match=r"AutoencoderKL: .*scaling_factor"):
        check_swap(emoji, vae)
