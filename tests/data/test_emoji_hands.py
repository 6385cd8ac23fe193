"""Several artists' emoji: their packages, captions, and a split that holds in every hand."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentpipe import UserError
from latentpipe.cli import app
from latentpipe.data import emoji_hands as hands
from latentpipe.data import emoji_sets as sets
from latentpipe.data.emoji import Emoji, read_split
from latentpipe.data.emoji_sets import HANDS, Hand, HandSet, Names

RED = '<path fill="#f00" d="M0 0h5v10H0z"/>'  # the left half
BLUE = '<circle fill="#00f" cx="5" cy="5" r="5"/>'
ICONS = {
    "prefix": "made-up",
    "width": 10,
    "height": 10,
    "icons": {"red-apple": {"body": RED}, "hot-dog": {"body": BLUE}, "wide": {"body": RED, "width": 20, "left": 0}},
    "aliases": {"apple": {"parent": "red-apple"}, "turned": {"parent": "red-apple", "hFlip": True}},
}
BY_NAME = {hand.name: hand for hand in HANDS}


def pack(folder: Path, package: str, **members: bytes | Any) -> Path:
    """A package as npm pack writes it; what is not bytes is written as JSON."""
    path = sets.package_file(folder, package)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def webp(colour: tuple[int, int, int, int]) -> bytes:
    """A picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGBA", (12, 12), colour).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


# --- packages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "plain"),
    [("1F34E", "1f34e"), ("2764-fe0f", "2764"), ("0023-fe0f-20e3", "23-20e3"), ("1f468-200d-1f692", "1f468-200d-1f692")],
)
def test_keys_are_compared_without_variation_selectors(written: str, plain: str) -> None:
    assert sets.plain_key(written) == plain


def test_a_string_and_its_code_points_have_one_key() -> None:
    assert sets.key_of("❤️") == "2764"
    assert sets.base_key(sets.key_of("👩🏾‍🚒")) == sets.key_of("👩‍🚒")


def test_missing_packages_are_named_with_the_command(tmp_path: Path) -> None:
    pack(tmp_path, BY_NAME["twemoji"].package)
    with pytest.raises(UserError, match=r"npm pack @iconify-json/fluent-emoji-flat@") as error:
        sets.check_packages(tmp_path)
    assert "twemoji" not in str(error.value)
    for package in [hand.package for hand in HANDS if hand.package] + [sets.NAMES_PACKAGE]:
        pack(tmp_path, package)
    sets.check_packages(tmp_path)


def test_a_set_with_code_points_is_matched_by_them_alone(tmp_path: Path) -> None:
    hand = BY_NAME["twemoji"]
    pack(tmp_path, hand.package, **{"icons.json": ICONS, "chars.json": {"1f34e": "apple", "1f98a": "turned"}})
    found = sets.read_hand(tmp_path, hand, {"1f34e": ["hot dog"], "1f32d": ["hot dog"], "1f98a": ["fox"]})
    assert found.entries == {"1f34e": "apple", "1f98a": "turned"}


def test_an_older_set_is_matched_by_name(tmp_path: Path) -> None:
    hand = BY_NAME["noto-v1"]
    pack(tmp_path, hand.package, **{"icons.json": ICONS})
    found = sets.read_hand(tmp_path, hand, {"1f34e": ["Red: Apple"], "1f32d": ["frankfurter", "HOT DOG"], "1f98a": ["fox"]})
    assert found.entries == {"1f34e": "red-apple", "1f32d": "hot-dog"}


def test_fluent_3d_takes_only_what_fluent_has(tmp_path: Path) -> None:
    hand = BY_NAME["fluent-3d"]
    files = {"assets/1f34e.webp": webp((255, 0, 0, 255)), "assets/2764-fe0f.webp": webp((0, 0, 0, 0)), "assets/1f98a.webp": b""}
    pack(tmp_path, hand.package, **files)
    known = HandSet(BY_NAME["fluent"], {"1f34e": "x", "2764": "y"})
    found = sets.read_hand(tmp_path, hand, {"1f34e": [], "2764": [], "1f98a": []}, known)
    assert set(found.entries) == {"1f34e", "2764"}
    assert found.draw("1f34e", 8).getpixel((4, 4)) == (255, 0, 0)
    assert np.asarray(found.draw("2764", 8)).min() == 255  # transparent is white


