"""A stage in the place of a pipeline's VAE: the pipeline draws what stock diffusers draws, and its switches and hooks work."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import tiny_hosts
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from helpers import some_images
from test_family_table import arguments, host_pipe, own, sound_pipe, unit
from tiny_hosts import BUILDERS, SIDE, call

from latentpipe import LatentPipeline, LatentSpace, UserError, VAEStage, check_swap, swap_vae
from latentpipe.pipelines import families, hosting
from latentpipe.pipelines.facade import Facade, VAEFacade

STATISTICS = {"latents_mean": [0.3, -0.2, 0.1, 0.4], "latents_std": [1.2, 0.8, 1.1, 0.9]}


def instructed(vae: Any = None) -> Any:
    """InstructPix2Pix: its UNet takes the picture's latents beside the noise."""
    pipe = BUILDERS["sd15"](vae)
    wide = tiny_hosts.unet(4, 8)
    wide.conv_in = torch.nn.Conv2d(8, 8, 3, padding=1)
    wide.register_to_config(in_channels=8)
    cls = diffusers.StableDiffusionInstructPix2PixPipeline
    return tiny_hosts.quiet(hosting.rebuild(pipe, cls, unet=wide))


def edit(n: int = 1) -> dict[str, Any]:
    """A call of InstructPix2Pix."""
    given = call("sd15", image=some_images(1, SIDE) * 0.5 + 0.5)
    return given | {"guidance_scale": 5.0, "image_guidance_scale": 1.5, "negative_prompt_embeds": given["prompt_embeds"] * 0}


def asymmetric() -> Any:
    """An autoencoder whose decoder takes the picture and its mask."""
    torch.manual_seed(0)
    widths = (8, 8, 8, 8)
    return diffusers.AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        down_block_out_channels=widths,
        up_block_out_channels=widths,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.18215,
    ).eval()


def test_a_pipeline_that_takes_raw_values_draws_what_stock_draws() -> None:
    pipe = instructed()
    expected = own(pipe, **edit())
    assert torch.equal(own(hosting.hosted(pipe), **edit()), expected)
    assert torch.equal(unit(hosting.draw(pipe, **edit())), expected)
    other = tiny_hosts.kl(4, seed=3, scaling_factor=0.3)
    assert torch.equal(own(hosting.hosted(pipe, VAEStage(other)), **edit()), own(instructed(other), **edit()))


def test_a_pipeline_that_takes_raw_values_refuses_what_it_would_misread() -> None:
    other = tiny_hosts.kl(4, seed=3, scaling_factor=1.0, **STATISTICS)
    for placed in (lambda: hosting.hosted(instructed(), VAEStage(other)), lambda: swap_vae(instructed(), other, force=True)):
        with pytest.raises(UserError, match=r"raw values of the picture, without the factor .* its own VAE declares"):
            placed()


def test_a_decoder_that_takes_the_picture_and_its_mask_gets_them() -> None:
    pipe = hosting.rebuild(BUILDERS["sd15"](asymmetric()), diffusers.StableDiffusionInpaintPipeline)
    given = arguments("sd15", "inpaint") | {"image": some_images(1, SIDE) * 0.5 + 0.5}
    expected = own(pipe, **given)
    new = hosting.hosted(pipe)
    assert isinstance(new.vae, diffusers.AsymmetricAutoencoderKL)
    again = arguments("sd15", "inpaint") | {"image": some_images(1, SIDE) * 0.5 + 0.5}
    assert torch.equal(own(new, **again), expected)
    with torch.no_grad():  # the mask matters
        latents = torch.ones(1, 4, 4, 4)
        plain = new.vae.decode(latents).sample
        masked = new.vae.decode(latents, image=given["image"], mask=given["mask_image"]).sample
        assert not torch.equal(plain, masked)
        assert torch.equal(masked, pipe.vae.decode(latents, image=given["image"], mask=given["mask_image"]).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("name", "task"), [("sd15", "image"), ("sdxl", "image"), ("sd3", "image"), ("flux", "image"), ("sana", "text")]
)
def test_sixteen_bits_are_rounded_as_diffusers_rounds(name: str, task: str, dtype: torch.dtype) -> None:
    pipe = host_pipe(name, task).to(dtype)

    def given() -> dict[str, Any]:
        found = arguments(name, task)
        floats = {key: value for key, value in found.items() if isinstance(value, torch.Tensor) and "mask" not in key}
        return found | {key: value.to(dtype) for key, value in floats.items()}

    expected = own(pipe, **given())
    assert expected.isfinite().all()
    assert torch.equal(own(hosting.hosted(pipe), **given()), expected)
    assert torch.equal(unit(hosting.draw(pipe, **given())), expected)


