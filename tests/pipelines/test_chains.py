"""Hires fix and the SDXL refiner equal diffusers' own calls one after the other; inpainting chooses the model's own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_families
import tiny_hosts
import torch
from helpers import draw_shape
from tiny_hosts import SIDE

from latentpipe import LatentPipeline, UserError, replay
from latentpipe.checkpoints.pipeline_io import load_pipeline
from latentpipe.checkpoints.registry import find_model
from latentpipe.explore.inpaint import inpaint
from latentpipe.pipelines import hosting
from latentpipe.pipelines.chains import Hires, Refiner
from latentpipe.pipelines.sampling import settings_of

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings("ignore")]


def plain_vae() -> Any:
    """A VAE of factor 1, so that diffusers' own latents are those of the stage."""
    return tiny_hosts.kl(4, scaling_factor=1.0)


@pytest.fixture(scope="module")
def xl() -> Any:
    """Stable Diffusion XL with words."""
    return tiny_hosts.quiet(hosting.rebuild(tiny_hosts.complete("sdxl"), vae=plain_vae()))


@pytest.fixture(scope="module")
def second(xl: Any) -> Any:
    """Its refiner: the second text encoder alone, and five numbers beside each size."""
    unet = tiny_hosts.unet(4, 8, **tiny_families.XL_UNET | {"projection_class_embeddings_input_dim": 5 * 4 + 8})
    parts = {"unet": unet, "text_encoder": None, "tokenizer": None, "text_encoder_2": tiny_hosts.clip(True)}
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        **{**{name: xl.components[name] for name in ("vae", "tokenizer_2", "scheduler")}, **parts},
        requires_aesthetics_score=True, add_watermarker=False,
    )  # fmt: skip
    return tiny_hosts.quiet(pipe)


def settings(**more: Any) -> dict[str, Any]:
    return {"num_inference_steps": 5, "guidance_scale": 3.0, "size": (SIDE, SIDE)} | more


def latents(host: Any, **more: Any) -> torch.Tensor:
    """What a LatentPipeline draws."""
    pipe = LatentPipeline(host)
    with torch.no_grad():
        return pipe.denoise(["red circle"], [5], pipe.check(settings_of(settings(**more))))


def theirs(pipe: Any, **call: Any) -> torch.Tensor:
    """Latents of diffusers' own call."""
    given = {"prompt": ["red circle"], "num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "latent"}
    return tiny_hosts.quiet(pipe)(**given, generator=[torch.Generator().manual_seed(5)], **call).images


def test_hires_equals_two_calls_of_diffusers(xl: Any) -> None:
    small = theirs(hosting.rebuild(xl), height=SIDE, width=SIDE)
    large = torch.nn.functional.interpolate(small, scale_factor=2.0, mode="bilinear")
    expected = theirs(hosting.rebuild(xl, diffusers.StableDiffusionXLImg2ImgPipeline), image=large, strength=0.6)
    found = latents(xl, hires=Hires(2.0, 0.6))
    assert found.shape[-1] == 2 * SIDE // 8
    assert torch.equal(found, expected)


def test_hires_begins_from_latents_of_any_number_of_channels() -> None:
    """diffusers' img2img takes 4 channels for latents; the oracle noises latents of 8 itself, and draws on as diffusers does."""
    host = load_pipeline(find_model("emoji"))
    small = theirs(hosting.rebuild(host), height=SIDE, width=SIDE)
    large = torch.nn.functional.interpolate(small, scale_factor=2.0, mode="bilinear")
    stock = hosting.rebuild(host, diffusers.StableDiffusionImg2ImgPipeline)

    def noised(image: Any, timestep: torch.Tensor, *rest: Any) -> torch.Tensor:
        noise = torch.randn(large.shape, generator=rest[-1][0])
        return stock.scheduler.add_noise(large, noise, timestep)

    stock.prepare_latents = noised
    expected = theirs(stock, image=torch.zeros(1, 3, 2 * SIDE, 2 * SIDE), strength=0.6)
    assert torch.equal(latents(host, hires=Hires(2.0, 0.6)), expected)


def test_the_refiner_equals_diffusers_two_calls(xl: Any, second: Any) -> None:
    base = theirs(hosting.rebuild(xl), height=SIDE, width=SIDE, denoising_end=0.6)
    expected = theirs(hosting.rebuild(second), image=base, denoising_start=0.6)
    found = latents(xl, refiner=Refiner(second, LatentPipeline(second).stage, 0.6))
    assert torch.equal(found, expected)
    assert not torch.equal(found, latents(xl))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"hires": Hires(1.3, 0.5)}, r"hires makes 42 x 42 pixels; sides must be multiples of 16"),
        ({"hires": Hires(0.5, 0.5)}, r"hires has scale 0.5 and strength 0.5; expected a scale over 1"),
        ({"hires": Hires(2.0, 0.1)}, r"5 steps at hires strength 0.1 run no step"),
        ({"hires": Hires(), "refiner": "second"}, r"two second passes, which exclude each other"),
        (
            {"refiner": "other space"},
            r"Refiner 'x' draws in another latent space: The scale of channel 0 is 1 in one space and 0.13",
        ),
        (
            {"refiner": "other family"},
            r"A refiner draws on after Stable Diffusion XL with another one; given were .* Stable Diffusion 1/2",
        ),
        ({"refiner": "second", "image": draw_shape("red", "bar")}, r"A refiner follows a drawing from a prompt alone"),
    ],
)
def test_what_cannot_be_chained_is_told(xl: Any, second: Any, more: dict[str, Any], told: str) -> None:
    stages = {"second": (second, LatentPipeline(second).stage)}
    stages["other space"] = (second, LatentPipeline(hosting.rebuild(second, vae=tiny_hosts.kl(4, scaling_factor=0.13025))).stage)
    stages["other family"] = (tiny_hosts.sd15(), stages["second"][1])
    if isinstance(more.get("refiner"), str):
        more = more | {"refiner": Refiner(*stages[more["refiner"]], 0.5, "x")}
    with pytest.raises(UserError, match=told):
        latents(xl, **more)