@pytest.mark.parametrize("content", [b"", b"nothing"])
def test_what_is_no_package_is_refused(tmp_path: Path, content: bytes) -> None:
    path = sets.package_file(tmp_path, sets.NAMES_PACKAGE)
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a package"):
        sets.read_names(tmp_path)
    pack(tmp_path, sets.NAMES_PACKAGE)
    with pytest.raises(UserError, match=r"holds no package/en/data\.json"):
        sets.read_names(tmp_path)
    pack(tmp_path, BY_NAME["twemoji"].package)
    with pytest.raises(UserError, match=r"holds no package/icons\.json"):
        sets.read_hand(tmp_path, BY_NAME["twemoji"], {})


def test_json_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    pack(tmp_path, BY_NAME["twemoji"].package, **{"icons.json": b"{"})
    with pytest.raises(UserError, match="holds JSON that cannot be read"):
        sets.read_hand(tmp_path, BY_NAME["twemoji"], {})


def test_names_are_read_with_those_of_skin_tones(tmp_path: Path) -> None:
    hand = {"hexcode": "1F44D", "label": "thumbs up", "tags": ["+1", "like"], "group": 1}
    hand["skins"] = [{"hexcode": "1F44D-1F3FB", "label": "thumbs up: light skin tone"}]
    pack(tmp_path, sets.NAMES_PACKAGE, **{"en/data.json": [hand, {"hexcode": "1F1E6", "label": "regional indicator A"}]})
    names = sets.read_names(tmp_path)
    assert names.labels["1f44d-1f3fb"] == "thumbs up: light skin tone"
    assert names.tags["1f44d"] == ("+1", "like")
    assert names.groups == {"1f44d": "people", "1f44d-1f3fb": "people", "1f1e6": ""}


def test_aliases_are_followed_and_mirrored() -> None:
    pytest.importorskip("resvg_py")
    plain, turned = (np.asarray(sets.render_svg(sets.svg_of(ICONS, name), 20)) for name in ("apple", "turned"))
    assert plain.shape == (20, 20, 4)
    assert tuple(plain[10, 4]) == (255, 0, 0, 255)
    assert plain[10, 15, 3] == 0
    assert np.array_equal(plain[:, ::-1], turned)
    with pytest.raises(ValueError, match="no icon"):
        sets.svg_of(ICONS, "nothing")


def test_a_margin_is_white_and_drawings_that_are_not_square_are_centred() -> None:
    pytest.importorskip("resvg_py")
    hand = Hand("x", "x style", "x@1", "x", "", margin=1 / 8)
    drawn = np.asarray(HandSet(hand, {"a": "hot-dog", "b": "wide"}, icons=ICONS).draw("a", 32))
    assert drawn.shape == (32, 32, 3)
    assert (drawn[:4] == 255).all()
    assert tuple(drawn[16, 16]) == (0, 0, 255)
    assert tuple(drawn[16, 5]) == (0, 0, 255)
    wide = np.asarray(HandSet(hand, {"b": "wide"}, icons=ICONS).draw("b", 32))
    inked = np.flatnonzero((wide != 255).any((1, 2)))
    assert inked.min() + inked.max() == 31


# --- captions and split -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequence", "kind"), [("🍎", "object"), ("👍🏽", "tone"), ("👍", "object"), ("🇯🇵", "flag"), ("🏴󠁧󠁢󠁥󠁮󠁧󠁿", "flag")]
)
def test_kinds(sequence: str, kind: str) -> None:
    assert hands.kind_of(sequence) == kind


