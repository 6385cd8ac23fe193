"""What a call names and where it writes, found out before anything large is imported."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from latentpipe import UserError
from latentpipe.cli import argument_checks, output_paths
from latentpipe.cli.app import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a mistaken call says; it ends with 2, and nothing was begun."""
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert "opening" not in said
    assert "Starting" not in said
    return said


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that takes no file, whoever asks: Linux has /proc")
@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "--out", "/proc/pictures"],
        ["grid", "x", "--x", "seed=1,2", "--out", "/proc/sheet.png"],
        ["encode", ".", "--vae", "emoji", "--out", "/proc/latents.safetensors"],
        ["ui", "--out", "/proc/pictures"],
    ],
)
def test_a_folder_that_takes_no_file_is_found_out_before_the_work(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert "nothing can be written in /proc" in refused(capsys, *arguments)


def test_trying_a_folder_leaves_nothing_in_it(tmp_path: Path) -> None:
    output_paths.room("--out", tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []


def test_a_tag_may_name_what_a_file_holds() -> None:
    values = {"prompt": "red <lora:inner:1>", "lora": ("some/file.safetensors=0.5",)}
    argument_checks.tagged(values)  # the name stands inside the file
    argument_checks.tagged({"prompt": "red <lora:inner:1>", "x": "prompt=inner,flat"})
    with pytest.raises(UserError, match="No LoRA 'inner'"):
        argument_checks.tagged({"prompt": "red <lora:inner:1>", "lora": ("flat=0.5",)})


def test_a_port_in_use_is_said_before_the_interface_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        said = refused(capsys, "ui", "--port", str(other.getsockname()[1]))
    assert "is taken" in said
