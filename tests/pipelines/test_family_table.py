"""Five host families in depth, all their tasks: what we decode and encode equals what diffusers does.

`test_every_family.py` holds all families.
"""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny_hosts
import torch
from helpers import some_images, tiny_vae
from tiny_hosts import BUILDERS, SIDE, call

from latentpipe import LatentSpace, UserError, VAEStage, swap_vae
from latentpipe.pipelines import families, hosting
from latentpipe.utils.io import content_hash

pytestmark = pytest.mark.numeric

TASKS = [
    (name, task)
    for name in BUILDERS
    for task in ("text", "image", "inpaint")
    if getattr(families.family_of(BUILDERS[name]()), task)
]
EXACT = {"sd15", "sd3", "flux", "sana", "sprint"}  # SDXL with statistics rounds in another order


def host_pipe(name: str, task: str) -> Any:
    """The pipeline of a family for a task, built by diffusers' own class from the family's components."""
    pipe = BUILDERS[name]()
    cls = getattr(diffusers, getattr(families.family_of(pipe), task))
    return pipe if task == "text" else tiny_hosts.quiet(hosting.rebuild(pipe, cls))


def arguments(name: str, task: str) -> dict[str, Any]:
    """A call of that task."""
    more: dict[str, Any] = {}
    if task != "text":
        side = 64 if name == "sprint" else SIDE
        more["image"] = some_images(1, side)[:, :, :, :] * 0.5 + 0.5
        more["strength"] = 0.9
        if name in ("flux", "sd3"):
            more |= {"height": side, "width": side}
    if task == "inpaint":
        more["mask_image"] = torch.zeros(1, 1, SIDE, SIDE)
        more["mask_image"][..., : SIDE // 2] = 1.0
    return call(name, **more)


def own(pipe: Any, **arguments: Any) -> torch.Tensor:
    """The host's own picture, in [0, 1]."""
    return pipe(**arguments, output_type="pt").images


def unit(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1], in the order in which a host's postprocessing computes it."""
    return (images * 0.5 + 0.5).clamp(0, 1)


def sound_pipe(name: str, task: str) -> Any:
    """As `host_pipe`, with a VAE that keeps clear of the two faults of diffusers 0.42 that have tests of their own."""
    pipe = host_pipe(name, task)
    if (name, task) == ("sd3", "inpaint"):
        pipe.vae.register_to_config(shift_factor=0.0)
    if (name, task) == ("sdxl", "inpaint"):
        pipe.vae.register_to_config(latents_mean=None, latents_std=None)
    return pipe


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_our_pictures_equal_the_hosts(name: str, task: str) -> None:
    """The oracle: bit for bit, but for the two faults of diffusers 0.42 that have tests of their own."""
    pipe = sound_pipe(name, task)
    expected = own(pipe, **arguments(name, task))
    ours = unit(hosting.draw(pipe, **arguments(name, task)))
    error = (ours - expected).abs().max().item()
    assert error == 0 if name in EXACT else error <= 1e-6, error
    assert expected.std() > 0.01


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_hosted_pipelines_make_the_same_pictures_by_themselves(name: str, task: str) -> None:
    pipe = sound_pipe(name, task)
    expected = own(pipe, **arguments(name, task))
    ours = own(hosting.hosted(pipe), **arguments(name, task))
    assert (ours - expected).abs().max() <= 1e-6


def test_sd3_inpaint_decodes_without_the_shift() -> None:
    """A fault of diffusers 0.42: its picture is the decoding of the same latents less the shift."""
    pipe = host_pipe("sd3", "inpaint")
    latents = hosting.hosted(pipe)(**arguments("sd3", "inpaint"), output_type="latent").images
    theirs = own(pipe, **arguments("sd3", "inpaint"))
    with torch.no_grad():
        without = unit(pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0])
        ours = unit(hosting.draw(pipe, **arguments("sd3", "inpaint")))
        assert (theirs - without).abs().max() <= 1e-6
        assert (theirs - ours).abs().max() > 1e-4
        assert torch.equal(ours, unit(VAEStage(pipe.vae).decode(latents)))


