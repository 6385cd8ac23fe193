"""Scores, thresholds and heat maps of anomalies; against scikit-learn, scipy, closed forms and planted defects."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import draw_shape, tiny_vae
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, roc_auc_score

from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import open_vae
from latentpipe.cli import app
from latentpipe.data import defects, image_set
from latentpipe.data.image_set import read_given_pictures
from latentpipe.explore.anomaly import conformal, heatmap
from latentpipe.explore.anomaly import detector as anomaly
from latentpipe.utils.errors import UserError
from latentpipe.vae.stage import VAEStage

scores = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=30)  # few values: many ties


@pytest.fixture(scope="module")
def stage() -> VAEStage:
    """The embedded VAE."""
    file = open_vae(find_model("emoji", "vae"))
    return VAEStage(file.build(), file.space).eval()


@pytest.fixture(scope="module")
def emoji() -> torch.Tensor:
    """Unseen emoji at 32 pixels."""
    return image_set.read_set(None, 32, 100, "validation").images


@pytest.fixture(scope="module")
def detector(stage: VAEStage, emoji: torch.Tensor) -> anomaly.Detector:
    """Of those emoji."""
    return anomaly.calibrate(stage, emoji, 0.1)


@given(scores, scores)
def test_areas_are_those_of_scikit_learn_with_ties(normal: list[float], anomalous: list[float]) -> None:
    truth, values = [0] * len(normal) + [1] * len(anomalous), normal + anomalous
    assert conformal.auroc(normal, anomalous) == pytest.approx(roc_auc_score(truth, values))
    assert conformal.auprc(normal, anomalous) == pytest.approx(average_precision_score(truth, values))


@given(scores, scores)
def test_auroc_turns_with_its_sides_and_knows_only_the_order(normal: list[float], anomalous: list[float]) -> None:
    value = conformal.auroc(normal, anomalous)
    assert conformal.auroc(anomalous, normal) == pytest.approx(1 - value)
    assert conformal.auroc(np.exp(normal), np.exp(anomalous)) == pytest.approx(value)


def test_the_interval_of_an_auroc_holds_the_true_one() -> None:
    held = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        score = conformal.with_interval(conformal.auroc, random.normal(0, 1, 60), random.normal(1, 1, 60), seed, 200)
        held += score.low <= 0.7602 <= score.high  # Phi(1 / sqrt 2)
    assert held >= 51  # of 60; a 95 % interval fails this once in a thousand


@given(st.integers(1, 60), st.data())
def test_the_binomial_interval_is_that_of_scipy(n: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    wanted = binomtest(hits, n).proportion_ci(0.95, method="exact")
    assert conformal.binomial_interval(hits, n) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_the_threshold_keeps_its_promise_and_wastes_little(rate: float) -> None:
    random, n, alarms = np.random.default_rng(0), 119, []
    for _ in range(3000):
        drawn = random.gumbel(size=n + 1)
        alarms.append(drawn[-1] > conformal.threshold(drawn[:-1], rate))
    exact = 1 - np.ceil((n + 1) * (1 - rate) - 1e-9) / (n + 1)  # for continuous scores
    assert exact - 1e-9 <= rate < exact + 1 / (n + 1) + 1e-9
    assert abs(np.mean(alarms) - exact) < 4 * (exact / 3000) ** 0.5


@given(scores, st.floats(0.05, 0.9), st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=5))
def test_an_alarm_is_a_small_p_value(known: list[float], rate: float, new: list[float]) -> None:
    p = conformal.p_values(known, new)
    assert ((p > 0) & (p <= 1)).all()
    if rate * (len(known) + 1) < 1:
        with pytest.raises(UserError, match="cannot promise"):
            conformal.threshold(known, rate)
    else:
        limit = conformal.threshold(known, rate)
        assert (p[np.array(new) > limit] <= rate + 1e-9).all()
        assert (p[np.array(new) <= limit] > rate - 1e-9).all()


@pytest.mark.parametrize("bad", [[], [float("nan")], [[1.0]]])
def test_scores_that_are_none_are_refused(bad: list) -> None:
    with pytest.raises(UserError, match="scores"):
        conformal.auroc(bad, [1.0])
    for rate in (0.0, 1.0, float("nan")):
        with pytest.raises(UserError, match="between 0 and 1"):
            conformal.threshold([1.0], rate)


def test_the_error_map_keeps_the_mean_of_flat_errors_and_peaks_where_the_error_is() -> None:
    images, rebuilt = torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32)
    rebuilt[0] += 0.5
    rebuilt[1, :, 20, 7] = 1.0
    maps = heatmap.error_map(images, rebuilt)
    assert torch.allclose(maps[0], torch.full((32, 32), 0.25), atol=1e-6)
    assert int(maps[1].argmax()) == 20 * 32 + 7
    assert float(maps[1].sum()) == pytest.approx(1.0, abs=1e-4)


def test_heat_colours_run_from_dark_to_bright_and_the_page_holds_all(emoji: torch.Tensor) -> None:
    ramp = heatmap.colours(np.linspace(-1, 2, 50)).astype(int)
    assert (np.diff(ramp.sum(-1)) >= 0).all()
    assert tuple(ramp[0]) == heatmap.STOPS[0]
    assert tuple(ramp[-1]) == heatmap.STOPS[-1]
    page = heatmap.heatmap_page(emoji[:5], torch.rand(5, 32, 32) * 5, ["a name"] * 5)
    assert page.width == 3 * (2 * heatmap.SHOWN_PX + 2 + 8) + 8


@pytest.mark.parametrize("kind", defects.KINDS)
def test_a_defect_changes_its_mask_alone_and_is_the_same_again(kind: str, emoji: torch.Tensor) -> None:
    first, mask = defects.plant(emoji[:8], kind, 3)
    again, _ = defects.plant(emoji[:8], kind, 3)
    assert torch.equal(first, again)
    assert float(first.abs().max()) <= 1 + 1e-6
    outside = (first - emoji[:8]).abs().amax(1)[~mask]
    assert float(outside.max()) < 0.1
    assert 4 <= float(mask.flatten(1).sum(1).max()) < 32 * 32 / 4
    with pytest.raises(ValueError, match="No defect"):
        defects.plant(emoji[:1], "rust")


@pytest.mark.slow
def test_the_heat_of_a_planted_scratch_lies_on_it(detector: anomaly.Detector, emoji: torch.Tensor) -> None:
    images, masks = defects.plant(emoji[60:90], "scratch")
    maps = detector.heat(images)
    assert conformal.auroc(maps[~masks].numpy(), maps[masks].numpy()) > 0.9
    plain = detector.score(emoji[60:90]).parts["local"]
    assert conformal.auroc(plain, detector.score(images).parts["local"]) > 0.6


def test_noise_is_an_anomaly_and_scores_are_of_each_picture_alone(detector: anomaly.Detector, emoji: torch.Tensor) -> None:
    noise = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    both = torch.cat([emoji[:4], noise])
    found = detector.score(both)
    assert found.anomalous[4:].all()
    assert (found.p[4:] == found.p.min()).all()
    swapped = detector.score(both.flip(0))
    assert np.allclose(swapped.total[::-1], found.total, atol=1e-3)
    assert set(found.parts) == set(anomaly.PARTS)
    with pytest.raises(UserError, match="takes images N 3 32 32"):
        detector.score(torch.zeros(1, 3, 64, 64))


def test_the_parts_are_what_they_say(stage: VAEStage, emoji: torch.Tensor) -> None:
    images = emoji[:3]
    raw, _ = anomaly.measure(stage, images)
    with torch.no_grad():
        mean, std = stage.posterior(images)
        rebuilt = stage.decode(mean).clamp(-1, 1)
    assert np.allclose(raw["pixel"], (images - rebuilt).square().mean((1, 2, 3)), rtol=1e-4)
    wanted = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0))
    assert np.allclose(raw["kl"], wanted.mean((1, 2, 3)), rtol=1e-4)


def test_a_detector_comes_back_from_its_file_and_refuses_another_vae(
    detector: anomaly.Detector, stage: VAEStage, emoji: torch.Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "emoji.json"
    detector.save(path)
    again = anomaly.load(path, stage)
    assert again == detector
    assert np.array_equal(again.score(emoji[:2]).total, detector.score(emoji[:2]).total)
    with pytest.raises(UserError, match="made with the VAE"):
        anomaly.load(path, VAEStage(tiny_vae()))
    facts = json.loads(path.read_text())
    for change, message in (
        ({"threshold": -9.0}, "damaged"),
        ({"calibration": [1.0]}, "damaged"),
        ({"mean": {}}, "damaged"),
        ({"version": 2}, "version 1"),
        ({"extra": 1}, "expected the keys"),
        ({"features": "0"}, "another feature network"),
    ):
        path.write_text(json.dumps(facts | change))
        with pytest.raises(UserError, match=message):
            anomaly.load(path, stage)


def test_calibration_refuses_too_few_and_reports_its_progress(stage: VAEStage, emoji: torch.Tensor) -> None:
    with pytest.raises(UserError, match="8 or more"):
        anomaly.calibrate(stage, emoji[:5])
    with pytest.raises(UserError, match="cannot promise"):
        anomaly.calibrate(stage, emoji[:16], 0.05)
    seen = []
    found = anomaly.calibrate(stage, emoji[:16], 0.5, report=lambda *row: seen.append(row))
    assert seen[-1] == (16, 16, "rebuild")
    assert (found.fitted, len(found.calibration), found.checked) == (4, 8, 4)


def test_the_bank_is_read_as_it_was_made(tmp_path: Path) -> None:
    picture = draw_shape("red", "circle", 128)
    picture.save(tmp_path / "a.png")
    image = read_given_pictures([tmp_path / "a.png"], 32, True).images
    boxes = np.asarray(picture, np.float32).reshape(32, 4, 32, 4, 3).mean((1, 3)) / 127.5 - 1
    assert np.allclose(image[0].permute(1, 2, 0), boxes, atol=1e-5)
    assert read_given_pictures([tmp_path], 64, True).images.shape == (1, 3, 64, 64)


@pytest.mark.slow
def test_the_verb_names_broken_files_and_writes_sheet_table_and_detector(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, "known")
    Path("new").mkdir()
    draw_shape("red", "circle").save("new/fine.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 4), np.uint8), "RGBA").save("new/noise.png")
    Image.new("I;16", (7, 90), 30000).save("new/grey.png")
    Path("new/broken.png").write_bytes(b"no picture")
    arguments = ["anomaly", "new", "--normal", "known", "--false-alarms", "0.3", "--csv", "a.csv", "--save", "d.json"]
    assert app.main(arguments) == 0
    shown = capsys.readouterr()
    assert "broken.png was skipped" in shown.err
    assert shown.out.strip().endswith("anomaly.png")
    lines = Path("a.csv").read_text().splitlines()
    assert len(lines) == 4
    rows = {line.split(",")[0]: line.split(",") for line in lines[1:]}
    assert rows["noise.png"][3] == "True"
    totals = [float(line.split(",")[1]) for line in lines[1:]]
    assert totals == sorted(totals, reverse=True)
    with Image.open("anomaly.png") as page:
        assert page.size[0] > 700
    assert app.main(["anomaly", "new/noise.png", "--detector", "d.json", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["flagged"] == 1
    assert facts["pictures"][0]["score"] == pytest.approx(float(rows["noise.png"][1]), abs=1e-3)


def test_the_verb_refuses_what_it_cannot_do(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("bad.png").write_bytes(b"")
    Path("d.json").write_text("{}")
    for arguments, message in (
        (["empty"], "holds no picture"),
        (["bad.png"], "could be read"),
        (["missing.png"], "no such file or folder"),
        ([], "PICTURES is missing"),
        ([str(pictures), "--out", "x.jpg"], "ends in .png"),
        ([str(pictures), "--normal", str(pictures), "--false-alarms", "0.01"], "cannot promise"),
        ([str(pictures), "--false-alarms", "2"], "expected 0 to 1"),
        ([str(pictures), "--most", "0"], "--most is 0"),
        ([str(pictures), "--detector", "d.json", "--size", "32"], "leave out"),
        ([str(pictures), "--detector", "d.json"], "no anomaly detector"),
    ):
        assert app.main(["anomaly", *arguments]) == 2, arguments
        assert message in capsys.readouterr().err, arguments
        assert not Path("anomaly.png").exists()
