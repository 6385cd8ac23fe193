"""Kohya's names and tensors; diffusers and peft as oracles for the files that they read and write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_hosts
import torch
from file_parts import conv, dora, linear, lokr, values
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from latentpipe.lora.adapter import Lora, LoraLayer
from latentpipe.lora.state_dict.cloneofsimo import ATTENTION, CLIP, SD_BLOCKS
from latentpipe.lora.state_dict.io import read_lora, write_lora
from latentpipe.lora.state_dict.keys import KeyResolver, flat, from_ldm, in_file, kohya_stem, unflat
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import read_header, read_tensors

pytestmark = pytest.mark.filterwarnings("ignore::latentpipe.utils.errors.LatentpipeWarning")


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Linear and Conv2d modules by path, without ``text_model.``"""
    found = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    return {path.removeprefix("text_model."): module for path, module in found.items()}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {name: tiny_hosts.complete(name) for name in ("sdxl", "sd3", "flux")} | {
        name: getattr(tiny_hosts, name)() for name in ("sd15", "sana")
    }


def test_every_module_of_every_host_has_a_name_that_comes_back(pipes: dict[str, Any]) -> None:
    checked = 0
    for pipe in pipes.values():
        for component, model in pipe.components.items():
            if not isinstance(model, nn.Module) or component == "safety_checker":
                continue
            paths = linears(model)
            stems = {kohya_stem(component, path, True): path for path in paths}
            assert len(stems) == len(paths)
            for names in (KeyResolver(stems), KeyResolver(stems, {component: list(paths)})):
                for stem, path in stems.items():
                    assert names.resolve(stem) == (component, path)
                    checked += 1
            dotted = {f"{component}.{in_file(component, path)}": path for path in paths}
            names = KeyResolver(dotted)
            assert {stem: names.resolve(stem) for stem in dotted} == {stem: (component, path) for stem, path in dotted.items()}
    assert checked > 1000


def test_names_with_underscores() -> None:
    for path in ("decoder.up_blocks.0.upsamplers.0.conv", "time_text_embed.timestep_embedder.linear_1", "a.b.0.to_add_out"):
        assert unflat(flat(path)) == path


LDM = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks_0_resnets_0_conv1",
    "input_blocks_3_0_op": "down_blocks_0_downsamplers_0_conv",
    "input_blocks_4_0_skip_connection": "down_blocks_1_resnets_0_conv_shortcut",
    "input_blocks_5_1_proj_in": "down_blocks_1_attentions_1_proj_in",
    "input_blocks_8_1_transformer_blocks_9_attn2_to_out_0": "down_blocks_2_attentions_1_transformer_blocks_9_attn2_to_out_0",
    "middle_block_0_out_layers_3": "mid_block_resnets_0_conv2",
    "middle_block_1_proj_out": "mid_block_attentions_0_proj_out",
    "middle_block_2_emb_layers_1": "mid_block_resnets_1_time_emb_proj",
    "output_blocks_0_1_proj_in": "up_blocks_0_attentions_0_proj_in",
    "output_blocks_2_1_conv": "up_blocks_0_upsamplers_0_conv",
    "output_blocks_2_2_conv": "up_blocks_0_upsamplers_0_conv",
    "output_blocks_5_0_in_layers_2": "up_blocks_1_resnets_2_conv1",
    "out_2": "conv_out",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "down_blocks_0_attentions_0_proj_in": "down_blocks_0_attentions_0_proj_in",
}


@pytest.mark.parametrize("name", LDM)
def test_the_blocks_of_the_first_unet_code(name: str) -> None:
    assert from_ldm(name) == LDM[name]


def test_the_base_tells_how_many_layers_a_block_has() -> None:
    base = {"unet": ["down_blocks.0.resnets.0.conv1", "down_blocks.1.attentions.0.proj_in"]}
    stem = "lora_unet_input_blocks_3_1_proj_in"
    assert KeyResolver([stem], base).resolve(stem) == ("unet", "down_blocks.1.attentions.0.proj_in")
    assert KeyResolver([stem]).resolve(stem) == ("unet", "down_blocks.0.attentions.2.proj_in")


@pytest.mark.parametrize("prefix", ["lora_unet", "lora_transformer", "lycoris"])
def test_a_transformer_by_each_of_its_prefixes(prefix: str) -> None:
    stems = [f"{prefix}_transformer_blocks_0_attn_to_q", f"{prefix}_proj_out", "lora_te1_text_model_encoder_layers_0_mlp_fc1"]
    names = KeyResolver(stems)
    assert [names.resolve(stem) for stem in stems] == [
        ("transformer", "transformer_blocks.0.attn.to_q"),
        ("transformer", "proj_out"),
        ("text_encoder", "encoder.layers.0.mlp.fc1"),
    ]


