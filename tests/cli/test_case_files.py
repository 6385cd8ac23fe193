"""Weights as people keep them: in shards, under other suffixes, behind links; and a user who has no home."""

from __future__ import annotations

import json
import pwd
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentpipe import LatentPipeline, UserError
from latentpipe.checkpoints.pipeline_io import hashes, load_pipeline
from latentpipe.checkpoints.registry import available
from latentpipe.checkpoints.tensor_source import VAE_FILE
from latentpipe.checkpoints.vae_io import load_vae, vae_hash
from latentpipe.cli.app import main
from latentpipe.lora.extract import extract_models
from latentpipe.utils.io import home, own_home, read_tensors
from latentpipe.utils.logging import quiet


@pytest.fixture
def sharded(model_folder: Path, tmp_path: Path) -> Path:
    """The model, each of its networks in shards as diffusers and transformers write them."""
    target = tmp_path / "sharded"
    with quiet():
        load_pipeline(model_folder).save_pretrained(target, max_shard_size="40KB")
    for part in ("unet", "vae", "text_encoder"):
        assert len(list((target / part).glob("*-of-*.safetensors"))) > 1, part
        assert not list((target / part).glob("model.safetensors")), part
    return target


def test_case_01_a_sharded_model_draws_and_hashes_as_the_whole_one(
    pipe: LatentPipeline, model_folder: Path, sharded: Path, tmp_path: Path, capsys: Any
) -> None:
    whole = tmp_path / "whole"
    with quiet():
        load_pipeline(model_folder).save_pretrained(whole)  # in fp32, as the shards are
    other = LatentPipeline.from_pretrained(sharded, device="cpu")
    assert hashes(sharded) == hashes(whole)
    drawn = [each("red circle", seed=1, num_inference_steps=2)[0].image.tobytes() for each in (pipe, other)]
    assert drawn[0] == drawn[1]
    assert main(["inspect", str(sharded)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"]["unet"] == sum(value.numel() for value in pipe.host.unet.state_dict().values())
    assert told["hashes"] == hashes(whole)
    with pytest.raises(UserError):
        extract_models(sharded, whole, 1)  # both are read, and there is no difference to extract


def test_case_01_a_sharded_model_is_swapped_and_saved(sharded: Path, vae_folder: Path, tmp_path: Path) -> None:
    assert main(["swap", "--model", str(sharded), "--vae", str(vae_folder), "--out", str(tmp_path / "swapped")]) == 0
    LatentPipeline.from_pretrained(tmp_path / "swapped", device="cpu")("red", seed=1, num_inference_steps=1)
    assert hashes(tmp_path / "swapped")["unet"] == hashes(sharded)["unet"]


def test_case_01_a_shard_that_is_missing_is_named(sharded: Path) -> None:
    gone = sorted((sharded / "unet").glob("*-of-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=gone.name):
        load_pipeline(sharded)
    with pytest.raises(UserError, match=gone.name):
        hashes(sharded)


@pytest.mark.parametrize("name", ["ae.sft", "0123abcd", "model.ckpt", "vae.safetensors.download"])
def test_case_07_a_safetensors_file_is_known_by_its_header(vae_folder: Path, tmp_path: Path, name: str, capsys: Any) -> None:
    file = tmp_path / name
    shutil.copy(vae_folder / VAE_FILE, file)
    link = tmp_path / "blobs" / "f" / ("e" * 64)
    link.parent.mkdir(parents=True)
    link.symlink_to(file)
    plain = tmp_path / "plain.safetensors"
    shutil.copy(vae_folder / VAE_FILE, plain)
    stated = {"scaling_factor": 1.0, "norm_groups": 4}
    for path in (file, link):
        assert vae_hash(path, **stated) == vae_hash(plain, **stated)
        built = [load_vae(each, **stated).decoder.conv_in.weight for each in (path, plain)]
        assert torch.equal(*built)
    assert main(["convert", str(file), "--scaling-factor", "1", "--norm-groups", "4", "--out", str(tmp_path / "out")]) == 0


def test_case_07_adapters_and_installed_files_of_another_suffix(
    own_home: Path, vae_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    lora = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(1, 4, 1, 1)}
    lora |= {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(4, 1, 1, 1)}
    for folder, tensors in (("lora", lora), ("vae", load_file(vae_folder / VAE_FILE))):
        (own_home / folder).mkdir()
        save_file(tensors, own_home / folder / "mine.sft")
        assert available(folder)["mine"] == own_home / folder / "mine.sft"
    blob = tmp_path / ("d" * 40)
    shutil.copy(own_home / "lora" / "mine.sft", blob)
    for path in (blob, own_home / "lora" / "mine.sft", "mine"):
        assert main(["inspect", str(path)]) == 0
        assert json.loads(capsys.readouterr().out)["layout"] == "kohya"
    assert main(["lora", "convert", str(blob), "--out", str(tmp_path / "out.safetensors")]) == 0


@pytest.mark.parametrize("name", ["ae.sft", "0123abcd", "x.ckpt"])
def test_case_07_a_pickle_of_any_name_is_refused_and_converted(vae_folder: Path, tmp_path: Path, name: str) -> None:
    torch.save({"state_dict": load_file(vae_folder / VAE_FILE)}, tmp_path / name)
    with pytest.raises(UserError, match=r"not a complete safetensors file|pickle"):
        read_tensors(tmp_path / name)
    with pytest.raises(UserError, match=r"not a complete safetensors file|pickle"):
        load_vae(tmp_path / name)
    done = main(["convert", str(tmp_path / name), "--scaling-factor", "1", "--norm-groups", "4", "--out", str(tmp_path / "out")])
    assert done == (2 if name.endswith(".sft") else 0)


def test_case_33_a_user_without_home_and_name_reads_and_is_told_what_to_set(
    monkeypatch: pytest.MonkeyPatch, vae_folder: Path, pictures: Path, capsys: Any
) -> None:
    def nobody(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "LATENTPIPE_HOME", "XDG_DATA_HOME", "LOCALAPPDATA", "USERPROFILE", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(RuntimeError):
        Path.home()  # else this test proves nothing
    assert "emoji" in available()
    assert not home().exists()
    with pytest.raises(UserError, match="set LATENTPIPE_HOME"):
        own_home()
    for verb in (["ls"], ["inspect", "emoji"], ["env"], ["inspect", str(vae_folder)]):
        assert main(verb) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["fit-adapter", "--from", "emoji", "--to", "emoji-tiny", "--images", str(pictures)]) == 2
    error = capsys.readouterr().err
    assert "LATENTPIPE_HOME" in error
    assert "Traceback" not in error
    monkeypatch.setenv("LATENTPIPE_HOME", "/some/where")
    assert own_home() == Path("/some/where")
