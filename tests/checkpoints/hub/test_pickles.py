"""Pickles through `convert`: tensors arrive as they were, code is named and refused, memory is bounded."""

from __future__ import annotations

import argparse
import os
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_vae
from safetensors import safe_open
from safetensors.torch import load_file

from latentpipe.checkpoints.pickles import child
from latentpipe.checkpoints.pickles.unpickle import unpickle
from latentpipe.cli.app import main
from latentpipe.utils.errors import UserError

GENERATOR = torch.Generator().manual_seed(0)


def some(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR).to(dtype)


MODEL = {
    "model.diffusion_model.input_blocks.0.0.weight": some(4, 4, 3, 3),
    "model.diffusion_model.out.2.bias": some(4, dtype=torch.float32),
    "first_stage_model.decoder.conv_in.weight": some(4, 4, 3, 3),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(7)[None],
    "model_ema.decay": torch.tensor(0.5),
}


def stub(name: str, **base: Any) -> type:
    """A class of a module that is not installed where the file is read."""
    module, _, last = name.rpartition(".")
    parts = module.split(".")
    for at in range(len(parts)):
        sys.modules.setdefault(".".join(parts[: at + 1]), types.ModuleType(".".join(parts[: at + 1])))
    made = type(last, (base.get("of", object),), {"__module__": module})
    setattr(sys.modules[module], last, made)
    return made


@pytest.fixture(autouse=True)
def as_before() -> Any:
    """Modules that a test made are gone afterwards."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("pytorch_lightning", "evil"):
            del sys.modules[name]


def read(source: Path, target: Path) -> dict[str, Any]:
    """What the process does, in this one (it takes seconds to start another)."""
    return child.convert_pickle(source, target)


def same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items())


@pytest.mark.parametrize("old", [False, True])
def test_a_whole_model_with_what_lightning_leaves(tmp_path: Path, old: bool) -> None:
    callback = stub("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    value = {
        "state_dict": OrderedDict(MODEL),
        "global_step": 470_000,
        "epoch": 3,
        "callbacks": {callback: {"best_model_score": np.float64(0.5), "monitor": None}},
        "hyper_parameters": argparse.Namespace(rate=1.0),
        "odd": callback(),
    }
    torch.save(value, tmp_path / "old.ckpt", _use_new_zipfile_serialization=not old)
    found = read(tmp_path / "old.ckpt", tmp_path / "new.safetensors")
    assert found == {"names": len(MODEL), "facts": {"global_step": "470000", "epoch": "3"}, "list": False}
    same(tmp_path / "new.safetensors", MODEL)
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        assert file.metadata()["global_step"] == "470000"
        assert '"file": "old.ckpt"' in file.metadata()["latentpipe.source"]


class Evil:
    """What a pickle could do."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("old", [False, True])