@pytest.mark.parametrize("factors", [{"scaling_factor": 0.18215}, {"scaling_factor": 0.3611, "shift_factor": 0.1159}])
def test_a_factor_is_not_rounded_before_it_divides(factors: dict[str, float]) -> None:
    space = LatentSpace.of(tiny_hosts.kl(4, **factors))
    latents = torch.linspace(-4, 4, 400).view(1, 4, 10, 10).bfloat16()
    scale, shift = factors["scaling_factor"], factors.get("shift_factor", 0.0)
    assert torch.equal(space.denormalize(latents), latents / scale + shift)
    assert torch.equal(space.normalize(latents), (latents - shift) * scale)


class Counted(ModelHook):
    """How often a hook of accelerate ran before a call."""

    runs = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        return args, kwargs


def foreign(name: str = "sd15") -> Any:
    """A pipeline with a VAE whose normalization its own code would misread, behind the facade that gives latents."""
    pipe = BUILDERS[name]()
    other = tiny_hosts.kl(pipe.vae.config.latent_channels, seed=3, scaling_factor=1.0, **STATISTICS)
    return swap_vae(pipe, other, force=True)


def model_hook(vae: Any) -> Counted:
    hook = Counted()
    add_hook_to_module(vae, hook)
    return hook


OFFLOADS = {
    "model offload": lambda vae: accelerate.cpu_offload_with_hook(vae, "cpu"),
    "sequential offload": lambda vae: accelerate.cpu_offload(vae, torch.device("cpu")),
    "group offload": lambda vae: vae.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
    "layerwise casting": lambda vae: vae.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
}


