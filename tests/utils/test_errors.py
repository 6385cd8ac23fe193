"""What people are told: plurals, numbers, the nearest word, and wrong types."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentpipe import LatentPipeline, UserError
from latentpipe.utils.errors import counted, expect, near, short


def test_one_picture_is_no_pictures() -> None:
    assert [counted(n, "picture") for n in (0, 1, 2, 1000)] == ["0 pictures", "1 picture", "2 pictures", "1,000 pictures"]
    assert counted(2, "entry", "entries") == "2 entries"


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(120.0, 2, "120"), (99.6, 2, "100"), (12345.0, 3, "12,300"), (0.00123, 2, "0.0012"), (1.5, 3, "1.5"), (0.0, 3, "0")],
)
def test_numbers_are_written_as_people_write_them(value: float, digits: int, text: str) -> None:
    assert short(value, digits) == text


def test_the_nearest_word() -> None:
    assert near("Emjoi", ["emoji", "flat"]) == " Did you mean 'emoji'?"
    assert near("zzz", ["emoji"]) == near("x", []) == ""


@pytest.mark.parametrize(
    ("value", "kinds", "right"), [(3, float, True), (True, int, False), (True, bool, True), ("3", int, False)]
)
def test_types(value: Any, kinds: Any, right: bool) -> None:
    if right:
        expect("n", value, kinds, "a number")
    else:
        with pytest.raises(UserError, match=r"n is .*; expected a number\."):
            expect("n", value, kinds, "a number")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt": 3}, "prompt is 3, of type int"),
        ({"prompt": ["red", "blue"]}, "expected one text"),
        ({"num_inference_steps": "20"}, "num_inference_steps is '20', of type str"),
        ({"num_inference_steps": 2.5}, "whole number"),
        ({"guidance_scale": None}, "guidance_scale is None"),
        ({"n": "2"}, "n is '2'"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"size": 64}, "size is 64"),
        ({"size": "64"}, "width and height"),
        ({"size": (64, 64, 3)}, "width and height"),
        ({"size": (64.0, 64)}, "whole pixels"),
        ({"guidance_interval": 0.5}, "two shares"),
        ({"image": "x.png"}, "PIL picture"),
        ({"negative_prompt": None}, "negative_prompt is None"),
        ({"scheduler": 3}, "scheduler is 3"),
        ({"stpes": 3}, "there is no setting 'stpes'.*Did you mean 'num_inference_steps'"),
    ],
)
def test_wrong_types_are_told(pipe: LatentPipeline, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        pipe(**({"prompt": "x"} | given))


def test_what_is_no_pipeline_is_told(pipe: LatentPipeline) -> None:
    with pytest.raises(UserError, match=r"LatentPipeline was given 'emoji'.*from_pretrained"):
        LatentPipeline("emoji")
    with pytest.raises(UserError, match="was given UNet2DConditionModel"):
        LatentPipeline(pipe.host.unet)
    for wrong in (3, None, ["emoji"]):
        with pytest.raises(UserError, match=r"model is .*expected a name"):
            LatentPipeline.from_pretrained(wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="vae is 3"):
        LatentPipeline.from_pretrained("emoji", 3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="device is 0"):
        LatentPipeline.from_pretrained("emoji", device=0)  # type: ignore[arg-type]


def test_what_is_no_vae_is_told() -> None:
    from latentpipe import VAEStage

    for wrong in ("emoji", 3, None):
        with pytest.raises(UserError, match=r"VAEStage was given .*stage_of opens names"):
            VAEStage(wrong)  # type: ignore[arg-type]


def test_alarms_name_keys_that_configs_have() -> None:
    from latentpipe.train import config
    from latentpipe.train.config.base import _keys

    known = {f"{prefix}{name}" for prefix, name in _keys(config.TrainVAE)}
    groups = "|".join(sorted({key.split(".")[0] for key in known if "." in key}))
    tree = ast.parse((Path(__file__).parents[2] / "latentpipe" / "evaluate" / "diagnosis.py").read_text())
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    named = {key for text in texts for key in re.findall(rf"\b(?:{groups})\.[a-z_0-9]+", text)}
    assert len(named) > 5
    assert named <= known


def test_a_pipeline_from_elsewhere_has_the_hashes_of_its_files(pipe: LatentPipeline, model_folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    host = StableDiffusionPipeline.from_pretrained(model_folder, local_files_only=True)
    mine = LatentPipeline(host)
    assert dict(mine.hashes) == dict(pipe.hashes)
    assert mine("x", num_inference_steps=1, seed=1)[0].recipe.hashes == pipe("x", num_inference_steps=1, seed=1)[0].recipe.hashes
    changed = LatentPipeline(host)
    with __import__("torch").no_grad():
        host.unet.conv_in.weight.add_(0.001)
    assert changed.hashes["unet"] != pipe.hashes["unet"]
    assert changed.hashes["vae"] == pipe.hashes["vae"]


def test_a_picture_is_stored_as_its_ending_says(pipe: LatentPipeline, tmp_path: Path) -> None:
    (picture,) = pipe("red circle", num_inference_steps=1, seed=-1)
    for name, kind in (("a.jpg", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP"), ("a.png", "PNG"), ("a", "PNG")):
        with Image.open(picture.save(tmp_path / name)) as stored:
            assert stored.format == kind
    with pytest.raises(UserError, match=r"\.png, \.jpg, \.jpeg, \.webp"):
        picture.save(tmp_path / "a.bmp")
    with pytest.raises(UserError, match="path is 3"):
        picture.save(3)  # type: ignore[arg-type]
