"""LatentPipeline against diffusers' own StableDiffusionPipeline, and what it refuses."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import draw_shape, grey_levels, tiny_vae
from PIL import Image

from latentpipe import LatentPipeline, UserError, VAEStage
from latentpipe.pipelines.denoise import host_for
from latentpipe.pipelines.sampling import SCHEDULERS, Settings, stretched
from latentpipe.utils.errors import LatentpipeWarning

PROMPT = "red circle"


@pytest.fixture(scope="module")
def stock(model_folder: Path) -> Any:
    """The same model in plain diffusers."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_stock(stock: Any, seed: int = 5, **settings: Any) -> Image.Image:
    """The oracle's picture."""
    return stock(PROMPT, generator=torch.Generator().manual_seed(seed), **settings).images[0]


def by_us(pipe: LatentPipeline, seed: int = 5, **settings: Any) -> Image.Image:
    """Our picture."""
    return pipe(PROMPT, seed=seed, **settings)[0].image


# --- the oracle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0, 7.5])
def test_our_picture_is_the_stock_pipelines_bit_for_bit(pipe: LatentPipeline, stock: Any, guidance: float) -> None:
    theirs = by_stock(stock, num_inference_steps=4, guidance_scale=guidance)
    assert grey_levels(by_us(pipe, num_inference_steps=4, guidance_scale=guidance), theirs) == 0
    assert np.asarray(theirs).std() > 5  # an empty picture would agree with everything


def test_the_negative_prompt_is_the_stock_pipelines(pipe: LatentPipeline, stock: Any) -> None:
    theirs = by_stock(stock, num_inference_steps=3, guidance_scale=4.0, negative_prompt="blue bar")
    ours = by_us(pipe, num_inference_steps=3, guidance_scale=4.0, negative_prompt="blue bar")
    assert grey_levels(ours, theirs) == 0
    assert grey_levels(ours, by_us(pipe, num_inference_steps=3, guidance_scale=4.0)) > 0


def test_another_size_is_the_stock_pipelines(pipe: LatentPipeline, stock: Any) -> None:
    theirs = by_stock(stock, num_inference_steps=2, guidance_scale=3.0, width=32, height=24)
    with pytest.warns(UserWarning, match="trained at 16 x 16"):
        ours = by_us(pipe, num_inference_steps=2, size=(32, 24))
    assert ours.size == (32, 24)
    assert grey_levels(ours, theirs) == 0


@pytest.mark.parametrize("factors", [{"scaling_factor": 0.25}, {"scaling_factor": 0.7, "shift_factor": None}])
def test_a_vae_with_a_factor_is_the_stock_pipelines(stock: Any, factors: dict[str, Any]) -> None:
    host = type(stock)(**{**stock.components, "vae": tiny_vae(4, **factors)}, requires_safety_checker=False)
    ours = by_us(LatentPipeline(host), num_inference_steps=2, guidance_scale=3.0)
    assert grey_levels(ours, by_stock(host, num_inference_steps=2, guidance_scale=3.0)) == 0


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_scheduler_is_the_stock_pipelines(pipe: LatentPipeline, stock: Any, name: str) -> None:
    import diffusers

    chosen = getattr(diffusers, SCHEDULERS[name])
    extra = {"clip_sample": False} if name == "ddim" else {}  # latents are not confined to [-1, 1]
    host = type(stock)(
        **{**stock.components, "scheduler": chosen.from_config(stock.scheduler.config, **extra)}, requires_safety_checker=False
    )
    host.set_progress_bar_config(disable=True)
    theirs = by_stock(host, num_inference_steps=5, guidance_scale=3.0)
    picture = pipe(PROMPT, seed=5, num_inference_steps=5, guidance_scale=3.0, scheduler=name)[0]
    assert picture.recipe.scheduler == name
    assert grey_levels(picture.image, theirs) == 0


def test_no_scheduler_clips_latents(pipe: LatentPipeline) -> None:
    for name in SCHEDULERS:
        config = host_for(pipe.host, pipe.stage, Settings(scheduler=name)).scheduler.config
        assert not config.get("clip_sample"), name
        assert not config.get("thresholding"), name
        assert config["prediction_type"] == "v_prediction"