@pytest.mark.parametrize("task", ["text", "image"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_and_cast_weights_draw_what_stock_draws(offload: str, task: str) -> None:
    stock, placed = host_pipe("sd15", task), hosting.hosted(host_pipe("sd15", task))
    for pipe in (stock, placed):
        OFFLOADS[offload](pipe.vae)
    assert torch.equal(own(placed, **arguments("sd15", task)), own(stock, **arguments("sd15", task)))
    assert torch.equal(unit(hosting.draw(placed, **arguments("sd15", task))), own(stock, **arguments("sd15", task)))


@pytest.mark.parametrize("offload", ["model offload", "sequential offload", "group offload"])
def test_weights_offloaded_behind_the_other_facade_draw_the_same(offload: str) -> None:
    placed = foreign()
    expected = own(placed, **call("sd15"))
    OFFLOADS[offload](placed.vae)
    assert torch.equal(own(placed, **call("sd15")), expected)


def test_hooks_fire_at_every_call() -> None:
    for pipe in (hosting.hosted(BUILDERS["sd15"]()), foreign()):
        hook = model_hook(pipe.vae)
        pipe.vae.decode(torch.zeros(1, 4, 4, 4))
        assert hook.runs == 1
        pipe.vae.encode(some_images(1, SIDE)).latent_dist.mode()
        assert hook.runs == 2


def test_a_hook_that_the_lent_vae_has_fires_too() -> None:
    pipe = BUILDERS["sd15"]()
    hook = model_hook(pipe.vae)
    hosting.hosted(pipe).vae.decode(torch.zeros(1, 4, 4, 4))
    assert hook.runs == 1


def test_fp16_that_overflows_climbs_with_offloaded_weights() -> None:
    pipe = BUILDERS["sd15"]().to(torch.float16)
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(3e4)
    expected = VAEStage(pipe.vae).decode(torch.ones(1, 4, 4, 4).half())
    accelerate.cpu_offload(pipe.vae, torch.device("cpu"))
    assert torch.equal(VAEStage(pipe.vae).decode(torch.ones(1, 4, 4, 4).half()), expected)


# --- the surface ------------------------------------------------------------------------------------------------


def test_a_hosted_pipeline_is_saved_with_its_own_vae(tmp_path: Path) -> None:
    for pipe in (BUILDERS["sd15"](), host_pipe("sdxl", "inpaint")):  # the second one's own VAE stands behind the other facade
        folder = tmp_path / type(pipe).__name__
        placed = hosting.hosted(pipe)
        placed.save_pretrained(folder)
        opened = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
        assert all(torch.equal(value, opened.state_dict()[key]) for key, value in pipe.vae.state_dict().items())
        assert LatentSpace.of(opened) == LatentSpace.of(pipe.vae)
        placed.save_pretrained(folder / "variant", variant="fp16")
        assert (folder / "variant/vae/diffusion_pytorch_model.fp16.safetensors").is_file()
        assert diffusers.DiffusionPipeline.load_config(folder)["vae"] == ["diffusers", "AutoencoderKL"]


def test_the_facade_has_the_config_the_class_and_the_outputs_of_the_vae() -> None:
    pipe = BUILDERS["sd15"]()
    placed = hosting.hosted(pipe).vae
    assert isinstance(placed, diffusers.AutoencoderKL)
    assert dict(placed.config) == dict(pipe.vae.config)
    assert placed.state_dict().keys() == pipe.vae.state_dict().keys()
    images, latents = some_images(1, SIDE), torch.ones(1, 4, 4, 4)
    with torch.no_grad():
        for method, given in (("encode", images), ("decode", latents)):
            mine, theirs = (getattr(vae, method)(given) for vae in (placed, pipe.vae))
            assert type(mine) is type(theirs)
            mine, theirs = (getattr(vae, method)(given, return_dict=False) for vae in (placed, pipe.vae))
            assert len(mine) == len(theirs) == 1
        assert torch.equal(mine[0], theirs[0])
    other = foreign().vae
    assert isinstance(other, diffusers.AutoencoderKL)
    assert other.config.norm_num_groups == 4
    assert torch.equal(other.encode(images, return_dict=False)[0].mode(), other.encode(images).latent_dist.mode())
    with torch.no_grad():
        assert torch.equal(other.decode(latents, return_dict=False)[0], other.decode(latents).sample)


@pytest.mark.parametrize("switch", ["tiling", "slicing", "fused projections"])
def test_switches_do_what_they_do_on_stock(switch: str) -> None:
    stock, placed = BUILDERS["sd15"](), hosting.hosted(BUILDERS["sd15"]())
    for pipe in (stock, placed):
        if switch == "tiling":
            pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 16, 2
            pipe.vae.enable_tiling()
        elif switch == "slicing":
            pipe.vae.enable_slicing()
        else:
            pipe.fuse_qkv_projections()
    plain = own(BUILDERS["sd15"](), **call("sd15", 2))
    expected = own(stock, **call("sd15", 2))
    assert torch.equal(own(placed, **call("sd15", 2)), expected)
    if switch == "tiling":
        assert not torch.equal(expected, plain)
    else:  # the same sums, in another order where a processor has one
        assert (expected - plain).abs().max() < 1e-5
    fused = [any(getattr(module, "fused_projections", False) for module in pipe.vae.modules()) for pipe in (stock, placed)]
    assert fused == [switch == "fused projections"] * 2
    for pipe in (stock, placed):
        pipe.vae.disable_tiling()
        pipe.vae.disable_slicing()
        if switch == "fused projections":
            pipe.unfuse_qkv_projections()
    assert torch.equal(own(placed, **call("sd15", 2)), own(stock, **call("sd15", 2)))


def test_switches_of_the_facade_change_nothing_that_was_lent() -> None:
    pipe = BUILDERS["sd15"]()
    before = {name: value for name, value in vars(pipe.vae).items() if isinstance(value, bool | int | float)}
    placed = hosting.hosted(pipe)
    placed.vae.enable_tiling()
    placed.vae.register_to_config(scaling_factor=3.0)
    assert {name: value for name, value in vars(pipe.vae).items() if isinstance(value, bool | int | float)} == before
    assert pipe.vae.config.scaling_factor == 0.18215
    twice = hosting.hosted(placed)  # what was set on it since holds for what is made of it
    assert twice.vae.use_tiling
    assert twice.vae.config.scaling_factor == 3.0


def test_tiling_works_behind_the_other_facade() -> None:
    pipe, latents = foreign(), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = pipe.vae.decode(latents).sample
    stock = copy.deepcopy(pipe.vae._stage.vae)
    for vae in (pipe.vae, stock):
        vae.tile_sample_min_size, vae.tile_latent_min_size = 16, 2
        vae.enable_tiling()
    with torch.no_grad():
        expected = stock.decode(VAEStage(stock, pipe.vae._stage.space).space.denormalize(latents)).sample
        assert torch.equal(pipe.vae.decode(latents).sample, expected)
    assert not torch.equal(expected, whole)


# --- a facade over a facade, and sentences ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "task"), [("sd15", "text"), ("sd3", "inpaint")])
def test_a_facade_over_a_facade_is_one_facade(name: str, task: str) -> None:
    pipe = host_pipe(name, task)
    once = hosting.hosted(pipe)
    twice = hosting.hosted(once)
    assert torch.equal(own(twice, **arguments(name, task)), own(once, **arguments(name, task)))
    assert not isinstance(twice.vae._stage.vae, Facade)
    assert families.behind(once.vae).decodes
    assert torch.equal(hosting.draw(once, **arguments(name, task)), hosting.draw(pipe, **arguments(name, task)))
    assert check_swap(once, once.vae, some_images(4, 64)).fits
    assert LatentPipeline(hosting.hosted(BUILDERS["sd15"]())).stage.space == LatentSpace.of(BUILDERS["sd15"]().vae)


@pytest.mark.parametrize(
    ("name", "counts", "expected"),
    [
        ("sd15", {"out_channels": 8}, (4, 8)),  # a learned variance: PixArt, Latte
        ("flux", {"in_channels": 384, "out_channels": 64}, (16, 8)),  # FLUX.1 Fill
        ("flux", {"in_channels": 128, "out_channels": 64}, (16, 8)),  # FLUX.1 Control
    ],
)
def test_what_a_denoiser_takes_is_the_smaller_of_both_ends(name: str, counts: dict[str, int], expected: tuple[int, int]) -> None:
    pipe = BUILDERS[name]()
    getattr(pipe, families.denoiser(pipe)).register_to_config(**counts)
    assert families.expected_latents(pipe) == expected


@pytest.mark.parametrize(
    "name",
    ["FluxKontextPipeline", "FluxFillPipeline", "FluxControlPipeline", "ChromaPipeline", "BriaPipeline", "OvisImagePipeline"],
)
def test_packed_families_are_known_by_their_own_unpacking(name: str) -> None:
    assert families.facts(getattr(diffusers, name)).patch == 2


def test_kontext_draws_what_stock_draws() -> None:
    pipe = tiny_hosts.quiet(
        hosting.rebuild(BUILDERS["flux"](), diffusers.FluxKontextPipeline, image_encoder=None, feature_extractor=None)
    )

    def given() -> dict[str, Any]:
        return call("flux", image=some_images(1, SIDE) * 0.5 + 0.5) | {
            "height": SIDE, "width": SIDE, "max_area": SIDE * SIDE, "_auto_resize": False,
        }  # fmt: skip

    expected = own(pipe, **given())
    assert torch.equal(own(hosting.hosted(pipe), **given()), expected)
    assert torch.equal(unit(hosting.draw(pipe, **given())), expected)
    with pytest.raises(UserError, match=r"returns 4 tokens, and a picture of 64 x 64 pixels has 16"):
        hosting.unpack(pipe, pipe(**given(), output_type="latent").images, 64, 64)


def videos() -> Any:
    return diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False])