@pytest.mark.parametrize("made", [linear(), conv(), conv(side=1)])
def test_doras_magnitudes_change_their_shape_only(made: LoraLayer, tmp_path: Path) -> None:
    lora = Lora({"unet": {"conv_in": dora(made)}})
    write_lora(lora, tmp_path / "a.safetensors", "kohya")
    scale = read_tensors(tmp_path / "a.safetensors")["lora_unet_conv_in.dora_scale"]
    down = made.tensors["lora_A"]
    assert scale.shape == (6, *[1] * (down.ndim - 1))  # out first, as ComfyUI and LyCORIS look for it
    back = read_lora(tmp_path / "a.safetensors").parts["unet"]["conv_in"].tensors["lora_magnitude_vector"]
    assert back.shape == ((1, 6, 1, 1) if down.ndim == 4 else (6,))
    assert torch.equal(back.flatten(), scale.flatten())


def test_a_third_factor_is_folded_into_the_first(tmp_path: Path) -> None:
    down, mid, up = values(3, 4, 1, 1, seed=1), values(3, 3, 3, 3, seed=2), values(5, 3, 1, 1, seed=3)
    stem = "lora_unet_conv_in"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": mid, f"{stem}.lora_up.weight": up}
    save_file(tensors, tmp_path / "a.safetensors")
    layer = read_lora(tmp_path / "a.safetensors").parts["unet"]["conv_in"]
    images = values(2, 4, 6, 6, seed=4)
    wanted = functional.conv2d(functional.conv2d(functional.conv2d(images, down), mid, padding=1), up)
    found = functional.conv2d(functional.conv2d(images, layer.tensors["lora_A"], padding=1), layer.tensors["lora_B"])
    assert (layer.rank, layer.alpha) == (3, 3.0)
    assert torch.allclose(found, wanted, atol=1e-4)


def test_whole_lokr_factors_keep_their_scale_for_programs_that_know_none(tmp_path: Path) -> None:
    lora = Lora({"unet": {"conv_in": lokr(8, 4.0, (True, True), 0), "conv_out": lokr(8, 8.0, (True, True), 1)}})
    assert write_lora(lora, tmp_path / "a.safetensors", "kohya") == read_lora(tmp_path / "a.safetensors").hash
    tensors = read_tensors(tmp_path / "a.safetensors")
    assert "lora_unet_conv_out.lokr_w1" in tensors  # scale 1 is what every reader takes
    first = tensors["lora_unet_conv_in.lokr_w1_a"] @ tensors["lora_unet_conv_in.lokr_w1_b"]
    assert torch.equal(first, lora.parts["unet"]["conv_in"].tensors["lokr_w1"])
    scale = tensors["lora_unet_conv_in.alpha"] / tensors["lora_unet_conv_in.lokr_w1_b"].shape[0]  # LyCORIS: alpha / dim
    assert scale == 0.5
    save_file(tensors, tmp_path / "bare.safetensors")
    bare = read_lora(tmp_path / "bare.safetensors").parts["unet"]
    assert {path: layer.scale for path, layer in bare.items()} == {"conv_in": 0.5, "conv_out": 1.0}


# --- the oracles ---------------------------------------------------------------------------------------------


def some_layers(model: nn.Module, pattern: str, seed: int, mixed: bool = True, with_dora: bool = False) -> dict[str, LoraLayer]:
    """LoRA, also of mixed ranks and alphas, on the modules whose path ends so."""
    made: dict[str, LoraLayer] = {}
    for index, (path, module) in enumerate(linears(model).items()):
        if not path.endswith(tuple(pattern.split())):
            continue
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        rank, alpha = (3, 1.5) if mixed and index % 3 == 0 else (2, 3.0)
        down = 0.5 * values(rank, *weight.shape[1:], seed=seed + index)
        up = 0.5 * values(weight.shape[0], rank, *[1] * (weight.ndim - 2), seed=seed + index + 1)
        made[path] = LoraLayer("lora", {"lora_A": down, "lora_B": up}, rank, alpha)
        made[path] = dora(made[path]) if with_dora else made[path]
    assert made
    return made


def merge(model: nn.Module, layers: Mapping[str, LoraLayer]) -> None:
    """The layers' change, written into the weights by the papers' formulas."""
    modules = linears(model)
    with torch.no_grad():
        for path, layer in layers.items():
            weight: torch.Tensor = modules[path].weight  # type: ignore[assignment]
            tensors = layer.tensors
            if layer.kind == "lokr":
                second = tensors.get("lokr_w2")
                second = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"] if second is None else second
                change = layer.scale * torch.kron(tensors["lokr_w1"], second)
            else:
                change = layer.scale * tensors["lora_B"].flatten(1) @ tensors["lora_A"].flatten(1)
            new = weight + change.reshape(weight.shape)
            if layer.dora:
                lengths = new.flatten(1).norm(dim=1)
                factor = tensors["lora_magnitude_vector"].flatten() / lengths
                new = new * factor.reshape(-1, *[1] * (weight.ndim - 1))
            weight.copy_(new)