def test_img2img_is_the_stock_pipelines(pipe: LatentPipeline, stock: Any) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    source = draw_shape("blue", "square", 16)
    host = StableDiffusionImg2ImgPipeline(**stock.components, requires_safety_checker=False)
    host.set_progress_bar_config(disable=True)
    theirs = by_stock(host, image=source, num_inference_steps=5, strength=0.6, guidance_scale=3.0)
    assert grey_levels(by_us(pipe, image=source, num_inference_steps=5, strength=0.6), theirs) == 0


# --- guidance -----------------------------------------------------------------------------------------------


def test_an_empty_interval_is_no_guidance(pipe: LatentPipeline) -> None:
    plain = by_us(pipe, num_inference_steps=4, guidance_scale=1.0)
    for point in (0.0, 0.5, 1.0):
        assert grey_levels(by_us(pipe, num_inference_steps=4, guidance_scale=7.0, guidance_interval=(point, point)), plain) == 0
    assert grey_levels(by_us(pipe, num_inference_steps=4, guidance_scale=7.0), plain) > 0


@pytest.mark.parametrize(
    ("interval", "guided"),
    [
        ((0.0, 0.5), [True, True, False, False]),
        ((0.5, 1.0), [False, False, True, True]),
        ((0.25, 0.75), [False, True, True, False]),
    ],
)
def test_exactly_the_steps_of_the_interval_are_guided(
    pipe: LatentPipeline, interval: tuple[float, float], guided: list[bool]
) -> None:
    batches: list[int] = []
    hook = pipe.host.unet.register_forward_pre_hook(lambda module, arguments: batches.append(len(arguments[0])))
    try:
        by_us(pipe, num_inference_steps=4, guidance_scale=5.0, guidance_interval=interval)
    finally:
        hook.remove()
    assert [size == 2 for size in batches] == guided


def test_a_partial_interval_differs_from_both_ends(pipe: LatentPipeline) -> None:
    part = by_us(pipe, num_inference_steps=4, guidance_scale=7.0, guidance_interval=(0.0, 0.5))
    assert grey_levels(part, by_us(pipe, num_inference_steps=4, guidance_scale=7.0)) > 0
    assert grey_levels(part, by_us(pipe, num_inference_steps=4, guidance_scale=1.0)) > 0


# --- batches, seeds and the host ----------------------------------------------------------------------------


def test_a_batch_is_its_single_pictures(pipe: LatentPipeline) -> None:
    batch = pipe(PROMPT, n=3, seed=11, num_inference_steps=3)
    assert [(picture.recipe.seed, picture.recipe.batch_index, picture.recipe.batch_size) for picture in batch] == [
        (11, 0, 3),
        (12, 1, 3),
        (13, 2, 3),
    ]
    for index, picture in enumerate(batch):
        assert grey_levels(picture.image, by_us(pipe, 11 + index, num_inference_steps=3)) <= 1
    assert grey_levels(batch[0].image, batch[1].image) > 3


def test_seeds_and_prompts_matter(pipe: LatentPipeline) -> None:
    assert grey_levels(by_us(pipe, 1, num_inference_steps=2), by_us(pipe, 1, num_inference_steps=2)) == 0
    assert grey_levels(by_us(pipe, 1, num_inference_steps=2), by_us(pipe, 2, num_inference_steps=2)) > 0
    latents = [pipe.denoise([text], [1], Settings(num_inference_steps=2)) for text in ("red circle", "blue bar")]
    assert not torch.equal(*latents)
    first, second = pipe(PROMPT, num_inference_steps=1)[0], pipe(PROMPT, num_inference_steps=1)[0]
    assert first.recipe.seed != second.recipe.seed


