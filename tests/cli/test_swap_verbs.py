"""`latentpipe swap` and `ls vae --fits`: the printed verdict, the saved pipeline, and the identity chain through it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import edit_json, grey_levels, tiny_vae

from latentpipe import LatentPipeline, LatentSpace, UserError, VAEStage
from latentpipe.checkpoints.pipeline_io import describe, load_pipeline
from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import load_vae, save_vae, vae_hash
from latentpipe.cli.app import main
from latentpipe.utils.io import read_json
from latentpipe.vae.stage import fold_normalization

pytestmark = pytest.mark.slow

ROWS = ["--steps", "2", "--seed", "3", "--device", "cpu"]


def verdict(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = main(["swap", *arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def same_space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded VAE with its normalization declared as scale and shift rather than folded in."""
    vae = load_vae(find_model("emoji", "vae"))
    fold_normalization(vae, LatentSpace(8, 4, (2.5,) * 8, (-0.12,) * 8))
    vae.register_to_config(scaling_factor=0.4, shift_factor=0.3)
    folder = tmp_path_factory.mktemp("vae") / "same-space"
    save_vae(vae, folder, {"base": "emoji"})
    return folder


def test_a_vae_that_fits(same_space: Path, capsys: Any) -> None:
    status, out, _ = verdict(capsys, "--vae", str(same_space))
    assert status == 0
    assert out.startswith("same space: its latents are the host's (R^2 ")
    assert "next: swap it." in out
    assert "this VAE decodes the host's latents" in out


