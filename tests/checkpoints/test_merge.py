"""Plain weights into safetensors: names and values unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentpipe import UserError
from latentpipe.cli.app import main
from latentpipe.utils.io import read_tensors


def test_two_files_become_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = {"features.0.weight": torch.randn(2, 3), "count": torch.tensor(3)}, {"lin0.model.1.weight": torch.randn(1, 4)}
    torch.save({"state_dict": first}, tmp_path / "a.pth")
    save_file(second, tmp_path / "b.safetensors")
    out = tmp_path / "metrics" / "both.safetensors"
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors"), "--out", str(out), "--to", "tensors"]) == 0
    found = read_tensors(out)
    assert found.keys() == first.keys() | second.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in {**first, **second}.items())
    assert str(out) in capsys.readouterr().out


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    from latentpipe.checkpoints.convert import merge_tensors

    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pth")
    torch.save({"a": torch.ones(2)}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="other values"):
        merge_tensors([tmp_path / "a.pth", tmp_path / "b.pth"], tmp_path / "out.safetensors")
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        merge_tensors([tmp_path / "a.pth"], tmp_path / "out.bin")
    with pytest.raises(UserError, match="no such file"):
        merge_tensors([tmp_path / "none.pth"], tmp_path / "out.safetensors")
    merge_tensors([tmp_path / "a.pth"], tmp_path / "out.safetensors")
    with pytest.raises(UserError, match="exists already"):
        merge_tensors([tmp_path / "a.pth"], tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b.pth", "out.safetensors"]


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    from latentpipe.checkpoints.convert import merge_tensors

    class Trap:
        """Would write a file when it is unpickled."""

        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"a": Trap()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="not a readable file"):
        merge_tensors([tmp_path / "a.pth"], tmp_path / "out.safetensors")
    assert not (tmp_path / "ran").exists()
