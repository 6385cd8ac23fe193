"""Styles: the banks that ship, the cells, and scores on pictures whose answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from latentpipe import UserError
from latentpipe.data import emoji_hands_bank
from latentpipe.data.emoji import read_split
from latentpipe.data.emoji_bank import SIDE
from latentpipe.data.emoji_hands import read_cells
from latentpipe.data.emoji_hands_bank import HandBank, cells_of, open_hands
from latentpipe.data.emoji_sets import HANDS, plain_key
from latentpipe.evaluate import prompt_adherence, style_adherence


def bank_of(style: str, **levels: float) -> HandBank:
    """Pictures of one grey level each."""
    pixels = np.stack([np.full(SIDE * SIDE * 3, level, np.float32) for level in levels.values()])
    return HandBank(style, list(levels), [f"a {key}" for key in levels], pixels)


BANKS = {"noto": bank_of("", x=0, y=50), "ink": bank_of("ink style", x=100, y=150, z=155), "oil": bank_of("oil style", y=250)}


def flat(level: float) -> np.ndarray:
    return np.full(SIDE * SIDE * 3, level, np.float32)


def test_the_banks_hold_every_trained_hand_with_its_style() -> None:
    banks = open_hands()
    assert list(banks) == [hand.name for hand in HANDS if hand.trained]
    for hand in HANDS:
        if hand.trained:
            bank = banks[hand.name]
            assert bank.style == hand.style
            assert len(bank.keys) == len(set(bank.keys)) == len(bank.captions) == len(bank.pixels) > 1000
            assert bank.pixels.min(1).max() < 250  # none is blank
    packages = {name: entry["package"] for name, entry in json.loads(emoji_hands_bank.INDEX.read_text())["hands"].items()}
    assert packages == {hand.name: hand.package for hand in HANDS if hand.trained and hand.package}


def test_one_emoji_looks_like_itself_in_every_hand_but_is_another_drawing() -> None:
    banks = open_hands()
    apples = {name: bank.pixels[bank.rows["1f34e"]].reshape(SIDE, SIDE, 3) for name, bank in banks.items()}
    for name, apple in apples.items():
        red, _green, blue = apple[SIDE // 2, SIDE // 2]
        assert red > blue + 50, name
        assert (apple[0, 0] > 240).all(), name
    assert len({apple.tobytes() for apple in apples.values()}) == len(apples)


def test_cells_are_held_out_and_no_emoji_that_the_split_keeps_out() -> None:
    banks, cells = open_hands(), cells_of(open_hands())
    assert len(cells) >= 300
    held = read_cells()
    assert all(key in held[name] for name, key in cells)
    kept = {plain_key(key) for name in ("validation", "held_out") for key in read_split()[name]}
    assert not {key for _, key in cells} & kept
    assert cells == cells_of(banks)
    assert len({name for name, _ in cells[:30]}) == 5  # the first ones are of every hand


def test_nearest_equals_brute_force() -> None:
    bank = open_hands()["twemoji"]
    query = np.random.default_rng(0).uniform(0, 255, (2, bank.pixels.shape[1])).astype(np.float32)
    for picture, near in zip(query, bank.nearest(query), strict=True):
        error = np.square(bank.pixels.astype(np.float64) - picture).mean(1)
        assert np.allclose(error[near], np.sort(error)[:5], rtol=1e-4)


def test_the_true_drawings_score_everything() -> None:
    banks = open_hands()
    cells = cells_of(banks)[:40]
    pictures = np.stack([banks[name].pixels[banks[name].rows[key]] for name, key in cells])
    found = style_adherence.score_cells(banks, cells, pictures)
    assert [found[name]["share"] for name in ("nearer", "top1", "top5")] == [1.0] * 3
    assert sum(row["n"] for row in found["hands"].values()) == found["n"] == 40
    noto = banks["noto"]
    copied = np.stack([noto.pixels[noto.rows[key]] if key in noto.rows else pictures[0] for _, key in cells])
    assert style_adherence.score_cells(banks, cells, copied)["nearer"]["share"] < 0.1  # the emoji in another hand


@pytest.mark.parametrize(("level", "nearer", "top1", "top5"), [(101, 1, 1, 1), (149, 0.5, 0.5, 1), (10, 0, 0.5, 1)])
def test_scores_are_shares_of_cells(level: float, nearer: float, top1: float, top5: float) -> None:
    pictures = np.stack([flat(level), flat(level if level != 101 else 151)])
    found = style_adherence.score_cells(BANKS, [("ink", "x"), ("ink", "y")], pictures)
    if level == 149:  # for x, Noto's 0 and ink's 100: ink; for y ink's 150
        nearer = 1
    assert found["nearer"]["share"] == nearer
    assert found["top1"]["share"] == top1
    assert found["top5"]["share"] == top5
    assert found["hands"] == {"ink": {"n": 2, "nearer": nearer, "top5": top5}}


def test_a_prompt_names_the_style() -> None:
    assert style_adherence.prompt_of(BANKS["ink"], "x") == "a x, ink style"
    assert style_adherence.prompt_of(BANKS["noto"], "x") == "a x"


def test_variety_counts_the_hands_that_seeds_show() -> None:
    pictures = np.stack([np.stack([flat(level) for level in group]) for group in ((52, 149, 251, 60), (50, 51, 52, 53))])
    found = style_adherence.score_variety(BANKS, ["y", "y"], pictures)
    assert found["two_hands"]["share"] == 0.5
    assert found["hands_shown"] == 2.0  # three of the first, one of the second
    assert found["pairwise_rms_of_hands"] == pytest.approx((100 + 200 + 100) / 3)
    first, second = (style_adherence.score_variety(BANKS, ["y"], part)["pairwise_rms"] for part in np.split(pictures, 2))
    assert second == pytest.approx((1 + 2 + 3 + 1 + 2 + 1) / 6)
    assert found["pairwise_rms"] == pytest.approx((first + second) / 2)


def test_variety_asks_for_any_style_with_four_seeds() -> None:
    asked: list[tuple[str, int]] = []

    def draw(texts: list[str], seeds: list[int]) -> list[Image.Image]:
        asked.extend(zip(texts, seeds, strict=True))
        return [Image.new("RGB", (64, 64), (seed * 60, 0, 0)) for seed in seeds]

    found = style_adherence.evaluate_variety(draw, 5)  # type: ignore[arg-type]
    assert found["n"] == 5
    assert [seed for _, seed in asked] == [0, 1, 2, 3] * 5
    assert all(text.endswith(", any style") for text, _ in asked)
    assert found["pairwise_rms"] > 0


def test_the_verbs_function_scores_cells_and_variety(model_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style_adherence.evaluate_variety, "__defaults__", (2,))
    result = prompt_adherence.evaluate(model_folder, seen=1, held_out=1, num_inference_steps=1, styles=3)
    assert result["cells"]["n"] == 3
    assert result["variety"]["n"] == 2
    table = prompt_adherence.adherence_table(result)
    assert "held-out cells (n = 3)" in table
    assert "two or more hands" in table
    with pytest.raises(UserError, match="styles -1"):
        prompt_adherence.evaluate(model_folder, styles=-1)
