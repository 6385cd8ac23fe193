"""The verbs and the API take single files as they take folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sized
import torch
from safetensors.torch import load_file, save_file
from written import write

from latentpipe import LatentPipeline, UserError, check_swap, replay
from latentpipe.checkpoints.pipeline_io import former_hash, hashes, load_pipeline
from latentpipe.checkpoints.registry import available, find_model
from latentpipe.checkpoints.single_file.gather import Stated
from latentpipe.checkpoints.vae_io import open_vae, save_vae
from latentpipe.cli.app import main
from latentpipe.engine.pipeline_cache import PipelineCache
from latentpipe.pipelines.metadata import recipe as recipes
from latentpipe.pipelines.verdict_cache import verdict_on


def test_generate_draws_from_a_file_what_it_draws_from_the_folder(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    folder, config, file = made("sd1")
    shared = ["generate", "red apple", "--steps", "2", "--seed", "3", "--size", "32"]
    assert main([*shared, "--model", str(folder), "--out", str(tmp_path / "one.png")]) == 0
    assert main([*shared, "--model", str(file), "--config", str(config), "--out", str(tmp_path / "two.png")]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "one.png")), np.asarray(Image.open(tmp_path / "two.png")))
    assert main([*shared, "--model", str(file), "--out", str(tmp_path / "three.png")]) == 2
    assert "Give its config folder with --config" in capsys.readouterr().err
    assert not (tmp_path / "three.png").exists()


def test_the_api_opens_files_and_hashes_them_as_the_folder(made: Any) -> None:
    folder, config, file = made("sd1")
    stated = Stated(config=config)
    pipe = LatentPipeline.from_pretrained(file, device="cpu", stated=stated)
    other = LatentPipeline.from_pretrained(folder, device="cpu")
    one, two = (each("red apple", seed=1, num_inference_steps=2, size=(32, 32))[0] for each in (pipe, other))
    assert np.array_equal(np.asarray(one.image), np.asarray(two.image))
    assert one.recipe.hashes["vae"] == two.recipe.hashes["vae"]
    assert one.recipe.hashes["unet"] == two.recipe.hashes["unet"]
    assert dict(hashes(file, stated)) == one.recipe.hashes
    assert one.recipe.model == "model"


def test_a_prediction_that_is_stated_changes_the_picture_and_the_hash(made: Any) -> None:
    _, config, file = made("sd1")
    pipes = [
        LatentPipeline.from_pretrained(file, device="cpu", stated=Stated(config=config, prediction=kind))
        for kind in (None, "v", "v-zsnr")
    ]
    assert [pipe.host.scheduler.config.prediction_type for pipe in pipes] == ["epsilon", "v_prediction", "v_prediction"]
    assert pipes[2].host.scheduler.config.rescale_betas_zero_snr
    assert len({pipe.hashes["scheduler"] for pipe in pipes}) == 3
    assert len({pipe("red apple", seed=1, num_inference_steps=2, size=(32, 32))[0].image.tobytes() for pipe in pipes}) == 3


def test_files_in_the_model_folder_have_names(made: Any, own_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, config, file = made("sd1")
    (own_home / "models" / "people").mkdir(parents=True)
    place = Path(shutil.copy(file, own_home / "models" / "people" / "mine.safetensors"))
    assert available("models")["people/mine"] == place
    assert find_model("mine") == place
    assert main(["ls", "models"]) == 0
    assert "people/mine" in capsys.readouterr().out
    shutil.copytree(config, own_home / "models" / "people" / "mine")
    with pytest.raises(UserError, match="is both"):
        find_model("people/mine")


def test_inspect_tells_what_is_assumed(tmp_path: Path, made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = sized.hollow(sized.whole("sdxl") | {"v_pred": (), "ztsnr": ()}, tmp_path / "model.safetensors")
    assert main(["inspect", str(file)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["family"], told["role"], told["opens_as"]) == ("sdxl", "model", "StableDiffusionXLPipeline")
    assert (told["prediction"], told["zero_terminal_snr"]) == ("v_prediction", True)
    assert "marker keys" in told["known_from"]
    assert told["parameters"]["denoiser"] == 2_567_463_684
    assert main(["inspect", str(file), "--prediction", "epsilon"]) == 0
    assert json.loads(capsys.readouterr().out)["known_from"] == "stated"
    _, config, tiny = made("sd1")
    assert main(["inspect", str(tiny), "--config", str(config)]) == 0
    assert json.loads(capsys.readouterr().out)["configs"] == str(config)
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert main(["inspect", str(tmp_path / "pointer.safetensors")]) == 2
    assert "git LFS pointer" in capsys.readouterr().err


def test_the_vae_of_a_whole_file_has_the_factor_of_its_family(tmp_path: Path) -> None:
    for family, factor in (("sd1", 0.18215), ("sdxl", 0.13025)):
        vae = open_vae(
            sized.hollow(sized.whole(family), tmp_path / f"{family}.safetensors")
        )  # nothing could be measured on zeros
        assert (vae.config["scaling_factor"], vae.config["norm_num_groups"]) == (factor, 32)


def test_a_vae_is_judged_beside_a_file_and_swapped_into_a_folder(made: Any, tmp_path: Path) -> None:
    folder, config, file = made("sd1")
    pipe = load_pipeline(file, stated=Stated(config=config))
    assert check_swap(pipe, folder / "vae").outcome == check_swap(load_pipeline(folder), folder / "vae").outcome
    narrow = tmp_path / "narrow"
    from helpers import tiny_vae

    save_vae(tiny_vae(), narrow, {})
    with pytest.raises(UserError, match="was not put in"):  # by its header, before anything is opened
        LatentPipeline.from_pretrained(file, vae=str(narrow), device="cpu", stated=Stated(config=config))
    assert not verdict_on(sized.hollow(sized.whole("sd1"), tmp_path / "whole.safetensors"), narrow).fits


@pytest.mark.parametrize("apart", [False, True])
def test_a_vae_is_swapped_into_a_file_which_becomes_a_folder(tmp_path: Path, made: Any, apart: bool) -> None:
    folder, config, file = made("sd1")
    tensors = load_file(file)
    vae = {name: value for name, value in tensors.items() if name.startswith("first_stage_model.")}
    kept = {name: value for name, value in tensors.items() if not (apart and name in vae)}
    own, part = write(kept, tmp_path / "model.safetensors"), write(vae, tmp_path / "ae.safetensors")
    verb = ["swap", "--model", str(own), "--vae", str(folder / "vae"), "--config", str(config)]
    verb += ["--parts", str(part)] if apart else []
    assert main(verb) == 0
    assert main([*verb, "--out", str(tmp_path / "out")]) == 0
    ours, whole = load_pipeline(tmp_path / "out").unet.state_dict(), load_pipeline(folder).unet.state_dict()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["vae_hash"] == hashes(own, Stated(config=config, parts=(part,)))["vae"]
    assert card["swapped_vae"]["verdict"]["outcome"] == "same space"
    if apart:
        pipe = LatentPipeline.from_pretrained(own, folder / "vae", device="cpu", stated=Stated(config=config, parts=(part,)))
        assert pipe.vae_name == "vae"


def test_folders_with_fp16_variants_and_shards_open_and_pickles_alone_name_convert(made: Any, tmp_path: Path) -> None:
    folder, _, _ = made("sd1")
    from diffusers import StableDiffusionPipeline

    whole = load_pipeline(folder)
    StableDiffusionPipeline.save_pretrained(load_pipeline(folder).to(torch.float16), tmp_path / "half", variant="fp16")
    assert load_pipeline(tmp_path / "half", None).unet.dtype == torch.float16
    whole.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert torch.equal(load_pipeline(tmp_path / "shards").unet.conv_in.weight, whole.unet.conv_in.weight)
    copy = Path(shutil.copytree(folder, tmp_path / "pickles"))
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"as a pickle alone .*latentpipe convert"):
        load_pipeline(copy)
    with pytest.raises(UserError, match="is a diffusers folder, which says itself"):
        load_pipeline(folder, stated=Stated(prediction="v"))


def test_a_lora_or_a_vae_in_place_of_a_model_is_told_with_its_option(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = write({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(4, 8)}, tmp_path / "flat.safetensors")
    vae = made("sd1")[0] / "vae" / "diffusion_pytorch_model.safetensors"
    for file, said in ((lora, "holds a LoRA"), (vae, "holds a VAE and no denoiser")):
        assert main(["generate", "red apple", "--model", str(file), "--out", str(tmp_path / "out")]) == 2
        told = capsys.readouterr().err
        assert said in told
        assert f"Give it with --{'lora' if file is lora else 'vae'}" in told


def test_a_suffix_and_a_name_decide_nothing(made: Any, tmp_path: Path) -> None:
    _, config, file = made("sdxl")
    for name in ("model.sft", "model", "model.ckpt", "sd15-inpainting-v_pred.bin"):
        copy = write(load_file(file), tmp_path / "again.safetensors").rename(tmp_path / name)
        assert type(load_pipeline(copy, stated=Stated(config=config))).__name__ == "StableDiffusionXLPipeline"


def test_text_encoders_have_one_hash_whatever_names_their_tensors_have(made: Any, tmp_path: Path) -> None:
    folder, config, file = made("sd1")
    stated = Stated(config=config)
    bare, named = (Path(shutil.copytree(folder, tmp_path / name)) for name in ("bare", "named"))
    source = "text_encoder/model.safetensors"
    tensors = {name.removeprefix("text_model."): value for name, value in load_file(folder / source).items()}
    save_file(tensors, bare / source)
    save_file({f"text_model.{name}": value for name, value in tensors.items()}, named / source)
    found = [hashes(place, given)["text_encoder"] for place, given in ((bare, None), (named, None), (file, stated))]
    pipe = LatentPipeline(load_pipeline(bare))
    assert len({*found, pipe.hashes["text_encoder"]}) == 1
    before = former_hash(bare, None, "text_encoder")
    assert before not in (found[0], None)
    assert former_hash(named, None, "text_encoder") == former_hash(file, stated, "text_encoder") == found[0]
    assert former_hash(bare, None, "unet") is None
    drawn = LatentPipeline.from_pretrained(bare, device="cpu")("red", seed=1, num_inference_steps=1, size=(32, 32))[0]
    old = drawn.recipe.model_copy(update={"hashes": {**drawn.recipe.hashes, "text_encoder": before}})
    recipes.save(drawn.image, tmp_path / "x.png", old)
    for place, given in ((bare, {}), (named, {}), (file, {"config": config})):
        if place == bare:  # as it was then
            assert replay(tmp_path / "x.png", place, device="cpu", **given).difference == 0
        else:
            with pytest.raises(UserError, match="text_encoder is"):
                replay(tmp_path / "x.png", place, device="cpu", **given)


def test_the_page_opens_a_file_that_others_complete(made: Any, own_home: Path) -> None:
    folder, config, file = made("sd1")
    (own_home / "models").mkdir()
    place = Path(shutil.copy(file, own_home / "models" / "mine.safetensors"))
    cache = PipelineCache(device="cpu")
    with pytest.raises(UserError):
        cache.open("mine")  # a tiny model is of no known family
    cache.stated[place] = Stated(config=config)
    assert cache.open("mine").stated is not None
    assert cache.verdict("mine", folder / "vae").fits
