"""Weights: every part is read strictly, saved whole, and found by name."""

from __future__ import annotations

import errno
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import edit_json, some_images, tiny_vae
from safetensors.torch import load_file, save_file

from latentpipe import UserError, VAEStage
from latentpipe.checkpoints import pipeline_io, registry, tensor_source, vae_io

FILE = tensor_source.VAE_FILE


def one_sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    """The message, which has to be short, free of tracebacks and end with a full stop."""
    text = str(error.value)
    assert "Traceback" not in text
    assert text.endswith(".")
    assert len(text) < 900
    return text


# --- strict loading -----------------------------------------------------------------------------------------


def test_a_saved_vae_opens_here_and_in_plain_diffusers_alike(vae_folder: Path) -> None:
    from diffusers import AutoencoderKL

    images = some_images()
    stock = AutoencoderKL.from_pretrained(vae_folder, torch_dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(VAEStage(vae_io.load_vae(vae_folder)).encode(images), stock.encode(images).latent_dist.mode())
    assert load_file(vae_folder / FILE)["quant_conv.weight"].dtype == torch.float16
    assert not vae_io.load_vae(vae_folder).training


def test_a_missing_key_is_named(vae_copy: Path) -> None:
    tensors = load_file(vae_copy / FILE)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, vae_copy / FILE)
    with pytest.raises(UserError) as error:
        vae_io.load_vae(vae_copy)
    assert "missing decoder.conv_in.bias" in one_sentence(error)


def test_an_extra_key_is_named(vae_copy: Path) -> None:
    save_file(load_file(vae_copy / FILE) | {"surplus": torch.zeros(1)}, vae_copy / FILE)
    with pytest.raises(UserError) as error:
        vae_io.load_vae(vae_copy)
    assert "extra surplus" in one_sentence(error)


def test_another_shape_is_named(vae_copy: Path) -> None:
    save_file(load_file(vae_copy / FILE) | {"decoder.conv_in.bias": torch.zeros(3)}, vae_copy / FILE)
    with pytest.raises(UserError) as error:
        vae_io.load_vae(vae_copy)
    assert "decoder.conv_in.bias is (3,), expected (16,)" in one_sentence(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(vae_copy: Path, value: float) -> None:
    tensors = load_file(vae_copy / FILE)
    tensors["decoder.conv_in.bias"][0] = value
    save_file(tensors, vae_copy / FILE)
    with pytest.raises(UserError) as error:
        vae_io.load_vae(vae_copy)
    assert "decoder.conv_in.bias holds values that are not finite" in one_sentence(error)


def test_many_problems_are_counted(vae_copy: Path) -> None:
    save_file({"surplus": torch.zeros(1)}, vae_copy / FILE)
    with pytest.raises(UserError, match=r"and \d+ more"):
        vae_io.load_vae(vae_copy)


def damaged(kind: str, whole: bytes) -> bytes:
    """The bytes of a weight file with one kind of damage."""
    return {
        "truncated": whole[: len(whole) // 2],
        "truncated in the header": whole[:50],
        "empty": b"",
        "random": bytes((i * 7919 + 13) % 256 for i in range(5000)),
        "header of 2^60 bytes": struct.pack("<Q", 2**60) + whole[8:],
        "pickle": pickle.dumps({"decoder.conv_in.bias": [1.0]}),
        "header is no JSON": struct.pack("<Q", 4) + b"nope" + whole,
    }[kind]


@pytest.mark.parametrize(
    "kind", ["truncated", "truncated in the header", "empty", "random", "header of 2^60 bytes", "pickle", "header is no JSON"]
)
def test_damaged_files_are_refused(vae_copy: Path, kind: str) -> None:
    (vae_copy / FILE).write_bytes(damaged(kind, (vae_copy / FILE).read_bytes()))
    with pytest.raises(UserError) as error:
        vae_io.load_vae(vae_copy)
    assert FILE in one_sentence(error)


def test_a_pickle_beside_the_config_is_not_looked_for(vae_copy: Path) -> None:
    tensors = load_file(vae_copy / FILE)
    (vae_copy / FILE).unlink()
    torch.save(tensors, vae_copy / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError) as error:
        vae_io.load_vae(vae_copy)
    assert "no such file; expected weights in safetensors format" in one_sentence(error)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "os", "__builtins__", None, 3, "AutoencoderKL "])
