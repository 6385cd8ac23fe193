"""Folders of ComfyUI, A1111, InvokeAI and hub caches, made by a script: all kinds listed rightly, used, and left as they are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from latentpipe.checkpoints.places.tool_folders import Import, entries, folders_file, foreign, imports
from latentpipe.checkpoints.registry import bundled_weights_dir, find_lora, find_model, name_of, named_lora
from latentpipe.cli.app import main
from latentpipe.utils.errors import UserError


def weights(path: Path, **shapes: tuple[int, ...]) -> Path:
    """A safetensors file of zeros; names may hold dots as '__'."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name.replace("__", "."): torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}, path)
    return path


def sdxl(path: Path) -> Path:
    prefix = "model__diffusion_model__"
    return weights(path, **{f"{prefix}a__attn2__to_k__weight": (8, 2048), f"{prefix}label_emb__0__0__weight": (8, 2816)})


def sd1(path: Path) -> Path:
    return weights(path, model__diffusion_model__a__attn2__to_k__weight=(8, 768))


def vae(path: Path) -> Path:
    return weights(path, decoder__conv_in__weight=(8, 4, 3, 3))


def lora(path: Path) -> Path:
    return weights(path, lora_unet_a_attn2_to_k__lora_down__weight=(4, 768), lora_unet_a_attn2_to_k__lora_up__weight=(8, 4))


def embedding(path: Path) -> Path:
    return weights(path, emb_params=(3, 768))


def pickled(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"a": torch.zeros(2)}, path)
    return path


def comfyui(root: Path, model_folder: Path) -> Path:
    """A ComfyUI folder with every kind, and more folders elsewhere that its extra_model_paths.yaml names."""
    models, other = root / "ComfyUI" / "models", root / "other"
    sdxl(models / "checkpoints" / "sdxl" / "one.safetensors")
    sd1(models / "checkpoints" / "two.safetensors")
    pickled(models / "checkpoints" / "old.ckpt")
    (models / "checkpoints" / "put_checkpoints_here").write_text("")
    shutil.copytree(model_folder, models / "diffusers" / "tiny")
    weights(models / "diffusion_models" / "flux.safetensors", double_blocks__0__img_mod__lin__weight=(4, 4))
    weights(models / "unet" / "flux.safetensors", double_blocks__0__img_mod__lin__weight=(4, 4))
    weights(models / "text_encoders" / "clip_l.safetensors", text_model__a=(4, 4))
    vae(models / "vae" / "ft-mse.safetensors")
    lora(models / "loras" / "style" / "flat.safetensors")
    embedding(models / "embeddings" / "bad.safetensors")
    pickled(models / "embeddings" / "worse.pt")
    weights(models / "upscale_models" / "x4.safetensors", a=(4, 4))
    weights(models / "controlnet" / "pose.safetensors", control_model__a=(4, 4))
    sd1(other / "ckpt" / "three.safetensors")
    lora(other / "models" / "Lora" / "four.safetensors")
    lora(other / "models" / "LyCORIS" / "five.safetensors")
    (models / "loras" / "loop").symlink_to(models / "loras", target_is_directory=True)
    extra = """
    # a comment
    other:
        base_path: ../other
        is_default: true
        checkpoints: ckpt
        loras: |
            models/Lora
            models/LyCORIS
        custom_nodes: nodes
    nothing:
    """
    (root / "ComfyUI" / "extra_model_paths.yaml").write_text("\n".join(line[4:] for line in extra.splitlines()))
    return root / "ComfyUI"


def a1111(root: Path) -> Path:
    """A web UI's folder with every kind."""
    top = root / "webui"
    sd1(top / "models" / "Stable-diffusion" / "two.safetensors")
    vae(top / "models" / "Stable-diffusion" / "two.vae.safetensors")
    pickled(top / "models" / "Stable-diffusion" / "old.ckpt")
    vae(top / "models" / "VAE" / "ft-mse.safetensors")
    lora(top / "models" / "Lora" / "flat.safetensors")
    lora(top / "models" / "LyCORIS" / "locon.safetensors")
    embedding(top / "embeddings" / "bad.safetensors")
    pickled(top / "models" / "ESRGAN" / "x4.pth")
    pickled(top / "models" / "RealESRGAN" / "x2.pth")
    return top


