"""Which words of a prompt a model has never seen, and the nearest that it knows.

The card of a model that was trained on captions of its own lists their words. Others, emoji characters and other scripts among
them, reach its text encoder as letters or bytes that never meant anything. A model whose card lists none is not judged.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from typing import Any

WORD = re.compile(r"[^\W\d_]+(?:[\u0300-\u036f][^\W\d_]*)*|[^\w\s]+")
ARTICLES = {"a", "an", "the"}
LIKE = 0.72  # similarity (difflib) from which a word is near another
_TONES = ("light", "medium light", "medium", "medium dark", "dark")
TONES = dict(zip("\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff", _TONES, strict=True))
JOINERS = "\ufe0e\ufe0f\u200d\u20e3"
MOST_TOLD = 6


def known_words(card: Mapping[str, Any]) -> frozenset[str]:
    """The words of the captions that a model was trained on, as its card lists them; empty where it does not."""
    words = card.get("words")
    return frozenset(words.split()) if isinstance(words, str) else frozenset()


def listed(captions: Iterable[str]) -> str:
    """The words of captions, sorted, as a card lists them."""
    return " ".join(sorted({word for caption in captions for word in words_of(caption)}))


def words_of(text: str) -> list[str]:
    """The words of a text as such tokenizers cut them: lower-case runs of letters, and runs of signs that are no punctuation."""
    found = WORD.findall(unicodedata.normalize("NFC", text).lower())
    return [word for word in found if not word.isascii() or word[0].isalpha()]


def unknown_words(text: str, known: Collection[str]) -> dict[str, str]:
    """The words of a prompt that are not `known`, each with the nearest that is ("" where none is near).

    An emoji character's nearest is its name, as far as the model knows the words of it.
    """
    if not known:
        return {}
    vocabulary = set(known)
    unknown = [word for word in dict.fromkeys(words_of(text)) if word not in vocabulary and _matters(word)]
    return {word: _nearest(word, vocabulary) for word in unknown}


def sentence(unknown: Mapping[str, str], known: Collection[str], what: str = "prompt") -> str:
    """What to tell about the unknown words of a prompt; "" where there are none."""
    if not unknown:
        return ""
    shown = [f"'{word[:40]}'" + (f" (nearest: '{near}')" if near else "") for word, near in list(unknown.items())[:MOST_TOLD]]
    more = f" and {len(unknown) - MOST_TOLD} more" if len(unknown) > MOST_TOLD else ""
    return (
        f"the model has never seen {', '.join(shown)}{more} of the {what}; it knows {len(known):,} words, "
        "and what it draws for others is chance"
    )


def _matters(word: str) -> bool:
    """Whether a word is more than punctuation, an article or a letter: a word, or signs such as emoji characters."""
    if word.isascii():
        return len(word) > 1 and word not in ARTICLES
    return any(unicodedata.category(char)[0] in "LNS" for char in word)


def _nearest(word: str, known: set[str]) -> str:
    plain = "".join(char for char in unicodedata.normalize("NFKD", word) if not unicodedata.combining(char))
    if plain.isascii() and plain.isalpha():
        return _like(plain, known)
    if any(unicodedata.category(char).startswith("L") for char in word):
        return ""  # another script: the names of its letters say nothing
    named = [_name(char) for char in sorted(word, key=lambda char: char in TONES) if char not in JOINERS]
    return " ".join(dict.fromkeys(part for name in named for part in name.split() if part in known))


def _like(word: str, known: set[str]) -> str:
    for form in (word, word.removesuffix("s"), word.removesuffix("es"), f"{word}s"):
        if form in known:
            return form
    found = difflib.get_close_matches(word, sorted(known), n=5, cutoff=LIKE)
    return max(found, key=lambda one: (one[0] == word[0], -found.index(one)), default="")


def _name(char: str) -> str:
    """What a sign is called, in plain words."""
    if char in TONES:
        return f"{TONES[char]} skin tone"
    return re.sub(r"[^a-z ]", " ", unicodedata.name(char, "").lower()).removesuffix(" sign")
