"""Whole models of the other families: saved by diffusers, opened, drawn with, swapped and replayed by us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_hosts
import torch
from helpers import draw_shape
from PIL import Image

from latentpipe import LatentPipeline, UserError, replay
from latentpipe.checkpoints.pipeline_io import load_pipeline
from latentpipe.cli.app import main

NAMES = ("sdxl", "sd3", "flux", "sana", "sprint")


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline of the family; not to be written to."""
    path = tmp_path_factory.mktemp("families") / family
    tiny_hosts.complete(family).save_pretrained(path)
    return path


def settings(family: str) -> dict[str, Any]:
    return {"size": (64, 64) if family in ("sana", "sprint") else (32, 32), "num_inference_steps": 2, "guidance_scale": 2.0}


@pytest.mark.numeric
def test_pictures_are_the_hosts_own(family: str, folder: Path) -> None:
    pipe = LatentPipeline.from_pretrained(folder, device="cpu")
    ours = pipe("abc", seed=4, **settings(family))[0]
    width, height = settings(family)["size"]
    more = {"use_resolution_binning": False} if family in ("sana", "sprint") else {}
    stock = tiny_hosts.quiet(load_pipeline(folder))
    theirs = stock(
        prompt=["abc"], width=width, height=height, num_inference_steps=2, guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(4)], output_type="np", **more,
    ).images[0]  # fmt: skip
    assert np.abs(np.asarray(ours.image, np.float64) / 255 - theirs).max() <= 0.5 / 255 + 1e-5
    assert ours.recipe.hashes["vae"] == pipe.hashes["vae"]
    assert {"scheduler", "text_encoder", "vae", "tokenizer"} < set(ours.recipe.hashes)


def test_drawn_from_the_command_line_and_replayed(family: str, folder: Path, tmp_path: Path) -> None:
    side = str(settings(family)["size"][0])
    arguments = ["generate", "abc", "--model", str(folder), "--steps", "2", "--size", side, "--seed", "3"]
    assert main([*arguments, "--out", str(tmp_path), "--device", "cpu"]) == 0
    picture = next(tmp_path.glob("*.png"))
    with Image.open(picture) as drawn:
        assert drawn.size == (int(side),) * 2
    assert replay(picture, model=folder, device="cpu").difference == 0


def test_stopping_keeps_the_partial_picture(family: str, folder: Path) -> None:
    pipe = LatentPipeline.from_pretrained(folder, device="cpu")
    seen = []

    def on_step(step: Any) -> bool:
        seen.append(step.latents.shape)
        return step.step == 1

    picture = pipe("abc", seed=4, on_step=on_step, **settings(family) | {"num_inference_steps": 4})[0]
    assert picture.recipe.stopped_after == 1
    assert seen[0] == (1, pipe.stage.space.channels, *(side // pipe.stage.space.downscale for side in settings(family)["size"]))


def test_beginning_from_a_picture(family: str, folder: Path) -> None:
    pipe = LatentPipeline.from_pretrained(folder, device="cpu")
    given = settings(family) | {"image": draw_shape("red", "circle"), "strength": 0.6, "num_inference_steps": 4}
    if family == "sana":
        with pytest.raises(UserError, match="Sana has no pipeline that begins from a picture"):
            pipe("abc", seed=1, **given)
        return
    first, second = (pipe("abc", seed=1, **given)[0].image for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != pipe("abc", seed=1, **given | {"image": draw_shape("blue", "bar")})[0].image.tobytes()


def test_what_a_family_cannot_do_is_refused(family: str, folder: Path) -> None:
    pipe = LatentPipeline.from_pretrained(folder, device="cpu")
    with pytest.raises(UserError, match="cannot switch its guidance step by step"):
        pipe("abc", seed=1, **settings(family) | {"guidance_interval": (0.0, 0.5)})
    if family != "sdxl":
        with pytest.raises(UserError, match="draws by flow matching"):
            pipe("abc", seed=1, scheduler="ddim", **settings(family))
    if family in ("flux", "sprint"):
        with pytest.raises(UserError, match="takes no negative prompt"):
            pipe("abc", seed=1, negative_prompt="x", **settings(family))
    with pytest.raises(UserError, match="sides must be multiples of"):
        pipe("abc", seed=1, **settings(family) | {"size": (36, 36)})


@pytest.mark.slow
def test_swap_and_save(family: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The family's own VAE, stored elsewhere: the same space; the saved pipeline opens with stock diffusers."""
    import diffusers

    vae = tmp_path / "same"
    load_pipeline(folder).vae.save_pretrained(vae)
    out = tmp_path / "out"
    assert main(["swap", "--model", str(folder), "--vae", str(vae), "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("same space: ")
    index = json.loads((out / "model_index.json").read_text())
    again = getattr(diffusers, index["_class_name"]).from_pretrained(out)
    assert again.vae_scale_factor == load_pipeline(folder).vae_scale_factor
    first, second = (
        LatentPipeline.from_pretrained(place, device="cpu")("abc", seed=1, **settings(family))[0] for place in (folder, out)
    )
    assert first.image.tobytes() == second.image.tobytes()
    assert first.recipe.hashes["vae"] == second.recipe.hashes["vae"]


def test_damaged_parts_are_named(family: str, folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    part = "unet" if (copy / "unet").is_dir() else "transformer"
    weights = next((copy / part).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{part}.*not a complete safetensors file"):
        load_pipeline(copy)
    weights.unlink()
    with pytest.raises(UserError, match=part):
        load_pipeline(copy)