def state(host: Any) -> dict[str, Any]:
    """What of a host a call might change."""
    kept = {
        f"{part}.{name}": value.clone()
        for part in ("unet", "vae", "text_encoder")
        for name, value in getattr(host, part).state_dict().items()
    }
    configs = {part: dict(getattr(host, part).config) for part in ("unet", "vae", "scheduler")} | {"host": dict(host.config)}
    running = {name: copy.deepcopy(value) for name, value in vars(host.scheduler).items()}
    return {"weights": kept, "configs": copy.deepcopy(configs), "scheduler": repr(running), "dtype": host.unet.dtype}


def test_a_call_changes_nothing_of_the_host(model_folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    host = StableDiffusionPipeline.from_pretrained(model_folder)
    before, scheduler = state(host), host.scheduler
    pipe = LatentPipeline(host)
    pipe(PROMPT, seed=0, num_inference_steps=2, guidance_scale=2.0, scheduler="euler")
    pipe(PROMPT, seed=0, num_inference_steps=2, guidance_interval=(0.5, 1.0))
    pipe(PROMPT, seed=0, num_inference_steps=3, image=draw_shape("red", "bar", 16), on_step=lambda step: True)
    after = state(host)
    assert host.scheduler is scheduler
    assert before["weights"].keys() == after["weights"].keys()
    assert all(torch.equal(before["weights"][name], value) for name, value in after["weights"].items())
    for name in ("configs", "scheduler", "dtype"):
        assert before[name] == after[name]


def test_nothing_is_left_over_for_the_next_call(pipe: LatentPipeline) -> None:
    before = by_us(pipe, num_inference_steps=3)
    pipe(PROMPT, seed=0, num_inference_steps=3, scheduler="unipc", guidance_scale=9.0, on_step=lambda step: True)
    assert grey_levels(by_us(pipe, num_inference_steps=3), before) == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_draws_nearly_the_same(model_folder: Path, pipe: LatentPipeline, dtype: str) -> None:
    half = LatentPipeline.from_pretrained(model_folder, device="cpu", dtype=dtype)
    picture = half(PROMPT, seed=5, num_inference_steps=2)[0]
    assert picture.recipe.machine.dtype == {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    difference = np.abs(np.asarray(picture.image, float) - np.asarray(by_us(pipe, num_inference_steps=2), float))
    assert difference.mean() < 12


# --- steps, previews and stopping ---------------------------------------------------------------------------


def test_every_step_is_reported_once(pipe: LatentPipeline) -> None:
    steps: list[tuple[int, int, tuple[int, ...]]] = []
    pipe(
        PROMPT,
        n=2,
        seed=0,
        num_inference_steps=4,
        on_step=lambda step: steps.append((step.step, step.steps, tuple(step.latents.shape))),
    )
    assert steps == [(k, 4, (2, 4, 8, 8)) for k in range(1, 5)]


def test_img2img_reports_the_steps_that_it_runs(pipe: LatentPipeline) -> None:
    seen: list[tuple[int, int]] = []
    picture = pipe(
        PROMPT,
        seed=0,
        num_inference_steps=5,
        strength=0.6,
        image=draw_shape("red", "bar"),
        on_step=lambda step: seen.append((step.step, step.steps)),
    )[0]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert picture.recipe.stopped_after is None
    assert picture.recipe.source is not None
    assert picture.recipe.source.strength == 0.6


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_stopping_keeps_a_partial_picture(pipe: LatentPipeline, name: str) -> None:
    kept: list[torch.Tensor] = []

    def on_step(step: Any) -> bool:
        kept.append(step.latents.clone())
        return step.step == 2

    picture = pipe(PROMPT, seed=5, num_inference_steps=5, scheduler=name, on_step=on_step)[0]
    assert len(kept) == 2
    assert picture.recipe.stopped_after == 2
    with torch.no_grad():
        from latentpipe.utils.images import to_pixels

        assert grey_levels(picture.image, to_pixels(pipe.stage.decode(kept[-1]))[0]) == 0


def test_stopping_at_the_last_step_is_finishing(pipe: LatentPipeline) -> None:
    picture = pipe(PROMPT, seed=5, num_inference_steps=3, on_step=lambda step: step.step == 3)[0]
    assert picture.recipe.stopped_after is None
    assert grey_levels(picture.image, by_us(pipe, num_inference_steps=3)) == 0


def test_the_estimate_is_of_the_clean_latents(pipe: LatentPipeline) -> None:
    kept: list[torch.Tensor] = []
    pipe(PROMPT, seed=5, num_inference_steps=8, on_step=lambda step: kept.append(step.latents.clone()))
    final = pipe.denoise([PROMPT], [5], Settings(num_inference_steps=8))
    noisy: list[torch.Tensor] = []
    pipe(PROMPT, seed=5, num_inference_steps=8, scheduler="euler", on_step=lambda step: noisy.append(step.latents.clone()))
    assert (kept[0] - final).abs().mean() < (noisy[0] - final).abs().mean()
    assert torch.allclose(kept[-1], final, atol=1e-3)


def test_a_preview_is_the_linear_map(pipe: LatentPipeline) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    picture = pipe.preview(latents, side=8)
    assert picture is not None
    assert pipe.preview_map is not None
    colours = np.einsum("chw,cr->hwr", latents[0].numpy(), np.array(pipe.preview_map["factors"])) + pipe.preview_map["bias"]
    expected = ((colours / 2 + 0.5).clip(0, 1) * 255).round()
    assert np.abs(np.asarray(picture) - expected).max() <= 1
    assert pipe.preview(latents).size == (256, 256)  # type: ignore[union-attr]


def test_there_is_no_preview_without_a_map(pipe: LatentPipeline) -> None:
    assert LatentPipeline(pipe.host).preview(torch.zeros(1, 4, 8, 8)) is None


# --- img2img ------------------------------------------------------------------------------------------------


def test_less_strength_stays_nearer_to_the_picture(pipe: LatentPipeline) -> None:
    source = draw_shape("red", "circle", 16)
    start = pipe.stage.encode(torch.zeros(1, 3, 16, 16)).detach()
    assert start.shape == (1, 4, 8, 8)
    settings = [
        Settings(num_inference_steps=10, strength=strength, image=source, guidance_scale=1.0) for strength in (0.1, 0.5, 1.0)
    ]
    from latentpipe.utils.images import to_images

    clean = pipe.stage.encode(to_images(source))
    with torch.no_grad():
        distance = [float((pipe.denoise([PROMPT], [0], each) - clean).square().mean()) for each in settings]
    assert distance[0] < distance[1] < distance[2]


def test_a_picture_of_any_mode_and_size_can_be_the_source(pipe: LatentPipeline) -> None:
    for source in (Image.new("L", (7, 3), 90), Image.new("RGBA", (40, 40), (1, 2, 3, 100)), Image.new("CMYK", (16, 16))):
        assert by_us(pipe, image=source, num_inference_steps=2, strength=1.0).size == (16, 16)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": -3}, "num_inference_steps is -3"),
        ({"num_inference_steps": 1001}, "expected 1 to 1000"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1"),
        ({"guidance_scale": 101.0}, "0 to 100"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval is 0.8 0.2"),
        ({"guidance_interval": (-0.1, 0.2)}, "guidance_interval"),
        ({"guidance_interval": (0.0, 1.1)}, "guidance_interval"),
        ({"guidance_interval": (float("nan"), 1.0)}, "guidance_interval"),
        ({"scheduler": "heun"}, "scheduler is 'heun'"),
        ({"size": (20, 16)}, "Try 16 x 16|Try 24 x 16"),
        ({"size": (0, 16)}, "multiples of 8"),
        ({"size": (-8, 16)}, "multiples of 8"),
        ({"size": (8192, 16)}, "at most 4096"),
        ({"n": 0}, "n is 0"),
        ({"n": -1}, "n is -1"),
        ({"n": 257}, "1 to 256 pictures"),
        ({"seed": -2}, "seed -2"),
        ({"seed": 2**32}, "seeds from 0 to 4294967295"),
        ({"seed": 2**32 - 1, "n": 2}, "seed"),
        ({"image": Image.new("RGB", (16, 16)), "strength": 0.0}, "strength is 0"),
        ({"image": Image.new("RGB", (16, 16)), "strength": 1.5}, "strength is 1.5"),
        ({"image": Image.new("RGB", (16, 16)), "strength": float("nan")}, "strength"),
        ({"image": Image.new("RGB", (16, 16)), "strength": 0.1, "num_inference_steps": 5}, "run no step"),
    ],
)
def test_impossible_settings_are_refused_before_the_first_step(
    pipe: LatentPipeline, settings: dict[str, Any], words: str
) -> None:
    def never(step: Any) -> bool:
        raise AssertionError("a step was run")

    with pytest.raises(UserError, match=words):
        pipe(PROMPT, on_step=never, **{"num_inference_steps": 5, "seed": 0} | settings)


def test_an_endless_prompt_is_refused_before_the_first_step(pipe: LatentPipeline) -> None:
    def never(step: Any) -> bool:
        raise AssertionError("a step was run")

    with pytest.raises(UserError, match="prompt"):
        pipe("red " * 6000, seed=0, num_inference_steps=1, on_step=never)


def test_the_largest_seed_is_allowed(pipe: LatentPipeline) -> None:
    assert pipe(PROMPT, seed=2**32 - 1, num_inference_steps=1)[0].recipe.seed == 2**32 - 1


def test_a_prompt_that_is_too_long_says_what_was_cut(pipe: LatentPipeline) -> None:
    words = [f"{colour} circle" for colour in ("red", "green", "blue", "yellow")] * 8
    prompt = " ".join(words)
    cut = pipe.truncated_text(prompt)
    assert cut
    assert prompt.endswith(cut)
    with pytest.warns(UserWarning, match=f"cut: '{cut[:60]}"):
        picture = pipe(prompt, seed=1, num_inference_steps=1)[0]
    assert picture.recipe.prompt == prompt
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kept = prompt.removesuffix(cut).strip()
        assert pipe.truncated_text(kept) == ""
        assert grey_levels(pipe(kept, seed=1, num_inference_steps=1)[0].image, picture.image) == 0


def test_empty_and_odd_prompts_draw(pipe: LatentPipeline) -> None:
    for prompt in ("", "  ", "日本 🍎 \x00", "a" * 10):
        (picture,) = pipe(prompt, seed=0, num_inference_steps=1)
        assert picture.recipe.prompt == prompt
        assert ("the prompt is empty: what is drawn is chance" in picture.notes) == (not prompt.strip())


def test_a_note_repeats_a_part_of_what_was_cut(pipe: LatentPipeline) -> None:
    (note,) = [one for one in pipe.notes_on("circle " * 500) if "cut: " in one]
    assert note.endswith(" ...'")
    assert len(note) < 160


@pytest.mark.parametrize(
    ("given", "drawn", "said"),
    [
        ((4000, 3000), (64, 64), "4,000 x 3,000 pixels is stretched to 64 x 64"),
        ((20, 3000), (64, 64), "20 x 3,000 pixels is stretched"),
        ((500, 500), (64, 64), ""),
        ((105, 100), (64, 64), ""),
        ((64, 128), (32, 64), ""),
    ],
)
def test_img2img_says_where_it_stretches(given: tuple[int, int], drawn: tuple[int, int], said: str) -> None:
    assert said in stretched(given, drawn)
    assert bool(said) == bool(stretched(given, drawn))


def test_the_note_on_stretching_reaches_whoever_draws(pipe: LatentPipeline) -> None:
    wide = Image.new("RGB", (90, 30))
    with pytest.warns(LatentpipeWarning, match="90 x 30 pixels is stretched to"):
        pipe("circle", seed=0, num_inference_steps=2, image=wide)


def test_a_vae_of_another_shape_is_refused(pipe: LatentPipeline) -> None:
    wide = VAEStage(tiny_vae(latent_channels=8))
    with pytest.raises(UserError, match="8-channel latents at 1/2 size; this denoiser takes 4 channels at 1/2"):
        LatentPipeline(pipe.host, wide)
    deep = tiny_vae(
        block_out_channels=(8,) * 5, down_block_types=("DownEncoderBlock2D",) * 5, up_block_types=("UpDecoderBlock2D",) * 5
    )
    with pytest.raises(UserError, match="1/16 size"):
        LatentPipeline(pipe.host, VAEStage(deep))


def test_another_vae_decodes(model_folder: Path, tmp_path: Path, pipe: LatentPipeline) -> None:
    from latentpipe.checkpoints.vae_io import save_vae, vae_hash

    save_vae(tiny_vae(9), tmp_path / "other", {})
    with pytest.raises(UserError, match=r"was not put in\.\nsame shape, other space"):
        LatentPipeline.from_pretrained(model_folder, vae=tmp_path / "other", device="cpu")
    other = LatentPipeline.from_pretrained(model_folder, vae=tmp_path / "other", device="cpu", force=True)
    picture = other(PROMPT, seed=5, num_inference_steps=2)[0]
    assert picture.recipe.vae == "other"
    assert picture.recipe.hashes == pipe.hashes | {"vae": vae_hash(tmp_path / "other")}
    assert grey_levels(picture.image, by_us(pipe, num_inference_steps=2)) > 0
    same = LatentPipeline.from_pretrained(model_folder, vae=model_folder / "vae", device="cpu")
    assert grey_levels(by_us(same, num_inference_steps=2), by_us(pipe, num_inference_steps=2)) == 0


@pytest.mark.parametrize(
    ("arguments", "words"), [({"dtype": "int8"}, "dtype"), ({"device": "abacus"}, "abacus"), ({"vae": "no"}, "No VAE 'no'")]
)
def test_impossible_openings_are_refused(model_folder: Path, arguments: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LatentPipeline.from_pretrained(model_folder, **{"device": "cpu"} | arguments)


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model_index\.json"):
        LatentPipeline.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="No model"):
        LatentPipeline.from_pretrained(tmp_path / "nothing")


def test_a_vae_that_decodes_to_nan_is_an_error(model_folder: Path) -> None:
    broken = LatentPipeline.from_pretrained(model_folder, device="cpu")
    with torch.no_grad():
        broken.stage.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        broken(PROMPT, seed=0, num_inference_steps=1)


# --- what is written ----------------------------------------------------------------------------------------


@pytest.fixture
def drawn(pipe: LatentPipeline) -> Any:
    """One picture."""
    return pipe(PROMPT, seed=5, num_inference_steps=2, guidance_scale=2.5, negative_prompt="bar", scheduler="euler")[0]


def test_the_recipe_tells_everything(drawn: Any, pipe: LatentPipeline, model_folder: Path) -> None:
    from latentpipe.checkpoints.pipeline_io import hashes

    recipe = drawn.recipe
    assert (recipe.prompt, recipe.negative, recipe.seed, recipe.steps, recipe.guidance) == (PROMPT, "bar", 5, 2, 2.5)
    assert (recipe.width, recipe.height, recipe.scheduler, recipe.model, recipe.vae) == (16, 16, "euler", model_folder.name, None)
    assert recipe.hashes == hashes(model_folder)
    assert recipe.machine.device == "cpu"
    assert recipe.machine.dtype == "float32"
    assert recipe.machine.threads == torch.get_num_threads()
    assert recipe.machine.versions["torch"] == torch.__version__


def test_a_saved_picture_holds_its_recipe(drawn: Any, tmp_path: Path) -> None:
    path = drawn.save(tmp_path / "sub" / "x.png")
    with Image.open(path) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(drawn.image))
        assert json.loads(picture.info["latentpipe"])["seed"] == 5


def test_a_picture_of_any_host_can_be_saved(pipe: LatentPipeline, tmp_path: Path) -> None:
    picture = LatentPipeline(pipe.host)(PROMPT, seed=0, num_inference_steps=1)[0]
    assert picture.save(tmp_path / "x.png").is_file()


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:x", "../cpu"])
def test_a_device_that_cannot_draw_is_refused(model_folder: Path, device: str) -> None:
    with pytest.raises(UserError, match="expected cpu, mps, cuda"):
        LatentPipeline.from_pretrained(model_folder, device=device)
