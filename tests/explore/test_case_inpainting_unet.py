"""A Stable Diffusion UNet of nine input channels redraws as diffusers does, and every other verb says what it is for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, UNet2DConditionModel
from helpers import edit_json
from PIL import Image

from latentpipe import LatentPipeline, UserError
from latentpipe.checkpoints.pipeline_io import load_pipeline
from latentpipe.cli.app import main
from latentpipe.explore.inpaint import inpaint
from latentpipe.utils.logging import quiet

SIDE = 16


def with_unet(source: Path, target: Path, channels: int, cls: Any = StableDiffusionInpaintPipeline) -> Path:
    """A saved pipeline with the parts of `source` but a UNet of so many input channels."""
    with quiet():
        pipe = load_pipeline(source)
        torch.manual_seed(3)
        unet = UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": channels}).eval()
        parts = {**pipe.components, "unet": unet if channels != 4 else pipe.unet}
        cls(**parts, requires_safety_checker=False).save_pretrained(target)
    shutil.copy(source / "vae" / "latent_rgb.json", target / "vae")
    return target


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An inpainting model; not to be written to."""
    return with_unet(model_folder, tmp_path_factory.mktemp("inpainting") / "redraws", 9)


def scene() -> tuple[Image.Image, Image.Image]:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    mask = Image.new("L", picture.size)
    mask.paste(255, (4, 4, 12, 14))
    return picture, mask


def theirs(folder: Path, strength: float, guidance: float) -> np.ndarray:
    """The same by diffusers alone."""
    with quiet():
        pipe = StableDiffusionInpaintPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    picture, mask = scene()
    drawn = pipe(
        "red circle", image=picture, mask_image=mask, num_inference_steps=4, strength=strength, guidance_scale=guidance,
        negative_prompt="blue", generator=torch.Generator().manual_seed(5), height=SIDE, width=SIDE, output_type="np",
    ).images[0]  # fmt: skip
    return (drawn * 255).round().astype(np.uint8)


@pytest.mark.parametrize(("strength", "guidance"), [(1.0, 4.0), (0.6, 4.0), (1.0, 1.0)])
def test_case_05_inpaint_draws_what_diffusers_draws_bit_for_bit(folder: Path, strength: float, guidance: float) -> None:
    picture, mask = scene()
    pipe = LatentPipeline.from_pretrained(folder, device="cpu")
    assert pipe.native_size == (SIDE, SIDE)
    steps: list[int] = []
    found = inpaint(
        pipe, picture, mask, "red circle", seed=5, num_inference_steps=4, guidance_scale=guidance, strength=strength, feather=0,
        negative_prompt="blue",
        report=lambda done, total, what: steps.append(done),
    )  # fmt: skip
    inside = np.asarray(mask) > 0
    assert np.array_equal(np.asarray(found)[inside], theirs(folder, strength, guidance)[inside])
    assert np.array_equal(np.asarray(found)[~inside], np.asarray(picture)[~inside])
    assert steps == list(range(1, int(4 * strength) + 1))


def test_case_05_the_other_verbs_say_what_the_model_is_for(
    folder: Path, own_home: Path, tmp_path: Path, pictures: Path, capsys: Any
) -> None:
    shutil.copytree(folder, own_home / "models" / "redraws")
    picture, mask = scene()
    picture.save(tmp_path / "picture.png")
    mask.save(tmp_path / "mask.png")
    ways = ["--model", "redraws", "--steps", "2"]
    out = str(tmp_path / "x.png")
    for verb in (
        ["generate", "red", *ways, "--out", str(tmp_path)],
        ["generate", "red", *ways, "--image", str(tmp_path / "picture.png"), "--out", str(tmp_path)],
        ["grid", "red", "--x", "seed=1,2", *ways, "--out", out],
        ["interpolate", "red", "blue", *ways, "--out", out],
    ):
        assert main(verb) == 2, verb
        said = capsys.readouterr().err
        assert "redraws parts of pictures (its UNet takes 9 channels" in said
        assert "latentpipe inpaint PICTURE --mask MASK" in said
    assert main(["inpaint", str(tmp_path / "picture.png"), "--mask", str(tmp_path / "mask.png"), *ways, "--out", out]) == 0
    assert main(["inspect", "redraws"]) == 0
    lora = (
        f"model: redraws\ndata: {{train: {pictures}, size_px: 16}}\nrun: {{out: {tmp_path}/a.safetensors, work: {tmp_path}/w}}\n"
    )
    (tmp_path / "lora.yaml").write_text(lora + "optim: {steps: 1}\n")
    edit_json(own_home / "models" / "redraws" / "model_index.json", _class_name="StableDiffusionPipeline")  # some convert it so
    assert main(["inpaint", str(tmp_path / "picture.png"), "--mask", str(tmp_path / "mask.png"), *ways, "--out", out]) == 0
    capsys.readouterr()
    assert main(["train-lora", str(tmp_path / "lora.yaml")]) == 2
    assert "train the adapter on the model that it was made from" in capsys.readouterr().err


def test_case_05_an_adapter_goes_on_and_moves_the_part(folder: Path) -> None:
    from latentpipe.lora.adapter import Lora, LoraLayer

    pipe = LatentPipeline.from_pretrained(folder, device="cpu")
    picture, mask = scene()
    plain = inpaint(pipe, picture, mask, "red", num_inference_steps=2)
    factors = {"lora_A": torch.full((1, 9, 3, 3), 0.3), "lora_B": torch.linspace(-1, 1, 32).view(32, 1, 1, 1)}
    report = pipe.attach_lora(Lora({"unet": {"conv_in": LoraLayer("lora", factors, 1, 1.0)}}, "one"))
    assert report.parts["unet"].output_delta
    assert inpaint(pipe, picture, mask, "red", num_inference_steps=2).tobytes() != plain.tobytes()


@pytest.mark.parametrize("cls", [StableDiffusionInpaintPipeline, StableDiffusionImg2ImgPipeline])
def test_case_05_a_usual_model_in_the_folder_of_another_task_draws_from_a_prompt(
    model_folder: Path, pipe: LatentPipeline, tmp_path: Path, cls: Any
) -> None:
    other = LatentPipeline.from_pretrained(with_unet(model_folder, tmp_path / "other", 4, cls), device="cpu")
    picture, mask = scene()
    drawn = [each("red circle", seed=1, num_inference_steps=2)[0].image.tobytes() for each in (pipe, other)]
    assert drawn[0] == drawn[1]
    parts = [inpaint(each, picture, mask, "red circle", seed=1, num_inference_steps=2).tobytes() for each in (pipe, other)]
    assert parts[0] == parts[1]


def test_case_05_other_channels_are_named(model_folder: Path, tmp_path: Path) -> None:
    pipe = LatentPipeline.from_pretrained(with_unet(model_folder, tmp_path / "edits", 8), device="cpu")
    for call in (lambda: pipe("red", num_inference_steps=1), lambda: inpaint(pipe, *scene(), "red", num_inference_steps=1)):
        with pytest.raises(UserError, match=r"does not draw from a prompt alone \(its UNet takes 8 channels"):
            call()