def test_captions_name_the_style_and_noto_is_plain() -> None:
    plain = Counter(hands.captions_in(BY_NAME["noto"], ["red apple"], "fruit, tree"))
    styled = Counter(hands.captions_in(BY_NAME["twemoji"], ["red apple", "apple"], "fruit, tree"))
    assert set(plain) == {"red apple", "red apple, any style", "fruit, tree"}
    assert max(plain, key=lambda text: plain[text]) == "red apple"
    assert styled["red apple, flat style"] == styled["apple, flat style"] > styled["apple, any style"]
    assert styled["fruit, tree, flat style"] == 2
    assert not hands.captions_in(BY_NAME["noto"], ["cat"], "")[-1].startswith(",")


def test_each_trained_hand_has_a_style_of_its_own() -> None:
    styles = [hand.style for hand in HANDS]
    assert len(set(styles)) == len(styles)
    assert [hand.name for hand in HANDS if not hand.style] == ["noto"]


def sets_of(keys: list[str]) -> dict[str, set[str]]:
    """Every trained hand has all keys."""
    return {hand.name: set(keys) for hand in HANDS if hand.trained}


def test_cells_are_a_tenth_the_same_for_both_fluents_and_never_notos() -> None:
    keys = [f"{number:x}" for number in range(0x1F300, 0x1F900)]
    cells = hands.held_out_cells(sets_of(keys))
    assert "noto" not in cells
    for name, held in cells.items():
        assert 0.07 < len(held) / len(keys) < 0.13, name
    assert cells["fluent"] == cells["fluent-3d"]
    assert set(cells["twemoji"]) != set(cells["emojitwo"])


def test_a_cell_is_held_out_only_where_three_other_hands_have_the_emoji() -> None:
    keys = [f"{number:x}" for number in range(0x1F300, 0x1F400)]
    given = sets_of(keys)
    for name in ("noto-v1", "emojitwo", "noto"):
        given[name] = set()
    cells = hands.held_out_cells(given)
    assert cells["twemoji"] == []  # both of Fluent alone
    given["noto"] = set(keys)
    assert hands.held_out_cells(given)["twemoji"]
    assert hands.held_out_cells(given)["fluent"] == []


def test_skin_tones_are_held_out_with_their_emoji() -> None:
    tones = [f"1f44d-1f3f{digit}" for digit in "bcdef"]
    cells = hands.held_out_cells(sets_of(["1f44d", *tones]), share=1.0)
    assert cells["twemoji"] == ["1f44d"]
    library = library_of({"1f44d": "👍", **{key: f"👍{chr(int(key[-5:], 16))}" for key in tones}})
    found = [drawing for drawing in hands.drawings(library, {"twemoji": ["1f44d"]}) if drawing.hand.name == "twemoji"]
    assert len(found) == 6
    assert {drawing.folder for drawing in found} == {"cells"}


def library_of(sequences: dict[str, str]) -> hands.Library:
    """A library in which Noto, Twemoji, Fluent and FxEmojis have all these emoji, drawn as a red half."""
    picture = Image.new("RGB", (136, 136), (0, 128, 0))
    captions = {key: re.sub("[^a-z0-9 ]", " ", key) for key in sequences}
    emojis = {key: Emoji((sequence,), (captions[key],), picture) for key, sequence in sequences.items()}
    found = {
        name: HandSet(BY_NAME[name], dict.fromkeys(sequences, "red-apple"), icons=ICONS)
        for name in ("twemoji", "fluent", "fxemoji")
    }
    empty = {hand.name: HandSet(hand, {}, icons=ICONS) for hand in HANDS if hand.package and hand.name not in found}
    return hands.Library(emojis, sequences, captions, Names({}, {}, {}), found | empty)


def of_split(name: str, count: int) -> dict[str, str]:
    """The first emoji of a part of the shipped split."""
    keys = list(read_split()[name])[:count]
    return {sets.plain_key(key): "".join(chr(int(part, 16)) for part in key.split("-")) for key in keys}


