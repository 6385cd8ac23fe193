"""Wrapping, reading back and unwrapping, against peft's own injection and closed forms."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from made import layer_for, random_lora
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn

from latentpipe.lora.adapter import LoraLayer
from latentpipe.lora.delta import delta, delta_shape
from latentpipe.lora.injection import attach, detach, inject, layers_of, wrappers
from latentpipe.lora.matching import fit
from latentpipe.lora.state_dict.io import read_lora
from latentpipe.lora.target_modules import SITES, leaves, select, select_all
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import content_hash


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 12)).eval()


IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
KINDS = {
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2", "4"], init_lora_weights=False),
    "rslora": LoraConfig(r=4, lora_alpha=5, target_modules=["0", "2", "4"], use_rslora=True, init_lora_weights=False),
    "dora": LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2", "4"], use_dora=True, init_lora_weights=False),
    "loha": LoHaConfig(r=3, alpha=5, target_modules=["0", "2", "4"], init_weights=False),
    "loha conv": LoHaConfig(r=3, alpha=5, target_modules=["0", "2", "4"], use_effective_conv2d=True, init_weights=False),
    "lokr": LoKrConfig(r=2, alpha=5, target_modules=["0", "2", "4"], init_weights=False),
    "lokr both": LoKrConfig(r=1, alpha=5, target_modules=["0", "2", "4"], decompose_both=True, init_weights=False),
    "lokr conv": LoKrConfig(r=1, alpha=5, target_modules=["0", "2", "4"], use_effective_conv2d=True, init_weights=False),
}


def by_peft(kind: str) -> tuple[nn.Module, dict[str, LoraLayer]]:
    """A module that peft itself has put layers on, and those layers in our form."""
    torch.manual_seed(3)
    model = inject_adapter_in_model(KINDS[kind], small(), "x").eval()
    if kind == "dora":
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.lora_magnitude_vector["x"].weight.data *= 1.3
    names = {
        "lora": ("lora_A", "lora_B", "lora_magnitude_vector"),
        "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    }
    names["lokr"] = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    family = "lora" if kind in ("lora", "rslora", "dora") else kind.split()[0]
    found: dict[str, LoraLayer] = {}
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            tensors = {}
            for name in names[family]:
                held = getattr(module, name)
                if "x" in held:
                    tensors[name] = (held["x"].weight if family == "lora" else held["x"]).detach().clone()
            found[path] = LoraLayer(family, tensors, module.r["x"], 5.0, kind == "rslora")  # type: ignore[arg-type]
    assert len(found) == 3
    return model, found


@pytest.mark.parametrize("kind", KINDS)
def test_attached_it_computes_what_peft_computes(kind: str) -> None:
    oracle, layers = by_peft(kind)
    model = small()
    attach(model, layers, "x")
    assert torch.equal(model(IMAGE), oracle(IMAGE))
    assert not torch.equal(model(IMAGE), small()(IMAGE))


@pytest.mark.parametrize("kind", KINDS)
def test_the_change_of_a_weight_is_what_the_layer_does(kind: str) -> None:
    _, layers = by_peft(kind)
    wrapped, added = small(), small()
    attach(wrapped, layers, "x")
    for path, layer in layers.items():
        weight = leaves(added)[path].weight
        assert delta_shape(layer) == (weight.shape[0], weight[0].numel())
        weight.data += delta(layer, weight.data)
    torch.testing.assert_close(added(IMAGE), wrapped(IMAGE), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", [0.5, 1.7, -0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_at_any_weight_it_computes_what_peft_computes(kind: str, weight: float) -> None:
    """A DoRA's weight lies inside the norm of its rows."""
    oracle, layers = by_peft(kind)
    for module in oracle.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_scale("x", weight)
    wrapped, fused = small(), small()
    attach(wrapped, layers, "x", weight)
    for path, layer in layers.items():
        leaves(fused)[path].weight.data += delta(layer, leaves(fused)[path].weight.data, weight)
    torch.testing.assert_close(wrapped(IMAGE), oracle(IMAGE), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fused(IMAGE), oracle(IMAGE), rtol=1e-5, atol=1e-5)
    assert (oracle(IMAGE) - small()(IMAGE)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_at_weight_zero_it_is_off(kind: str) -> None:
    _, layers = by_peft(kind)
    model = small()
    attach(model, layers, "x", 0.0)
    assert torch.equal(model(IMAGE), small()(IMAGE))
    assert all(not delta(layer, leaves(small())[path].weight, 0.0).any() for path, layer in layers.items())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_back_is_what_was_attached(kind: str) -> None:
    _, layers = by_peft(kind)
    model = small()
    attach(model, layers, "x")
    found = layers_of(model, "x")
    assert found.keys() == layers.keys()
    for path, layer in layers.items():
        assert (found[path].kind, found[path].rank, found[path].scale) == (layer.kind, layer.rank, layer.scale)
        assert found[path].tensors.keys() == layer.tensors.keys()
        assert all(torch.equal(found[path].tensors[name], layer.tensors[name]) for name in layer.tensors)


def test_two_adapters_add_up_and_one_can_leave() -> None:
    model, plain = small(), small()
    first = {path: layer_for(module.weight, 2, 1) for path, module in leaves(plain).items()}
    second = {path: layer_for(module.weight, 3, 2) for path, module in leaves(plain).items()}
    attach(model, first, "first", 0.5)
    alone = model(IMAGE)
    attach(model, second, "second", dict.fromkeys(second, -1.5))
    together = small()
    for path, module in leaves(together).items():
        module.weight.data += 0.5 * delta(first[path], module.weight) - 1.5 * delta(second[path], module.weight)
    torch.testing.assert_close(model(IMAGE), together(IMAGE), rtol=1e-5, atol=1e-5)
    detach(model, "second")
    assert torch.equal(model(IMAGE), alone)
    detach(model, "first")
    assert torch.equal(model(IMAGE), plain(IMAGE))


def test_detaching_leaves_the_very_same_modules() -> None:
    model = small()
    modules, digest = list(model.modules()), content_hash(model.state_dict())
    attach(model, {path: layer_for(module.weight, 2, 1) for path, module in leaves(model).items()}, "x")
    detach(model)
    assert all(before is after for before, after in zip(modules, model.modules(), strict=True))
    assert content_hash(model.state_dict()) == digest
    assert not list(wrappers(model))


def test_new_layers_change_nothing_and_are_all_that_trains() -> None:
    model = small()
    inject(model, ["0", "4"], "x", 4, 8.0, ranks={"4": 2})
    assert torch.equal(model(IMAGE), small()(IMAGE))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{path}.lora_{side}.lora.weight" for path in "04" for side in "AB"}
    found = layers_of(model, "x")
    assert (found["0"].rank, found["0"].alpha, found["4"].rank, found["4"].alpha) == (4, 8.0, 2, 4.0)


def test_a_layer_takes_the_dtype_of_its_base() -> None:
    model = small().to(torch.bfloat16)
    attach(model, {"4": layer_for(leaves(model)["4"].weight, 2, 1)}, "x")
    assert model(IMAGE.bfloat16()).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_text_encoders_are_addressed_with_and_without_their_prefix() -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = CLIPTextModelWithProjection(config).eval()
    paths = select("text_encoder", model, ["text"])
    assert paths
    assert all(path.startswith("encoder.layers.0.") for path in paths)
    ids = torch.arange(5)[None]
    before = model(ids).text_embeds
    attach(model, {path: layer_for(leaves(model)[path].weight, 2, 1) for path in paths}, "x")
    assert layers_of(model, "x").keys() == set(paths)
    assert not torch.equal(model(ids).text_embeds, before)
    detach(model)
    assert torch.equal(model(ids).text_embeds, before)


def test_sites_name_what_they_say(pipe) -> None:
    components = pipe.loras.fuser.components
    attention = select("unet", components["unet"], ["unet.attention"])
    assert attention
    assert all(path.endswith(("to_q", "to_k", "to_v", "to_out.0")) for path in attention)
    conv = select("unet", components["unet"], ["unet.conv"])
    assert set(conv) | set(attention) < set(select("unet", components["unet"], ["unet.all"]))
    encoder, decoder = (select("vae", components["vae"], [f"vae.{side}"]) for side in ("encoder", "decoder"))
    assert set(encoder) & set(decoder) == set()
    assert sorted(encoder + decoder) == sorted(select("vae", components["vae"], ["vae.all"]))
    assert select("vae", components["vae"], ["unet.all"]) == []
    assert select("unet", components["unet"], [r"unet\..*attn2\.to_k$"]) == [
        path for path in attention if path.endswith("attn2.to_k")
    ]
    assert set(select_all(components, ["text", "vae.decoder"])) == {"text_encoder", "vae"}
    assert len(SITES) == 8


@pytest.mark.parametrize(
    ("sites", "said"),
    [
        ([], "No site"),
        (["unet.atention"], "did you mean 'unet.attention'"),
        (["nothing.here"], "matches no"),
        (["(("], "regular expression"),
    ],
)
def test_a_site_that_names_nothing_is_an_error(pipe, sites: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        select_all(pipe.loras.fuser.components, sites)


def test_selection_is_blind_to_what_is_attached(pipe) -> None:
    components = {name: copy.deepcopy(model) for name, model in pipe.loras.fuser.components.items()}
    before = select_all(components, ["unet.all", "text", "vae.all"])
    for name, layers in random_lora(components, ["unet.all", "text", "vae.all"]).parts.items():
        attach(components[name], layers, "x")
    assert select_all(components, ["unet.all", "text", "vae.all"]) == before


@pytest.mark.filterwarnings("ignore:.*invalid shape")  # peft takes its own bias for a shard
def test_a_bias_that_was_trained_along_is_refused_and_named(tmp_path: Path) -> None:
    """peft's lora_bias: the file that peft itself writes."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["4"], lora_bias=True, init_lora_weights=False)
    oracle = inject_adapter_in_model(config, small(), "default")
    tensors = {f"unet.{name}": value.contiguous() for name, value in get_peft_model_state_dict(oracle).items()}
    save_file(tensors, tmp_path / "b.safetensors")
    lora = read_lora(tmp_path / "b.safetensors")
    assert [key.rpartition(".")[2] for key in lora.unread] == ["bias"]
    with pytest.raises(UserError, match=r"lora_B\.bias is a bias .*lora_bias.*load the file with peft"):
        fit(lora, {"unet": small()})
    kept, left = fit(lora, {"unet": small()}, partial=True)
    assert len(kept.parts["unet"]) == len(left) == 1