def patches() -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(4,), layers_per_block=1, latent_channels=4, norm_num_groups=1, **blocks
    )


def representations() -> Any:
    sizes = {"encoder_hidden_size": 64, "encoder_num_hidden_layers": 1, "encoder_patch_size": 8, "encoder_input_size": 16}
    sizes |= {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4}
    return diffusers.AutoencoderRAE(encoder_type="mae", patch_size=4, decoder_intermediate_size=16, **sizes)


def unnamed() -> Any:
    return diffusers.AutoencoderKLKVAE(channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 1))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (videos, "AutoencoderKLWan is an autoencoder of videos"),
        (representations, "AutoencoderRAE: This VAE's config names no latent_channels .* pictures, .* whose config names them"),
        (unnamed, "AutoencoderKLKVAE: This VAE's config names no latent_channels .* pictures, .* whose config names them"),
    ],
)
def test_what_is_no_autoencoder_of_pictures_is_refused_in_a_sentence(build: Any, said: str) -> None:
    pipe = BUILDERS["sd15"]()
    vae = build()
    pipe.vae = vae
    for asked in (hosting.hosted, hosting.draw, LatentPipeline, lambda it: check_swap(it, vae), lambda _: VAEStage(vae)):
        with pytest.raises(UserError, match=said):
            asked(pipe)