def test_what_the_split_keeps_out_stays_out_in_every_hand() -> None:
    kept = {name: of_split(name, 40) for name in ("validation", "held_out")}
    library = library_of({**kept["validation"], **kept["held_out"], "1f34e": "🍎"})
    for drawing in hands.drawings(library, {"twemoji": list(kept["validation"])}):
        if drawing.hand.name == "fxemoji":
            assert drawing.folder == "unseen"
        elif drawing.key == "1f34e":
            assert drawing.folder == "train"
        else:
            assert drawing.key in kept[drawing.folder], drawing
    counts = Counter((drawing.hand.name, drawing.folder) for drawing in hands.drawings(library, {}))
    assert counts["twemoji", "held_out"] == 40
    assert counts["noto", "validation"] == 40


def test_a_held_out_caption_alone_keeps_a_picture_out() -> None:
    library = library_of({"1f34e": "🍎"})
    library.captions["1f34e"] = next(iter(read_split()["held_out"].values()))
    library.emojis.clear()
    assert {drawing.folder for drawing in hands.drawings(library, {}) if drawing.hand.trained} == {"held_out"}


def test_tones_and_flags_are_used_of_the_hands_that_say_so() -> None:
    library = library_of({"1f44d": "👍", "1f44d-1f3fd": "👍🏽", "1f1ef-1f1f5": "🇯🇵"})
    assert len(library.keys(BY_NAME["noto"])) == len(library.keys(BY_NAME["twemoji"])) == 3
    assert library.keys(BY_NAME["fluent"]) == ["1f44d"]


def test_the_shipped_cells_follow_the_rule_and_touch_nothing_else() -> None:
    cells = hands.read_cells()
    assert set(cells) == {hand.name for hand in HANDS if hand.trained and hand.style}
    for name, keys in cells.items():
        assert keys == sorted(set(keys))
        assert all(hands._low(f"{key}/{BY_NAME[name].family}", hands.HELD_OUT_SHARE) for key in keys)
        assert all(sets.base_key(key) == key for key in keys)
    assert sum(len(keys) for keys in cells.values()) > 500
    packages = json.loads(hands.CELLS_FILE.read_text())["packages"]
    assert packages == {hand.name: hand.package for hand in HANDS if hand.package and hand.trained}


def test_folders_hold_pictures_with_their_columns(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    library = library_of({"1f34e": "🍎", "1f44d-1f3fd": "👍🏽"})
    library.names.groups["1f34e"] = "food"
    library.names.tags["1f34e"] = ("fruit", "+1", "tree")
    counts = hands.write_hands(tmp_path / "out", library, 32, cells={"fluent": ["1f34e"]})
    assert counts["train"] == {"noto": 2, "twemoji": 2}
    assert counts["cells"] == {"fluent": 1}
    assert counts["unseen"] == {"fxemoji": 1}
    lines = [json.loads(line) for line in (tmp_path / "out" / "train" / "metadata.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"object", "tone"}
    apple = [line for line in lines if line["file_name"] == "twemoji-1f34e.png"]
    assert {line["text"] for line in apple} == {"1f34e, flat style", "1f34e, any style", "fruit, tree, flat style"}
    assert {(line["emoji"], line["hand"], line["group"]) for line in apple} == {("1f34e", "twemoji", "food")}
    with Image.open(tmp_path / "out" / "train" / "twemoji-1f34e.png") as drawn:
        assert drawn.size == (32, 32)
    with Image.open(tmp_path / "out" / "train" / "noto-1f34e.png") as drawn:
        assert drawn.size == (128, 128)
    with pytest.raises(UserError, match="is not empty"):
        hands.write_hands(tmp_path / "out", library, 32)


def test_a_broken_drawing_is_left_out(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    library = library_of({"1f34e": "🍎", "1f32d": "🌭"})
    library.sets["twemoji"].entries["1f34e"] = "nothing"
    assert hands.write_hands(tmp_path / "out", library, 32, cells={})["train"] == {"noto": 2, "twemoji": 1, "fluent": 2}


def test_the_verb_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["emoji", "--hands", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "npm pack @iconify-json/twemoji@" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
