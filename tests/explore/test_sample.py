"""Priors, draws from them, and the Frechet distance of independent sets; against scikit-learn and closed forms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_vae
from PIL import Image
from sklearn.mixture import GaussianMixture

from latentpipe.cli import app
from latentpipe.data import image_set
from latentpipe.evaluate.metrics.features import open_features
from latentpipe.evaluate.metrics.frechet import frechet
from latentpipe.explore import sample
from latentpipe.explore.prior import KEPT, aggregate, fit_mixture, normal
from latentpipe.utils.errors import UserError
from latentpipe.vae.stage import VAEStage


def cloud(n: int = 600, size: int = 6, seed: int = 0) -> torch.Tensor:
    """Rows with correlated values, unequal variances and a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, size, generator=generator) @ torch.randn(size, size, generator=generator)
    return mixed + torch.randn(size, generator=generator)


def clusters(n: int = 300) -> torch.Tensor:
    """Three far clusters in 4 dimensions, of n/2, n/3 and n/6 rows."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.tensor([[0.0, 0, 0, 0], [6, 0, 0, 1], [0, -7, 2, 0]])
    which = torch.repeat_interleave(torch.arange(3), torch.tensor([n // 2, n // 3, n // 6]))
    spread = torch.tensor([[0.5, 1, 1, 0.2], [1, 0.3, 1, 1], [0.4, 0.4, 1, 1]])
    return (centres[which] + spread[which] * torch.randn(n, 4, generator=generator)).double()


def test_normal_draws_are_standard_normal() -> None:
    drawn = normal((4, 2, 2)).sample(2000)
    assert drawn.shape == (2000, 4, 2, 2)
    assert drawn.mean().abs() < 0.02
    assert torch.cov(drawn.flatten(1).T).sub(torch.eye(16)).abs().max() < 0.12


def test_a_draw_depends_on_its_own_seed_alone() -> None:
    prior = aggregate(cloud().view(-1, 6, 1, 1), k=2)
    for source in (prior, normal((6, 1, 1))):
        many = source.sample(5, seed=3)
        assert torch.equal(many[:2], source.sample(2, seed=3))
        assert torch.equal(many[1:], source.sample(4, seed=4))
        assert not torch.equal(many[0], many[1])
    with pytest.raises(UserError, match="1 or more"):
        prior.sample(0)


@pytest.mark.parametrize("shape", [(6, 1, 1), (12, 2, 2)])
def test_one_gaussian_has_the_mean_and_the_covariance_of_the_latents(shape: tuple[int, int, int]) -> None:
    """The second shape has more values than the mixture keeps components."""
    size = int(np.prod(shape))
    rows = cloud(size=size)
    assert (size > KEPT) == (shape != (6, 1, 1))
    drawn = aggregate(rows.view(-1, *shape), k=1).sample(4000).flatten(1)
    scale = torch.cov(rows.T).diagonal().mean()
    assert (drawn.mean(0) - rows.mean(0)).square().mean() < 0.003 * scale
    assert (torch.cov(drawn.T) - torch.cov(rows.T)).abs().max() < 0.15 * torch.cov(rows.T).diagonal().max()


def test_fewer_pictures_than_values_stay_in_their_span() -> None:
    rows = cloud(n=10, size=40)
    drawn = aggregate(rows.view(-1, 10, 2, 2), k=1).sample(3).flatten(1)
    centred = (rows - rows.mean(0)).double()
    beside = (drawn - rows.mean(0)).double()
    assert (beside - beside @ torch.linalg.pinv(centred) @ centred).abs().max() < 1e-4


def test_the_mixture_is_that_of_scikit_learn() -> None:
    rows = clusters()
    ours = fit_mixture(rows, 3)
    theirs = GaussianMixture(3, reg_covar=1e-3, random_state=0, tol=1e-6, max_iter=500).fit(rows.numpy())
    order, other = ours.weights.argsort(), theirs.weights_.argsort()
    assert ours.weights[order].numpy() == pytest.approx(theirs.weights_[other], abs=1e-3)
    assert ours.means[order].numpy() == pytest.approx(theirs.means_[other], abs=0.02)
    covariances = (ours.factors @ ours.factors.mT)[order].numpy()
    assert covariances == pytest.approx(theirs.covariances_[other], abs=0.03)
    assert ours.log_density(rows).logsumexp(1).numpy() == pytest.approx(theirs.score_samples(rows.numpy()), abs=0.05)


def test_mixture_draws_lie_in_the_clusters() -> None:
    rows = clusters().float()
    drawn = aggregate(rows.view(-1, 4, 1, 1), k=3).sample(600).flatten(1)
    near = torch.cdist(drawn, torch.tensor([[0.0, 0, 0, 0], [6, 0, 0, 1], [0, -7, 2, 0]])).argmin(1)
    assert torch.bincount(near).numpy() / 600 == pytest.approx([1 / 2, 1 / 3, 1 / 6], abs=0.06)


def test_too_few_pictures_for_a_mixture() -> None:
    with pytest.raises(UserError, match="needs the latents of 40 pictures"):
        aggregate(torch.randn(39, 2, 1, 1))


def test_the_distance_of_sets_has_an_interval_that_holds_the_truth() -> None:
    """Two Gaussians whose distance is 3^2 by their means; the estimate's own bias is small at this N."""
    random = np.random.default_rng(0)
    first, second = random.standard_normal((800, 3)), random.normal([3, 0, 0], 1, (600, 3))
    score = sample.frechet_between(first, second)
    assert score.value == pytest.approx(frechet(first, second))
    assert score.low < 9 < score.high
    assert score.n == 600
    assert sample.frechet_between(first, first).low == 0