def tree_hash(root: Path) -> str:
    """Names, kinds, times and contents of everything below a folder."""
    digest = hashlib.sha256()
    for at, folders, names in os.walk(root):
        for path in sorted(Path(at, name) for name in [*folders, *names]):
            facts = path.lstat()
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            digest.update(
                repr((path.relative_to(root).as_posix(), facts.st_mode, facts.st_mtime_ns, facts.st_size)).encode() + content
            )
    return digest.hexdigest()


def listed(capsys: pytest.CaptureFixture[str], kind: str = "all") -> dict[tuple[str, str], str]:
    """What `ls` prints of other tools: kind and name, and the facts in parentheses."""
    capsys.readouterr()
    assert main(["ls", kind]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith(")")]
    return {(row.split()[0], row.split()[1]): row.rpartition("  (")[2].rstrip(")") for row in rows}


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-cache"))


def test_comfyui(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = comfyui(tmp_path, model_folder)
    before = tree_hash(tmp_path)
    assert main(["import", "--from", "comfyui", str(top)]) == 0
    rows = listed(capsys)
    assert {key: facts.split(", ")[0] for key, facts in rows.items()} == {
        ("model", "comfyui/old"): "a pickle: convert it",
        ("model", "comfyui/sdxl/one"): "SDXL",
        ("model", "comfyui/three"): "SD 1.x",
        ("model", "comfyui/tiny"): "StableDiffusionPipeline",
        ("model", "comfyui/two"): "SD 1.x",
        ("part", "comfyui/clip_l"): "?",
        ("part", "comfyui/flux"): "FLUX.1",
        ("part", "comfyui/flux.safetensors"): "FLUX.1",
        ("vae", "comfyui/ft-mse"): "4 channels",
        ("lora", "comfyui/style/flat"): "SD 1.x",
        ("lora", "comfyui/four"): "SD 1.x",
        ("lora", "comfyui/five"): "SD 1.x",
        ("embedding", "comfyui/bad"): "SD 1.x",
        ("embedding", "comfyui/worse"): "a pickle: convert it",
        ("upscaler", "comfyui/x4"): "?",
    }
    assert all(facts.endswith(", comfyui") for facts in rows.values())
    assert {key[0] for key in listed(capsys, "embeddings")} == {"embedding"}
    assert find_model("comfyui/tiny") == find_model("tiny") == top / "models" / "diffusers" / "tiny"
    assert find_model("tiny", "vae") == top / "models" / "diffusers" / "tiny" / "vae"
    assert find_model("ft-mse", "vae") == top / "models" / "vae" / "ft-mse.safetensors"
    assert find_lora("comfyui/style/flat") == named_lora("style/flat") == top / "models" / "loras" / "style" / "flat.safetensors"
    assert named_lora("four") == tmp_path / "other" / "models" / "Lora" / "four.safetensors"
    assert find_lora("flat").is_relative_to(bundled_weights_dir())  # our own first
    assert name_of(find_model("ft-mse", "vae"), "vae") == "comfyui/ft-mse"
    with pytest.raises(UserError, match="No LoRA 'old'"):
        find_lora("old")
    assert main(["inspect", "tiny"]) == 0
    assert main(["inspect", "four"]) == 0
    assert "comfyui" not in capsys.readouterr().err
    assert tree_hash(tmp_path) == before


def test_a1111_beside_comfyui(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tops = {"a1111": a1111(tmp_path), "comfyui": comfyui(tmp_path, model_folder)}
    before = tree_hash(tmp_path)
    for tool, top in tops.items():
        assert main(["import", str(top), "--from", tool]) == 0
        assert main(["import", str(top / "models" / ".."), "--from", tool]) == 0  # twice is once
    out = capsys.readouterr().out
    assert "upscalers   2" in out
    assert "pickles" in out
    assert yaml.safe_load(folders_file().read_text()) == [{"from": tool, "path": str(top)} for tool, top in tops.items()]
    rows = {key: facts for key, facts in listed(capsys).items() if key[1].startswith("a1111")}
    assert {key: facts.split(", ")[0] for key, facts in rows.items()} == {
        ("model", "a1111/old"): "a pickle: convert it",
        ("model", "a1111/two"): "SD 1.x",
        ("vae", "a1111/two.vae"): "4 channels",
        ("vae", "a1111/ft-mse"): "4 channels",
        ("lora", "a1111/flat"): "SD 1.x",
        ("lora", "a1111/locon"): "SD 1.x",
        ("embedding", "a1111/bad"): "SD 1.x",
        ("upscaler", "a1111/x2"): "a pickle: convert it",
        ("upscaler", "a1111/x4"): "a pickle: convert it",
    }
    with pytest.raises(UserError, match=r"several vae files named 'ft-mse': a1111/ft-mse, comfyui/ft-mse\. Give one"):
        find_model("ft-mse", "vae")
    assert find_model("a1111/ft-mse", "vae") == tops["a1111"] / "models" / "VAE" / "ft-mse.safetensors"
    assert tree_hash(tmp_path) == before


def invoke_config(**facts: str) -> tuple[str]:
    return (json.dumps(facts),)


def test_invokeai(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = tmp_path / "invokeai"
    sdxl(top / "models" / "0f3a" / "jugger.safetensors")
    lora(top / "models" / "sd-1" / "lora" / "old.safetensors")
    vae(tmp_path / "elsewhere" / "v.safetensors")
    (top / "databases").mkdir()
    with sqlite3.connect(top / "databases" / "invokeai.db") as made:
        made.execute("PRAGMA journal_mode=WAL")
        made.execute("CREATE TABLE models (id TEXT PRIMARY KEY, config TEXT NOT NULL)")
        rows = [
            invoke_config(type="main", path="0f3a/jugger.safetensors", name="Jugger XL"),
            invoke_config(type="vae", path=str(tmp_path / "elsewhere" / "v.safetensors"), name="mine"),
            invoke_config(type="main", path="gone.safetensors", name="gone"),
            invoke_config(type="ip_adapter", path="0f3a/jugger.safetensors", name="other"),
            ("no json",),
        ]
        made.executemany("INSERT INTO models VALUES (hex(randomblob(8)), ?)", rows)
    made.close()
    before = tree_hash(tmp_path)
    found = {(entry.kind, entry.name): entry.path for entry in entries(Import("invokeai", top, "invokeai"))}
    assert found == {
        ("models", "invokeai/Jugger XL"): top / "models" / "0f3a" / "jugger.safetensors",
        ("vae", "invokeai/mine"): tmp_path / "elsewhere" / "v.safetensors",
        ("lora", "invokeai/sd-1/old"): top / "models" / "sd-1" / "lora" / "old.safetensors",
    }
    assert tree_hash(tmp_path) == before
    assert main(["import", "--from", "invokeai", str(top)]) == 0
    assert find_model("Jugger XL") == top / "models" / "0f3a" / "jugger.safetensors"
    assert find_lora("old") == top / "models" / "sd-1" / "lora" / "old.safetensors"
    (top / "databases" / "invokeai.db").write_text("nonsense" * 100)
    assert main(["ls"]) == 0
    assert "no database of InvokeAI" in capsys.readouterr().err


def test_a_hub_cache(tmp_path: Path, model_folder: Path, vae_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    for repo, source in (("models--org--tiny", model_folder), ("models--org--vae", vae_folder)):
        snapshot = cache / repo / "snapshots" / ("a" * 40)
        shutil.copytree(source, snapshot)
        (cache / repo / "refs").mkdir()
        (cache / repo / "refs" / "main").write_text("a" * 40)
    language = cache / "models--org--words" / "snapshots" / ("b" * 40)
    language.mkdir(parents=True)
    (language / "config.json").write_text('{"architectures": ["GPT2"]}')
    before = tree_hash(tmp_path)
    assert main(["import", "--from", "diffusers-cache", str(cache)]) == 0
    rows = listed(capsys)
    assert {key: facts.split(", ")[::2] for key, facts in rows.items()} == {
        ("model", "org/tiny"): ["StableDiffusionPipeline", "diffusers-cache"],
        ("vae", "org/vae"): ["AutoencoderKL", "diffusers-cache"],
    }
    assert find_model("org/tiny") == cache / "models--org--tiny" / "snapshots" / ("a" * 40)
    assert find_model("org/tiny", "vae").name == "vae"
    assert find_model(f"org/vae@{'a' * 40}", "vae") == cache / "models--org--vae" / "snapshots" / ("a" * 40)
    assert tree_hash(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1", "expected sections of paths"),
        ("a: 3", "the section a holds '3'"),
        ("a: [", "not valid YAML"),
        ("a: {loras: x, loras: y}", "the key 'loras' stands twice"),
    ],
)
def test_a_damaged_list_of_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    path = tmp_path / "extra_model_paths.yaml"
    path.write_text(text)
    assert main(["import", "--from", "comfyui", str(path)]) == 2
    assert said in capsys.readouterr().err
    assert not folders_file().exists()


def test_a_list_of_paths_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_MODELS", str(tmp_path / "mine"))
    monkeypatch.setenv("HOME", str(tmp_path))
    places = [lora(tmp_path / name / "x.safetensors") for name in ("mine/loras", "home", "beside")]
    path = tmp_path / "extra_model_paths.yaml"
    path.write_text("a: {base_path: $MY_MODELS, loras: loras}\nb: {loras: ~/home}\nc: {loras: beside, unet: nowhere}\n")
    assert main(["import", "--from", "comfyui", str(path)]) == 0
    assert sorted(foreign("lora").values()) == sorted(places)
    assert sorted(foreign("lora")) == ["comfyui/beside/x.safetensors", "comfyui/x", "comfyui/x.safetensors"]


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in [
        ((str(tmp_path / "none"), "--from", "a1111"), "no such folder; expected the web UI's folder"),
        ((str(tmp_path), "--from", "a1111"), "nothing of a1111 is there"),
        ((str(tmp_path), "--from", "diffusers-cache"), "nothing of diffusers-cache is there"),
        ((str(tmp_path), "--from", "automatic"), "expected one of comfyui, a1111"),
        ((str(tmp_path),), "--from is missing"),
    ]:
        assert main(["import", *words]) == 2
        assert said in capsys.readouterr().err
    folders_file().write_text("- {from: comfyui}\n")
    assert main(["ls"]) == 2
    assert "is no entry; expected lines 'from'" in capsys.readouterr().err


def test_a_drive_that_is_away_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = a1111(tmp_path)
    assert main(["import", "--from", "a1111", str(top)]) == 0
    shutil.move(top, tmp_path / "away")
    assert main(["ls", "lora"]) == 0
    out, err = capsys.readouterr()
    assert "flat" in out
    assert f"left out: {top} (a1111) is not there" in err
    with pytest.raises(UserError, match="No LoRA 'locon'"):
        find_lora("locon")


def test_where_the_list_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTPIPE_HOME", str(tmp_path / "own"))
    assert folders_file() == tmp_path / "own" / "folders.yaml"
    monkeypatch.delenv("LATENTPIPE_HOME")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert folders_file() == tmp_path / "xdg" / "latentpipe" / "folders.yaml"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.delenv("APPDATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folders_file() == tmp_path / ".config" / "latentpipe" / "folders.yaml"


def test_the_same_files_are_noted_once(tmp_path: Path, model_folder: Path) -> None:
    from latentpipe.checkpoints.hub.importing import note

    root = comfyui(tmp_path / "ComfyUI", model_folder)
    note("comfyui", root)
    rows = imports()
    assert note("comfyui", root)[-1] == str(folders_file())
    assert f"nothing was added: {root} is noted already" in note("comfyui", root / "models")[-2]
    assert imports() == rows
    (tmp_path / "other" / "models" / "vae").mkdir(parents=True)
    note("comfyui", tmp_path / "other")
    assert [one.label for one in imports()] == ["comfyui", "comfyui-2"]
