"""The text side: a byte-pair tokenizer trained on the captions, and a small CLIP text encoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from latentpipe.train.config import TextShape
from latentpipe.utils.reading import parse_object

BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Iterable[str], shape: TextShape) -> Any:
    """A CLIPTokenizer whose merges come from these captions; any text can be written in its vocabulary."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    backend: Any = CLIPTokenizer()._tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # All letters get their numbers beforehand: left to itself the trainer numbers word-final ones, and breaks ties
    # between merges, in the order of a hash table, which is another one in each run.
    letters = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary, special_tokens=[BEGIN, END, *letters], end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(captions, trainer)
    model = parse_object(backend.to_str())["model"]
    vocabulary: dict[str, int] = model["vocab"]
    merges: Any = [tuple(pair) if not isinstance(pair, str) else tuple(pair.split(" ")) for pair in model["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=shape.length)
    token_ids(tokenizer, [""])  # its file holds how it was used last; so the file of an unused one is the same
    return tokenizer


def build_text_encoder(tokenizer: Any, shape: TextShape) -> Any:
    """A CLIPTextModel of this shape with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        projection_dim=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.length,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def token_ids(tokenizer: Any, prompts: list[str]) -> Any:
    """Prompts as the host pipeline tokenizes them: padded and cut to the encoder's length, B x length."""
    length = tokenizer.model_max_length
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def with_vocabulary(old: Any, old_tokenizer: Any, tokenizer: Any, shape: TextShape) -> Any:
    """A text encoder for another tokenizer with the weights of `old`: a CLIPTextModel of the same shape.

    A token that both know keeps its vector; a new one begins with the mean of the vectors of the old tokens that write it.
    """
    new = build_text_encoder(tokenizer, shape)
    weights = old.state_dict()
    name = next(key for key in weights if key.endswith("token_embedding.weight"))
    known, vectors = old_tokenizer.get_vocab(), weights[name]
    table = new.get_input_embeddings().weight
    for token, index in tokenizer.get_vocab().items():
        if token in known:
            table[index] = vectors[known[token]]
            continue
        text = tokenizer.decode([index]).strip()
        pieces = old_tokenizer(text, add_special_tokens=False).input_ids
        if pieces:
            table[index] = vectors[pieces].mean(0)
    rest = {key: value for key, value in weights.items() if key != name}
    missing, unexpected = new.load_state_dict(rest, strict=False)
    assert missing == [name], missing
    assert not unexpected, unexpected
    return new
