"""``<lora:name:weight>`` in prompts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentpipe.lora.prompt_tags import split_tags
from latentpipe.utils.errors import UserError


@pytest.mark.parametrize(
    ("prompt", "text", "found"),
    [
        ("red apple", "red apple", {}),
        ("  two  spaces stay ", "  two  spaces stay ", {}),
        ("red apple <lora:flat:0.7>", "red apple", {"flat": 0.7}),
        ("<lora:flat>red apple", "red apple", {"flat": 1.0}),
        ("a <lora:flat:-0.5> b <LORA: solid : 1e-1 >, c", "a b, c", {"flat": -0.5, "solid": 0.1}),
        ("a < b and <lore x>", "a < b and <lore x>", {}),
    ],
)
def test_tags_are_taken_out(prompt: str, text: str, found: dict[str, float]) -> None:
    assert split_tags(prompt) == (text, found)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("<lora:>", "names no LoRA"),
        ("<lora::1>", "names no LoRA"),
        ("<lora:a:x>", "'x' is no number"),
        ("<lora:a><lora:a:2>", "twice"),
    ],
)
def test_bad_tags_are_told(prompt: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        split_tags(prompt)


@given(st.text(alphabet="ab <>:lor0.", max_size=40))
def test_any_text_is_read_or_told(prompt: str) -> None:
    try:
        text, found = split_tags(prompt)
    except UserError:
        return
    assert split_tags(text) == (text, {})
    assert found or text == prompt
