"""Which files open as a VAE, under which names, and what is said of those that do not."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import edit_json, some_images, tiny_vae
from parts import ldm_names, levels_vae, taesd, write, write_halves
from safetensors.torch import load_file, save_file

from latentpipe import UserError, VAEStage
from latentpipe.checkpoints import vae_io
from latentpipe.checkpoints.convert import convert
from latentpipe.checkpoints.identify import looks_like
from latentpipe.checkpoints.registry import available, find_model, name_of
from latentpipe.checkpoints.tensor_source import VAE_FILE
from latentpipe.checkpoints.vae_file import StatedConfig
from latentpipe.checkpoints.vae_io import load_vae, open_vae, save_vae, vae_hash
from latentpipe.vae.latent_space import downscale_of

STATED = {"scaling_factor": 0.7, "norm_groups": 4}


def refused(path: Path, **given: Any) -> str:
    """The one sentence that opening raises."""
    with pytest.raises(UserError) as error:
        load_vae(path, **given)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 700
    assert text.endswith(".")
    return text


# --- folders ------------------------------------------------------------------------------------------------


def small(kind: str) -> Any:
    """One random autoencoder of each class."""
    import diffusers

    torch.manual_seed(0)
    if kind == "AutoencoderKL":
        return tiny_vae()
    if kind == "AutoencoderTiny":
        return diffusers.AutoencoderTiny(
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    if kind == "AutoencoderDC":
        two = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
               {"block_out_channels": (8, 16), "layers_per_block": (1, 1), "qkv_multiscales": ((), ())}.items()}  # fmt: skip
        norms = {"decoder_norm_types": ("batch_norm", "rms_norm"), "decoder_act_fns": ("relu", "silu")}
        return diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=0.4, **two, **norms)
    if kind == "AsymmetricAutoencoderKL":
        return diffusers.AsymmetricAutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, down_block_out_channels=(8, 8), layers_per_down_block=1,
            up_block_types=("UpDecoderBlock2D",) * 2, up_block_out_channels=(8, 16), layers_per_up_block=1, norm_num_groups=4,
        )  # fmt: skip
    return diffusers.ConsistencyDecoderVAE(
        encoder_block_out_channels=(8, 8), encoder_down_block_types=("DownEncoderBlock2D",) * 2, encoder_layers_per_block=1,
        encoder_norm_num_groups=4, decoder_block_out_channels=(8, 8), decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2, decoder_layers_per_block=1, decoder_norm_num_groups=4,
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AsymmetricAutoencoderKL", "ConsistencyDecoderVAE"]
)
@torch.no_grad()
def test_every_class_opens_from_its_folder(kind: str, tmp_path: Path) -> None:
    vae = small(kind).eval()
    vae.save_pretrained(tmp_path / "vae")
    stage = VAEStage(load_vae(tmp_path / "vae"))
    assert type(stage.vae) is type(vae)
    assert stage.space.downscale == downscale_of(vae.config) == 2
    own = VAEStage(vae)
    images = some_images(2, 32)
    assert torch.equal(stage.encode(images), own.encode(images))
    decoded = stage.decode(stage.encode(images))
    assert decoded.shape == images.shape
    if kind != "ConsistencyDecoderVAE":  # it draws noise
        assert torch.equal(decoded, own.decode(own.encode(images)))
    assert convert([tmp_path / "vae"], tmp_path / "copy") == vae_hash(tmp_path / "vae") == vae_hash(tmp_path / "copy")


def test_variants_and_shards_open_where_the_plain_file_is_absent(tmp_path: Path) -> None:
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "plain")
    vae.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    vae.save_pretrained(tmp_path / "variant", variant="fp16")
    vae.save_pretrained(tmp_path / "variant shards", variant="fp16", max_shard_size="20KB")
    digest = vae_hash(tmp_path / "plain")
    for name in ("shards", "variant", "variant shards"):
        assert not (tmp_path / name / VAE_FILE).exists()
        assert vae_hash(tmp_path / name) == digest, name
        assert load_vae(tmp_path / name).state_dict().keys() == vae.state_dict().keys()
    shutil.copy(tmp_path / "plain" / VAE_FILE, tmp_path / "variant" / "diffusion_pytorch_model.bf16.safetensors")
    assert "keep one of them" in refused(tmp_path / "variant")
    shard = sorted((tmp_path / "shards").glob("*-of-*"))[0]
    shard.unlink()
    assert f"{shard.name}: no such file" in refused(tmp_path / "shards")


@pytest.mark.parametrize(
    "listed", [None, {}, {"weight_map": {}}, {"weight_map": {"a": "../../secret.safetensors"}}, {"weight_map": 3}]
)
def test_an_index_names_files_of_its_folder_only(listed: Any, tmp_path: Path) -> None:
    tiny_vae().save_config(tmp_path)
    (tmp_path / f"{VAE_FILE}.index.json").write_text(json.dumps(listed))
    assert "index.json" in refused(tmp_path)


def test_a_config_without_weights_is_no_random_vae(tmp_path: Path) -> None:
    tiny_vae().save_config(tmp_path)
    assert "no such file; expected weights in safetensors format" in refused(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "config.json: no such file" in refused(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"latent_channels": "4"}, {"block_out_channels": 8}, {"scaling_factor": "big"}, {"scaling_factor": [1]},
     {"latents_std": [0, 1, 1, 1], "latents_mean": [0] * 4}, {"latents_std": 3, "latents_mean": 2},
     {"down_block_types": ["os"] * 2}, {"scaling_factor": 0},
     {"norm_num_groups": 0}, {"layers_per_block": -1}, {"act_fn": "nonsense"}, {"shift_factor": "x"}],
)  # fmt: skip
def test_nonsense_in_a_config_is_one_sentence(vae_copy: Path, changes: dict[str, Any]) -> None:
    edit_json(vae_copy / "config.json", **changes)
    refused(vae_copy)


# --- single files -------------------------------------------------------------------------------------------


def test_a_single_file_has_a_name(own_home: Path, tmp_path: Path) -> None:
    path = write(ldm_names(levels_vae()), own_home / "vae" / "mine.safetensors")
    assert available("vae")["mine"] == path == find_model("mine", "vae")
    assert name_of(path, "vae") == "mine"
    assert find_model(path, "vae") == path.resolve()
    assert "mine" not in available("models")
    save_vae(tiny_vae(), own_home / "vae" / "mine", {})
    with pytest.raises(UserError, match=r"'mine' is both .*; rename one of them"):
        find_model("mine", "vae")
    assert find_model("mine.safetensors", "vae") == path
    assert find_model(own_home / "vae" / "mine", "vae").is_dir()
    assert name_of(tmp_path / "other", "vae") == "other"


def test_given_values_must_be_numbers_that_make_sense() -> None:
    for wrong in (
        {"factor": 0.0},
        {"factor": -1.0},
        {"factor": float("nan")},
        {"shift": float("inf")},
        {"downscale": 0},
        {"groups": -2},
    ):
        with pytest.raises(UserError, match="expected a finite number"):
            StatedConfig(**wrong)  # type: ignore[arg-type]


def test_a_given_factor_wins_and_a_shift_alone_needs_one(vae_copy: Path, tmp_path: Path) -> None:
    assert open_vae(vae_copy, scaling_factor=0.5, shift_factor=0.1).space.scale == (0.5,) * 4
    assert open_vae(vae_copy, shift_factor=0.1).space.shift == (0.1,) * 4
    assert VAEStage(load_vae(vae_copy, shift_factor=0.1)).space.shift == (0.1,) * 4
    path = write(ldm_names(levels_vae()), tmp_path / "a.safetensors")
    assert "state both" in refused(path, shift_factor=0.1, norm_groups=4)


def test_only_our_metadata_is_believed_and_only_if_whole(tmp_path: Path) -> None:
    tensors = ldm_names(levels_vae())
    for config, message in (
        ("{", "no JSON object"),
        ("[]", "no JSON object"),
        ('{"_class_name": "UNet2DModel"}', "names the class 'UNet2DModel'; expected one of AutoencoderKL"),
        ('{"_class_name": "AutoencoderRAE"}', "names the class 'AutoencoderRAE'; expected one of AutoencoderKL"),
        ('{"_class_name": "AutoencoderKL"}', "names no latent_channels"),
    ):
        assert message in refused(write(tensors, tmp_path / "a.safetensors", **{"latentpipe.config": config}))


def bad_bytes(kind: str, whole: bytes) -> bytes:
    return {
        "empty": b"",
        "random": bytes((i * 7919 + 13) % 256 for i in range(5000)),
        "truncated header": whole[:50],
        "truncated data": whole[: len(whole) * 2 // 3],
        "huge header": struct.pack("<Q", 2**60) + whole[8:],
        "a web page": b"<!doctype html><html>" + b" " * 4000,
        "a git pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 334643276\n",
    }[kind]


@pytest.mark.parametrize(
    "kind", ["empty", "random", "truncated header", "truncated data", "huge header", "a web page", "a git pointer"]
)
def test_damaged_single_files_are_refused(kind: str, tmp_path: Path) -> None:
    path = write(ldm_names(levels_vae()), tmp_path / "a.safetensors")
    path.write_bytes(bad_bytes(kind, path.read_bytes()))
    assert "not a complete safetensors file" in refused(path, **STATED)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool])
@pytest.mark.parametrize("form", ["file", "folder"])
def test_weights_that_are_no_floats_are_refused_before_they_are_read(dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    vae = levels_vae()
    save_vae(vae, tmp_path / "vae", {})
    own = load_file(tmp_path / "vae" / VAE_FILE)
    own["decoder.conv_in.bias"] = own["decoder.conv_in.bias"].to(dtype)
    target = write(own, tmp_path / ("a.safetensors" if form == "file" else "vae") / ("" if form == "file" else VAE_FILE))
    text = refused(target if form == "file" else tmp_path / "vae", **STATED)
    assert "decoder.conv_in.bias is stored as" in text
    assert "expected a float of 16 to 64 bits" in text


def test_weights_that_are_not_finite_are_refused_while_measuring_too(tmp_path: Path) -> None:
    tensors = ldm_names(levels_vae())
    tensors["encoder.conv_in.bias"][0] = torch.nan
    path = write(tensors, tmp_path / "a.safetensors")
    for given in (STATED, {"norm_groups": 4}, {}):
        assert "encoder.conv_in.bias holds values that are not finite" in refused(path, **given)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_pickles_are_left_to_convert(suffix: str, tmp_path: Path, own_home: Path) -> None:
    path = tmp_path / f"vae{suffix}"
    torch.save(ldm_names(levels_vae()), path)
    assert f"latentpipe convert {path}" in refused(path)
    assert find_model(path, "vae") == path.resolve()
    assert "vae" not in available("vae")


def test_places_that_are_no_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    assert "symbolic links" in refused(tmp_path / "loop.safetensors")
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nothing")
    assert "no such file" in refused(tmp_path / "gone.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "not a file" in refused(tmp_path / "pipe.safetensors")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    assert "only safetensors files are read here" in refused(tmp_path / "picture.png")
    if os.geteuid():  # root reads everything
        path = write({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
        path.chmod(0)
        assert "cannot be read (permission denied)" in refused(path)


def test_pictures_of_other_than_three_channels_are_refused(tmp_path: Path) -> None:
    path = write(ldm_names(levels_vae(in_channels=4, out_channels=4)), tmp_path / "a.safetensors")
    assert "encodes pictures of 4 channels; images here have 3" in refused(path, **STATED)


# --- what it looks like ---------------------------------------------------------------------------------------

LOOKS = {
    "a LoRA": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"],
    "a UNet (a denoiser)": ["time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "a denoising transformer": ["transformer_blocks.0.attn.to_q.weight"],
    "a checkpoint that holds a denoiser and no VAE": ["model.diffusion_model.input_blocks.0.0.weight"],
    "a text encoder": ["text_model.embeddings.token_embedding.weight"],
    "a textual inversion embedding": ["emb_params"],
    "a vector-quantized autoencoder": ["encoder.conv_in.weight", "quantize.embedding.weight"],
    "something else": ["alpha", "beta"],
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_file_that_is_no_vae_is_described(look: str, tmp_path: Path) -> None:
    path = write({name: torch.zeros(2, 2) for name in LOOKS[look]}, tmp_path / "a.safetensors")
    assert f"looks like {look}" in refused(path)


def test_a_video_vae_and_an_empty_file_are_described(tmp_path: Path) -> None:
    assert "3-D convolutions" in refused(write({"encoder.conv1.weight": torch.zeros(1, 1, 1, 1, 1)}, tmp_path / "a.safetensors"))
    assert "no tensors" in refused(write({}, tmp_path / "b.safetensors"))


@pytest.mark.parametrize(
    ("name", "look"),
    [("Juggernaut_XL_v9_unet_diffusion_pytorch_model.fp16", "a UNet"), ("shinkai_makoto_offset", "a LoRA"),
     ("Alien_Style", "a LoRA"), ("stripped_models_peft_adapter_model", "a LoRA"), ("text_encoder_model", "a text encoder"),
     ("Hard_Edge_Detection_canny_diffusion_pytorch_model.fp16", "a ControlNet"),
     ("Standard_Reference_IP_Adapter", "an IP-Adapter"),
     ("siglip-so400m-patch14-384_model", "an image encoder")],
)  # fmt: skip
def test_real_files_are_described(name: str, look: str, assets: Path) -> None:
    manifest = json.loads((assets / "weights/manifests" / f"{name}.json").read_text())
    shapes = {key: tuple(entry["shape"]) for key, entry in manifest.items() if isinstance(entry, dict) and "shape" in entry}
    assert looks_like(shapes).startswith(look)


def test_real_loras_are_refused(assets: Path) -> None:
    for path in (assets / "weights/lora_catundchat/pytorch_lora_weights.safetensors",
                 assets / "weights/lora_cloneofsimo/example_loras/lora_disney.safetensors"):  # fmt: skip
        assert "looks like a LoRA" in refused(path)


# --- convert --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_of_weights_is_converted(suffix: str, wrapped: bool, tmp_path: Path) -> None:
    vae = levels_vae()
    tensors = {f"first_stage_model.{name}": value for name, value in ldm_names(vae).items()}
    path = tmp_path / f"old{suffix}"
    torch.save({"state_dict": tensors, "global_step": 3} if wrapped else tensors, path)
    digest = convert([path], tmp_path / "vae", given=StatedConfig(0.7, groups=4))
    assert vae_hash(tmp_path / "vae") == digest
    assert torch.equal(load_vae(tmp_path / "vae").state_dict()["quant_conv.weight"], vae.state_dict()["quant_conv.weight"])
    card = json.loads((tmp_path / "vae" / vae_io.CARD_FILE).read_text())
    assert card["source"][0]["file"] == path.name
    assert len(card["source"][0]["sha256"]) == 64
    assert card["content_hash"] == digest


class Run:
    """What a pickle could do."""

    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


def test_convert_runs_no_code(tmp_path: Path) -> None:
    for name, value in (("evil", {"a": Run()}), ("list", [1, 2]), ("text", {"a": "b"})):
        torch.save(value, tmp_path / f"{name}.pt")
        with pytest.raises(UserError, match=r"not a readable file of torch weights|holds no named tensors"):
            convert([tmp_path / f"{name}.pt"], tmp_path / "out")
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    for name in ("junk.ckpt", "gone.ckpt"):
        with pytest.raises(UserError):
            convert([tmp_path / name], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_bin_is_converted(vae_copy: Path, tmp_path: Path) -> None:
    digest = vae_hash(vae_copy)
    torch.save(load_file(vae_copy / VAE_FILE), vae_copy / "diffusion_pytorch_model.bin")
    (vae_copy / VAE_FILE).unlink()
    assert convert([vae_copy], tmp_path / "new") == digest == vae_hash(tmp_path / "new")


def test_nothing_is_overwritten_or_left_half_written(vae_copy: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    for out, to, message in (
        (vae_copy, None, "exists already"),
        (tmp_path / "a", "ldm", "ends in .safetensors"),
        (tmp_path / "a.safetensors", "diffusers", "ends in .safetensors"),
        (tmp_path / "a", "onnx", "expected diffusers"),
    ):
        with pytest.raises(UserError, match=message):
            convert([vae_copy], out, to)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="expected one of fp32"):
        convert([vae_copy], tmp_path / "a", dtype="int8")
    tensors = load_file(vae_copy / VAE_FILE)
    tensors["decoder.conv_in.bias"][0] = torch.inf
    save_file(tensors, vae_copy / VAE_FILE)
    with pytest.raises(UserError, match="not finite"):
        convert([vae_copy], tmp_path / "a")
    assert sorted(tmp_path.iterdir()) == before


def test_the_verb_converts_and_says_where(vae_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from latentpipe.cli.app import main

    out = tmp_path / "out.safetensors"
    assert main(["convert", str(vae_copy), "--out", str(out), "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out == f"{out}  {vae_hash(out)[:16]}\n"
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.bfloat16}
    assert main(["convert", str(vae_copy), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    pair = [str(path) for path in write_halves(taesd(), tmp_path / "pth")]
    assert main(["convert", *pair, "--out", str(tmp_path / "tiny"), "--scaling-factor", "2"]) == 0
    assert open_vae(tmp_path / "tiny").space.scale == (2.0,) * 4
    assert main(["convert", "nothing", "--out", str(tmp_path / "x")]) == 2
    assert "No VAE 'nothing'" in capsys.readouterr().err
