"""Networks from files: absurd numbers are one sentence in little time and memory, before anything is built."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import edit_json, tiny_vae
from safetensors.torch import load_file, save_file
from torch import nn

from latentpipe import UserError
from latentpipe.checkpoints.components import TooLarge, built_within, check_config
from latentpipe.checkpoints.convert import convert
from latentpipe.checkpoints.pipeline_io import load_pipeline
from latentpipe.checkpoints.registry import bundled_weights_dir
from latentpipe.checkpoints.vae_io import load_vae, open_vae
from latentpipe.cli.app import main

MB = 1024  # of ru_maxrss, in kilobytes


ABSURD: list[tuple[dict[str, Any], str]] = [
    ({"latent_channels": 2147483648}, "latent_channels: input should be less than or equal to 65536"),
    ({"latent_channels": 65536}, "it asks for many times the values that the weights beside it hold"),
    ({"latent_channels": 10**30}, "a whole number of 31 digits"),
    ({"latent_channels": 4.0}, "latent_channels: input should be a valid integer"),
    ({"latent_channels": True}, "latent_channels: input should be a valid integer"),
    ({"latent_channels": "4"}, "latent_channels: input should be a valid integer"),
    ({"layers_per_block": 1000000}, "layers_per_block"),
    ({"layers_per_block": 1000}, "it asks for many times the values"),
    ({"block_out_channels": [8] * 1000}, "block_out_channels"),
    ({"block_out_channels": [8, 10**9]}, "block_out_channels"),
    ({"block_out_channels": "abc"}, "block_out_channels"),
    ({"sample_size": 10**12}, "sample_size"),
    ({"scaling_factor": "0.18"}, "scaling_factor: input should be a valid number"),
    ({"latents_mean": [0.0] * 4, "latents_std": [0.0] * 4}, "latents_std must be greater than 0"),
    ({"whatever": [{"x": 10**15}]}, r"whatever\.0\.x is 1000000000000000"),
    ({"_class_name": "DiffusionPipeline"}, "_class_name is 'DiffusionPipeline'; expected one of AutoencoderKL"),
]


@pytest.mark.parametrize(("changes", "reason"), ABSURD, ids=range(len(ABSURD)))
def test_an_absurd_vae_is_one_sentence(vae_copy: Path, changes: dict[str, Any], reason: str) -> None:
    edit_json(vae_copy / "config.json", **changes)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UserError, match=reason):
        load_vae(vae_copy)
    assert time.process_time() - begin < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * MB


def test_inspect_of_an_absurd_vae(vae_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_json(vae_copy / "config.json", latent_channels=2147483648)
    assert main(["inspect", str(vae_copy)]) == 2
    assert "latent_channels" in capsys.readouterr().err


def test_the_config_in_a_file_is_checked_too(vae_folder: Path, tmp_path: Path) -> None:
    convert([vae_folder], tmp_path / "v.safetensors")
    config = open_vae(vae_folder).config | {"layers_per_block": 10**6}
    stored = load_file(tmp_path / "v.safetensors")
    save_file(stored, tmp_path / "w.safetensors", {"latentpipe.config": json.dumps(config)})
    with pytest.raises(UserError, match="the config in its metadata: layers_per_block"):
        open_vae(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("part", "changes", "reason"),
    [
        ("unet", {"cross_attention_dim": 60000}, "many times the values"),
        ("unet", {"layers_per_block": 900}, "many times the values"),
        ("unet", {"block_out_channels": [32, 2**31]}, "block_out_channels"),
        ("unet", {"attention_head_dim": 1.5}, "attention_head_dim"),
        ("unet", {"norm_eps": 1e39}, "norm_eps"),
        ("unet", {"sample_size": -1}, "sample_size"),
        ("text_encoder", {"vocab_size": 2000000}, "many times the values"),
        ("text_encoder", {"num_hidden_layers": 1000}, "many times the values"),
        ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("text_encoder", {"num_labels": 10**9}, "num_labels"),
        ("text_encoder", {"hidden_size": "32"}, "hidden_size"),
    ],
)
def test_an_absurd_part_of_a_model_is_one_sentence(model_copy: Path, part: str, changes: dict[str, Any], reason: str) -> None:
    edit_json(model_copy / part / "config.json", **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=rf"{part}.*{reason}"):
        load_pipeline(model_copy)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * MB


@pytest.mark.parametrize("name", ["AutoencoderKL", "utils", "DDIMScheduler", "", 5, ["a", "b"], None, "__doc__"])
def test_a_class_that_is_no_pipeline(model_copy: Path, name: Any) -> None:
    edit_json(model_copy / "model_index.json", _class_name=name)
    with pytest.raises(UserError, match="expected a pipeline with a VAE"):
        load_pipeline(model_copy)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (["transformers", "CLIPTokenizer_"], "unet"),
        (["diffusers", "utils"], "is no network"),
        (["diffusers", "DDIMModel"], "is no network"),
        (["os", "system"], "is no network"),
        (["torch.nn", "Linear"], "is no network"),
        ([["x"], "y"], "expected a library and a class"),
    ],
)
def test_a_part_that_is_no_network(model_copy: Path, source: list[Any], reason: str) -> None:
    edit_json(model_copy / "model_index.json", unet=source)
    with pytest.raises(UserError, match=reason):
        load_pipeline(model_copy)


def test_a_part_outside_the_folder(model_copy: Path) -> None:
    edit_json(model_copy / "model_index.json", **{"../unet": ["diffusers", "UNet2DConditionModel"]})
    with pytest.raises(UserError, match="expected a library and a class"):
        load_pipeline(model_copy)


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"model": {}}', '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}']
)
def test_a_tokenizer_that_is_none(model_copy: Path, text: str) -> None:
    (model_copy / "tokenizer" / "tokenizer.json").write_text(text)
    for name in ("vocab.json", "merges.txt"):
        (model_copy / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="model-copy"):
        load_pipeline(model_copy)


def test_a_tokenizer_of_another_text_encoder(model_copy: Path) -> None:
    path = model_copy / "tokenizer" / "tokenizer_config.json"
    edit_json(path, model_max_length=10**15)
    with pytest.raises(UserError, match="model_max_length is 1000000000000000; its text encoder reads 16 tokens"):
        load_pipeline(model_copy)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 16}))
    load_pipeline(model_copy)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.int32])
def test_weights_of_another_kind_are_not_taken_for_floats(vae_copy: Path, model_copy: Path, dtype: torch.dtype) -> None:
    path = model_copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"conv_in.weight": tensors["conv_in.weight"].to(dtype)}, path)
    with pytest.raises(UserError, match=r"conv_in\.weight is stored as \w+, expected a float of 16 to 64 bits"):
        load_pipeline(model_copy)


def test_doubles_that_no_float_holds(vae_copy: Path) -> None:
    path = vae_copy / "diffusion_pytorch_model.safetensors"
    tensors = {name: value.double() for name, value in load_file(path).items()}
    save_file(tensors, path)
    load_vae(vae_copy)
    tensors["encoder.conv_in.bias"][0] = 1e300
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"encoder\.conv_in\.bias holds values that are not finite"):
        load_vae(vae_copy)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(2**20, 2**20),
        lambda: torch.zeros(2**40),
        lambda: torch.full((2**40,), 1.0),
        lambda: torch.arange(2**40),
        lambda: torch.arange(1, 2**40, 2),
        lambda: torch.linspace(0, 1, 2**40),
        lambda: torch.eye(2**20),
        lambda: [nn.Linear(1, 1) for _ in range(10**6)],
        lambda: [torch.zeros(2**19) for _ in range(100)],
    ],
)
def test_building_stops_at_the_limit(make: Any) -> None:
    begin = time.process_time()
    with pytest.raises(TooLarge):
        built_within(make, 10, 10)
    assert time.process_time() - begin < 5


def test_building_within_the_limit_is_as_without() -> None:
    plain = tiny_vae(3)
    torch.manual_seed(3)
    state = plain.state_dict()
    config = dict(plain.config)
    again = built_within(lambda: type(plain).from_config(config), sum(map(torch.numel, state.values())), len(state))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in state.items())


def test_what_ships_passes() -> None:
    for path in [*bundled_weights_dir().rglob("config.json")]:
        check_config(json.loads(path.read_text()), path)


def test_defaults_of_diffusers_and_transformers_pass() -> None:
    import diffusers
    import transformers

    for name in ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AsymmetricAutoencoderKL", "UNet2DConditionModel",
                 "SD3Transformer2DModel", "FluxTransformer2DModel", "SanaTransformer2DModel"):  # fmt: skip
        kind = getattr(diffusers, name)
        import inspect

        fields = inspect.signature(kind.__init__).parameters.values()
        check_config({field.name: field.default for field in fields if field.default is not field.empty}, name)
    for config in (
        transformers.CLIPTextConfig(),
        transformers.T5Config(),
        transformers.CLIPConfig(),
        transformers.Gemma2Config(),
    ):
        check_config(json.loads(config.to_json_string(use_diff=False)), type(config).__name__)