def test_a_vae_that_does_not(model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    save_vae(tiny_vae(5), tmp_path / "other", {})
    arguments = ["--model", str(model_folder), "--vae", str(tmp_path / "other")]
    status, out, _ = verdict(capsys, *arguments, "--json")
    assert status == 1
    assert json.loads(out)["outcome"] == "same shape, other space"
    status, _, err = verdict(capsys, *arguments, "--out", str(tmp_path / "out"))
    assert status == 2
    assert "Nothing was saved: this VAE does not fit (--force saves it all the same)." in err
    assert not (tmp_path / "out").exists()
    status, _, _ = verdict(capsys, *arguments, "--out", str(tmp_path / "out"), "--force")
    assert status == 0
    card = read_json(tmp_path / "out" / "card.json")
    assert card["swapped_vae"]["verdict"]["forced"] is True
    assert card["vae_hash"] == vae_hash(model_folder / "vae")
    assert load_pipeline(tmp_path / "out") is not None
    forced = ["--model", str(tmp_path / "out"), "--vae", str(model_folder / "vae")]
    assert "was put in by force (other), so other VAEs cannot be judged beside it" in verdict(capsys, *forced)[2]
    with pytest.raises(UserError, match="was put in by force"):
        LatentPipeline.from_pretrained(tmp_path / "out", vae=model_folder / "vae", device="cpu")


def test_measured_on_your_own_pictures(same_space: Path, pictures: Path, capsys: Any) -> None:
    status, out, _ = verdict(capsys, "--vae", str(same_space), "--images", str(pictures))
    assert status == 0
    assert "measured on 12 pictures given, 64 px" in out


@pytest.fixture(scope="module")
def saved(same_space: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with that VAE swapped in by the verb; not to be written to."""
    out = tmp_path_factory.mktemp("swapped") / "out"
    assert main(["swap", "--vae", str(same_space), "--out", str(out)]) == 0
    return out


def test_a_saved_swap_draws_with_stock_diffusers_what_we_draw(same_space: Path, saved: Path) -> None:
    """SD1's own code ignores a shift, so it is folded in: nothing is lost on the way."""
    from diffusers import StableDiffusionPipeline

    out = saved
    ours = LatentPipeline.from_pretrained("emoji", vae=same_space, device="cpu")("red apple", seed=7, num_inference_steps=4)[
        0
    ].image
    saved = LatentPipeline.from_pretrained(out, device="cpu")("red apple", seed=7, num_inference_steps=4)[0].image
    stock = StableDiffusionPipeline.from_pretrained(out)
    stock.set_progress_bar_config(disable=True)
    theirs = stock("red apple", generator=[torch.Generator().manual_seed(7)], num_inference_steps=4, guidance_scale=3.0).images[0]
    assert grey_levels(ours, saved) <= 1
    assert grey_levels(saved, theirs) <= 1
    assert read_json(out / "vae" / "card.json")["base"] == "emoji"
    assert describe(str(out))["card"]["swapped_vae"]["hash"] == vae_hash(out / "vae")


def test_the_chain_holds_through_a_swap(same_space: Path, saved: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(saved, tmp_path / "out"))
    assert main(["generate", "red apple", "--model", str(out), "--out", str(tmp_path), *ROWS]) == 0
    shutil.rmtree(out / "vae")
    shutil.copytree(same_space, out / "vae")
    edit_json(out / "vae" / "config.json", scaling_factor=0.5)
    with pytest.raises(UserError, match="its denoiser was trained on latents of VAE 95ad80af4c76"):
        load_pipeline(out)


def test_nothing_is_written_over(model_copy: Path, vae_folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").mkdir()
    given = ["--vae", str(vae_folder), "--model", str(model_copy)]
    status, _, err = verdict(capsys, *given, "--out", str(tmp_path / "out"))
    assert status == 2
    assert "exists already" in err
    status, _, err = verdict(capsys, *given, "--out", str(model_copy / "unet" / "x"))
    assert status == 2
    assert "lies within the model" in err


@pytest.mark.parametrize("form", ["ldm", "diffusers"])
def test_the_same_vae_in_another_format_is_the_same(form: str, tmp_path: Path, capsys: Any) -> None:
    place = tmp_path / ("vae.safetensors" if form == "ldm" else "vae")
    assert main(["convert", "emoji", "--out", str(place)]) == 0
    capsys.readouterr()
    assert vae_hash(place) == vae_hash(find_model("emoji", "vae"))
    status, out, err = verdict(capsys, "--vae", str(place), "--out", str(tmp_path / "out"))
    assert status == 0, err
    assert out.startswith("same space: its latents are the host's (R^2 1.0000)")
    assert vae_hash(tmp_path / "out" / "vae") == vae_hash(find_model("emoji", "vae"))
    first, second = (load_vae(path).state_dict() for path in (place, tmp_path / "out" / "vae"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_list_of_vaes_says_which_fit(same_space: Path, own_home: Path, capsys: Any) -> None:
    shutil.copytree(same_space, own_home / "vae" / "declared")
    save_vae(tiny_vae(), own_home / "vae" / "small", {})
    (own_home / "vae" / "noise.safetensors").write_bytes(b"\x00" * 50)
    assert main(["ls", "vae", "--fits", "emoji"]) == 0
    out, err = capsys.readouterr()
    assert "left out: noise:" in err
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert "same space" in rows["emoji"]
    assert "same space" in rows["declared"]
    assert "other shape" in rows["small"]
    assert list(rows)[-1] == "small"
    assert main(["ls", "models", "--fits", "emoji"]) == 2


def test_generate_refuses_what_the_verdict_refuses(installed: str, own_home: Path, tmp_path: Path, capsys: Any) -> None:
    save_vae(tiny_vae(5), own_home / "vae" / "other", {})
    arguments = ["generate", "red circle", "--model", installed, "--vae", "other", "--out", str(tmp_path), *ROWS]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "VAE other was not put in." in err
    assert "same shape, other space" in err
    assert main([*arguments, "--force"]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--vae", "nothing"], "No VAE 'nothing'"),
        (["--vae", "emoji", "--model", "nothing"], "No model 'nothing'"),
        (["--vae", "emoji", "--images", "nowhere"], "no such folder"),
    ],
)
def test_mistakes(arguments: list[str], said: str, capsys: Any) -> None:
    status, out, err = verdict(capsys, *arguments)
    assert status == 2
    assert said in err
    assert out == ""


def test_an_encoder_alone_says_so() -> None:
    stage = VAEStage(tiny_vae())
    del stage.vae.decoder
    assert not stage.decodes
    with pytest.raises(UserError, match="encoder alone"):
        stage.decode(torch.zeros(1, 4, 8, 8))