def test_sdxl_inpaint_encodes_without_the_statistics() -> None:
    """A fault of diffusers 0.42: at full strength of the mask's outside it keeps latents of another space."""
    pipe = host_pipe("sdxl", "inpaint")
    given = arguments("sdxl", "inpaint")
    theirs = pipe(**given, output_type="latent").images
    ours = hosting.hosted(pipe)(**arguments("sdxl", "inpaint"), output_type="latent").images
    kept = slice(SIDE // 8 // 2, None)  # columns that the mask leaves alone: the picture's own latents
    raw = VAEStage(pipe.vae).space.denormalize(ours[..., kept])
    missing = raw * pipe.vae.config.scaling_factor
    assert (theirs[..., kept] - missing).abs().max() <= 1e-5
    assert (theirs[..., kept] - ours[..., kept]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_a_swap_mends_the_inpainting_that_a_host_gets_wrong(name: str) -> None:
    """The VAE goes in behind the facade there, and in plain sight where the host's own code is right."""
    pipe = host_pipe(name, "inpaint")
    new = swap_vae(pipe, pipe.vae, force=True)
    assert isinstance(new.vae, families.VAEFacade)
    assert not isinstance(swap_vae(BUILDERS[name](), pipe.vae, force=True).vae, families.VAEFacade)
    ours = unit(hosting.draw(pipe, **arguments(name, "inpaint")))
    assert (own(new, **arguments(name, "inpaint")) - ours).abs().max() <= 1e-6
    assert (own(pipe, **arguments(name, "inpaint")) - ours).abs().max() > 1e-4


def test_sana_resizes_after_decoding() -> None:
    pipe = BUILDERS["sana"]()
    given = {"use_resolution_binning": True, "height": 64, "width": 96, "num_inference_steps": 1}
    pipe.transformer.register_to_config(sample_size=16)
    expected = own(pipe, **call("sana", **given))
    ours = unit(hosting.draw(pipe, **call("sana", **given)))
    assert ours.shape[-2:] == (64, 96)
    assert (ours - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("name", BUILDERS)
def test_what_was_lent_is_as_before(name: str) -> None:
    pipe = BUILDERS[name]()
    parts = {key: part for key, part in pipe.components.items() if part is not None}
    weights = {key: content_hash(part.state_dict()) for key, part in parts.items() if hasattr(part, "state_dict")}
    configs = {key: dict(part.config) for key, part in parts.items()}
    flags = dict(pipe.config)
    hosting.draw(pipe, **call(name))
    assert {key: part for key, part in pipe.components.items() if part is not None} == parts
    assert {key: content_hash(part.state_dict()) for key, part in parts.items() if hasattr(part, "state_dict")} == weights
    assert {key: dict(part.config) for key, part in parts.items()} == configs
    assert dict(pipe.config) == flags


def test_a_rebuilt_pipeline_derives_its_values_from_the_new_vae() -> None:
    pipe = BUILDERS["sd15"]()
    assert pipe.vae_scale_factor == 8
    new = hosting.rebuild(pipe, vae=tiny_vae())
    assert new.vae_scale_factor == 2
    assert new.image_processor.config.vae_scale_factor == 2
    assert pipe.vae_scale_factor == 8
    assert new.config.requires_safety_checker == pipe.config.requires_safety_checker


@pytest.mark.parametrize(("name", "expected"), {"sd15": (4, 8), "sd3": (16, 8), "flux": (16, 8), "sana": (32, 32)}.items())
def test_what_a_denoiser_takes(name: str, expected: tuple[int, int]) -> None:
    assert families.expected_latents(BUILDERS[name]()) == expected


def test_an_inpainting_unet_takes_the_channels_of_its_output() -> None:
    pipe = BUILDERS["sd15"]()
    pipe.unet.register_to_config(in_channels=9)
    assert families.expected_latents(pipe) == (4, 8)


def test_an_unknown_class_is_taken_for_what_its_latents_are() -> None:
    class Renamed(diffusers.StableDiffusionPipeline):
        pass

    pipe = hosting.rebuild(BUILDERS["sd15"](), Renamed)
    assert torch.equal(hosting.draw(pipe, **call("sd15")), hosting.draw(BUILDERS["sd15"](), **call("sd15")))

    class Packed(diffusers.FluxPipeline):
        pass

    packed = hosting.rebuild(BUILDERS["flux"](), Packed)
    assert torch.equal(hosting.draw(packed, **call("flux")), hosting.draw(BUILDERS["flux"](), **call("flux")))

    with pytest.raises(UserError, match=r"Packed returns latents of shape .*FAMILIES.*FLUX\.1"):
        hosting.unpack(packed, torch.zeros(1, 3, 4, 4))


def test_a_pipeline_without_a_vae_is_refused() -> None:
    blocks = {"block_out_channels": (8, 8), "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(sample_size=8, norm_num_groups=2, attention_head_dim=4, **blocks)
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    with pytest.raises(UserError, match="DDPMPipeline has no VAE; expected a diffusers pipeline of Stable Diffusion 1/2, "):
        families.family_of(pipe)


@pytest.mark.parametrize(
    ("name", "space", "reason"),
    [
        ("sd15", LatentSpace(4, 8, (0.2,) * 4, (0.0,) * 4), ""),
        ("sd15", LatentSpace(4, 8, (0.2,) * 4, (0.1,) * 4), "ignores the shift of 0.1"),
        ("sd15", LatentSpace(4, 8, (0.2, 0.3, 0.2, 0.2), (0.0,) * 4), "one factor for all channels"),
        ("sdxl", LatentSpace(4, 8, (0.2, 0.3, 0.2, 0.2), (0.1,) * 4), ""),
        ("sd3", LatentSpace(16, 8, (0.2,) * 16, (0.1,) * 16), ""),
        ("flux", LatentSpace(16, 8, (0.2,) * 15 + (0.3,), (0.1,) * 16), "one factor for all channels"),
        ("sana", LatentSpace(16, 8, (0.2,) * 16, (0.0,) * 16), "cannot read the outputs of AutoencoderKL"),
    ],
)
def test_which_factors_a_host_honours(name: str, space: LatentSpace, reason: str) -> None:
    said = families.honours(families.family_of(BUILDERS[name]()), space, kl := tiny_hosts.kl(4))
    assert type(kl).__name__ == "AutoencoderKL"
    assert said == "" if not reason else reason in said
