"""Verdicts on files: other shapes by the header alone, the rest measured once for the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_vae

from latentpipe import LatentPipeline, UserError
from latentpipe.checkpoints import tensor_source
from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import declared_space, save_vae
from latentpipe.cli.app import main
from latentpipe.compatibility.measure import Verdict
from latentpipe.pipelines import verdict_cache
from latentpipe.pipelines.verdict_cache import fitting, judged, verdict_on


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading any tensor is an error."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(tensor_source, "read_tensors", refuse)
    monkeypatch.setattr(tensor_source, "_read_shards", refuse)
    monkeypatch.setattr("latentpipe.checkpoints.pipeline_io.read_tensors", refuse)


@pytest.mark.usefixtures("no_weights")
def test_another_shape_is_told_by_the_headers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = verdict_on("emoji", "emoji-vector")
    assert verdict.outcome == "other shape"
    assert verdict.evidence is None
    with pytest.raises(SystemExit) as end:
        main(["swap", "--vae", "emoji-vector", "--json"])
    assert end.value.code == 1
    assert json.loads(capsys.readouterr().out)["outcome"] == "other shape"
    with pytest.raises(UserError, match="VAE emoji-vector was not put in"):
        LatentPipeline.from_pretrained("emoji", vae="emoji-vector", device="cpu")


@pytest.mark.parametrize("name", ["emoji", "emoji-tiny", "emoji-vector", "emoji-codec"])
def test_what_the_header_says_is_what_the_file_is(name: str, tmp_path: Path) -> None:
    from latentpipe.checkpoints.vae_io import open_vae

    place = find_model(name, "vae")
    declared, opened = declared_space(place), open_vae(place).space
    assert (declared.channels, declared.downscale) == (opened.channels, opened.downscale)


def test_a_single_file_without_a_config(tmp_path: Path) -> None:
    assert main(["convert", "emoji", "--to", "ldm", "--out", str(tmp_path / "vae.safetensors")]) == 0
    space = declared_space(tmp_path / "vae.safetensors")
    assert (space.channels, space.downscale) == (8, 4)


def test_verdicts_are_kept_and_read_again(model_folder: Path, vae_copy: Path, own_home: Path, monkeypatch: Any) -> None:
    first = verdict_on(model_folder, vae_copy)
    assert first.outcome == "same space"
    kept = list((own_home / "verdicts").glob("*.json"))
    assert len(kept) == 1
    assert Verdict.from_dict(json.loads(kept[0].read_text())) == first
    measured: list[Any] = []
    monkeypatch.setattr(verdict_cache, "judge_stages", lambda *stages: measured.append(stages) or first)
    assert verdict_on(model_folder, vae_copy) == first
    assert not measured
    kept[0].write_text("{")
    assert verdict_on(model_folder, vae_copy) == first
    assert len(measured) == 1
    verdict_on(model_folder, vae_copy, torch.zeros(4, 3, 16, 16))
    assert len(measured) == 2  # given pictures are always measured
    save_vae(tiny_vae(3), vae_copy, {})
    verdict_on(model_folder, vae_copy)
    assert len(measured) == 3


def test_a_home_without_rights_costs_time_only(model_folder: Path, vae_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LATENTPIPE_HOME", str(tmp_path / "file"))
    assert verdict_on(model_folder, vae_folder).fits


def test_stages_that_no_file_vouches_for_are_not_kept(model_folder: Path, own_home: Path) -> None:
    from latentpipe import VAEStage

    assert judged(VAEStage(tiny_vae()), VAEStage(tiny_vae())).fits
    assert not (own_home / "verdicts").exists()


def test_the_list_opens_no_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the whole model was opened")

    monkeypatch.setattr(verdict_cache, "load_pipeline", refuse)
    found = {name: verdict for name, _, verdict in fitting("emoji")}
    assert found["emoji"].encodes
    assert found["emoji-decoder-ft"].encodes
    assert found["emoji-tiny"].outcome == "decoder fits"
    assert not found["emoji-eq"].fits
    assert found["emoji-vector"].evidence is None


def test_a_model_that_does_not_fit_itself_says_so(model_copy: Path, vae_folder: Path) -> None:
    import shutil

    shutil.rmtree(model_copy / "vae")
    save_vae(tiny_vae(latent_channels=6), model_copy / "vae", {})
    (model_copy / "card.json").unlink()
    with pytest.raises(UserError, match="does not fit itself"):
        verdict_on(model_copy, vae_folder)


def test_img2img_through_a_lone_decoder_begins_from_the_models_own_encoder() -> None:
    own = LatentPipeline.from_pretrained("emoji", device="cpu")
    tiny = LatentPipeline.from_pretrained("emoji", vae="emoji-tiny", device="cpu")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert torch.equal(tiny.stage.encode(images), own.stage.encode(images))
        assert not torch.equal(tiny.stage.decode(tiny.stage.encode(images)), own.stage.decode(own.stage.encode(images)))
    picture = tiny("red apple", seed=7, num_inference_steps=2)[0]
    assert picture.recipe.vae == "emoji-tiny"
    assert picture.recipe.adapter is None
