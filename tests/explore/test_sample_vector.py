"""The VAE whose latents are one vector: it ships, and its prior draws pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import load_vae
from latentpipe.cli import app
from latentpipe.data import image_set
from latentpipe.evaluate.metrics.features import open_features
from latentpipe.explore import sample, traverse
from latentpipe.explore.prior import normal
from latentpipe.vae.stage import VAEStage

NAME = "emoji-vector"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_sample_needs_no_argument(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["sample", "--measured", "20"]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == "samples.png"
    assert "positions" not in told.err
    with Image.open("samples.png") as page:
        assert page.size == (4 + 8 * 68, 4 + 2 * 68)


def test_traverse_needs_no_argument(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["traverse", "--most", "200"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "traverse.png"
    with Image.open("traverse.png") as page:
        assert page.size == (traverse.LABEL_PX + 7 * 67, 18 + 8 * 67)


def test_a_walk_begins_low_in_the_attribute() -> None:
    captions = [["flag france"], ["woman dark skin tone"], ["woman light skin tone"], ["man light skin tone"]] * 5
    assert traverse.beginning(captions) == 0
    assert traverse.beginning(captions, ["skin tone"]) == 2
    assert traverse.beginning(captions, ["woman", "skin tone"]) == 3


def test_its_draws_are_nearer_to_emoji_than_those_of_the_embedded_vae() -> None:
    """Not one interval touches the other, at 64 draws."""
    real = image_set.first(image_set.read_set(None, 64, 64, "validation"), 64)
    found = {}
    for name in (NAME, "emoji"):
        stage = VAEStage(load_vae(find_model(name, "vae")))
        priors = {"N(0, I)": normal(stage.space.shape(1, 64, 64)[1:])}
        found[name] = sample.distances(stage, priors, real, open_features("emoji-words"))["N(0, I)"]
    assert found[NAME].high < found["emoji"].low


def test_a_picture_is_one_vector_near_the_prior() -> None:
    """Posterior samples of training pictures: each number about N(0, 1), as far as its two moments tell."""
    stage = VAEStage(load_vae(find_model(NAME, "vae")))
    real = image_set.read_set(None, 64, 200, "train")
    latents = image_set.encode(stage, real.images, generator=torch.Generator().manual_seed(0))
    assert latents.shape[1:] == (128, 1, 1)
    assert latents.mean(0).abs().mean() < 0.2
    assert (latents.std(0) - 1).abs().mean() < 0.15
