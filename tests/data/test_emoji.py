"""The emoji set: captions, combinations, and a split that keeps what is held out away from training."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from latentpipe import UserError
from latentpipe.data import emoji as emojis
from latentpipe.data.emoji import Combination, Emoji, caption_of, combination_of, read_split

SPLIT = read_split()


# --- captions, without the font -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequence", "name", "caption"),
    [
        ("🍎", ":red_apple:", "red apple"),
        ("👩🏾‍🚒", ":woman_firefighter_medium-dark_skin_tone:", "woman firefighter medium dark skin tone"),
        ("🇯🇵", ":Japan:", "flag of japan"),
        ("🏴󠁧󠁢󠁥󠁮󠁧󠁿", ":England:", "flag of england"),
        ("🇨🇮", ":Côte_d’Ivoire:", "flag of cote d'ivoire"),
        ("🇦🇬", ":Antigua_&_Barbuda:", "flag of antigua and barbuda"),
        ("#️⃣", ":keycap_#:", "keycap #"),
        ("🪅", ":piñata:", "pinata"),
        ("🕛", ":twelve_o’clock:", "twelve o'clock"),
    ],
)
def test_captions_are_plain_words(sequence: str, name: str, caption: str) -> None:
    assert caption_of(sequence, name) == caption


@pytest.mark.parametrize(
    ("caption", "combination"),
    [
        ("woman firefighter medium dark skin tone", Combination("firefighter", "woman", "medium dark")),
        ("man walking facing right light skin tone", Combination("walking facing right", "man", "light")),
        ("person medium skin tone bald", Combination("bald", "person", "medium")),
        ("firefighter dark skin tone", Combination("firefighter", "person", "dark")),
        ("woman medium light skin tone", Combination("adult", "woman", "medium light")),
        (
            "couple with heart man man dark skin tone medium skin tone",
            Combination("couple with heart man man dark skin tone medium skin tone", "person", ""),
        ),
        ("red apple", Combination("red apple", "person", "")),
        ("woman dark chocolate", Combination("dark chocolate", "woman", "")),
    ],
)
def test_combinations_are_read_from_captions(caption: str, combination: Combination) -> None:
    assert combination_of(caption) == combination


# --- the split file, without the font -----------------------------------------------------------------------


def test_the_split_has_its_published_counts() -> None:
    assert len(SPLIT["held_out"]) == 228
    assert len(SPLIT["validation"]) == 150
    assert re.fullmatch("[0-9a-f]{64}", SPLIT["font_sha256"])


def test_held_out_and_validation_do_not_meet() -> None:
    assert not SPLIT["held_out"].keys() & SPLIT["validation"].keys()
    assert not set(SPLIT["held_out"].values()) & set(SPLIT["validation"].values())
    assert emojis.held_out_captions() == frozenset(SPLIT["held_out"].values())
    assert len(emojis.held_out_captions()) == 228


def test_every_held_out_caption_is_a_combination() -> None:
    found = [combination_of(caption) for caption in SPLIT["held_out"].values()]
    assert all(each.tone in emojis.TONES and each.gender in emojis.GENDERS for each in found)
    assert len(set(found)) == len(found)


def test_each_role_holds_out_one_tone_for_each_gender() -> None:
    cells: dict[str, list[Combination]] = {}
    for caption in SPLIT["held_out"].values():
        combination = combination_of(caption)
        cells.setdefault(combination.role, []).append(combination)
    for role, held in cells.items():
        assert sorted(each.gender for each in held) == ["man", "person", "woman"], role
        assert len({each.tone for each in held}) == 3, role  # so role x tone and gender x tone are seen with others
    tones = Counter(each.tone for held in cells.values() for each in held)
    assert set(tones) == set(emojis.TONES)
    assert max(tones.values()) - min(tones.values()) <= 12  # the Latin pattern is balanced


def test_a_role_and_its_mirror_image_hold_out_the_same() -> None:
    found = {combination_of(caption) for caption in SPLIT["held_out"].values()}
    for each in found:
        if each.role.endswith(" facing right"):
            assert Combination(each.role.removesuffix(" facing right"), each.gender, each.tone) in found


def test_keys_are_code_points() -> None:
    picture = Image.new("RGB", (1, 1))
    assert Emoji(("👨\u200d🚒", "x"), ("man firefighter",), picture).key == "1f468-200d-1f692"
    for key in (*SPLIT["held_out"], *SPLIT["validation"]):
        assert re.fullmatch("[0-9a-f]{2,6}(-[0-9a-f]{2,6})*", key)


def test_split_of_looks_up_the_key() -> None:
    picture = Image.new("RGB", (1, 1))
    for name in ("held_out", "validation"):
        key = next(iter(SPLIT[name]))
        sequence = "".join(chr(int(point, 16)) for point in key.split("-"))
        assert emojis.split_of(Emoji((sequence,), ("x",), picture), SPLIT) == name
    assert emojis.split_of(Emoji(("🍎",), ("red apple",), picture), SPLIT) == "train"


def test_mirror_twins_are_found() -> None:
    left = Image.new("RGB", (136, 136), (255, 255, 255))
    left.paste((200, 0, 0), (0, 34, 68, 102))
    round_one = Image.new("RGB", (136, 136), (255, 255, 255))
    round_one.paste((0, 0, 200), (40, 40, 96, 96))
    drawn = [
        Emoji((char,), (char,), picture) for char, picture in zip("abc", (left, ImageOps.mirror(left), round_one), strict=True)
    ]
    assert emojis.mirror_twins(drawn) == {drawn[0].key, drawn[1].key}  # its own mirror image is no twin


def test_a_missing_font_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="apt-get install fonts-noto-color-emoji"):
        emojis.find_font(tmp_path / "none.ttf")


# --- the rendered set, with the font ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def font() -> Path:
    """The font that the split was made with."""
    pytest.importorskip("emoji")
    try:
        path = emojis.find_font()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if emojis.file_hash(path) != SPLIT["font_sha256"]:
        pytest.skip(f"{path} is another version of Noto Color Emoji than the split was made with")
    return path


@pytest.fixture(scope="module")
def rendered(font: Path) -> list[Emoji]:
    """Every emoji, drawn once for all tests."""
    return emojis.render_all(font)


@pytest.fixture(scope="module")
def made(rendered: list[Emoji], font: Path) -> dict[str, Any]:
    """The split, made anew."""
    return emojis.make_split(rendered, emojis.file_hash(font))


@pytest.mark.slow
def test_the_set_has_its_published_size(rendered: list[Emoji]) -> None:
    assert len(rendered) == 3771
    assert len({emoji.key for emoji in rendered}) == 3771
    assert len({emoji.picture.tobytes() for emoji in rendered}) == 3771
    assert all(emoji.picture.size == (136, 136) and emoji.picture.mode == "RGB" for emoji in rendered)
    assert all(emoji.captions and all(emoji.captions) for emoji in rendered)


def test_the_rule_makes_the_shipped_split(made: dict[str, Any]) -> None:
    assert made == json.loads(emojis.SPLIT_FILE.read_text())


def test_training_sees_no_held_out_caption(rendered: list[Emoji]) -> None:
    held = emojis.held_out_captions()
    train = [emoji for emoji in rendered if emojis.split_of(emoji, SPLIT) == "train"]
    assert len(train) == 3771 - 228 - 150
    assert not {caption for emoji in train for caption in emoji.captions} & held


def test_every_part_of_a_held_out_combination_is_seen_in_training(rendered: list[Emoji]) -> None:
    seen = {
        combination_of(caption) for emoji in rendered if emojis.split_of(emoji, SPLIT) == "train" for caption in emoji.captions
    }
    pairs = {(each.role, each.gender) for each in seen}
    tones = {(each.role, each.tone) for each in seen}
    for caption in SPLIT["held_out"].values():
        combination = combination_of(caption)
        assert combination not in seen
        assert (combination.role, combination.gender) in pairs
        assert (combination.role, combination.tone) in tones


def reduced(pictures: list[Image.Image]) -> np.ndarray:
    """Pictures at 32 x 32, one row for each."""
    return np.stack([np.asarray(picture.resize((32, 32), Image.Resampling.BOX), np.float64).ravel() for picture in pictures])


def test_no_mirrored_twin_lies_across_the_splits(rendered: list[Emoji]) -> None:
    assert not emojis.mirror_twins(rendered) & SPLIT["validation"].keys()
    whole = {emoji.picture.tobytes(): emoji.key for emoji in rendered}
    for emoji in rendered:  # exact mirror images, pixel by pixel
        twin = whole.get(ImageOps.mirror(emoji.picture).tobytes())
        if twin not in (None, emoji.key):
            assert emoji.key not in SPLIT["validation"], (emoji.captions, twin)
            assert (emoji.key in SPLIT["held_out"]) == (twin in SPLIT["held_out"]), (emoji.captions, twin)
    held = [emoji for emoji in rendered if emoji.key in SPLIT["held_out"]]
    others = [emoji for emoji in rendered if emoji.key not in SPLIT["held_out"]]
    mirrored = reduced([ImageOps.mirror(emoji.picture) for emoji in held])
    plain = reduced([emoji.picture for emoji in others])
    distance = np.square(mirrored).sum(1)[:, None] + np.square(plain).sum(1)[None] - 2 * mirrored @ plain.T
    assert distance.min() / plain.shape[1] > 25


@pytest.mark.slow
def test_folders_are_written_with_captions(font: Path, tmp_path: Path) -> None:
    from latentpipe.data.image_folder import read_index

    counts = emojis.write_folders(tmp_path, 16, font)
    assert counts == {"train": 3393, "validation": 150, "held_out": 228}
    for name, count in counts.items():
        items = read_index(tmp_path / name)
        assert len(items) == count
        assert all(item.captions and item.path.is_file() for item in items)
    with Image.open(tmp_path / "train" / "1f34e.png") as picture:
        assert picture.size == (16, 16)
        red, green, blue = np.asarray(picture.convert("RGB"), float)[6:12, 6:10].reshape(-1, 3).mean(0)
    assert red > 1.5 * max(green, blue)  # the red apple is red
