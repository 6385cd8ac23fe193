"""Evaluations by several workers: the figures of one, in the same order, also where pictures are broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import opened_in_threads, tiny_vae

from latentpipe import UserError, VAEStage, compare_vaes, evaluate_vae
from latentpipe.checkpoints.vae_io import save_vae
from latentpipe.cli.app import main
from latentpipe.evaluate import artists, crew
from latentpipe.evaluate.metrics import latents
from latentpipe.evaluate.protocol import PROTOCOLS

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def in_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Workers are threads, and batches are of five pictures."""
    with monkeypatch.context() as patch:
        for module in (crew, artists):
            patch.setattr(module, "opened_on", opened_in_threads)
        for module in (latents, crew):
            patch.setattr(module, "batch_of", lambda height, width: 5)
        yield patch


def figures(found: Any) -> str:
    """Everything that is printed, to the last digit."""
    return json.dumps(found.as_dict(), sort_keys=True)


@pytest.mark.parametrize("protocol", ["latentpipe", "coco-5k"])
def test_figures_do_not_depend_on_the_workers(pictures: Path, vae_folder: Path, protocol: str) -> None:
    way = {"protocol": replace(PROTOCOLS[protocol], size_px=32), "full": True, "probe": 7, "cost": False}
    one, three = (evaluate_vae(vae_folder, pictures, **way, workers=count) for count in (1, 3))
    assert figures(one) == figures(three)
    alone = evaluate_vae(vae_folder, pictures, **way)
    assert alone.pictures == one.pictures
    assert alone.scores.keys() == one.scores.keys()
    assert all(one.scores[name].value == pytest.approx(score.value, rel=1e-4, abs=1e-6) for name, score in alone.scores.items())


def test_broken_pictures_shift_what_follows_as_they_do_for_one(pictures: Path, vae_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "set"))
    for name in ("red-square.png", "blue-bar.png"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    way = {"protocol": replace(PROTOCOLS["coco-5k"], size_px=32), "cost": False}  # a seed for each picture
    one, two, alone = (evaluate_vae(vae_folder, folder, **way, workers=count) for count in (1, 2, None))
    assert figures(one) == figures(two)
    assert set(one.pictures["skipped"]) == {"red-square.png", "blue-bar.png"}
    assert (one.names, one.pictures["sha256"], len(one.names)) == (alone.names, alone.pictures["sha256"], 10)
    assert one.per_picture["PSNR"] == pytest.approx(alone.per_picture["PSNR"], rel=1e-5)


def test_a_comparison_does_not_depend_on_the_workers(pictures: Path, vae_folder: Path, tmp_path: Path) -> None:
    save_vae(tiny_vae(1), tmp_path / "other", {})
    way = {"vaes": [vae_folder, tmp_path / "other"], "folder": pictures, "cost": False}
    one, two = (compare_vaes(**way, workers=count) for count in (1, 2))
    assert json.dumps(one.as_dict()) == json.dumps(two.as_dict())


def test_prompts_do_not_depend_on_the_workers(model_folder: Path) -> None:
    from latentpipe import LatentPipeline
    from latentpipe.evaluate.prompt_adherence import draw_all, four_seeds

    pipe = LatentPipeline.from_pretrained(model_folder, device="cpu")
    settings = pipe.check(artists.Settings(num_inference_steps=2))
    prompts = [f"red {number}" for number in range(20)]
    found = []
    for count in (None, 1, 2):
        with artists.artists(pipe, model_folder, count, "cpu") as draw:
            pixels = [picture.tobytes() for picture in draw_all(draw, prompts, settings, "some")]
            found.append((pixels, four_seeds(draw, prompts[:2], settings)))
    assert found[0] == found[1] == found[2]


def test_processes_find_what_threads_do(
    pictures: Path, vae_folder: Path, in_threads: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_threads.undo()
    words = ["evaluate", "vae", str(vae_folder), "--images", str(pictures), "--json", "--workers"]
    assert main([*words, "2"]) == 0
    two = json.loads(capsys.readouterr().out)
    in_threads.setattr(crew, "opened_on", opened_in_threads)
    assert main([*words, "1"]) == 0
    assert json.loads(capsys.readouterr().out) == two


def test_calls_that_cannot_be_right(pictures: Path, vae_folder: Path) -> None:
    with pytest.raises(UserError, match="workers is 0"):
        evaluate_vae(vae_folder, pictures, workers=0)
    with pytest.raises(UserError, match="give its name, folder or file"):
        evaluate_vae(VAEStage(tiny_vae()), pictures, workers=2)
    assert torch.get_num_threads() == 1