@pytest.mark.slow
def test_a_chain_replays_from_its_recipe(xl: Any, second: Any, tmp_path: Path) -> None:
    from latentpipe.pipelines.chains import open_refiner

    xl.save_pretrained(tmp_path / "base")
    second.save_pretrained(tmp_path / "refiner")
    pipe = LatentPipeline.from_pretrained(tmp_path / "base", device="cpu")
    large = pipe("red circle", seed=3, **settings(hires=Hires(2.0, 0.5)))[0]
    assert large.image.size == (2 * SIDE, 2 * SIDE)
    assert large.recipe.stopped_after is None
    assert replay(large.save(tmp_path / "large.png"), model=tmp_path / "base", device="cpu").difference == 0
    refined = pipe("red circle", seed=3, **settings(refiner=open_refiner(tmp_path / "refiner", 0.6, "cpu")))[0]
    path = refined.save(tmp_path / "refined.png")
    assert replay(path, model=tmp_path / "base", device="cpu", refiner=tmp_path / "refiner").difference == 0
    with pytest.raises(UserError, match="was refined by another"):
        replay(path, model=tmp_path / "base", device="cpu", refiner=tmp_path / "base")


def test_stopping_in_the_first_pass_leaves_out_the_second(xl: Any) -> None:
    seen = []

    def on_step(step: Any) -> bool:
        seen.append((step.step, step.steps))
        return step.step == 2

    picture = LatentPipeline(xl)("red circle", seed=3, on_step=on_step, **settings(hires=Hires(2.0, 0.5)))[0]
    assert seen == [(1, 7), (2, 7)]
    assert picture.recipe.stopped_after == 2
    assert picture.image.size == (SIDE, SIDE)


@pytest.mark.parametrize(("kind", "cls"), [("fill", "FluxFillPipeline"), ("plain", "FluxInpaintPipeline")])
def test_inpaint_draws_by_the_pipeline_that_the_model_was_made_for(kind: str, cls: str) -> None:
    """A Fill by its own; latents as diffusers' own call has them."""
    host = tiny_hosts.complete("flux")
    if kind == "fill":
        host = hosting.rebuild(host, transformer=tiny_families.flux_transformer(384))
    pipe = LatentPipeline(host)
    mask = draw_shape("red", "square").convert("L").point(lambda value: 255 if value < 200 else 0)
    picture = draw_shape("blue", "circle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "default_sample_size", SIDE // 8)
        new = inpaint(pipe, picture, mask, "abc", seed=3, num_inference_steps=2, guidance_scale=1.0)
    assert new.size == picture.size
    assert new.getpixel((0, 0)) == picture.getpixel((0, 0))
    assert new.tobytes() != picture.tobytes()
    twin = tiny_hosts.quiet(hosting.rebuild(host, getattr(diffusers, cls)))
    assert hosting.facts(type(twin)).patch == 2
