"""Tokenizers that no single file holds: CLIP's and T5's, shipped; or those of a config folder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"


def clip_vocabulary() -> dict[str, int]:
    """CLIP's 49,408 tokens and their numbers, made of its merges: bytes, bytes that end a word, merges, the two ends."""
    return dict(_clip()[0])


@lru_cache(maxsize=1)
def _clip() -> tuple[dict[str, int], list[Any]]:
    lines = (DATA / "clip_merges.txt").read_text("utf-8").splitlines()[1:]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    symbols = _byte_symbols()
    tokens = [*symbols, *(f"{each}</w>" for each in symbols), *(first + second for first, second in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, merges


def _byte_symbols() -> list[str]:
    """A printable character for each byte, in the order of GPT-2's table: printable Latin-1 first, the others from 256 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [*map(chr, shown), *(chr(256 + index) for index in range(len(hidden)))]


def bundled_tokenizer(config: Mapping[str, Any]) -> Any:
    """A tokenizer by its entry in a shipped set of configs."""
    import transformers

    length = int(config["model_max_length"])
    if config["_class_name"] == "CLIPTokenizer":
        vocabulary, merges = _clip()
        ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        return transformers.CLIPTokenizer(
            vocab=dict(vocabulary), merges=list(merges), model_max_length=length, pad_token=config["pad_token"], **ends
        )
    from tokenizers import Tokenizer

    ends = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(DATA / "t5_tokenizer.json")), model_max_length=length, **ends
    )
