"""The tokenizer that is trained on captions, and the text encoder's shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentpipe.train.config import TextShape
from latentpipe.train.text_encoder import BEGIN, END, build_text_encoder, token_ids, train_tokenizer, with_vocabulary

SHAPE = TextShape(width=32, layers=1, heads=2, vocabulary=600, length=12)
CAPTIONS = [f"{colour} {shape}" for colour in ("red", "green", "blue", "yellow") for shape in ("circle", "square", "bar")]
TOKENIZER = train_tokenizer(CAPTIONS, SHAPE)


def test_captions_become_few_tokens() -> None:
    assert len(TOKENIZER("red circle", add_special_tokens=False).input_ids) == 2
    assert TOKENIZER.decode(TOKENIZER("red circle").input_ids, skip_special_tokens=True).strip() == "red circle"


def test_the_ends_are_marked_as_clip_marks_them() -> None:
    ids = TOKENIZER("red circle").input_ids
    assert TOKENIZER.convert_ids_to_tokens([ids[0], ids[-1]]) == [BEGIN, END]
    assert TOKENIZER.model_max_length == 12


@given(st.text(max_size=30))
def test_any_text_has_ids_within_the_vocabulary(text: str) -> None:
    ids = token_ids(TOKENIZER, [text, "red circle"])
    assert ids.shape == (2, 12)
    assert ids.min() >= 0
    assert ids.max() < len(TOKENIZER)


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz '", max_size=8))
def test_any_word_can_be_written(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    assert TOKENIZER.unk_token_id not in ids or TOKENIZER.unk_token == END
    assert TOKENIZER.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_different_prompts_have_different_ids() -> None:
    ids = token_ids(TOKENIZER, [*CAPTIONS, ""])
    assert len({tuple(row) for row in ids.tolist()}) == len(CAPTIONS) + 1


def test_the_tokenizer_survives_saving(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    TOKENIZER.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again.model_max_length == 12
    for text in [*CAPTIONS, "purple hexagon", "Zürich 🍎"]:
        assert again(text).input_ids == TOKENIZER(text).input_ids


def test_long_prompts_are_cut_and_short_ones_padded() -> None:
    ids = token_ids(TOKENIZER, ["red circle " * 20, ""])
    end, pad = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
    assert ids[0, -1] == end
    assert ids[1, 1] == end
    assert set(ids[1, 2:].tolist()) == {pad}


def test_the_encoder_has_the_shape() -> None:
    encoder = build_text_encoder(TOKENIZER, SHAPE).eval()
    with torch.no_grad():
        ids = token_ids(TOKENIZER, ["red circle", "blue bar"])
        states = encoder(ids)[0]
    assert states.shape == (2, 12, 32)
    assert encoder.config.vocab_size == len(TOKENIZER)
    assert encoder.config.eos_token_id == TOKENIZER.eos_token_id
    assert not torch.allclose(states[0], states[1])


@pytest.mark.parametrize("vocabulary", [514, 600, 5000])
def test_any_vocabulary_size_works(vocabulary: int) -> None:
    tokenizer = train_tokenizer(CAPTIONS, TextShape(vocabulary=vocabulary, length=8, width=32, heads=2, layers=1))
    assert tokenizer.decode(tokenizer("red circle").input_ids, skip_special_tokens=True).strip() == "red circle"


def test_a_new_vocabulary_keeps_what_known_words_say() -> None:
    torch.manual_seed(0)
    old = build_text_encoder(TOKENIZER, SHAPE).eval()
    tokenizer = train_tokenizer([*CAPTIONS, *(f"{caption}, flat style" for caption in CAPTIONS)], SHAPE)
    new = with_vocabulary(old, TOKENIZER, tokenizer, SHAPE).eval()
    assert len(tokenizer) > len(TOKENIZER)
    with torch.no_grad():
        before, after = old(token_ids(TOKENIZER, CAPTIONS))[0], new(token_ids(tokenizer, CAPTIONS))[0]
    ids = tokenizer("red circle").input_ids
    assert torch.equal(before[:, : len(ids)], after[:, : len(ids)])  # the number of the padding's token may differ
    table, known = new.get_input_embeddings().weight, old.get_input_embeddings().weight
    pieces = TOKENIZER("style", add_special_tokens=False).input_ids
    assert len(pieces) > 1
    assert torch.allclose(table[tokenizer.get_vocab()["style</w>"]], known[pieces].mean(0))
