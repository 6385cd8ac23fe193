"""What a text encoder makes of a prompt's words: which it never saw, and which it does not read any more."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from latentpipe.lora.prompt_tags import without_tags
from latentpipe.pipelines import prompt_weighting, vocabulary
from latentpipe.pipelines.denoise import is_classic
from latentpipe.pipelines.embeddings import EmbeddingManager

MOST_SHOWN = 60  # characters of a prompt that a note repeats


def truncated_text(host: Any, embeddings: EmbeddingManager, prompt: str) -> str:
    """The end of a prompt that is too long for a host's text encoder; each vector of an embedding counts as a token."""
    if not is_classic(host):
        return ""  # the other families have several text encoders that cut at different places
    with embeddings.reading(prompt) as reader:
        text = prompt_weighting.plain(embeddings.spell(prompt))
        ids = reader.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        cut = ids[reader.tokenizer.model_max_length - 2 :]
        if reader is host:
            return str(host.tokenizer.decode(cut)).strip()
        return embeddings.read_back(reader.tokenizer, cut)


def too_long(host: Any, what: str, cut: str) -> str:
    """The sentence on the words that were cut; `what` they were cut from."""
    read = host.tokenizer.model_max_length - 2
    shown = cut if len(cut) <= MOST_SHOWN else f"{cut[:MOST_SHOWN]} ..."
    return f"the {what} is longer than the {read} tokens that the text encoder reads; cut: '{shown}'"


def never_seen(embeddings: EmbeddingManager, prompt: str, known: Collection[str]) -> dict[str, str]:
    """The words of a prompt that are not `known`, each with the nearest; names of embeddings are none of them."""
    text = prompt_weighting.plain(embeddings.spell(without_tags(prompt)))
    return vocabulary.unknown_words(text, known)
