"""Disentanglement on codes whose scores are known in closed form, and the drawn factors that it is measured on."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import mutual_info_score

from latentpipe.data import factor_shapes as drawn
from latentpipe.explore.disentanglement import concentration, dci, entropy, information, mig, sap, scored
from latentpipe.utils.errors import UserError

GRID = np.array([(a, b, c) for a in range(3) for b in range(4) for c in range(5)] * 20)


def test_a_latent_for_each_factor_is_perfect() -> None:
    codes = GRID[:, [2, 0, 1]] * np.array([3.0, -1.0, 0.5])
    assert mig(codes, GRID) == pytest.approx(1)
    assert sap(codes, GRID) == pytest.approx(1)
    assert sap(codes, GRID, nominal=(0, 1, 2)) == pytest.approx(1)
    assert dci(codes, GRID) == pytest.approx((1, 1, 1))


def test_noise_says_nothing() -> None:
    codes = np.random.default_rng(0).standard_normal((len(GRID), 6))
    assert mig(codes, GRID) < 0.02
    assert sap(codes, GRID) < 0.01
    assert sap(codes, GRID, nominal=(0,)) < 0.05
    disentanglement, completeness, informativeness = dci(codes, GRID)
    assert disentanglement < 0.1
    assert completeness < 0.1
    assert informativeness < 1.3 * np.mean([1 / 3, 1 / 4, 1 / 5])


def test_a_factor_that_two_latents_share_leaves_no_gap() -> None:
    codes = np.concatenate([GRID, GRID], 1).astype(float)
    assert mig(codes, GRID) == pytest.approx(0)
    assert sap(codes, GRID) == pytest.approx(0)


def test_a_rotated_code_is_informative_and_not_disentangled() -> None:
    pair = GRID[:, :1].repeat(2, 1)
    pair[:, 1] = np.random.default_rng(0).integers(0, 3, len(pair))
    turned = pair @ np.array([[1.0, 1.0], [1.0, -1.0]])
    assert mig(turned, pair) < 0.02
    assert sap(turned, pair) < 0.02
    disentanglement, _, informativeness = dci(turned, pair)
    assert disentanglement < 0.2
    assert informativeness == pytest.approx(1)


def test_half_of_the_factors_give_half() -> None:
    codes = np.stack([GRID[:, 0], np.zeros(len(GRID))], 1).astype(float)
    assert mig(codes, GRID[:, :2]) == pytest.approx(0.5)
    assert sap(codes, GRID[:, :2]) == pytest.approx(0.5)


@given(st.permutations(range(4)), st.lists(st.floats(0.1, 9), min_size=4, max_size=4))
def test_the_order_and_the_units_of_latents_do_not_count(order: list[int], scales: list[float]) -> None:
    random = np.random.default_rng(1)
    codes = np.concatenate([GRID[:, :3] + random.standard_normal((len(GRID), 3)), random.standard_normal((len(GRID), 1))], 1)
    changed = codes[:, order] * np.array(scales)
    assert mig(changed, GRID) == pytest.approx(mig(codes, GRID), abs=0.01)
    assert sap(changed, GRID) == pytest.approx(sap(codes, GRID))


def test_information_is_that_of_scikit_learn() -> None:
    random = np.random.default_rng(2)
    first = random.integers(0, 7, 400)
    second = (first + random.integers(0, 3, 400)) % 7
    assert information(first, second) == pytest.approx(mutual_info_score(first, second))
    assert information(first, first) == pytest.approx(entropy(first))


def test_concentration_in_closed_form() -> None:
    assert concentration(np.eye(3)) == pytest.approx((1, 1))
    assert concentration(np.ones((4, 3))) == pytest.approx((0, 0))
    half = -(0.5 * np.log(0.5) * 2) / np.log(3)
    assert concentration(np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])) == pytest.approx((0.5 * (1 - half) + 0.5, 1))
    assert concentration(np.zeros((2, 2))) == (0, 0)


def test_a_score_has_an_interval_around_it() -> None:
    codes = GRID + np.random.default_rng(0).standard_normal(GRID.shape)
    score = scored(mig, codes, GRID)
    assert score.low < score.value < score.high
    assert score.n == len(GRID)
    assert score.value == pytest.approx(mig(codes, GRID))


@pytest.mark.parametrize(("codes", "given", "words"), [
    (np.full((60, 2), np.nan), GRID[:60], "not finite"),
    (np.zeros((60, 2)), np.zeros((60, 2), int), "two values"),
])  # fmt: skip
def test_what_cannot_be_measured_is_said(codes: np.ndarray, given: np.ndarray, words: str) -> None:
    with pytest.raises(UserError, match=words):
        mig(codes, given)


def test_arrays_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="integer factors"):
        mig(np.zeros((60, 2)), GRID[:60].astype(float))


def test_every_factor_changes_the_picture() -> None:
    grid = drawn.grid()
    assert len(grid) == np.prod(list(drawn.FACTORS.values())) == len(np.unique(grid, axis=0))
    start = np.array([[1, 1, 2, 2, 3]])
    for column, count in enumerate(drawn.FACTORS.values()):
        changed = start.copy()
        changed[0, column] = (start[0, column] + 1) % count
        assert (drawn.draw_factors(changed) != drawn.draw_factors(start)).any()


def test_the_shape_is_where_and_as_large_as_its_factors_say() -> None:
    rows = np.array([[shape, size, x, y, 5] for shape in range(3) for size in range(4) for x in (0, 5) for y in (0, 5)])
    for row, picture in zip(rows, drawn.draw_factors(rows, 128).astype(float), strict=True):
        cover = (255 - picture[..., 0]) / (255 - picture[..., 0]).max()
        assert cover.sum() / 128**2 == pytest.approx(np.pi * drawn.RADII[row[1]] ** 2, rel=0.03)
        middle = (cover.sum(0) @ (np.arange(128) + 0.5)) / cover.sum() / 128
        assert middle == pytest.approx(np.linspace(drawn.FIRST, drawn.LAST, 6)[row[2]], abs=0.01)


def test_factors_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="below"):
        drawn.draw_factors(np.array([[3, 0, 0, 0, 0]]))


def test_the_folder_is_a_captioned_set(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(drawn, "grid", lambda: np.array([[0, 3, 0, 0, 0], [2, 0, 5, 5, 5]]))
    assert drawn.write_factors(tmp_path / "f", 32) == 2
    rows = [json.loads(line) for line in (tmp_path / "f" / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["large red disc", "tiny blue triangle"]
    assert rows[1]["factors"] == [2, 0, 5, 5, 5]
    with Image.open(tmp_path / "f" / rows[0]["file_name"]) as picture:
        assert (np.asarray(picture) == drawn.draw_factors(np.array([rows[0]["factors"]]), 32)[0]).all()