def test_code_is_named_and_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": some(2), "b": Evil()}, "evil.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(child.Refused, match=r"posix|system"):
        read(Path("evil.pt"), Path("out.safetensors"))
    torch.save({"a": stub("evil.mine.Thing")(), "b": torch.nn.Linear(2, 2)}, "own.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(child.Refused, match=r"evil\.mine\.Thing"):
        read(Path("own.pt"), Path("out.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pt", "own.pt"]


def test_wrappers_parameters_views_and_alphas(tmp_path: Path) -> None:
    base = some(4, 6)
    for value, expected in [
        ({"params_ema": {"a": base}, "params": {"a": some(4, 6)}}, {"a": base}),
        ({"state_dict": {"state_dict": {"a": base}}}, {"a": base}),
        ({"a": torch.nn.Parameter(base)}, {"a": base}),
        ({"a": base, "b": base, "c": base[1:], "d": base.T}, {"a": base, "b": base, "c": base[1:], "d": base.T.contiguous()}),
        ({"x.lora_down.weight": base, "x.alpha": 4, "step": 7}, {"x.lora_down.weight": base, "x.alpha": torch.tensor(4.0)}),
        ([base, base.T], {"0": base, "1": base.T.contiguous()}),
    ]:
        torch.save(value, tmp_path / "x.pt")
        assert read(tmp_path / "x.pt", tmp_path / "x.safetensors")["list"] == isinstance(value, list)
        same(tmp_path / "x.safetensors", expected)


def test_embeddings(tmp_path: Path) -> None:
    vectors = some(3, 768)
    a1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "EasyNegative", "step": 500}
    original = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": torch.nn.ParameterDict({"*": vectors.float()})}
    for value, expected, name in [
        (a1111, {"emb_params": vectors}, "EasyNegative"),
        (original, {"emb_params": vectors.float()}, None),
        ({"<cat>": vectors[0]}, {"<cat>": vectors[0]}, None),
        ({"clip_l": vectors, "clip_g": some(3, 1280)}, None, None),
    ]:
        torch.save(value, tmp_path / "x.pt")
        found = read(tmp_path / "x.pt", tmp_path / "x.safetensors")
        same(tmp_path / "x.safetensors", expected if expected is not None else dict(value))
        assert found["facts"].get("name") == name


def test_what_is_no_weights_is_refused(tmp_path: Path) -> None:
    wide = torch.as_strided(torch.zeros(1), (2**40,), (0,))
    for value, said in [
        ({"a": "b"}, "holds no named tensors"),
        ([1, 2], "a list of 2"),
        (3, "holds no named tensors"),
        ({"a": wide}, "and tensors of 4,398,046,511,104"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "sparse"),
    ]:
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(child.Refused, match=said):
            read(tmp_path / "x.pt", tmp_path / "x.safetensors")
    for content in (b"", b"junk", b"PK\x03\x04junk", b"<!DOCTYPE html>"):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(child.Refused, match="not a readable file"):
            read(tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_no_other_code_reads_a_pickle() -> None:
    package = Path(child.__file__).parents[2]
    calls = ("torch.load(", "torch.jit.load(", "Unpickler(", "allow_pickle=True", "read_pickle(pickle")
    found = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if any(c in path.read_text() for c in calls)}
    assert found == {"checkpoints/pickles/child.py"}


# --- the verb, and its process --------------------------------------------------------------------------------


@pytest.mark.slow
def test_convert_keeps_a_whole_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": MODEL, "odd": stub("pytorch_lightning.callbacks.Timer")()}, tmp_path / "old.ckpt")
    assert main(["convert", str(tmp_path / "old.ckpt"), "--out", str(tmp_path / "new.safetensors")]) == 0
    assert "a checkpoint" in capsys.readouterr().out
    same(tmp_path / "new.safetensors", MODEL)
    half = tmp_path / "half.safetensors"
    assert main(["convert", str(tmp_path / "old.ckpt"), "--out", str(half), "--dtype", "fp16"]) == 0
    assert {str(value.dtype) for value in load_file(half).values()} == {"torch.float16", "torch.int64"}
    assert main(["convert", str(tmp_path / "old.ckpt"), "--out", str(half)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_convert_writes_a_vae_with_its_config(tmp_path: Path) -> None:
    vae = tiny_vae()
    torch.save(vae.state_dict(), tmp_path / "vae.pt")
    out = tmp_path / "vae.safetensors"
    assert main(["convert", str(tmp_path / "vae.pt"), "--out", str(out), "--scaling-factor", "1", "--norm-groups", "4"]) == 0
    with safe_open(out, "pt") as file:
        assert "latentpipe.config" in file.metadata()


@pytest.mark.slow
def test_the_process_is_bounded_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Large:
        def __reduce__(self) -> Any:
            return bytearray, (2**36,)

    torch.save({"a": some(2), "b": Large()}, tmp_path / "large.pt")
    assert main(["convert", str(tmp_path / "large.pt"), "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "it wants more memory than its size explains" in capsys.readouterr().err
    torch.save({"a": some(2), "b": Evil()}, tmp_path / "evil.pt")
    assert main(["convert", str(tmp_path / "evil.pt"), "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "which is code" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pt", "large.pt"]


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").touch()
    with pytest.raises(UserError, match=r"a\.ckpt is empty \(0 bytes\); fetch it again"):
        unpickle(tmp_path / "a.ckpt", tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
