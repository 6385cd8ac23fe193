"""The verbs for LoRA files, as the command line calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import tyro
from safetensors.torch import load_file, save_file

from latentpipe.cli import lora as lora_verbs
from latentpipe.lora.adapter import Lora, LoraLayer
from latentpipe.lora.merge import METHODS
from latentpipe.lora.state_dict.describe import layout
from latentpipe.lora.state_dict.io import card, read_lora, write_lora
from latentpipe.utils.errors import LatentpipeWarning, UserError
from latentpipe.utils.io import file_hash, read_tensors


def call(function: Callable[..., None], *arguments: Any) -> None:
    """As `latentpipe.cli` does it."""
    tyro.cli(function, args=[str(argument) for argument in arguments])


def layer(out: int, inputs: int, rank: int, seed: int, alpha: float | None = None) -> LoraLayer:
    """A random plain layer."""
    random = torch.Generator().manual_seed(seed)
    tensors = {"lora_A": torch.randn(rank, inputs, generator=random), "lora_B": torch.randn(out, rank, generator=random)}
    return LoraLayer("lora", tensors, rank, alpha or rank)


UNET = "mid_block.attentions.0.transformer_blocks.0.attn1.to_"
TEXT = "encoder.layers.0.self_attn.q_proj"


def adapter(seed: int, rank: int = 2, alpha: float = 8.0) -> Lora:
    """An adapter on a unet and its text encoder, with a card."""
    parts = {
        "unet": {f"{UNET}{end}": layer(8, 8, rank, seed + index, alpha) for index, end in enumerate("qkv")},
        "text_encoder": {TEXT: layer(6, 6, rank, seed + 9, alpha)},
    }
    lora = Lora(parts, "made")
    said = card(lora, title="Made", base_hashes={"unet": "u" * 64}, trigger_words=["flat"], base_model="emoji")
    return replace(lora, metadata=said)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A LoRA file in diffusers' layout, alpha 8 on rank 2."""
    write_lora(adapter(1), tmp_path / "first.safetensors")
    return tmp_path / "first.safetensors"


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """Another one, of another rank, in kohya's layout."""
    write_lora(replace(adapter(50, 3, 3.0), name="second"), tmp_path / "second.safetensors", "kohya")
    return tmp_path / "second.safetensors"


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What was printed, as JSON."""
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# --- inspect ---------------------------------------------------------------------------------------------------


def test_inspect_says_what_a_file_is(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layout, components, ranks, alphas, hashes, words, metadata."""
    call(lora_verbs.lora_inspect, file)
    said = printed(capsys)
    assert said["layout"] == "diffusers"
    assert said["bytes"] == file.stat().st_size
    assert said["hash"] == read_lora(file).hash
    assert said["dtype"] == ["float32"]
    assert said["finite"] is True
    assert said["components"]["unet"] == {
        "modules": 3,
        "kinds": {"lora": 3},
        "ranks": {"2": 3},
        "alphas": {"8": 3},
        "rslora": False,
        "parameters": 96,
    }
    assert said["parameters"] == 96 + 24
    assert said["base"] == {"unet": "u" * 64}
    assert said["trigger_words"] == ["flat"]
    assert said["metadata"]["modelspec.title"] == "Made"
    assert said["metadata"]["ss_network_dim"] == "2"
    assert said["unread"] == []