def predicted(unet: nn.Module) -> torch.Tensor:
    condition = {"text_embeds": values(1, 8, seed=7), "time_ids": values(1, 6, seed=8)}
    with torch.no_grad():
        out = unet(values(1, 4, 8, 8, seed=5), 7, values(1, 3, 16, seed=6), added_cond_kwargs=condition)
    return out.sample


def encoded(text: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return text(torch.tensor([[0, 5, 7, 9, 1]])).last_hidden_state


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "dora"])
def test_diffusers_makes_the_same_of_our_files(layout: str, tmp_path: Path) -> None:
    oracle, ours = tiny_hosts.complete("sdxl"), tiny_hosts.complete("sdxl")
    sites = "to_q to_out.0 proj_in ff.net.2" + ("" if layout == "kohya" else " conv1 conv_in conv_shortcut")
    mixed = layout != "kohya"  # diffusers 0.42 ignores the alphas of kohya's files where they differ (a RuntimeWarning)
    parts = {"unet": some_layers(ours.unet, sites, 10, mixed, layout == "dora")}
    for name in ("text_encoder", "text_encoder_2"):
        parts[name] = some_layers(getattr(ours, name), "q_proj out_proj fc1", 50, mixed)
    before = [predicted(ours.unet), encoded(ours.text_encoder), encoded(ours.text_encoder_2)]
    write_lora(Lora(parts), tmp_path / "a.safetensors", "kohya" if layout == "kohya" else "diffusers")
    oracle.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="a")
    for name, layers in parts.items():
        merge(getattr(ours, name), layers)
    found = [predicted(oracle.unet), encoded(oracle.text_encoder), encoded(oracle.text_encoder_2)]
    wanted = [predicted(ours.unet), encoded(ours.text_encoder), encoded(ours.text_encoder_2)]
    for old, one, other in zip(before, found, wanted, strict=True):
        assert (one - other).abs().max() < 1e-4 * other.abs().max()
        assert (one - old).abs().max() > 1e-2 * old.abs().max()


