"""Other people's LoRA files on models of the right shape: every key is matched, or named. Parts made by code: test_kohya_lora."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from latentpipe.lora.adapter import LoraLayer
from latentpipe.lora.state_dict.io import read_lora, write_lora
from latentpipe.utils.io import read_header

pytestmark = [pytest.mark.filterwarnings("ignore::latentpipe.utils.errors.LatentpipeWarning"), pytest.mark.slow]
DTYPES = {"torch.float16": torch.float16, "torch.bfloat16": torch.bfloat16, "torch.float32": torch.float32}
Shapes = dict[str, tuple[int, ...]]


def shapes(model: nn.Module) -> Shapes:
    """Shape of each weight of a Linear or Conv2d by path."""
    found = {path: module.weight.shape for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    return {path.removeprefix("text_model."): tuple(shape) for path, shape in found.items()}


def unet(**config: Any) -> Shapes:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return shapes(UNet2DConditionModel(**config))


@pytest.fixture(scope="module")
def sd15() -> Shapes:
    """SD1.5's UNet."""
    return unet(cross_attention_dim=768, attention_head_dim=8)


@pytest.fixture(scope="module")
def sdxl() -> Shapes:
    """SDXL's UNet."""
    return unet(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def clip(width: int, layers: int, projection: bool = False) -> Shapes:
    """A CLIP text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, projection_dim=width)
    with torch.device("meta"):
        return shapes((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def fits(layer: LoraLayer, shape: tuple[int, ...] | None) -> bool:
    """Whether a layer's factors make a weight of this shape."""
    down, up = layer.tensors["lora_A"], layer.tensors["lora_B"]
    return shape is not None and up.shape[0] == shape[0] and down[0].shape.numel() == torch.Size(shape[1:]).numel()


def matched(part: dict[str, LoraLayer] | Any, model: Shapes) -> int:
    return sum(fits(layer, model.get(path)) for path, layer in part.items())


def from_manifest(assets: Path, name: str, folder: Path) -> Path:
    """A file with the keys, shapes and dtypes of a real one, alpha 4 and random numbers."""
    entries = json.loads((assets / "weights" / "manifests" / f"{name}.json").read_text())
    tensors = {}
    for key, entry in entries.items():
        if "shape" in entry:
            dtype = DTYPES[entry["dtype"]]
            value = torch.full((), 4.0) if key.endswith(".alpha") else torch.empty(entry["shape"]).uniform_(-1, 1)
            tensors[key] = value.to(dtype).reshape(entry["shape"])
    save_file(tensors, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("given", [False, True])
def test_catundchat_256_of_256(assets: Path, sd15: Shapes, ending: str, given: bool) -> None:
    path = assets / "weights" / "lora_catundchat" / f"pytorch_lora_weights.{ending}"
    found = read_lora(path, {"unet": sd15.keys()} if given else None, pickles=True)
    assert found.unread == ()
    assert list(found.parts) == ["unet"]
    assert 2 * len(found.parts["unet"]) == 2 * matched(found.parts["unet"], sd15) == 256
    assert {(layer.rank, layer.alpha) for _, _, layer in found.layers()} == {(4, 4.0)}


@pytest.mark.parametrize(
    "name", ["example_loras/lora_disney", "example_loras/analog_svd_rank4", "history/lora_disney_inpainting"]
)
@pytest.mark.parametrize("given", [False, True])
def test_cloneofsimo_144_of_144(assets: Path, sd15: Shapes, name: str, given: bool) -> None:
    path = assets / "weights" / "lora_cloneofsimo" / f"{name}.safetensors"
    found = read_lora(path, {"unet": sd15.keys()} if given else None)
    assert len(found.parts["unet"]) == matched(found.parts["unet"], sd15) == 144
    assert len(found.parts["text_encoder"]) == matched(found.parts["text_encoder"], clip(768, 12)) == 48
    assert found.unread == (("<s1>", "<s2>") if "disney" in name else ())  # words that it learnt: no layers
    assert {layer.scale for _, _, layer in found.layers()} == {1.0}


def test_cloneofsimo_lists_are_of_sd2(assets: Path, sd15: Shapes) -> None:
    """Their cross-attention takes 1024 numbers: every layer fits SD2's UNet, and 32 of 128 do not fit SD1.5's."""
    folder = assets / "weights" / "lora_cloneofsimo" / "history"
    sd2 = unet(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
    for name in ("lora_disney", "lora_kiriko"):
        part = read_lora(folder / f"{name}.pt", pickles=True).parts["unet"]
        assert len(part) == matched(part, sd2) == 128
        assert {path.split(".")[-1] for path, layer in part.items() if not fits(layer, sd15.get(path))} == {"to_k", "to_v"}
        assert matched(part, sd15) == 96
    text = read_lora(folder / "lora_kiriko.text_encoder.pt", pickles=True).parts["text_encoder"]
    assert len(text) == matched(text, clip(1024, 23)) == 92


@pytest.mark.parametrize("given", [False, True])
def test_kohyas_sd15_file(assets: Path, sd15: Shapes, tmp_path: Path, given: bool) -> None:
    path = from_manifest(assets, "shinkai_makoto_offset", tmp_path)
    found = read_lora(path, {"unet": sd15.keys(), "text_encoder": clip(768, 12).keys()} if given else None)
    assert len(read_header(path).shapes) == 792 == 3 * sum(len(part) for part in found.parts.values())
    assert 2 * len(found.parts["unet"]) == 2 * matched(found.parts["unet"], sd15) == 384
    assert len(found.parts["text_encoder"]) == matched(found.parts["text_encoder"], clip(768, 12)) == 72
    assert found.unread == ()
    assert {(layer.rank, layer.alpha) for _, _, layer in found.layers()} == {(128, 4.0)}


def test_kohyas_sdxl_file(assets: Path, sdxl: Shapes, tmp_path: Path) -> None:
    path = from_manifest(assets, "Alien_Style", tmp_path)
    found = read_lora(path)
    counts = {component: len(part) for component, part in found.parts.items()}
    assert counts == {"unet": 722, "text_encoder": 72, "text_encoder_2": 192}
    assert 3 * sum(counts.values()) == len(read_header(path).shapes) == 2958
    assert matched(found.parts["unet"], sdxl) == 722
    assert matched(found.parts["text_encoder"], clip(768, 12)) == 72
    assert matched(found.parts["text_encoder_2"], clip(1280, 32, projection=True)) == 192
    assert found.unread == ()
    path.unlink()
    assert write_lora(found, tmp_path / "back.safetensors", "diffusers") == found.hash
    again = read_lora(tmp_path / "back.safetensors", {"unet": sdxl.keys()})
    assert again.hash == found.hash
    assert {layer.alpha for _, _, layer in again.layers()} == {4.0}


def test_pefts_flux_file(assets: Path, tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        flux = shapes(FluxTransformer2DModel(guidance_embeds=True))
    path = from_manifest(assets, "stripped_models_peft_adapter_model", tmp_path)
    found = read_lora(path)
    assert list(found.parts) == ["transformer"]
    entries = len(read_header(path).shapes)
    assert 2 * len(found.parts["transformer"]) == 2 * matched(found.parts["transformer"], flux) == entries == 762
    assert found.unread == ()