def test_latents_of_patches_are_those_of_flux_2() -> None:
    """As Flux2Pipeline computes them: 2 x 2 raw values become channels, normalized by statistics that are weights."""
    vae = patches()
    with torch.no_grad():
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 1.5)
        raw = vae.encode(some_images(1, SIDE)).latent_dist.mode()
        packed = diffusers.Flux2Pipeline._patchify_latents(raw)
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        expected = (packed - vae.bn.running_mean.view(1, -1, 1, 1)) / std
        stage = VAEStage(vae)
        assert torch.equal(stage.encode(some_images(1, SIDE)), expected)
        assert (stage.space.denormalize(expected) - raw).abs().max() <= 1e-5
        mean, deviation = stage.posterior(some_images(1, SIDE))
    assert mean.shape == deviation.shape == expected.shape
    assert stage.space.raw_shape(1, SIDE, SIDE) == tuple(raw.shape)
    with pytest.raises(UserError, match=r"StableDiffusionPipeline .*cannot read the outputs of AutoencoderKLFlux2"):
        hosting.facade(diffusers.StableDiffusionPipeline, stage, vae)


def test_a_vae_of_another_class_stands_behind_the_facade_that_gives_latents() -> None:
    pipe = instructed()
    assert families.unsupported_reason(diffusers.StableDiffusionPanoramaPipeline, VAEStage(tiny_hosts.kl(4)), tiny_hosts.dc())
    assert isinstance(
        hosting.facade(diffusers.StableDiffusionPanoramaPipeline, VAEStage(tiny_hosts.kl(4)), tiny_hosts.dc()), VAEFacade
    )
    assert not isinstance(hosting.hosted(pipe).vae, VAEFacade)
    assert sound_pipe("sd15", "text").vae.config.scaling_factor == 0.18215
