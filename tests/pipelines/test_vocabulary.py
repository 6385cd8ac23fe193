"""Words that a model was never trained on: which they are, the nearest known one, and where that is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentpipe.checkpoints.registry import bundled_weights_dir
from latentpipe.data.emoji import held_out_captions
from latentpipe.data.emoji_bank import open_bank
from latentpipe.pipelines.vocabulary import known_words, listed, sentence, unknown_words, words_of

KNOWN = known_words(json.loads((bundled_weights_dir() / "emoji" / "card.json").read_text()))


def test_the_shipped_card_lists_the_words_of_the_captions_it_was_trained_on() -> None:
    bank = open_bank()
    captions = [caption for row in bank.rows_of("train") for caption in bank.captions[row]]
    assert frozenset(listed(captions).split()) == KNOWN
    seen = [text for text in held_out_captions() if unknown_words(text, KNOWN)]
    assert not seen  # held-out pictures are new combinations of known words


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("red apple", {}),
        ("A red apple, the heart!", {}),
        ("red aple", {"aple": "apple"}),
        ("two apples", {"apples": "apple"}),
        ("\N{RED APPLE}", {"\N{RED APPLE}": "red apple"}),
        ("waving \N{WAVING HAND SIGN}\U0001f3fd", {"\N{WAVING HAND SIGN}\U0001f3fd": "waving hand medium skin tone"}),
        ("кот", {"кот": ""}),
        ("猫 cat", {"猫": ""}),
        ("Café", {"café": ""}),
        ("xqzzt cat xqzzt", {"xqzzt": ""}),
        ("42 4k", {}),
        ("", {}),
    ],
)
def test_unknown_words_and_the_nearest(prompt: str, unknown: dict[str, str]) -> None:
    found = unknown_words(prompt, KNOWN)
    assert list(found) == list(unknown)
    for word, nearest in unknown.items():
        if nearest:
            assert found[word] == nearest
        elif not word.isascii() and word != "café":
            assert found[word] == ""  # another script has no neighbour


def test_a_model_whose_card_lists_no_words_is_not_judged() -> None:
    assert known_words({}) == known_words({"words": 3}) == frozenset()
    assert unknown_words("blorf \N{RED APPLE}", frozenset()) == {}


def test_the_sentence_names_words_and_neighbours() -> None:
    assert sentence({}, KNOWN) == ""
    said = sentence({"aple": "apple", "кот": ""}, KNOWN, "negative prompt")
    assert "'aple' (nearest: 'apple'), 'кот' of the negative prompt" in said
    assert f"{len(KNOWN):,} words" in said
    assert "and 4 more" in sentence({f"w{i}": "" for i in range(10)}, KNOWN)


def test_words_are_cut_as_the_tokenizer_cuts_them() -> None:
    assert words_of("O'Clock: medium-dark  (x)") == ["o", "clock", "medium", "dark", "x"]


def test_drawing_tells_what_the_model_does_not_know(
    model_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from latentpipe import LatentPipeline
    from latentpipe.cli.app import main
    from latentpipe.utils.errors import LatentpipeWarning

    pipe = LatentPipeline.from_pretrained(model_folder, device="cpu")
    assert "circle" in pipe.words
    assert pipe.unknown_words("(red:1.2) cirle") == {"cirle": "circle"}
    with pytest.warns(LatentpipeWarning, match=r"never seen 'cirle' \(nearest: 'circle'\) of the prompt"):
        (picture,) = pipe("red cirle", num_inference_steps=1, seed=1)
    assert "'cirle'" in picture.notes[0]
    assert pipe("red circle", num_inference_steps=1, seed=1)[0].notes == ()
    out = tmp_path / "x.png"
    assert main(["generate", "red cirle", "--model", str(model_folder), "--steps", "1", "--seed", "1", "--out", str(out)]) == 0
    assert "latentpipe: note: the model has never seen 'cirle'" in capsys.readouterr().err