def test_other_classes_are_refused(vae_copy: Path, name: Any) -> None:
    edit_json(vae_copy / "config.json", _class_name=name)
    with pytest.raises(UserError) as error:
        vae_io.load_vae(vae_copy)
    assert "_class_name" in one_sentence(error)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"AutoencoderKL"', "\x00"])
def test_damaged_configs_are_refused(vae_copy: Path, content: str) -> None:
    (vae_copy / "config.json").write_text(content)
    with pytest.raises(UserError) as error:
        vae_io.load_vae(vae_copy)
    assert "config.json" in one_sentence(error)
    (vae_copy / "config.json").unlink()
    with pytest.raises(UserError, match="no such file"):
        vae_io.load_vae(vae_copy)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("damage", ["missing key", "truncated", "no file", "not finite"])
def test_every_part_of_a_pipeline_is_checked(model_copy: Path, part: str, damage: str) -> None:
    path = model_copy / part / pipeline_io.PARTS[part]
    tensors = load_file(path)
    name = sorted(key for key in tensors if key.endswith("bias"))[0]
    if damage == "missing key":
        save_file({key: value for key, value in tensors.items() if key != name}, path)
    elif damage == "not finite":
        tensors[name][0] = float("nan")
        save_file(tensors, path)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    (model_copy / vae_io.CARD_FILE).unlink()  # else a changed VAE is refused for its hash already
    with pytest.raises(UserError) as error:
        pipeline_io.load_pipeline(model_copy)
    assert part in one_sentence(error)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_a_part_without_its_config_is_a_user_error(model_copy: Path, part: str) -> None:
    (model_copy / part / "config.json").unlink()
    with pytest.raises(UserError) as error:
        pipeline_io.load_pipeline(model_copy)
    assert part in one_sentence(error)


@pytest.mark.parametrize("part", ["tokenizer", "scheduler"])
def test_a_missing_part_is_a_user_error(model_copy: Path, part: str) -> None:
    import shutil

    shutil.rmtree(model_copy / part)
    with pytest.raises(UserError) as error:
        pipeline_io.load_pipeline(model_copy)
    assert part in str(error.value)


def test_a_pipeline_class_that_diffusers_lacks_is_refused(model_copy: Path) -> None:
    edit_json(model_copy / "model_index.json", _class_name="NoSuchPipeline")
    with pytest.raises(UserError, match="holds a NoSuchPipeline; expected a pipeline with a VAE of diffusers"):
        pipeline_io.load_pipeline(model_copy)


def test_a_denoiser_beside_another_vae_is_refused(model_copy: Path) -> None:
    edit_json(model_copy / vae_io.CARD_FILE, vae_hash="0" * 64)
    with pytest.raises(UserError) as error:
        pipeline_io.load_pipeline(model_copy)
    text = one_sentence(error)
    assert "0" * 16 in text
    assert vae_io.vae_hash(model_copy / "vae")[:16] in text


def test_plain_libraries_open_the_model_without_us(model_folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model_folder)
    pipe.set_progress_bar_config(disable=True)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    ours = pipeline_io.load_pipeline(model_folder)
    for part in pipeline_io.PARTS:
        first, second = getattr(pipe, part).state_dict(), getattr(ours, part).state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), part
    assert all(name.startswith("text_model.") for name in load_file(model_folder / "text_encoder" / "model.safetensors"))


