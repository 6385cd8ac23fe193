"""The yardstick: the bank, the intervals, the scores on pictures whose answer is known."""

import math

import numpy as np
import pytest
from PIL import Image

from latentpipe import UserError
from latentpipe.data.emoji import combination_of, held_out_captions, read_split
from latentpipe.data.emoji_bank import SIDE, open_bank, small
from latentpipe.evaluate import prompt_adherence


@pytest.fixture(scope="module")
def bank():
    return open_bank()


def picture_of(bank, row: int, side: int) -> Image.Image:
    tile = bank.pixels[row].reshape(SIDE, SIDE, 3).astype(np.uint8)
    return Image.fromarray(tile).resize((side, side), Image.Resampling.NEAREST)


def test_bank_and_split_agree(bank):
    split = read_split()
    assert bank.font_sha256 == split["font_sha256"]
    for name in ("validation", "held_out"):
        assert {bank.keys[row] for row in bank.rows_of(name)} == set(split[name])
    assert len(bank.keys) == len(set(bank.keys)) == 3771
    train = {caption for row in bank.rows_of("train") for caption in bank.captions[row]}
    assert not train & held_out_captions()


def test_every_picture_of_the_bank_finds_itself(bank):
    rows = list(range(0, len(bank.keys), 40))
    found = bank.nearest(np.stack([small(picture_of(bank, row, 64)) for row in rows]))
    assert prompt_adherence.score(bank, rows, found)["top1"] == 1.0


@pytest.mark.slow
def test_nearest_equals_brute_force(bank):
    rng = np.random.default_rng(0)
    queries = rng.uniform(0, 255, (4, bank.pixels.shape[1])).astype(np.float32)
    found = bank.nearest(queries, k=5)
    for query, near in zip(queries, found, strict=True):
        error = np.square(bank.pixels.astype(np.float64) - query).mean(1)
        assert np.allclose(error[near], np.sort(error)[:5], rtol=1e-4)


def test_wrong_pictures_score_nothing(bank):
    rows = bank.rows_of("held_out")[:10]
    white = np.full((10, SIDE * SIDE * 3), 255, np.float32)
    result = prompt_adherence.score(bank, rows, bank.nearest(white))
    assert result["top1"] == 0
    assert result["low"] == pytest.approx(0, abs=1e-12)


def test_attributes_are_counted_apart(bank):
    rows = bank.rows_of("held_out")[:20]
    texts = [bank.captions[row][0] for row in rows]
    same = prompt_adherence.attributes(bank, texts, np.array([[row] * 5 for row in rows]))
    assert same == {"role": 1.0, "gender": 1.0, "tone": 1.0}
    seen = {combination_of(bank.captions[row][0]): row for row in bank.rows_of("train")}
    sibling = [prompt_adherence._siblings(combination_of(text), seen)[0] for text in texts]
    assert prompt_adherence.attributes(bank, texts, np.array([[row] * 5 for row in sibling])) == {
        "role": 1.0,
        "gender": 1.0,
        "tone": 0.0,
    }


@pytest.mark.slow
def test_copying_the_nearest_sibling_never_wins_top1(bank):
    result = prompt_adherence.baselines(bank, "held_out", bank.rows_of("held_out"))
    assert result["nearest_sibling"]["top1"] == 0.0
    assert result["nearest_sibling"]["top5"] > 0.8
    assert 0.1 < result["mean_of_siblings"]["top1"] < 0.3


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (250, 400)])
def test_wilson_solves_its_equation(hits, n):
    z = 1.959964
    for bound in prompt_adherence.wilson(hits, n):
        assert (hits / n - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / n, abs=1e-9)


def test_wilson_of_nothing_says_nothing():
    assert prompt_adherence.wilson(0, 0) == (0.0, 1.0)


@pytest.mark.slow
def test_evaluate_reports_all_parts(model_folder, tmp_path):
    result = prompt_adherence.evaluate(model_folder, seen=3, held_out=2, num_inference_steps=2, grid=tmp_path / "grid.png")
    assert {"n", "top1", "top5", "low", "high"} <= set(result["seen"])
    assert {"role", "gender", "tone"} <= set(result["held_out"])
    assert set(result["baselines"]["held_out"]) == {"nearest_caption", "nearest_sibling", "mean_of_siblings"}
    assert result["seen"]["n"] == 3
    assert result["held_out"]["n"] == 2
    assert result["seeds"]["smallest"] > 0
    assert Image.open(tmp_path / "grid.png").width > 64
    assert "Wilson" in prompt_adherence.adherence_table(result)
    assert math.isfinite(result["seeds"]["mean"])


def test_an_object_has_no_gender(bank):
    apple = next(row for row, texts in enumerate(bank.captions) if "red apple" in texts)
    assert prompt_adherence.attributes(bank, ["person judge dark skin tone"], np.array([[apple] * 5])) == {
        "role": 0.0,
        "gender": 0.0,
        "tone": 0.0,
    }


def test_a_grid_needs_the_name_of_a_png(model_folder, tmp_path):
    with pytest.raises(UserError, match="PNG"):
        prompt_adherence.evaluate(model_folder, seen=1, held_out=1, num_inference_steps=1, grid=tmp_path)


def test_objects_are_the_seen_prompts_without_tone_and_flag(bank):
    rows = bank.objects()
    assert 1400 < len(rows) < 1700
    assert set(rows) < set(bank.rows_of("train"))
    captions = {bank.captions[row][0] for row in rows}
    assert "red apple" in captions
    assert "thumbs up" in captions
    assert not [caption for caption in captions if "skin tone" in caption or caption.startswith("flag of ")]


def test_the_distance_at_24_pixels_is_of_both_reduced(bank):
    wanted = bank.pixels[:3]
    assert prompt_adherence.rms24(wanted, wanted) == 0
    assert prompt_adherence.rms24(np.full((2, SIDE * SIDE * 3), 100.0), np.full((2, SIDE * SIDE * 3), 112.0)) == pytest.approx(12)
    board = (np.indices((SIDE, SIDE)).sum(0) % 2 * 255).repeat(3).reshape(1, -1).astype(np.float32)
    assert prompt_adherence.rms24(board, 255 - board) < 200  # fine patterns count less than 255


def test_objects_are_scored_beside_the_others(model_folder):
    result = prompt_adherence.evaluate(model_folder, seen=1, held_out=1, num_inference_steps=1, objects=2)
    assert result["objects"]["n"] == 2
    assert set(result["baselines"]) == {"seen", "held_out"}
    assert "objects" in prompt_adherence.adherence_table(result)
    assert result["objects"]["rms24"] > 0
