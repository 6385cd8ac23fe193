"""The difference of two checkpoints as a LoRA: exact where the rank suffices, and plain about what it leaves out."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from helpers import edit_json, tiny_vae
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_hosts import clip, unet

from latentpipe.checkpoints.pipeline_io import hashes
from latentpipe.lora.adapter import Lora
from latentpipe.lora.delta import delta
from latentpipe.lora.extract import EXTRACTED_KEY, Explained, explained, extract, extract_models
from latentpipe.lora.state_dict.io import read_lora, stated_base, write_lora
from latentpipe.lora.target_modules import leaves
from latentpipe.utils.errors import LatentpipeWarning, UserError
from latentpipe.utils.io import content_hash, read_tensors

Tensors = dict[str, torch.Tensor]


def moved(tensors: Tensors, rank: int, names: tuple[str, ...], seed: int = 0) -> Tensors:
    """The tensors with a change of a low rank on some."""
    random = torch.Generator().manual_seed(seed)
    found = dict(tensors)
    for name in names:
        value = tensors[name]
        rows, columns = value.shape[0], value[0].numel()
        change = torch.randn(rows, rank, generator=random) @ torch.randn(rank, columns, generator=random)
        found[name] = (value.float() + 0.1 * change.reshape(value.shape)).to(value.dtype)
    return found


def applied(lora: Lora, component: str, before: Tensors) -> Tensors:
    """The state dict with the adapter's changes added."""
    found = dict(before)
    for path, layer in lora.parts[component].items():
        found[f"{path}.weight"] = before[f"{path}.weight"] + delta(layer, before[f"{path}.weight"])
    return found


@pytest.fixture(scope="module")
def states() -> Tensors:
    """The weights of a tiny UNet."""
    return dict(unet(4, 8).state_dict())


CONV, LINEAR = "conv_in.weight", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"


@given(rank=st.integers(1, 3), more=st.integers(0, 3))
def test_a_change_of_that_rank_comes_back(states: Tensors, rank: int, more: int) -> None:
    """Linear and convolution, any rank at or above that of the change; nothing else is in it."""
    after = moved(states, rank, (CONV, LINEAR))
    lora = extract(states, after, "unet", rank + more)
    assert {path for _, path, _ in lora.layers()} == {name.removesuffix(".weight") for name in (CONV, LINEAR)}
    assert {layer.rank for _, _, layer in lora.layers()} == {rank}
    back = applied(lora, "unet", states)
    for name in states:
        assert (back[name] - after[name]).abs().max() < 1e-5, name
    assert explained(lora)["unet"].share == pytest.approx(1, abs=1e-6)


def test_a_rank_that_is_too_small_says_what_it_holds(states: Tensors) -> None:
    """The share of ||dW|| is that of the truncated SVDs."""
    after = moved(states, 3, (CONV, LINEAR))
    lora = extract(states, after, "unet", 1)
    values = [torch.linalg.svdvals((after[name] - states[name]).flatten(1)).double() for name in (CONV, LINEAR)]
    held = sum(float(one[0] ** 2) for one in values) / sum(float(one.square().sum()) for one in values)
    assert explained(lora)["unet"].share == pytest.approx(held**0.5, rel=1e-4)
    assert explained(lora)["unet"].layers == 2
    assert "2 layers, rank 1" in str(explained(lora)["unet"])


def test_a_share_of_energy_chooses_each_layers_rank(states: Tensors) -> None:
    """As few columns as hold it; more for a layer whose change is spread."""
    after = moved(moved(states, 1, (CONV,)), 6, (LINEAR,))
    lora = extract(states, after, "unet", 0.9)
    ranks = {path: layer.rank for _, path, layer in lora.layers()}
    assert ranks["conv_in"] == 1
    assert 1 < ranks[LINEAR.removesuffix(".weight")] < 6
    assert explained(lora)["unet"].share >= 0.9**0.5
    assert all(layer.alpha == layer.rank for _, _, layer in lora.layers())


def test_biases_and_norms_are_named(states: Tensors) -> None:
    """A warning, and their share of the whole difference."""
    after = moved(states, 1, (LINEAR,))
    after["conv_in.bias"] = states["conv_in.bias"] + 1
    after["conv_norm_out.weight"] = states["conv_norm_out.weight"] * 2
    with pytest.warns(LatentpipeWarning, match=r"unet\.conv_in\.bias, unet\.conv_norm_out\.weight"):
        lora = extract(states, after, "unet", 4)
    said = explained(lora)["unet"]
    assert set(said.left_out) == {"conv_in.bias", "conv_norm_out.weight"}
    parts = [(after[name] - states[name]).norm() ** 2 for name in (*said.left_out, LINEAR)]
    assert said.left_share == pytest.approx(float(((parts[0] + parts[1]) / sum(parts)) ** 0.5), rel=1e-4)