@pytest.mark.parametrize("prefixed", [True, False])
def test_both_names_of_clip_weights_are_read(model_copy: Path, prefixed: bool) -> None:
    path = model_copy / "text_encoder" / "model.safetensors"
    plain = {name.removeprefix("text_model."): value for name, value in load_file(path).items()}
    plain["embeddings.position_ids"] = torch.arange(16)[None]
    save_file(
        {f"text_model.{name}" if prefixed else name: value for name, value in plain.items()}, path, metadata={"format": "pt"}
    )
    loaded = pipeline_io.load_pipeline(model_copy).text_encoder.state_dict()
    wanted = plain["final_layer_norm.bias"].float()
    assert any(torch.equal(value, wanted) for name, value in loaded.items() if name.endswith("final_layer_norm.bias"))


# --- identity


def test_the_hash_does_not_know_the_file(vae_copy: Path) -> None:
    before = vae_io.vae_hash(vae_copy)
    save_file(dict(reversed(load_file(vae_copy / FILE).items())), vae_copy / FILE, metadata={"made": "today"})
    edit_json(vae_copy / "config.json", sample_size=99)
    assert vae_io.vae_hash(vae_copy) == before


def test_the_vae_hash_knows_the_normalization(vae_copy: Path) -> None:
    before = vae_io.vae_hash(vae_copy)
    edit_json(vae_copy / "config.json", scaling_factor=0.5)
    assert vae_io.vae_hash(vae_copy) != before


def test_saving_returns_the_hash_that_the_file_has(tmp_path: Path) -> None:
    digest = vae_io.save_vae(tiny_vae(3), tmp_path / "vae", {"data": "x"})
    assert digest == vae_io.vae_hash(tmp_path / "vae")
    assert json.loads((tmp_path / "vae" / vae_io.CARD_FILE).read_text()) == {"data": "x", "content_hash": digest}


def test_the_models_card_names_the_hashes_of_its_parts(model_folder: Path, vae_folder: Path) -> None:
    card = json.loads((model_folder / vae_io.CARD_FILE).read_text())
    assert card["hashes"] == pipeline_io.hashes(model_folder)
    assert card["vae_hash"] == card["hashes"]["vae"] == vae_io.vae_hash(vae_folder)


def test_saving_a_vae_does_not_change_the_callers(tmp_path: Path) -> None:
    vae = tiny_vae()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    vae_io.save_vae(vae, tmp_path / "vae", {})
    assert vae.dtype == torch.float32
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())


def test_a_failed_save_leaves_no_vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = tiny_vae()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(vae), "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        vae_io.save_vae(vae, tmp_path / "vae", {})
    assert not list(tmp_path.iterdir())


# --- names --------------------------------------------------------------------------------------------------


def test_names_resolve_among_the_users_own(installed: str, own_home: Path) -> None:
    assert registry.find_model(installed) == own_home / "models" / "tiny"
    assert registry.find_model(installed, "vae") == own_home / "models" / "tiny" / "vae"
    assert registry.available()["tiny"] == own_home / "models" / "tiny"


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LATENTPIPE_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert registry.home() == tmp_path / "latentpipe"


def test_own_vaes_have_names(vae_folder: Path, own_home: Path) -> None:
    import shutil

    shutil.copytree(vae_folder, own_home / "vae" / "mine")
    assert registry.find_model("mine", "vae") == own_home / "vae" / "mine"
    with pytest.raises(UserError, match="No model 'mine'"):
        registry.find_model("mine")


def test_an_unknown_name_lists_the_known(installed: str) -> None:
    with pytest.raises(UserError, match=r"No model 'nothing': .*\btiny\b"):
        registry.find_model("nothing")
    with pytest.raises(UserError, match="No VAE 'nothing'"):
        registry.find_model("nothing", "vae")


def test_describe_a_model_and_a_vae(model_folder: Path, vae_folder: Path) -> None:
    model, vae = pipeline_io.describe(model_folder), pipeline_io.describe(vae_folder)
    assert model["hashes"] == pipeline_io.hashes(model_folder)
    assert model["hashes"]["vae"] == vae["hash"] == vae["card"]["content_hash"]
    assert vae["parameters"] == model["parameters"]["vae"] == sum(value.numel() for value in tiny_vae().state_dict().values())
    assert vae["space"]["channels"] == 4
    json.dumps(model)


def test_describe_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither model_index"):
        pipeline_io.describe(tmp_path)
