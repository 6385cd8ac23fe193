"""LoRA files: every layout comes back as it went; what is not right is one sentence."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from file_parts import conv, dora, linear, loha, lokr, loras, values
from hypothesis import given
from safetensors.torch import save_file

from latentpipe.lora.adapter import Lora, LoraLayer
from latentpipe.lora.state_dict.io import card, read_lora, stated_base, trigger_words, write_lora
from latentpipe.utils.errors import LatentpipeWarning, UserError
from latentpipe.utils.io import read_header, read_tensors

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FF = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
pytestmark = pytest.mark.filterwarnings("ignore::latentpipe.utils.errors.LatentpipeWarning")


def small() -> Lora:
    return Lora({"unet": {Q: linear(2, 3.0), FF: linear(4, 1.5, seed=5), "conv_in": dora(conv())}})


def saved(tmp_path: Path, tensors: dict[str, Any], **metadata: str) -> Path:
    path = tmp_path / "file.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata or None)
    return path


def pair(stem: str, rank: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    return {f"{stem}.lora_down.weight": values(rank, 4, seed=seed), f"{stem}.lora_up.weight": values(6, rank, seed=seed + 1)}


def same(first: Lora, second: Lora) -> None:
    assert {name: list(part) for name, part in first.parts.items()} == {
        name: list(part) for name, part in second.parts.items()
    } or ({name: set(part) for name, part in first.parts.items()} == {name: set(part) for name, part in second.parts.items()})
    for component, path, layer in first.layers():
        other = second.parts[component][path]
        told = (layer.kind, layer.rank, layer.alpha, layer.rslora)
        assert told == (other.kind, other.rank, other.alpha, other.rslora), path
        assert set(layer.tensors) == set(other.tensors)
        for name, value in layer.tensors.items():
            assert value.dtype == other.tensors[name].dtype
            assert value.shape == other.tensors[name].shape
            assert torch.equal(value, other.tensors[name]), (path, name)
    assert first.hash == second.hash


@given(loras())
@pytest.mark.slow
def test_round_trips_are_exact(lora: Lora) -> None:
    with tempfile.TemporaryDirectory() as folder:
        at = lora
        for step, to in enumerate(["peft", "kohya", "peft", "diffusers", "kohya", "diffusers"]):
            path = Path(folder) / f"{step}.safetensors"
            assert write_lora(at, path, to) == lora.hash  # type: ignore[arg-type]
            at = read_lora(path)
            same(lora, at)
            assert at.unread == ()
            assert trigger_words(at) == ["flat style"]


@pytest.mark.parametrize("to", ["peft", "diffusers", "kohya"])
def test_layouts_have_the_keys_that_their_programs_write(to: Any, tmp_path: Path) -> None:
    text = {"encoder.layers.0.self_attn.q_proj": linear()}
    lora = Lora({"unet": {Q: linear()}, "text_encoder": text, "text_encoder_2": text})
    write_lora(lora, tmp_path / "a.safetensors", to)
    keys = set(read_header(tmp_path / "a.safetensors").shapes)
    clip = "text_model.encoder.layers.0.self_attn.q_proj"
    wanted = {
        "peft": {f"unet.base_model.model.{Q}.lora_A.weight", f"text_encoder.base_model.model.{clip}.lora_B.weight"},
        "diffusers": {f"unet.{Q}.lora_A.weight", f"text_encoder_2.{clip}.lora_B.weight"},
        "kohya": {
            f"lora_unet_{Q.replace('.', '_')}.alpha",
            f"lora_te1_{clip.replace('.', '_')}.lora_down.weight",
            f"lora_te2_{clip.replace('.', '_')}.lora_up.weight",
        },
    }[to]
    assert wanted <= keys
    if to == "kohya":
        write_lora(Lora({"text_encoder": text}), tmp_path / "b.safetensors", "kohya")
        assert f"lora_te_{clip.replace('.', '_')}.alpha" in read_header(tmp_path / "b.safetensors").shapes
        told = {"latentpipe.base": '{"text_encoder_2": "00"}'}
        write_lora(Lora({"text_encoder": text}), tmp_path / "c.safetensors", "kohya", metadata=told)
        assert f"lora_te1_{clip.replace('.', '_')}.alpha" in read_header(tmp_path / "c.safetensors").shapes


def test_the_same_lora_is_the_same_file(tmp_path: Path) -> None:
    told = card(small(), title="a", base_hashes={"unet": "12"})
    for name in ("a", "b"):
        write_lora(small(), tmp_path / f"{name}.safetensors", metadata=told)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(("dtype", "kind"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_dtype_is_chosen_and_alpha_is_not_rounded(dtype: str, kind: torch.dtype, tmp_path: Path) -> None:
    lora = Lora({"unet": {Q: linear(3, 1.2345678)}})
    for to in ("kohya", "diffusers", "peft"):
        told = write_lora(lora, tmp_path / "a.safetensors", to, dtype=dtype)  # type: ignore[arg-type]
        back = read_lora(tmp_path / "a.safetensors")
        assert back.parts["unet"][Q].alpha == 1.2345678
        assert {value.dtype for value in back.parts["unet"][Q].tensors.values()} == {kind}
        assert back.hash == told
    large = Lora({"unet": {Q: dataclasses.replace(linear(), tensors={n: v * 1e6 for n, v in linear().tensors.items()})}})
    with pytest.raises(UserError, match="beyond the range of fp16"):
        write_lora(large, tmp_path / "large.safetensors", dtype="fp16")
    assert not (tmp_path / "large.safetensors").exists()


def test_kohyas_alpha_carries_the_scale_of_rslora(tmp_path: Path) -> None:
    lora = Lora({"unet": {Q: linear(4, 2.0, rslora=True)}})
    write_lora(lora, tmp_path / "a.safetensors", "kohya")
    tensors = read_tensors(tmp_path / "a.safetensors")
    alpha = tensors[f"lora_unet_{Q.replace('.', '_')}.alpha"]
    assert alpha.shape == ()
    assert alpha.item() / 4 == 1.0  # 2 / sqrt(4)
    bare = read_lora(saved(tmp_path, tensors))  # another program kept the tensors and lost our metadata
    assert bare.parts["unet"][Q].scale == 1.0
    assert read_lora(tmp_path / "a.safetensors").parts["unet"][Q].rslora


def test_an_alpha_that_another_program_changed_wins_over_our_note(tmp_path: Path) -> None:
    write_lora(Lora({"unet": {Q: linear(4, 2.0, rslora=True)}}), tmp_path / "a.safetensors", "kohya")
    tensors = read_tensors(tmp_path / "a.safetensors")
    tensors[f"lora_unet_{Q.replace('.', '_')}.alpha"] *= 3
    changed = saved(tmp_path, tensors, **read_header(tmp_path / "a.safetensors").metadata)
    assert read_lora(changed).parts["unet"][Q].scale == 3.0


@pytest.mark.parametrize(
    ("stem", "component", "path"),
    [
        (f"unet.{Q}", "unet", Q),
        (f"base_model.model.{Q}", "unet", Q),
        (f"unet.base_model.model.{Q}", "unet", Q),
        (Q, "unet", Q),
        ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", "unet", Q),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder", "encoder.layers.0.mlp.fc1"),
        ("text_encoder.encoder.layers.0.mlp.fc1", "text_encoder", "encoder.layers.0.mlp.fc1"),
        ("base_model.model.text_model.encoder.layers.0.mlp.fc1", "text_encoder", "encoder.layers.0.mlp.fc1"),
        ("transformer.single_transformer_blocks.0.proj_out", "transformer", "single_transformer_blocks.0.proj_out"),
        ("vae.decoder.conv_in", "vae", "decoder.conv_in"),
        ("decoder.mid_block.attentions.0.to_q", "vae", "decoder.mid_block.attentions.0.to_q"),
    ],
)
@pytest.mark.parametrize("ends", [("lora_A.weight", "lora_B.weight"), ("lora_A.default.weight", "lora_B.default.weight"),
                                  ("lora.down.weight", "lora.up.weight")])  # fmt: skip
def test_dotted_keys_of_every_writer(stem: str, component: str, path: str, ends: tuple[str, str], tmp_path: Path) -> None:
    made = linear()
    tensors = {f"{stem}.{ends[0]}": made.tensors["lora_A"], f"{stem}.{ends[1]}": made.tensors["lora_B"]}
    found = read_lora(saved(tmp_path, tensors))
    assert [(where, name) for where, name, _ in found.layers()] == [(component, path)]
    assert found.parts[component][path].alpha == 2.0  # no alpha in the file: the rank


def test_the_oldest_keys_of_diffusers(tmp_path: Path) -> None:
    made = linear().tensors
    old = {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora": ("unet", Q),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora": (
            "unet",
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
        ),
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora": ("text_encoder", "encoder.layers.0.self_attn.out_proj"),
        "text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_linear_layer": ("text_encoder", "encoder.layers.1.mlp.fc1"),
    }
    tensors = {}
    for stem in old:
        tensors |= {f"{stem}.down.weight": made["lora_A"].clone(), f"{stem}.up.weight": made["lora_B"].clone()}
    found = read_lora(saved(tmp_path, tensors))
    assert {(component, path) for component, path, _ in found.layers()} == set(old.values())


def test_keys_of_no_layer_are_named(tmp_path: Path) -> None:
    extra = {"lora_unet_conv_in.diff": values(2), "<s1>": values(3), "lora_unet_conv_out.alpha": torch.tensor(1.0)}
    found = read_lora(saved(tmp_path, pair("lora_unet_mid_block_attentions_0_proj_in") | extra))
    assert set(found.unread) == set(extra)


def test_the_paths_of_the_base_settle_names_outside_the_table(tmp_path: Path) -> None:
    path = saved(tmp_path, pair("lora_unet_my_own_block_to_q"))
    assert list(read_lora(path, {"unet": ["my_own.block.to_q"]}).parts["unet"]) == ["my_own.block.to_q"]
    assert list(read_lora(path).parts["unet"]) == ["my.own.block.to_q"]
    assert list(read_lora(path, {"transformer": ["my_own.block.to_q"]}).parts) == ["transformer"]
    lora = Lora({"unet": {"my_own.block.to_q": linear()}})
    write_lora(lora, tmp_path / "own.safetensors", "kohya")
    same(lora, read_lora(tmp_path / "own.safetensors"))


def test_a_peft_folder(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {f"base_model.model.{path}.lora_A.weight": values(rank, 4) for path, rank in ((Q, 2), (FF, 4))}
    tensors |= {f"base_model.model.{path}.lora_B.weight": values(6, rank) for path, rank in ((Q, 2), (FF, 4))}
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"without adapter_config\.json"):
        read_lora(folder)
    config = {"r": 2, "lora_alpha": 16, "rank_pattern": {"ff.net.2": 4}, "alpha_pattern": {".*ff.*": 5}, "use_rslora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = read_lora(folder)
    assert found.name == "adapter"
    told = {path: (layer.rank, layer.alpha, layer.rslora) for _, path, layer in found.layers()}
    assert told == {Q: (2, 16.0, True), FF: (4, 5.0, True)}
    for wrong, words in (({"lora_alpha": "8"}, "alpha '8'"), ({"alpha_pattern": {"(a+)+": 1}}, "pattern"), ({"r": 0}, "rank 0")):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {}} | wrong))
        with pytest.raises(UserError, match=words):
            read_lora(folder)


def test_a_peft_file_alone_says_that_its_alpha_is_unknown(tmp_path: Path) -> None:
    tensors = {f"base_model.model.{Q}.lora_A.weight": values(2, 4), f"base_model.model.{Q}.lora_B.weight": values(6, 2)}
    with pytest.warns(LatentpipeWarning, match="alpha is taken to be the rank"):
        read_lora(saved(tmp_path, tensors))
    with pytest.warns(LatentpipeWarning, match="diffusers does not load"):
        write_lora(Lora({"unet": {Q: loha(2, 1.0, 4, 4, 0)}}), tmp_path / "loha.safetensors")
    with pytest.warns(LatentpipeWarning, match="only some layers"):
        write_lora(Lora({"unet": {Q: linear(), FF: dora(linear())}}), tmp_path / "some.safetensors")


GOOD = pair("lora_unet_mid_block_attentions_0_proj_in")
STEM = "lora_unet_mid_block_attentions_0_proj_in"
LOHA = {f"unet.{Q}.{name}": value for name, value in loha(2, 1.0, 4, 4, 0).tensors.items()}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no adapter": ({"encoder.conv_in.weight": values(2, 2)}, "holds no LoRA"),
    "nan": (GOOD | {f"{STEM}.lora_up.weight": torch.full((6, 2), float("nan"))}, "not finite"),
    "inf alpha": (GOOD | {f"{STEM}.alpha": torch.tensor(float("inf"))}, "not finite"),
    "rank 0": (pair(STEM, 0), "rank is 0"),
    "shapes": (GOOD | {f"{STEM}.lora_up.weight": values(6, 3)}, "do not multiply"),
    "vector": (GOOD | {f"{STEM}.lora_up.weight": values(6)}, "do not multiply"),
    "half": ({f"{STEM}.lora_up.weight": values(6, 2)}, "but no lora_A"),
    "twice": (GOOD | pair("unet.mid_block.attentions.0.proj_in"), "twice"),
    "te twice": (pair("lora_te_text_model_embeddings_x") | pair("lora_te1_text_model_embeddings_x"), "twice"),
    "two kinds": (GOOD | {f"{STEM}.hada_w1_a": values(2, 2)}, "lora and loha at once"),
    "integers": (GOOD | {f"{STEM}.lora_up.weight": torch.ones(6, 2, dtype=torch.int8)}, "stored as int8"),
    "alpha": (GOOD | {f"{STEM}.alpha": values(2)}, "expected one number"),
    "columns": (GOOD | {f"{STEM}.dora_scale": values(1, 4)}, "columns"),
    "dora": (GOOD | {f"{STEM}.dora_scale": values(5, 1)}, "one number for each of 6"),
    "dora of loha": (LOHA | {f"unet.{Q}.dora_scale": values(4, 1)}, "DoRA over loha"),
    "loha": ({name: value for name, value in LOHA.items() if not name.endswith("hada_w2_b")}, "no hada_w2_b"),
    "lokr": ({f"unet.{Q}.{n}": v for n, v in lokr(2, 1.0, (True, False), 0).tensors.items() if n != "lokr_w2_b"}, "no lokr_w2_b"),
    "flux": (pair("lora_unet_double_blocks_0_img_attn_qkv"), "first code"),
    "mid": (GOOD | {f"{STEM}.lora_mid.weight": values(3, 3, 3, 3)}, "lora_mid"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_one_sentence(name: str, tmp_path: Path) -> None:
    tensors, words = BAD[name]
    path = saved(tmp_path, tensors)
    with pytest.raises(UserError, match=words) as raised:
        read_lora(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_damaged_files(tmp_path: Path) -> None:
    write_lora(small(), tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        read_lora(cut)
    with pytest.raises(UserError, match="no such file"):
        read_lora(tmp_path / "none.safetensors")
    for key in ("lora_adapter_metadata", "latentpipe.layers"):
        for value in ("{", "[1]", "[" * 10**5):
            with pytest.raises(UserError, match=key):
                read_lora(saved(tmp_path, GOOD, **{key: value}))


def test_pickles_pass_through_convert_only(tmp_path: Path) -> None:
    named, listed, other = tmp_path / "a.bin", tmp_path / "b.pt", tmp_path / "c.ckpt"
    torch.save(GOOD, named)
    torch.save([value for _ in range(8) for value in (values(4, 2), values(2, 4))], listed)
    torch.save({"step": 3}, other)
    for path in (named, listed, other):
        with pytest.raises(UserError, match="latentpipe lora convert"):
            read_lora(path)
    assert list(read_lora(named, pickles=True).parts) == ["unet"]
    assert next(iter(read_lora(listed, pickles=True).parts["text_encoder"])) == "encoder.layers.0.self_attn.k_proj"
    with pytest.raises(UserError, match="no named tensors"):
        read_lora(other, pickles=True)
    torch.save([1, 2], other)
    with pytest.raises(UserError, match="list of 2"):
        read_lora(other, pickles=True)
    other.write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable file"):
        read_lora(other, pickles=True)


def test_nothing_is_written_where_something_is_wrong(tmp_path: Path) -> None:
    wrong: list[tuple[Lora, str, dict[str, Any], str]] = [
        (Lora({}), "a.safetensors", {}, "no layer"),
        (small(), "a.bin", {}, "safetensors file"),
        (small(), "a.safetensors", {"to": "a1111"}, "No LoRA layout"),
        (small(), "a.safetensors", {"dtype": "fp8"}, "No dtype"),
        (Lora({"unet": {"a.b": linear(), "a_b": linear()}}), "a.safetensors", {"to": "kohya"}, "same name"),
        (Lora({"unet": {Q: LoraLayer("lora", {"lora_A": values(2, 4)}, 2, 1.0)}}), "a.safetensors", {}, "no lora_B"),
    ]
    for lora, name, options, words in wrong:
        with pytest.raises(UserError, match=words):
            write_lora(lora, tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_the_card_is_read_back(tmp_path: Path) -> None:
    told = card(
        small(),
        title="Flat emoji",
        base_hashes={"unet": "ab", "vae": "cd"},
        trigger_words=("flat style", "emoji"),
        sample_settings={"prompt": "a cat, flat style", "seed": 7},
        training={"steps": 10},
        base_model="emoji",
        loras={"one": 0.5},
    )
    assert all(isinstance(value, str) and value for value in told.values())
    assert told["modelspec.sai_model_spec"] == "1.0.1"
    assert (told["ss_network_dim"], told["ss_network_module"]) == ("Dynamic", "networks.lora")
    assert "modelspec.date" not in told
    write_lora(small(), tmp_path / "a.safetensors", metadata=told)
    back = read_lora(tmp_path / "a.safetensors")
    assert stated_base(back) == {"unet": "ab", "vae": "cd"}
    assert trigger_words(back) == ["flat style", "emoji"]
    assert json.loads(back.metadata["latentpipe.sample"])["seed"] == 7
    write_lora(back, tmp_path / "b.safetensors", "kohya")
    other = read_lora(tmp_path / "b.safetensors")
    assert stated_base(other) == stated_base(back)
    assert back.metadata["modelspec.hash_sha256"] != other.metadata["modelspec.hash_sha256"]
    assert "lora_adapter_metadata" not in other.metadata
    same_alpha = card(Lora({"unet": {Q: linear(4, 2.0)}}), title="a", base_hashes={})
    assert (same_alpha["ss_network_dim"], same_alpha["ss_network_alpha"]) == ("4", "2")
    assert card(Lora({"unet": {Q: loha(2, 1.0, 4, 4, 0)}}), title="a", base_hashes={})["ss_network_module"] == "lycoris.kohya"


def test_the_hash_of_modelspec_is_that_of_all_bytes_after_the_header(tmp_path: Path) -> None:
    import hashlib

    write_lora(small(), tmp_path / "a.safetensors", metadata=card(small(), title="a", base_hashes={}))
    data = (tmp_path / "a.safetensors").read_bytes()
    rest = data[8 + int.from_bytes(data[:8], "little") :]
    assert read_header(tmp_path / "a.safetensors").metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(rest).hexdigest()


def test_damaged_cards(tmp_path: Path) -> None:
    assert stated_base(small()) == {}
    assert trigger_words(Lora({}, metadata={"modelspec.trigger_phrase": "one, two"})) == ["one", "two"]
    for value in ("{", "[1]", '{"unet": 3}'):
        with pytest.raises(UserError, match=r"latentpipe\.base is damaged"):
            stated_base(Lora({}, metadata={"latentpipe.base": value}))
    with pytest.raises(UserError, match=r"latentpipe\.trigger_words is damaged"):
        trigger_words(Lora({}, metadata={"latentpipe.trigger_words": "3"}))
