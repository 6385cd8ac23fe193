"""AutoencoderKL in LDM's vocabulary, against diffusers' own converter and against rules written apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import edit_json, some_images
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import ldm_names, levels_vae, write
from safetensors.torch import load_file, save_file

from latentpipe import UserError, VAEStage
from latentpipe.checkpoints import ldm_keys
from latentpipe.checkpoints.convert import convert
from latentpipe.checkpoints.tensor_source import CONFIG_KEY, VAE_FILE
from latentpipe.checkpoints.vae_file import StatedConfig
from latentpipe.checkpoints.vae_io import load_vae, open_vae, save_vae, vae_hash

STATED = {"scaling_factor": 0.7, "norm_groups": 4}
SHAPES = [
    {},
    {"levels": 1},
    {"levels": 5, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
    {"mid_block_add_attention": True, "layers_per_block": 2, "block_out_channels": (8, 8, 16)},
    {"levels": 2, "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), "latent_channels": 3,
     "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), "mid_block_add_attention": True},
]  # fmt: skip


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_names_are_mapped_as_by_hand(shape: dict[str, Any]) -> None:
    vae = levels_vae(**shape)
    assert equal(ldm_keys.to_ldm(vae.state_dict()), ldm_names(vae))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_an_ldm_file_opens_as_the_vae_that_it_came_from(shape: dict[str, Any], prefix: str, tmp_path: Path) -> None:
    vae = levels_vae(**shape)
    tensors = {prefix + name: tensor for name, tensor in ldm_names(vae).items()}
    if prefix:
        tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.full((2, 4), torch.nan)  # never read
    loaded = load_vae(write(tensors, tmp_path / "a.safetensors"), **STATED)
    for name in ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups", "mid_block_add_attention",
                 "use_quant_conv", "use_post_quant_conv", "down_block_types", "up_block_types"):  # fmt: skip
        assert list(np_like(loaded.config[name])) == list(np_like(vae.config[name])), name
    assert equal(loaded.state_dict(), vae.state_dict())
    images = some_images(2, 32)
    with torch.no_grad():
        assert torch.equal(loaded.encode(images).latent_dist.mode(), vae.encode(images).latent_dist.mode())
    assert VAEStage(loaded).space.scale[0] == 0.7


def np_like(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("shape", SHAPES[:4])  # diffusers' converter drops attention outside the middle block
def test_diffusers_converter_reads_our_ldm_files(shape: dict[str, Any], tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    vae = levels_vae(**shape)
    save_vae(vae, tmp_path / "vae", {})
    convert([tmp_path / "vae"], tmp_path / "ldm.safetensors")
    theirs = convert_ldm_vae_checkpoint(load_file(tmp_path / "ldm.safetensors"), dict(vae.config))
    assert equal(theirs, load_file(tmp_path / "vae" / VAE_FILE))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factors", [{}, {"scaling_factor": 0.31, "shift_factor": -0.2}, {"latents": True}])
def test_the_round_trip_is_exact(shape: dict[str, Any], factors: dict[str, Any], tmp_path: Path) -> None:
    c = shape.get("latent_channels", 4)
    if "latents" in factors:
        factors = {"latents_mean": [0.1 * i for i in range(c)], "latents_std": [1.5 + i for i in range(c)], "scaling_factor": 0.5}
    digest = save_vae(levels_vae(**(shape | factors)), tmp_path / "vae", {})
    assert convert([tmp_path / "vae"], tmp_path / "ldm.safetensors") == digest
    assert convert([tmp_path / "ldm.safetensors"], tmp_path / "back") == digest
    assert vae_hash(tmp_path / "vae") == vae_hash(tmp_path / "ldm.safetensors") == vae_hash(tmp_path / "back") == digest
    assert equal(load_file(tmp_path / "vae" / VAE_FILE), load_file(tmp_path / "back" / VAE_FILE))
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("vae", "back"))
    assert before == after


@settings(max_examples=12)
@given(
    st.integers(1, 6), st.integers(1, 3), st.integers(1, 9), st.booleans(), st.booleans(), st.booleans(),
    st.lists(st.sampled_from([4, 8, 12]), min_size=6, max_size=6),
)  # fmt: skip
def test_shapes_tell_the_config(
    levels: int, layers: int, channels: int, attention: bool, quant: bool, post: bool, widths: list[int]
) -> None:
    vae = levels_vae(
        levels, layers_per_block=layers, latent_channels=channels, mid_block_add_attention=attention, use_quant_conv=quant,
        use_post_quant_conv=post, block_out_channels=tuple(widths[:levels]),
    )  # fmt: skip
    table = ldm_keys.key_table(ldm_names(vae))
    own = {table[name]: tuple(value.shape) for name, value in ldm_names(vae).items()}
    found = ldm_keys.ldm_config({name: shape[:2] if ".attentions." in name else shape for name, shape in own.items()})
    for name, value in found.items():
        assert np_like(value) == list(np_like(vae.config[name])) if name != "_class_name" else value == "AutoencoderKL"


def test_the_hash_does_not_know_the_format(tmp_path: Path) -> None:
    vae = levels_vae(mid_block_add_attention=True).half()
    digest = save_vae(vae, tmp_path / "vae", {})
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    ldm, own = ldm_names(vae), dict(vae.state_dict())
    stated = {"scaling_factor": 1.0, "norm_groups": 4}
    for name, tensors in {
        "ldm": ldm,
        "linear": {name: value.flatten(1) if ".attn_1." in name and value.ndim == 4 else value for name, value in ldm.items()},
        "prefixed": {f"first_stage_model.{name}": tensor for name, tensor in ldm.items()},
        "diffusers": own,
        "diffusers prefixed": {f"vae.{name}": tensor for name, tensor in own.items()},
        "trained": ldm | {"loss.logvar": torch.zeros(1), "model_ema.num_updates": torch.tensor(3)},
        "2022": {name.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value").replace("to_out.0", "proj_attn"):
                 tensor for name, tensor in own.items()},
    }.items():  # fmt: skip
        path = write(tensors, tmp_path / f"{name}.safetensors")
        assert vae_hash(path, **stated) == digest, name
        save_file(load_file(path), path, metadata={CONFIG_KEY: json.dumps(config)})
        assert vae_hash(path) == digest, name
    assert vae_hash(tmp_path / "ldm.safetensors", scaling_factor=0.5) != digest


def test_old_attention_names_in_a_folder_open(tmp_path: Path) -> None:
    vae = levels_vae(mid_block_add_attention=True)
    save_vae(vae, tmp_path / "vae", {})
    path = tmp_path / "vae" / VAE_FILE
    tensors = load_file(path)
    save_file({name.replace("to_q", "query").replace("to_out.0", "proj_attn"): value for name, value in tensors.items()}, path)
    assert equal(load_vae(tmp_path / "vae", torch.float16).state_dict(), tensors)


def test_a_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    vae = levels_vae(mid_block_add_attention=True)
    name = "decoder.mid_block.attentions.0.to_q.weight"
    path = write(ldm_names(vae) | {name: vae.state_dict()[name]}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="mixes two formats"):
        load_vae(path, **STATED)


def test_missing_and_extra_tensors_of_a_file_are_named(tmp_path: Path) -> None:
    tensors = ldm_names(levels_vae())
    del tensors["decoder.up.2.block.1.conv2.bias"]
    path = write(tensors | {"surplus": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"missing decoder\.up_blocks\.0\.resnets\.1\.conv2\.bias; extra surplus"):
        load_vae(path, **STATED)
    decoder = {name: tensor for name, tensor in tensors.items() if not name.startswith("encoder")}
    with pytest.raises(UserError, match="is not a complete AutoencoderKL: it has no encoder"):
        load_vae(write(decoder, tmp_path / "b.safetensors"), **STATED)


def test_an_sdxl_vae_is_recognized_by_its_shapes(assets: Path) -> None:
    manifest = json.loads((assets / "weights/manifests/Juggernaut_XL_v9_vae_diffusion_pytorch_model.fp16.json").read_text())
    found = ldm_keys.ldm_config({name: tuple(entry["shape"]) for name, entry in manifest.items()})
    assert found["block_out_channels"] == [128, 256, 512, 512]
    assert (found["layers_per_block"], found["latent_channels"], found["mid_block_add_attention"]) == (2, 4, True)
    table = {own: ldm for ldm, own in ldm_keys.key_table(manifest).items()}
    assert {"decoder.up.3.block.0.conv1.weight", "decoder.mid.attn_1.proj_out.weight"} <= {table[name] for name in manifest}
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        wanted = AutoencoderKL.from_config(found).state_dict()
    assert {name: list(value.shape) for name, value in wanted.items()} == {n: entry["shape"] for n, entry in manifest.items()}


def test_the_embedded_vae_survives_the_trip(tmp_path: Path) -> None:
    from latentpipe.checkpoints.registry import find_model

    folder = find_model("emoji", "vae")
    stated = json.loads((folder / "card.json").read_text())["content_hash"]
    assert (
        vae_hash(folder)
        == stated
        == convert([folder], tmp_path / "emoji.safetensors")
        == vae_hash(tmp_path / "emoji.safetensors")
    )


def test_only_a_plain_autoencoderkl_becomes_an_ldm_file(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    tiny = AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
    )
    tiny.save_pretrained(tmp_path / "tiny")
    with pytest.raises(UserError, match="an LDM file holds an AutoencoderKL only"):
        convert([tmp_path / "tiny"], tmp_path / "a.safetensors")
    save_vae(levels_vae(), tmp_path / "vae", {})
    path = tmp_path / "vae" / VAE_FILE
    save_file(load_file(path) | {"decoder.mid_block.resnets.0.conv1.lora_A.a.weight": torch.zeros(1)}, path)
    for out in ("b.safetensors", "b"):
        with pytest.raises(UserError, match="adapter attached; merge"):
            convert([tmp_path / "vae"], tmp_path / out)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_downscale_that_contradicts_the_shapes_is_refused(tmp_path: Path) -> None:
    path = write(ldm_names(levels_vae(3)), tmp_path / "a.safetensors")
    assert open_vae(path, downscale=4, **STATED).space.downscale == 4
    with pytest.raises(UserError, match="reduces a picture's side 4 times; downscale 8 was given"):
        open_vae(path, downscale=8, **STATED)
    save_vae(levels_vae(), tmp_path / "vae", {})
    edit_json(tmp_path / "vae" / "config.json", norm_num_groups=3)
    with pytest.raises(UserError, match="does not describe a working AutoencoderKL"):
        load_vae(tmp_path / "vae")
    assert StatedConfig().factor is None