def test_embedding_tables_are_left_out_and_prefixes_do_not_matter() -> None:
    """A text encoder with ``text_model.`` before and without it after; its tables are no layers."""
    before = {name.removeprefix("text_model."): value for name, value in clip(False).state_dict().items()}
    table, layer = "embeddings.token_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"
    after = moved(before, 1, (table, layer))
    prefixed = {f"text_model.{name}": value for name, value in before.items()} | {
        "text_model.embeddings.position_ids": torch.arange(4)
    }
    with pytest.warns(LatentpipeWarning, match="token_embedding"):
        lora = extract(prefixed, after, "text_encoder", 2)
    assert list(lora.parts["text_encoder"]) == [layer.removesuffix(".weight")]


def test_the_guess_of_layers_agrees_with_real_networks() -> None:
    """Every weight that is carried without `paths` is a Linear or Conv2d of the real class, and none is missed."""
    for component, model in (("unet", unet(4, 8)), ("text_encoder", clip(True)), ("vae", tiny_vae(mid_block_add_attention=True))):
        before = dict(model.state_dict())
        after = {name: value + 0.01 if value.is_floating_point() else value for name, value in before.items()}
        with pytest.warns(LatentpipeWarning):
            lora = extract(before, after, component, 1)
        assert set(lora.parts[component]) == set(leaves(model)), component


def test_paths_narrow_it(states: Tensors) -> None:
    """Only the modules that an adapter can go on."""
    after = moved(states, 1, (CONV, LINEAR))
    with pytest.warns(LatentpipeWarning, match=r"conv_in\.weight"):
        lora = extract(states, after, "unet", 1, paths=[LINEAR.removesuffix(".weight")])
    assert len(lora.parts["unet"]) == 1


def test_another_dtype_is_no_difference(states: Tensors) -> None:
    """The same weights rounded to fp16 differ by rounding alone; a real change still counts."""
    half = {name: value.half() for name, value in states.items()}
    with pytest.raises(UserError, match="nothing to extract"):
        extract(states, half, "unet", 1)
    lora = extract(states, moved(half, 1, (LINEAR,)), "unet", 1)
    assert len(lora.parts["unet"]) == 1


@pytest.mark.parametrize("rank", [0, -1, 1.0, 0.0, 2.5, float("nan"), True])
def test_ranks_that_are_none(states: Tensors, rank: float) -> None:
    """A whole number from 1, or a share."""
    with pytest.raises(UserError, match="The rank is"):
        extract(states, moved(states, 1, (LINEAR,)), "unet", rank)


def test_checkpoints_that_do_not_compare(states: Tensors) -> None:
    """Equal ones, other names, other shapes, NaN, and a difference that no LoRA carries."""
    with pytest.raises(UserError, match="nothing to extract"):
        extract(states, dict(states), "unet", 1)
    fewer = {name: value for name, value in states.items() if name != CONV}
    with pytest.raises(UserError, match=r"conv_in\.weight is only in one"):
        extract(states, fewer, "unet", 1)
    with pytest.raises(UserError, match=r"\(8, 4, 3, 3\) before and \(8, 5, 3, 3\) after"):
        extract(states, {**states, CONV: torch.zeros(8, 5, 3, 3)}, "unet", 1)
    with pytest.raises(UserError, match=r"unet\.conv_in\.weight holds values that are not finite"):
        extract(states, {**states, CONV: states[CONV] * float("nan")}, "unet", 1)
    biased = {**states, "conv_in.bias": states["conv_in.bias"] + 1}
    with (
        pytest.warns(LatentpipeWarning, match="conv_in.bias"),
        pytest.raises(UserError, match="No weight of a linear or convolution"),
    ):
        extract(states, biased, "unet", 1)