def test_diffusers_makes_the_same_of_a_lokr(tmp_path: Path) -> None:
    from peft import LoKrConfig, get_peft_model_state_dict, inject_adapter_in_model

    model, oracle, ours = (tiny_hosts.unet(4, 16) for _ in range(3))
    config = LoKrConfig(r=3, alpha=5, target_modules=["to_q", "ff.net.2"], rank_pattern={"to_q": 2}, init_weights=False)
    tensors = get_peft_model_state_dict(inject_adapter_in_model(config, model))
    ranks = {path: 2 if path.endswith("to_q") else 3 for path in linears(ours) if path.endswith(("to_q", "ff.net.2"))}
    layers = {}
    for path, rank in ranks.items():
        own = {name.rpartition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{path}.")}
        layers[path] = LoraLayer("lokr", own, rank, 5.0)
    write_lora(Lora({"unet": layers}), tmp_path / "a.safetensors")
    oracle.load_lora_adapter(tmp_path, prefix="unet", weight_name="a.safetensors")
    merge(ours, layers)
    arguments = (values(1, 4, 8, 8, seed=5), 7, values(1, 3, 16, seed=6))
    with torch.no_grad():
        found, wanted, before = (each(*arguments).sample for each in (oracle, ours, tiny_hosts.unet(4, 16)))
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (found - before).abs().max() > 1e-3 * wanted.abs().max()


def test_what_diffusers_saves_is_read_with_its_alpha(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    model = tiny_hosts.unet(4, 16)
    config = LoraConfig(
        r=2, lora_alpha=7, target_modules=["to_q", "conv1"], rank_pattern={"to_q": 3}, alpha_pattern={"to_q": 5},
        init_lora_weights=False, use_rslora=True,
    )  # fmt: skip
    model.add_adapter(config)
    tensors = get_peft_model_state_dict(model)
    for name, state in (("new", tensors), ("old", convert_state_dict_to_diffusers(tensors))):
        StableDiffusionPipeline.save_lora_weights(
            tmp_path / name, unet_lora_layers=state, unet_lora_adapter_metadata=config.to_dict()
        )
        found = read_lora(tmp_path / name / "pytorch_lora_weights.safetensors")
        assert found.unread == ()
        assert len(found.parts["unet"]) == len(tensors) / 2
        for path, layer in found.parts["unet"].items():
            assert (layer.rank, layer.alpha, layer.rslora) == ((3, 5.0, True) if path.endswith("to_q") else (2, 7.0, True))
            assert torch.equal(layer.tensors["lora_B"], tensors[f"{path}.lora_B.weight"])


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_peft_takes_and_gives_the_same_tensors(kind: str, tmp_path: Path) -> None:
    from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, set_peft_model_state_dict

    sites = ["to_q", "ff.net.2", "conv1"]
    if kind in ("lora", "dora"):
        config: Any = LoraConfig(r=2, lora_alpha=5, target_modules=sites, init_lora_weights=False, use_dora=kind == "dora")
    else:
        config = (LoHaConfig if kind == "loha" else LoKrConfig)(r=2, alpha=5, target_modules=sites, init_weights=False)
    torch.manual_seed(3)
    model = get_peft_model(tiny_hosts.unet(4, 16), config)
    model.save_pretrained(tmp_path / "peft")
    lora = read_lora(tmp_path / "peft")
    assert {(layer.kind, layer.rank, layer.alpha) for _, _, layer in lora.layers()} == {(kind.replace("dora", "lora"), 2, 5.0)}
    assert lora.unread == ()
    write_lora(lora, tmp_path / "a.safetensors", "peft")
    written, wanted = read_tensors(tmp_path / "a.safetensors"), read_tensors(tmp_path / "peft" / "adapter_model.safetensors")
    assert set(written) == set(wanted)
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    torch.manual_seed(4)
    other = get_peft_model(tiny_hosts.unet(4, 16), config)
    result = set_peft_model_state_dict(other, written)
    assert result.unexpected_keys == []
    assert not [name for name in result.missing_keys if "lora_" in name or "hada_" in name or "lokr_" in name]
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    stored = json.loads(read_header(tmp_path / "a.safetensors").metadata["lora_adapter_metadata"])
    assert stored["unet.r"] == 2


# --- the oldest files, made by code --------------------------------------------------------------------------


def numbered(blocks: int, names: int, rank: int = 2) -> dict[str, torch.Tensor]:
    """``unet:i:up`` and ``unet:i:down`` of layers 8 wide; the fifth of a block that has nine is GEGLU's."""
    tensors = {}
    for index in range(blocks * names):
        out = 64 if names == 9 and index % 9 == 4 else 8
        tensors[f"unet:{index}:up"] = values(out, rank, seed=index)
        tensors[f"unet:{index}:down"] = values(rank, 8, seed=index + 1)
    return tensors


def test_numbered_layers_are_those_of_sd15_or_of_the_base(tmp_path: Path) -> None:
    text = {f"text_encoder:{n}:{end}": values(*size) for n in range(8) for end, size in (("up", (4, 1)), ("down", (1, 4)))}
    save_file(numbered(16, 9) | text | {"<s1>": values(4)}, tmp_path / "a.safetensors", metadata={"unet:0:rank": "2"})
    found = read_lora(tmp_path / "a.safetensors")
    paths = list(found.parts["unet"])
    assert paths[0] == "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert paths[4] == "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"
    assert paths[-1] == "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    assert [path.split(".attn1")[0] for path in paths[::9]] == SD_BLOCKS
    assert list(found.parts["text_encoder"])[:4] == [f"encoder.layers.0.self_attn.{name}" for name in CLIP]
    assert found.unread == ("<s1>",)
    assert {layer.scale for _, _, layer in found.layers()} == {1.0}
    write_lora(found, tmp_path / "b.safetensors", "kohya")
    again = read_lora(tmp_path / "b.safetensors")
    assert again.hash == found.hash
    assert not any(name.startswith("unet:") for name in again.metadata)

    small = tiny_hosts.unet(4, 16)
    base = {"unet": list(linears(small))}
    save_file(numbered(4, 8), tmp_path / "c.safetensors")
    assert len(read_lora(tmp_path / "c.safetensors", base).parts["unet"]) == 4 * 2 * len(ATTENTION)
    paths = list(read_lora(tmp_path / "c.safetensors", base).parts["unet"])
    assert set(paths) <= set(base["unet"])
    assert [path.split("_")[0] for path in paths[:: 2 * len(ATTENTION)]] == ["down", "up", "up", "mid"]
    with pytest.raises(UserError, match="which layer is which cannot be known"):
        read_lora(tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="which layer is which cannot be known"):
        read_lora(tmp_path / "a.safetensors", base)


def test_numbers_with_a_gap(tmp_path: Path) -> None:
    tensors = numbered(16, 9)
    del tensors["unet:7:up"], tensors["unet:7:down"]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="without a gap"):
        read_lora(tmp_path / "a.safetensors")
    tensors = numbered(16, 9)
    del tensors["unet:7:up"]
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="no lora_B"):
        read_lora(tmp_path / "b.safetensors")
