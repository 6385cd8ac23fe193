"""Who is better, and is it certain? Evaluations made by hand, against scipy and by construction."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentpipe.evaluate.comparison import check_same, compare, floor_of, labels_of
from latentpipe.evaluate.report.text import figure, rounded
from latentpipe.evaluate.results import Evaluation, Score
from latentpipe.evaluate.statistics import EXACT, holm, interval, least_p, p_of_interval, sign_flip
from latentpipe.utils.errors import UserError

N = 20
NAMES = [f"{index:02}.png" for index in range(N)]
DIFFICULTY = np.random.default_rng(0).normal(28, 3, N)


def evaluation(name: str, psnr: np.ndarray, lpips: np.ndarray | None = None, **changes) -> Evaluation:
    """An evaluation by hand: PSNR, and where given LPIPS, of N pictures."""
    rows = {"PSNR": psnr} | ({} if lpips is None else {"LPIPS": lpips})
    kinds = {"PSNR": ("dB", "higher"), "LPIPS": ("", "lower")}
    fields = {
        "hash": name * 64,
        "about": {"class": "AutoencoderKL", "channels": 4, "downscale": 8},
        "pictures": {"set": "set", "n": len(psnr), "size_px": 64, "sha256": "0" * 64, "skipped": {}},
        "protocol": {"name": "latentpipe", "posterior": "mode"},
        "scores": {metric: Score.of(row.tolist(), *kinds[metric]) for metric, row in rows.items()},
        "per_picture": {metric: row.tolist() for metric, row in rows.items()},
        "names": NAMES[: len(psnr)],
    }
    return Evaluation(name, **(fields | changes))


def noisy(gain: float, seed: int, spread: float = 0.2) -> np.ndarray:
    """PSNR of the N pictures: as difficult as they are, plus a gain in dB and noise."""
    return DIFFICULTY + gain + np.random.default_rng(seed).normal(0, spread, N)


@pytest.mark.parametrize("n", [3, 8, EXACT])
def test_the_sign_flip_test_is_scipys_permutation_test(n: int) -> None:
    from scipy.stats import permutation_test

    for seed in range(4):
        values = np.random.default_rng(seed).normal(0.4, 1, n)
        theirs = permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
        assert sign_flip(values) == pytest.approx(float(theirs.pvalue), abs=1e-12)


def test_the_drawn_sign_flip_test_is_near_a_paired_t_test_on_normal_values() -> None:
    from scipy.stats import ttest_1samp

    for seed in range(3):
        values = np.random.default_rng(seed).normal(0.2, 1, 80)
        assert sign_flip(values) == pytest.approx(float(ttest_1samp(values, 0).pvalue), abs=0.02)


def test_the_drawn_test_does_not_depend_on_how_signs_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    from latentpipe.evaluate import statistics

    values = np.random.default_rng(1).normal(0.3, 1, 30)
    whole = sign_flip(values)
    monkeypatch.setattr(statistics, "SIGNS", 300)
    assert sign_flip(values) == pytest.approx(whole, abs=0.01)
    assert sign_flip(np.ones(30)) == pytest.approx(1e-4)  # 1 of 10,000: never 0
    assert sign_flip(np.zeros(30)) == 1.0


def test_the_p_value_of_an_interval_is_that_of_a_normal_test() -> None:
    from scipy.stats import norm

    for value, error in ((0.5, 0.2), (-1.0, 0.9), (0.0, 1.0)):
        expected = 2 * norm.sf(abs(value) / error)
        assert p_of_interval(value, value - 1.959964 * error, value + 1.959964 * error) == pytest.approx(expected, rel=1e-6)
    assert p_of_interval(0, 0, 0) == 1
    assert p_of_interval(1, 1, 1) == 0


@given(st.floats(-5, 5), st.floats(0.01, 5), st.floats(0.01, 5))
def test_the_p_value_of_an_interval_is_small_exactly_where_it_leaves_zero_out(value: float, down: float, up: float) -> None:
    low, high = value - down, value + up
    if min(abs(low), abs(high)) > 1e-4:
        assert (p_of_interval(value, low, high) < 0.05) == (low > 0 or high < 0)


def test_holm_is_the_textbooks_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert len(holm([])) == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_is_between_the_p_value_and_bonferroni_and_keeps_the_order(p: list[float]) -> None:
    array, adjusted = np.array(p), holm(p)
    assert (adjusted >= array).all()
    assert (adjusted <= np.minimum(len(p) * array, 1) + 1e-12).all()
    assert (np.diff(adjusted[np.argsort(array, kind="stable")]) >= 0).all()


def test_a_vae_that_is_better_on_every_picture_wins() -> None:
    found = compare([evaluation("a", noisy(0, 1)), evaluation("b", noisy(3, 2)), evaluation("c", noisy(-2, 3))])
    assert found.outcomes["PSNR"].winner == "b"
    assert str(found.outcomes["PSNR"]) == "b"
    assert all(one.clear for one in found.differences)
    assert {one.better for one in found.differences} == {"a", "b"}


def test_a_difference_far_smaller_than_that_of_the_pictures_is_found_since_it_is_paired() -> None:
    first, second = noisy(0, 1, 0.02), noisy(0.6, 2, 0.02)
    (one,) = compare([evaluation("a", first), evaluation("b", second)]).differences
    assert one.better == "b"
    assert (one.low, one.high) == pytest.approx(interval(first - second))
    assert one.value == pytest.approx((first - second).mean())
    alone = [interval(row) for row in (first, second)]
    assert alone[0][1] > alone[1][0]  # unpaired intervals overlap


@pytest.mark.parametrize("shift", [0.24, -0.24])
def test_a_clear_difference_below_the_floor_names_nobody(shift: float) -> None:
    found = compare([evaluation("a", noisy(0, 1, 0.02)), evaluation("b", noisy(shift, 2, 0.02))])
    (one,) = found.differences
    assert one.clear
    assert one.floor == 0.5
    assert one.better is None
    assert found.outcomes["PSNR"].winner is None
    assert "at least 0.5 dB of PSNR" in found.rule()


@pytest.mark.parametrize(
    ("metric", "values", "floor"),
    [
        ("PSNR of the pooled error", (30.0, 31.0), 0.5),
        ("SSIM", (0.9, 0.91), 0.005),
        ("MS-SSIM (3 scales)", (0.9, 0.91), 0.005),
        ("LPIPS (alex)", (0.1, 0.2), 0.01),
        ("Frechet distance on emoji-words", (40.0, 50.0), 0.8),
        ("rate", (-3.0, 2.0), 0.04),
    ],
)
def test_floors(metric: str, values: tuple[float, float], floor: float) -> None:
    assert floor_of(metric, *values) == pytest.approx(floor)


def test_a_tie_names_nobody() -> None:
    values = noisy(0, 1)
    found = compare([evaluation("a", values), evaluation("b", values), evaluation("c", values - 4)])
    assert found.outcomes["PSNR"].winner is None
    assert sorted(found.outcomes["PSNR"].open) == ["a", "b"]
    assert str(found.outcomes["PSNR"]) == "no clear winner: a or b"


def test_lower_is_better_where_the_metric_says_so() -> None:
    low, high = noisy(0, 1) / 100, noisy(5, 2) / 100
    found = compare([evaluation("a", noisy(0, 3), low), evaluation("b", noisy(0, 3), high)])
    assert found.outcomes["LPIPS"].winner == "a"
    assert found.outcomes["PSNR"].winner is None


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_relabelling_changes_no_result(order: tuple[int, ...]) -> None:
    vaes = [evaluation("a", noisy(0, 1)), evaluation("b", noisy(0.1, 2)), evaluation("c", noisy(1.5, 3))]
    straight, turned = compare(vaes), compare([vaes[index] for index in order])
    assert turned.outcomes["PSNR"].winner == straight.outcomes["PSNR"].winner
    assert sorted(turned.outcomes["PSNR"].open) == sorted(straight.outcomes["PSNR"].open)
    pairs = {frozenset((one.first, one.second)): one for one in straight.differences}
    for one in turned.differences:
        other = pairs[frozenset((one.first, one.second))]
        sign = 1 if one.first == other.first else -1
        assert one.value == pytest.approx(sign * other.value)
        assert sorted((sign * one.low, sign * one.high)) == pytest.approx([other.low, other.high], abs=1e-9)
        assert (one.clear, one.better, one.p) == (other.clear, other.better, other.p)


def test_many_comparisons_cost_certainty() -> None:
    values = DIFFICULTY + np.where(np.arange(N) % 4 == 0, -1.5, 1.56)
    alone = compare([evaluation("a", DIFFICULTY), evaluation("b", values)])
    assert alone.outcomes["PSNR"].winner == "b"
    crowd = compare([evaluation("a", DIFFICULTY), evaluation("b", values), *(evaluation(f"c{i}", noisy(0, i)) for i in range(5))])
    same = next(one for one in crowd.differences if (one.first, one.second) == ("a", "b"))
    assert same.p == alone.differences[0].p
    assert same.high < 0
    assert not same.clear
    assert f"made here ({len(list(combinations(range(7), 2)))})" in crowd.rule()


def test_five_pictures_make_no_winner_and_that_is_said() -> None:
    found = compare([evaluation("a", DIFFICULTY[:5]), evaluation("b", DIFFICULTY[:5] + 9)])
    assert found.outcomes["PSNR"].winner is None
    assert any("5 pictures are too few" in note for note in found.notes)
    assert found.differences[0].p == least_p(5)
    assert not compare([evaluation("a", DIFFICULTY[:6]), evaluation("b", DIFFICULTY[:6] + 9)]).notes
    many = [evaluation(name, DIFFICULTY[:6] + 9 * index) for index, name in enumerate("abc")]
    assert any("6 pictures are too few for any winner in 3 comparisons" in note for note in compare(many).notes)
    assert compare(many).outcomes["PSNR"].winner is None
    sets = {("Frechet distance on x", 0, 1): (5.0, 4.9, 5.1)}
    score = {"Frechet distance on x": Score(1.0, 0.9, 1.1, 5, "", "lower")}
    few = [evaluation(name, DIFFICULTY[:5], scores=score, per_picture={}) for name in "ab"]
    assert not compare(few, sets).differences[0].clear


def test_distances_between_sets_are_judged_by_their_paired_interval_and_open_without_one() -> None:
    scores = {"Frechet distance on x": Score(9.0, 8.0, 10.0, N, "", "lower")}
    better = {"Frechet distance on x": Score(6.0, 5.0, 7.0, N, "", "lower")}
    vaes = [
        evaluation("a", DIFFICULTY, scores=scores, per_picture={}),
        evaluation("b", DIFFICULTY, scores=better, per_picture={}),
    ]
    assert str(compare(vaes).outcomes["Frechet distance on x"]) == "not tested"
    found = compare(vaes, {("Frechet distance on x", 0, 1): (3.0, 2.0, 4.0)})
    assert found.outcomes["Frechet distance on x"].winner == "b"
    unsure = compare(vaes, {("Frechet distance on x", 0, 1): (3.0, -0.2, 6.2)})
    assert unsure.outcomes["Frechet distance on x"].open == ["b", "a"]


def test_pictures_without_a_value_are_left_out_of_the_differences() -> None:
    first, second = noisy(0, 1), noisy(1, 2)
    gaps = second.copy()
    gaps[[2, 5]] = math.nan
    score = {"PSNR": Score(float(np.nanmean(gaps)), 0, 0, N - 2, "dB", "higher")}
    full = evaluation("a", first)
    (one,) = compare([full, evaluation("b", second, scores=score, per_picture={"PSNR": gaps.tolist()})]).differences
    kept = np.isfinite(gaps)
    assert one.n == N - 2
    assert one.value == pytest.approx((first - second)[kept].mean())
    gone = evaluation("b", second, per_picture={"PSNR": [math.nan] * N})
    assert compare([full, gone]).differences == []


def test_the_extremes_are_the_pictures_with_the_largest_differences() -> None:
    second = DIFFICULTY.copy()
    second[3] += 2
    second[7] += 5
    second[11] -= 4
    found = compare([evaluation("a", DIFFICULTY), evaluation("b", second)]).extremes
    assert [(one.first, one.picture, round(one.value, 6)) for one in found] == [
        ("a", "11.png", 4),
        ("b", "07.png", 5),
        ("b", "03.png", 2),
    ]


def test_the_same_weights_twice_are_named_apart_and_told() -> None:
    assert labels_of(["a", "b", "a", "a", "a (2)"]) == ["a", "b", "a (2)", "a (3)", "a (2) (2)"]
    found = compare([evaluation("a", DIFFICULTY), evaluation("a", DIFFICULTY)])
    assert found.labels == ["a", "a (2)"]
    assert found.notes[0] == f"a and a (2) are the same weights ({'a' * 16})."
    assert found.outcomes["PSNR"].winner is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pictures": {"set": "set", "n": N, "size_px": 64, "sha256": "1" * 64}}, "sha256"),
        ({"pictures": {"set": "set", "n": N, "size_px": 32, "sha256": "0" * 64}}, "size_px"),
        ({"pictures": {"set": "set", "n": 3, "size_px": 64, "sha256": "0" * 64}}, "with n"),
        ({"protocol": {"name": "latentpipe", "posterior": "sample"}}, "protocols"),
        ({"names": NAMES[::-1]}, "names"),
    ],
)
def test_other_pictures_or_another_protocol_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_same([evaluation("a", DIFFICULTY), evaluation("b", DIFFICULTY, **changes)])


def test_one_vae_is_no_comparison() -> None:
    with pytest.raises(UserError, match="two VAEs"):
        compare([evaluation("a", DIFFICULTY)])


def test_the_table_names_every_vae_metric_and_winner() -> None:
    text = str(compare([evaluation("first", noisy(0, 1)), evaluation("second", noisy(3, 2))]))
    assert "set: 20 pictures, 64 × 64 px; protocol latentpipe" in text
    row = next(line for line in text.splitlines() if line.startswith("PSNR (dB) ↑"))
    assert row.endswith("second")


def test_figures_are_rounded_to_two_digits_of_their_uncertainty() -> None:
    assert rounded(31.23456, 30.9, 31.6) == ("31.23", "30.90", "31.60")
    assert rounded(-0.0123456, -0.0133, -0.0113) == ("−0.0123", "−0.0133", "−0.0113")
    assert rounded(123456.7, 120000, 127000) == ("123457", "120000", "127000")
    assert rounded(2.0, 2.0, 2.0) == ("2", "2", "2")


def test_one_picture_has_no_interval() -> None:
    score = Score.of([30.0], "dB", "higher")
    assert math.isnan(score.low)
    assert math.isnan(score.high)
    assert figure(score) == "30 (no interval for n = 1)"
    (one,) = compare([evaluation("a", DIFFICULTY[:1]), evaluation("b", DIFFICULTY[:1] + 9)]).differences
    assert not one.clear
    assert one.better is None
