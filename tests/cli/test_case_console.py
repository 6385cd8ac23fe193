"""Consoles that lack a character, and file names that are no text: the work is done, shown with replacements, and kept."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import draw_shape, vae_run

from latentpipe import UserError
from latentpipe.cli.app import main
from latentpipe.pipelines.metadata.recipe import read
from latentpipe.train.vae.train import train_vae

LATIN = b"caf\xe9"


def on_console(monkeypatch: pytest.MonkeyPatch, encoding: str, *arguments: str) -> tuple[int, bytes]:
    """Exit status and printed bytes of a verb on a console of an encoding, strict as Python opens it."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline="\n"))
    status = main(list(arguments))
    sys.stdout.flush()
    return status, raw.getvalue()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_case_15_a_console_that_lacks_a_character_gets_another_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path, encoding: str
) -> None:
    out, prompt = tmp_path / "日本 🍎", "red 🍎 яблоко"
    asked = ["generate", prompt, "--model", str(model_folder), "--steps", "1", "--seed", "3", "--out", str(out)]
    status, said = on_console(monkeypatch, encoding, *asked)
    assert status == 0
    (picture,) = out.glob("*.png")
    assert read(picture).prompt == prompt
    assert said == f"{picture}\n".encode(encoding, "replace")
    status, said = on_console(monkeypatch, encoding, "inspect", str(picture))
    assert status == 0
    assert json.loads(said.decode(encoding))["prompt"] == prompt.encode(encoding, "replace").decode(encoding)


def bad_names(folder: Path) -> Path:
    """Twelve pictures, one with a name that is not UTF-8, and a broken file with another such name."""
    folder.mkdir(parents=True)
    for index in range(11):
        draw_shape("red", ("circle", "square", "bar")[index % 3], 32).save(folder / f"v{index}.png")
    for name, content in ((LATIN + b".png", (folder / "v0.png").read_bytes()), (b"na\xefve.png", b"broken")):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(content)
    return folder


@pytest.fixture
def latin(tmp_path: Path) -> Path:
    """A folder whose own name and some of whose files' are not UTF-8."""
    try:
        return bad_names(tmp_path / os.fsdecode(LATIN))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")


def test_case_40_every_verb_that_names_files_ends_well(
    monkeypatch: pytest.MonkeyPatch, latin: Path, vae_folder: Path, tmp_path: Path
) -> None:
    vae = str(vae_folder)
    small = ["--csv", str(tmp_path / "vae.csv"), "--sheet", str(tmp_path / "vae.png")]
    quick = ["--size", "16", "--false-alarms", "0.5", "--out", str(tmp_path / "a.png"), "--csv", str(tmp_path / "anomaly.csv")]
    for name, verb in {
        "evaluate": ["evaluate", "vae", vae, "--images", str(latin), *small],
        "evaluate json": ["evaluate", "vae", vae, "--images", str(latin), "--json", *small],
        "anomaly": ["anomaly", str(latin), "--vae", vae, "--normal", str(latin), *quick],
        "encode": ["encode", str(latin), "--vae", vae, "--size", "16", "--out", str(tmp_path / "c.safetensors")],
        "compare": ["compare", vae, vae, "--images", str(latin), "--out", str(tmp_path / "c.html")],
    }.items():  # fmt: skip
        status, said = on_console(monkeypatch, "utf-8", *verb)
        assert status == 0, name
        assert said
    for file in ("vae.csv", "anomaly.csv"):
        with open(tmp_path / file, newline="", encoding="utf-8") as table:
            rows = list(csv.DictReader(table))
        assert len(rows) == 12
        assert any("caf?" in str(list(row.values())) for row in rows)
    assert (tmp_path / "c.html").stat().st_size
    assert not list(tmp_path.glob(".*.part"))


def test_case_40_weights_of_such_names_are_refused_in_a_sentence_before_the_work(
    latin: Path, model_folder: Path, vae_folder: Path, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    model = shutil.copytree(model_folder, latin / "model")  # safetensors itself opens no such file
    bad = latin / os.fsdecode(LATIN + b".safetensors")
    for verb in (
        ["generate", "red", "--model", str(model), "--out", str(tmp_path)],
        ["encode", str(latin), "--vae", str(vae_folder), "--size", "16"],  # whose usual place lies in that folder
        ["swap", "--vae", str(vae_folder), "--out", str(latin / "swapped")],
        ["lora", "merge", "flat", "solid", "--out", str(bad)],
        ["fit-adapter", "--from", "emoji", "--to", "emoji", "--images", str(pictures), "--out", str(bad)],
    ):
        assert main(verb) == 2, verb
        assert "not UTF-8" in capsys.readouterr().err
    with pytest.raises(UserError, match="not UTF-8"):
        train_vae(vae_run(latin, pictures))


def test_case_40_pictures_go_into_such_a_folder(monkeypatch: pytest.MonkeyPatch, latin: Path, model_folder: Path) -> None:
    asked = ["generate", "red", "--model", str(model_folder), "--steps", "1", "--seed", "3", "--out", str(latin / "out")]
    status, said = on_console(monkeypatch, "utf-8", *asked)
    assert status == 0
    assert b"caf?" in said
    assert read(latin / "out" / "red-3.png").prompt == "red"


def test_case_40_a_run_on_such_a_folder_is_recorded_and_goes_on(latin: Path, tmp_path: Path, capsys: Any) -> None:
    train_vae(vae_run(tmp_path, latin, optim={"steps": 1}))
    train_vae(vae_run(tmp_path, latin, optim={"steps": 2}, resume=True))
    assert "12 pictures read, 1 skipped" in capsys.readouterr().out
