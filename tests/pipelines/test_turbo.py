"""Turbo: the LoRA that was distilled from a model is found by the model's hashes, and brings its settings along."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import grey_levels, write_pictures
from PIL import Image

from latentpipe import LatentPipeline, UserError
from latentpipe.cli.app import main
from latentpipe.pipelines.metadata.recipe import read


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A LoRA that was distilled from the tiny model in two steps, by the verb."""
    root = tmp_path_factory.mktemp("turbo")
    pictures = write_pictures(root / "shapes")
    out = root / "quick.safetensors"
    words = ["distil", str(model_folder), "--pictures", str(pictures), "--out", str(out), "--training-steps", "2"]
    assert main([*words, "--batch-size", "4", "--steps", "3"]) == 0
    assert (root / "quick-run" / "checkpoints").is_dir()
    return out


@pytest.fixture
def ready(turbo: Path, own_home: Path) -> Path:
    """The same, installed."""
    (own_home / "lora").mkdir()
    return Path(shutil.copy(turbo, own_home / "lora" / "quick.safetensors"))


def test_it_is_drawn_with_its_own_steps_and_replayed(ready: Path, model_folder: Path, tmp_path: Path) -> None:
    pipe = LatentPipeline.from_pretrained(model_folder, turbo=True)
    (picture,) = pipe("red circle", seed=3)
    recipe = picture.recipe
    assert (recipe.steps, recipe.guidance, recipe.loras) == (3, 1.0, {"quick": 1.0})
    assert pipe("red circle", seed=3, num_inference_steps=5)[0].recipe.steps == 5
    by_hand = LatentPipeline.from_pretrained(model_folder)
    assert by_hand("red circle", seed=3)[0].recipe.steps == 20
    by_hand.attach_lora("quick")
    assert grey_levels(by_hand("red circle", seed=3, num_inference_steps=3, guidance_scale=1.0)[0].image, picture.image) == 0


def test_the_command_line_draws_with_it(ready: Path, installed: str, tmp_path: Path) -> None:
    assert main(["generate", "red circle", "--model", installed, "--turbo", "--seed", "3", "--out", str(tmp_path / "a.png")]) == 0
    assert read(tmp_path / "a.png").steps == 3
    assert main(["replay", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png")]) == 0
    with Image.open(tmp_path / "a.png") as first, Image.open(tmp_path / "b.png") as second:
        assert grey_levels(first, second) == 0


def test_a_model_without_one_is_told_how_to_make_it(model_folder: Path, own_home: Path) -> None:
    with pytest.raises(UserError, match=r"No LoRA that is installed was distilled from model .*latentpipe distil"):
        LatentPipeline.from_pretrained(model_folder, turbo=True)


def test_one_of_another_model_is_not_taken(ready: Path, model_copy: Path) -> None:
    from safetensors.torch import save_file

    from latentpipe.utils.io import read_tensors

    weights = model_copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.01 for name, value in read_tensors(weights).items()}, weights)
    with pytest.raises(UserError, match="latentpipe distil"):
        LatentPipeline.from_pretrained(model_copy, turbo=True)