def test_what_an_adapter_says_survives_its_file(states: Tensors, tmp_path: Path) -> None:
    """The base's hash and the shares; damage is told."""
    lora = extract(states, moved(states, 1, (LINEAR,)), "unet", 2, base_hash=content_hash(states))
    write_lora(lora, tmp_path / "one.safetensors")
    back = read_lora(tmp_path / "one.safetensors")
    assert back.hash == lora.hash
    assert stated_base(back) == {"unet": content_hash(states)}
    assert explained(back) == explained(lora)
    assert isinstance(explained(back)["unet"], Explained)
    with pytest.raises(UserError, match="damaged"):
        explained(Lora({}, "x", {EXTRACTED_KEY: '{"components": {"unet": {"layers": 1}}}'}))
    assert explained(Lora({}, "x")) == {}


# --- whole models ----------------------------------------------------------------------------------------------


def change_file(file: Path, rank: int, count: int = 2) -> None:
    """A change of a low rank on the last matrices of a safetensors file."""
    tensors = read_tensors(file)
    names = [name for name, value in tensors.items() if value.ndim == 2 and "embedding" not in name and min(value.shape) > rank]
    save_file(moved(tensors, rank, tuple(sorted(names)[-count:])), file, metadata={"format": "pt"})


def test_two_pipelines(model_folder: Path, model_copy: Path) -> None:
    """Every component that differs, with the hashes of the model before; what is no network is named."""
    change_file(model_copy / "unet" / "diffusion_pytorch_model.safetensors", 2)
    change_file(model_copy / "text_encoder" / "model.safetensors", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LatentpipeWarning)
        lora = extract_models(model_folder, model_copy, 3)
    assert set(lora.parts) == {"unet", "text_encoder"}
    assert not any(path.startswith("text_model.") for path in lora.parts["text_encoder"])
    known = hashes(model_folder)
    assert stated_base(lora) == {part: known[part] for part in ("unet", "text_encoder", "vae")}
    for said in explained(lora).values():
        assert said.share > 0.99
        assert said.left_out == ()
    assert lora.name == "model-copy"
    edit_json(model_copy / "scheduler" / "scheduler_config.json", beta_end=0.03)
    with pytest.warns(LatentpipeWarning, match="the scheduler"):
        extract_models(model_folder, model_copy, 3)


def test_the_extracted_adapter_makes_the_changed_model(model_folder: Path, model_copy: Path) -> None:
    """Fused onto the model before, it gives the weights of the model after."""
    from latentpipe.checkpoints.pipeline_io import load_pipeline
    from latentpipe.lora.fusion import LoraFuser

    change_file(model_copy / "unet" / "diffusion_pytorch_model.safetensors", 2)
    lora = extract_models(model_folder, model_copy, 2)
    before, after = load_pipeline(model_folder).unet, load_pipeline(model_copy).unet
    wanted = after.state_dict()
    mixer = LoraFuser({"unet": before})
    mixer.load(lora)
    mixer.set({lora.name: 1.0})
    for name, value in before.state_dict().items():
        assert (value - wanted[name]).abs().max() < 2e-3, name  # both are stored in fp16


def test_two_vaes_and_a_model_beside_a_vae(model_folder: Path, vae_copy: Path) -> None:
    """A model stands for its VAE; another normalization cannot be carried and is named."""
    tensors = read_tensors(vae_copy / "diffusion_pytorch_model.safetensors")
    save_file(moved(tensors, 1, ("decoder.conv_in.weight",)), vae_copy / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    for before in (model_folder, model_folder / "vae"):
        lora = extract_models(before, vae_copy, 4)
        assert list(lora.parts) == ["vae"]
        assert list(lora.parts["vae"]) == ["decoder.conv_in"]
        assert stated_base(lora) == {"vae": hashes(model_folder)["vae"]}
    edit_json(vae_copy / "config.json", scaling_factor=0.5)
    with pytest.warns(LatentpipeWarning, match="the VAE's normalization"):
        extract_models(model_folder, vae_copy, 4)


def test_models_that_do_not_compare(model_folder: Path, model_copy: Path, tmp_path: Path) -> None:
    """The same model, one that is missing, and one of other parts."""
    with pytest.raises(UserError, match="nothing to extract"):
        extract_models(model_folder, model_copy, 4)
    with pytest.raises(UserError, match="No VAE"):
        extract_models(tmp_path / "missing", model_copy, 4)
    index = json.loads((model_copy / "model_index.json").read_text())
    (model_copy / "model_index.json").write_text(json.dumps({**index, "text_encoder_2": ["transformers", "CLIPTextModel"]}))
    shutil.copytree(model_copy / "text_encoder", model_copy / "text_encoder_2")
    with pytest.raises(UserError, match="different parts"):
        extract_models(model_folder, model_copy, 4)