def test_inspect_by_name_and_keys_of_no_layer(own_home: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name in $LATENTPIPE_HOME/lora; what belongs to no layer is listed."""
    (own_home / "lora").mkdir()
    save_file({**load_file(file), "embedding.vectors": torch.ones(2)}, own_home / "lora" / "flat.safetensors")
    call(lora_verbs.lora_inspect, "flat")
    said = printed(capsys)
    assert said["unread"] == ["embedding.vectors"]
    with pytest.raises(UserError, match=r"No LoRA 'round'.*flat"):
        call(lora_verbs.lora_inspect, "round")


def test_inspect_refuses_what_is_no_lora(file: Path, tmp_path: Path) -> None:
    """Other weights, a truncated file, a pickle."""
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="holds no LoRA"):
        call(lora_verbs.lora_inspect, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a complete safetensors"):
        call(lora_verbs.lora_inspect, tmp_path / "cut.safetensors")
    torch.save(load_file(file), tmp_path / "old.bin")
    with pytest.raises(UserError, match="latentpipe lora convert"):
        call(lora_verbs.lora_inspect, tmp_path / "old.bin")


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (["lora_unet_conv_in.lora_down.weight"], "kohya"),
        (["base_model.model.conv_in.lora_A.weight"], "peft"),
        (["unet.conv_in.lora_A.weight"], "diffusers"),
        (["down_blocks.0.attn1.processor.to_q_lora.down.weight"], "diffusers (attention processors)"),
        (["unet:0:up", "unet:0:down"], "cloneofsimo"),
        (["conv_in.lora_A.weight"], "peft (no component in its keys)"),
    ],
)
def test_layouts_are_told_by_keys(keys: list[str], name: str, tmp_path: Path) -> None:
    """One mark each."""
    save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / "x.safetensors")
    assert layout(tmp_path / "x.safetensors") == name


# --- convert ---------------------------------------------------------------------------------------------------


def test_convert_round_trip_keeps_alpha_and_names_its_source(file: Path, tmp_path: Path, capsys: Any) -> None:
    """diffusers to kohya to peft to diffusers: the same hash; alpha 8 on rank 2 stays."""
    before = read_lora(file)
    source = file
    for step, to in enumerate(("kohya", "peft", "diffusers")):
        out = tmp_path / f"step{step}.safetensors"
        call(lora_verbs.lora_convert, source, "--out", out, "--to", to)
        assert before.hash[:16] in capsys.readouterr().out
        lora = read_lora(out)
        assert lora.hash == before.hash
        assert {one.alpha for _, _, one in lora.layers()} == {8.0}
        said = json.loads(lora.metadata["latentpipe.converted"])
        assert said == {"file": source.name, "sha256": file_hash(source)}
        source = out
    assert set(read_tensors(source)) == set(read_tensors(file))


def test_convert_reads_pickles_and_casts(file: Path, tmp_path: Path) -> None:
    """.bin, weights alone; fp16 on request; code in a pickle is not run."""
    torch.save(load_file(file), tmp_path / "old.bin")
    call(lora_verbs.lora_convert, tmp_path / "old.bin", "--out", tmp_path / "new.safetensors", "--dtype", "fp16")
    lora = read_lora(tmp_path / "new.safetensors")
    assert {value.dtype for _, _, one in lora.layers() for value in one.tensors.values()} == {torch.float16}
    torch.save({"model": subprocess.run}, tmp_path / "bad.bin")
    with pytest.raises(UserError, match=r"bad\.bin"):
        call(lora_verbs.lora_convert, tmp_path / "bad.bin", "--out", tmp_path / "bad.safetensors")
    assert not (tmp_path / "bad.safetensors").exists()


def test_convert_to_plain(tmp_path: Path) -> None:
    """LoHa becomes plain LoRA of rank up to r squared, or of --rank with a warning."""
    random = torch.Generator().manual_seed(1)
    names = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)}
    tensors = {name: torch.randn(shape, generator=random) for name, shape in names.items()}
    odd = Lora({"unet": {f"{UNET}q": LoraLayer("loha", tensors, 2, 2.0)}}, "odd")
    write_lora(odd, tmp_path / "odd.safetensors", "kohya")
    call(lora_verbs.lora_convert, tmp_path / "odd.safetensors", "--out", tmp_path / "plain.safetensors", "--plain")
    plain = read_lora(tmp_path / "plain.safetensors").parts["unet"][f"{UNET}q"]
    assert (plain.kind, plain.rank) == ("lora", 4)
    wanted = (tensors["hada_w1_a"] @ tensors["hada_w1_b"]) * (tensors["hada_w2_a"] @ tensors["hada_w2_b"])
    assert torch.allclose(plain.tensors["lora_B"] @ plain.tensors["lora_A"] * plain.scale, wanted, atol=1e-5)
    with pytest.warns(LatentpipeWarning, match="rank 1 is not exact"):
        call(lora_verbs.lora_convert, tmp_path / "odd.safetensors", "--out", tmp_path / "one.safetensors", "--plain", "--rank", 1)
    with pytest.raises(UserError, match="belongs to --plain"):
        call(lora_verbs.lora_convert, tmp_path / "odd.safetensors", "--out", tmp_path / "x.safetensors", "--rank", 1)


def test_convert_names_keys_that_it_does_not_write(file: Path, tmp_path: Path) -> None:
    """Nothing is dropped in silence."""
    save_file({**load_file(file), "embedding.vectors": torch.ones(2)}, tmp_path / "more.safetensors")
    with pytest.warns(LatentpipeWarning, match=r"not written: embedding\.vectors"):
        call(lora_verbs.lora_convert, tmp_path / "more.safetensors", "--out", tmp_path / "x.safetensors")


# --- merge -----------------------------------------------------------------------------------------------------


def change(path: Path, component: str, name: str) -> torch.Tensor:
    """B A times the scale of one layer of a file."""
    one = read_lora(path).parts[component][name]
    return one.tensors["lora_B"] @ one.tensors["lora_A"] * one.scale


def test_merge_writes_the_sum_and_its_sources(file: Path, second: Path, tmp_path: Path, capsys: Any) -> None:
    """Files of two layouts and ranks; a negative weight; the result is explained by inspect."""
    out = tmp_path / "both.safetensors"
    call(lora_verbs.lora_merge, file, second, "--weights", 0.7, -0.5, "--method", "cat", "--out", out)
    capsys.readouterr()
    for component, name in (("unet", f"{UNET}k"), ("text_encoder", TEXT)):
        wanted = 0.7 * change(file, component, name) - 0.5 * change(second, component, name)
        assert torch.allclose(change(out, component, name), wanted, atol=1e-5)
    call(lora_verbs.lora_inspect, out)
    said = printed(capsys)
    assert said["merged"]["method"] == "cat"
    assert [source["name"] for source in said["merged"]["sources"]] == ["first", "second"]
    assert [source["hash"] for source in said["merged"]["sources"]] == [read_lora(file).hash, read_lora(second).hash]
    assert said["base"] == {"unet": "u" * 64}
    assert said["trigger_words"] == ["flat"]
    assert said["components"]["unet"]["ranks"] == {"5": 3}
    assert said["metadata"]["ss_base_model_version"] == "emoji"


def test_merge_by_component_and_dtype(file: Path, second: Path, tmp_path: Path) -> None:
    """Weights by component; the widest dtype of the sources unless one is given."""
    halves = []
    for name, source in (("a", file), ("b", second)):
        write_lora(read_lora(source), tmp_path / f"{name}.safetensors", dtype="fp16")
        halves.append(tmp_path / f"{name}.safetensors")
    out = tmp_path / "m.safetensors"
    call(
        lora_verbs.lora_merge,
        *halves,
        "--weights",
        "unet=0.5",
        "unet=1,text_encoder=0",
        "--method",
        "cat",
        "--out",
        out,
        "--to",
        "kohya",
    )
    lora = read_lora(out)
    assert set(lora.parts) == {"unet"}
    assert {value.dtype for _, _, one in lora.layers() for value in one.tensors.values()} == {torch.float16}
    call(lora_verbs.lora_merge, halves[0], second, "--method", "svd", "--rank", 1, "--out", tmp_path / "s.safetensors")
    one = read_lora(tmp_path / "s.safetensors").parts["unet"][f"{UNET}q"]
    assert (one.rank, one.tensors["lora_A"].dtype) == (1, torch.float32)


def test_merge_refuses_in_one_sentence(file: Path, second: Path, tmp_path: Path) -> None:
    """And writes nothing."""
    out = tmp_path / "m.safetensors"
    for arguments, words in (
        ((file, second, "--weights", "1", "loud"), "--weights loud"),
        ((file, second, "--weights", "1", "vae=1"), "no layer in 'vae'"),
        ((file, second, "--weights", "1"), "1 weights for 2"),
        ((file, second, "--weights", "0", "0"), "Every weight is 0"),
        ((file, second, "--method", "linear"), "needs equal ranks"),
        ((file, file), "Two LoRA files have the name"),
        ((file, "missing"), "No LoRA 'missing'"),
    ):
        with pytest.raises(UserError, match=words):
            call(lora_verbs.lora_merge, *arguments, "--out", out)
        assert not out.exists()


def test_the_methods_of_the_command_line_are_those_there_are() -> None:
    """The list is written twice, because --help answers without torch."""
    assert set(get_args(lora_verbs.Method)) == set(METHODS)


# --- extract ---------------------------------------------------------------------------------------------------


def test_extract_writes_a_file_that_names_its_base(model_folder: Path, model_copy: Path, tmp_path: Path, capsys: Any) -> None:
    """A whole rank and a share; the report is printed."""
    file = model_copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = read_tensors(file)
    random = torch.Generator().manual_seed(1)
    value = tensors["conv_in.weight"]
    change = torch.randn(value.shape[0], 1, generator=random) @ torch.randn(1, value[0].numel(), generator=random)
    save_file({**tensors, "conv_in.weight": (value.float() + 0.1 * change.reshape(value.shape)).half()}, file, {"format": "pt"})
    for rank, to in ((4, "diffusers"), (0.9, "kohya")):
        out = tmp_path / f"{to}.safetensors"
        call(lora_verbs.lora_extract, model_folder, model_copy, "--rank", rank, "--out", out, "--to", to)
        assert "unet: 1 layer, rank" in capsys.readouterr().out
        lora = read_lora(out)
        assert list(lora.parts["unet"]) == ["conv_in"]
        assert lora.parts["unet"]["conv_in"].tensors["lora_A"].dtype == torch.float16
    call(lora_verbs.lora_inspect, out)
    said = printed(capsys)
    assert set(said["base"]) == {"unet", "vae"}
    assert said["components"]["unet"]["ranks"] == {"1": 1}
    assert said["extracted"]["components"]["unet"]["share"] > 0.94
    with pytest.raises(UserError, match=r"The rank is 2\.5"):
        call(lora_verbs.lora_extract, model_folder, model_copy, "--rank", 2.5, "--out", tmp_path / "x.safetensors")


# --- all -------------------------------------------------------------------------------------------------------


def test_an_out_that_is_taken_or_misnamed_is_refused_first(file: Path, tmp_path: Path) -> None:
    """Before anything is read; the file that is there stays as it is."""
    before = file_hash(file)
    for function, sources in (
        (lora_verbs.lora_convert, ["missing"]),
        (lora_verbs.lora_merge, ["missing"]),
        (lora_verbs.lora_extract, ["missing", "missing"]),
    ):
        with pytest.raises(UserError, match="exists already"):
            call(function, *sources, "--out", file)
        with pytest.raises(UserError, match=r"out\.bin: a LoRA is a safetensors file"):
            call(function, *sources, "--out", tmp_path / "out.bin")
    assert file_hash(file) == before


def test_the_verbs_need_no_torch_to_be_listed() -> None:
    """--help answers at once."""
    code = "import sys, latentpipe.cli.lora; assert 'torch' not in sys.modules and 'tyro' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys, tyro\nfrom latentpipe.cli import lora as lora_verbs\n"
        "try:\n tyro.cli(lora_verbs.lora_merge, args=['--help'])\nexcept SystemExit as end:\n assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "magnitude_prune_svd" in run.stdout


@pytest.mark.slow
def test_third_party_files(assets: Path, tmp_path: Path, capsys: Any) -> None:
    """A real SD1.5 LoRA is inspected, merged with itself at two weights, and comes out at 1.5 times."""
    files = sorted((assets / "weights" / "lora_catundchat").glob("*.safetensors"))
    assert files
    call(lora_verbs.lora_inspect, files[0])
    said = printed(capsys)
    assert said["components"]["unet"]["modules"] == 128
    assert said["unread"] == []
    twin = tmp_path / "twin.safetensors"
    call(lora_verbs.lora_convert, files[0], "--out", twin, "--to", "kohya")
    call(
        lora_verbs.lora_merge,
        files[0],
        twin,
        "--weights",
        1,
        0.5,
        "--method",
        "cat",
        "--out",
        tmp_path / "m.safetensors",
        "--dtype",
        "fp32",
    )
    name = next(iter(read_lora(files[0]).parts["unet"]))
    one, two = (read_lora(file).parts["unet"][name] for file in (files[0], tmp_path / "m.safetensors"))
    wanted = 1.5 * one.tensors["lora_B"].float() @ one.tensors["lora_A"].float() * one.scale
    assert torch.allclose(two.tensors["lora_B"] @ two.tensors["lora_A"] * two.scale, wanted, atol=1e-6)