def stage() -> VAEStage:
    return VAEStage(tiny_vae())


def test_distances_name_the_prior_other_pictures_and_reconstructions() -> None:
    real = image_set.read_set(None, 32, 24, "validation")
    found = sample.distances(
        stage(), {"N(0, I)": normal((4, 16, 16))}, image_set.first(real, 12), open_features("emoji-words"), real.images[12:]
    )
    assert list(found) == ["N(0, I)", sample.OTHERS, sample.REBUILT]
    assert {score.n for score in found.values()} == {12}
    for score in found.values():
        assert score.low <= score.value <= score.high
    assert found[sample.OTHERS].value < found["N(0, I)"].value
    with pytest.raises(UserError, match="2 pictures"):
        sample.distances(stage(), {}, image_set.first(real, 1), open_features("emoji-words"))


def test_several_positions_are_noted_and_one_is_not() -> None:
    note = sample.positions_note(stage(), "tiny", 32)
    assert note is not None
    assert "16 x 16 positions" in note
    deep = VAEStage(
        tiny_vae(
            block_out_channels=(8,) * 6, down_block_types=("DownEncoderBlock2D",) * 6, up_block_types=("UpDecoderBlock2D",) * 6
        )
    )
    assert sample.positions_note(deep, "deep", 32) is None


@pytest.fixture
def tiny(vae_folder: Path, own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny VAE by a name, and an empty folder to work in."""
    shutil.copytree(vae_folder, own_home / "vae" / "tiny-kl")
    monkeypatch.chdir(tmp_path)
    return "tiny-kl"


def test_the_verb_writes_a_sheet_and_prints_its_path(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["sample", "--vae", tiny, "--n", "3", "--size", "32", "--measured", "6"]) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert lines[-1] == "samples.png"
    assert lines[0].startswith("Frechet distance on emoji-words to 6 pictures of emoji bank, 32 px")
    assert "16 x 16 positions" in told.err
    with Image.open("samples.png") as page:
        assert page.size == (4 + 3 * 36, 4 + 36)


def test_the_verb_on_a_folder_as_json_with_a_mixture(
    tiny: str, pictures: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for index in range(4):
        for path in pictures.glob("*.png"):
            shutil.copy(path, many / f"{index}-{path.name}")
    arguments = ["--vae", tiny, "--n", "2", "--size", "32", "--measured", "8", "--prior", "gmm", "--images", str(many), "--json"]
    assert app.main(["sample", *arguments, "--out", "a.png"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["prior"] == "mixture of 10 Gaussians"
    assert found["set"] == "many"
    assert set(found["distances"]) == {found["prior"], sample.OTHERS, sample.REBUILT}
    assert "positions" not in told.err
    assert app.main(["sample", *arguments[:-1], "--out", "b.png"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize(("arguments", "words"), [
    (["--n", "0"], "--n is 0"),
    (["--measured", "1"], "--measured is 1"),
    (["--seed", "-2"], "--seed is -2"),
    (["--size", "33"], "multiples of 2"),
    (["--out", "samples.jpg"], "ends in .png"),
    (["--images", "nowhere"], "no such folder"),
    (["--vae", "nothing"], "No VAE 'nothing'"),
    (["--measured", "2", "--features", "squeezenet10"], "squeezenet10"),
])  # fmt: skip
def test_mistakes_are_one_sentence(tiny: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--vae", tiny, *arguments] if "--vae" not in arguments else arguments
    assert app.main(["sample", *given]) == 2
    assert words in capsys.readouterr().err
    assert not Path("samples.png").exists()
