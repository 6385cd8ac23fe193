"""Textual inversion in prompts: ``<NAME>`` stands for its vectors, and each of them counts as a token.

The pipeline itself is never changed. A prompt is spelled with one private character for each vector, copies of the tokenizers
know these characters as tokens, and hooks hand the text encoders the vectors where such tokens stand.
"""

from __future__ import annotations

import copy
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from latentpipe.checkpoints.embedding import Embedding, Vectors, bare, read_embedding
from latentpipe.checkpoints.registry import find_embedding, is_installed_embedding, named_embedding
from latentpipe.pipelines import families, hosting
from latentpipe.utils.errors import LatentpipeWarning, UserError

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
FIRST, MOST = 0x100000, 0xFFF0  # the private characters: Unicode's plane 16
TAG = re.compile(r"<\s*([^<>:]*[^<>:\s])\s*>")
_PRIVATE = re.compile("[\U00100000-\U0010ffff]+")
Table = dict[str, tuple[Embedding, Vectors, int]]  # word -> whose it is, its vectors, the number of the first of them


class EmbeddingManager:
    """The embeddings of one pipeline: those that were attached, and those that its LoRA adapters bring while they are on."""

    def __init__(self, host: Any, loras: Any) -> None:
        self.host, self.loras = host, loras
        self.attached: dict[str, Embedding] = {}
        self._lock = threading.RLock()
        self._known: tuple[tuple[tuple[str, str], ...], dict[str, Any]] = ((), {})  # the last tokenizers, and what they know

    @property
    def on(self) -> dict[str, Embedding]:
        """All that a prompt may name now, by name; UserError where two have one name."""
        found = dict(self.attached)
        for lora in self.loras.on:
            for one in lora.embeddings:
                other = found.setdefault(one.name, one)
                if other is not one and other.hash != one.hash:
                    raise UserError(f"LoRA '{lora.name}' brings an embedding '{one.name}', and another of that name is attached.")
        return found

    def attach(self, source: Embedding | str | Path, name: str | None = None) -> Embedding:
        """Open one (by name, file or as it is) under its own or another name; see `LatentPipeline.attach_embedding`."""
        if isinstance(source, Embedding):
            one = Embedding(name or source.name, source.tokens)
        else:
            one = read_embedding(find_embedding(source), name)
        if problem := misfit(self.host, one):
            raise UserError(problem[0].upper() + problem[1:])
        with self._lock:
            for other in self.on.values():
                if common := sorted(set(other.words) & set(one.words)):
                    raise UserError(
                        f"An embedding '{other.name}' is attached already, and <{common[0]}> stands for it; detach it, "
                        "or attach the new one under another name."
                    )
            self.attached[one.name] = one
        return one

    def forget(self, name: str | None = None) -> None:
        """Take off one (None: all)."""
        with self._lock:
            names = list(self.attached) if name is None else [key for key in self.attached if bare(key) == bare(name)]
            if name is not None and not names:
                raise UserError(f"No embedding '{name}' is attached; attached: {', '.join(self.attached) or 'none'}.")
            for each in names:
                del self.attached[each]

    @contextmanager
    def more(self, names: Sequence[str]) -> Iterator[None]:
        """These installed ones are attached as well, inside, one thread at a time; those that are on already stay."""
        if not names:
            yield
            return
        with self._lock:
            before = dict(self.attached)
            try:
                for name in names:
                    path = named_embedding(name)
                    if not any(bare(name) in one.words for one in self.on.values()):
                        self.attach(read_embedding(path, name))
                yield
            finally:
                self.attached = before

    def named_in(self, *texts: str) -> list[str]:
        """The installed embeddings that prompts name and that are not on; a warning for ``<words>`` that are none."""
        table = self._table()
        found: list[str] = []
        for word in dict.fromkeys(match[1] for text in texts for match in TAG.finditer(text)):
            if bare(word) in table or any(bare(word) == bare(other) for other in found):
                continue
            if is_installed_embedding(word):
                found.append(word)
            else:
                told = f"<{word[:80]}> names no embedding that is attached or installed; it is read as text"
                warnings.warn(LatentpipeWarning(told), stacklevel=4)
        return found

    def tagged(self, text: str) -> str:
        """A prompt with the plain names in it of embeddings that are on, as words of their own, in angle brackets."""
        words = sorted(self._table(), key=len, reverse=True)
        if not words:
            return text
        either = "|".join(map(re.escape, words))
        pattern = re.compile(rf"<[^<>]*>|(?<![\w-])(?:{either})(?![\w-])", re.IGNORECASE)
        return pattern.sub(lambda match: match[0] if match[0].startswith("<") else f"<{match[0]}>", text)

    def used(self, *texts: str) -> dict[str, Embedding]:
        """Those that prompts name, by name."""
        table = self._table()
        words = (bare(match[1]) for text in texts for match in TAG.finditer(text)) if table else ()
        return {table[word][0].name: table[word][0] for word in words if word in table}

    def idle(self, *texts: str) -> list[str]:
        """A sentence for each attached one that no prompt names."""
        used = self.used(*texts)
        return [
            f"the embedding '{name}' is attached, and no prompt names it: write <{name}> where it shall stand"
            for name in self.attached
            if name not in used
        ]

    def spell(self, text: str) -> str:
        """A prompt with a private character for each vector of what it names; UserError where it holds such characters itself."""
        table = self._table()
        if not table:
            return text
        if own := _PRIVATE.search(text):
            raise UserError(
                f"the prompt holds U+{ord(own[0][0]):X}, a private character, which stands for embeddings here; leave it out."
            )
        return TAG.sub(lambda match: _characters(table, bare(match[1])) or match[0], text)

    def read_back(self, tokenizer: Any, ids: Sequence[int]) -> str:
        """Tokens that a tokenizer of `reading` made, as a person writes them; of a name that was cut the whole name."""
        table = self._table()
        words = [word for word, (_, rows, _) in table.items() for _ in range(_count(rows))]
        names = dict(zip(_ids(tokenizer, len(words)), words, strict=True))
        parts = []
        for word, run in groupby(ids, names.get):
            parts.append(self.host.tokenizer.decode(list(run)).strip() if word is None else f"<{word}>")
        return " ".join(parts)

    @contextmanager
    def reading(self, *texts: str) -> Iterator[Any]:
        """The host, such that it reads spelled prompts inside; `texts`: the prompts as they were."""
        if not self.used(*texts):
            yield self.host
            return
        table, handles = self._table(), []
        tokenizers = self._tokenizers(table)
        try:
            for component in _encoders(self.host):
                rows = torch.cat([rows[component if component in rows else ""] for _, rows, _ in table.values()])
                handles += _hooked(getattr(self.host, component), rows, _ids(tokenizers[TOKENIZERS[component]], len(rows)))
            yield hosting.rebuild(self.host, **tokenizers)
        finally:
            for handle in handles:
                handle.remove()

    def _table(self) -> Table:
        """What each word stands for, numbered through."""
        found: Table = {}
        first = 0
        for one in self.on.values():
            for word, rows in one.words.items():
                found[word] = (one, rows, first)
                first += _count(rows)
        if first > MOST:
            raise UserError(f"The embeddings that are attached have {first:,} vectors; at most {MOST:,} are taken. Detach some.")
        return found

    def _tokenizers(self, table: Table) -> dict[str, Any]:
        """Copies of the host's tokenizers that know the characters as tokens; the last ones are kept."""
        from tokenizers import AddedToken

        key = tuple((word, one.hash) for word, (one, _, _) in table.items())
        if self._known[0] != key:
            total = sum(_count(rows) for _, rows, _ in table.values())
            twins = {}
            for component in _encoders(self.host):
                name = TOKENIZERS[component]
                twins[name] = copy.deepcopy(getattr(self.host, name))
                twins[name].add_tokens([AddedToken(chr(FIRST + at), normalized=False) for at in range(total)])
            self._known = key, twins
        return self._known[1]


def misfit(host: Any, one: Embedding) -> str:
    """Why a host's text encoders cannot read an embedding, with the widths of both; empty where they can."""
    family = families.family_of(host)
    if family not in families.FAMILIES[:2]:
        names = " and ".join(row.name for row in families.FAMILIES[:2])
        return f"{family.name} takes no embeddings, {names} do; leave '{one.name}' out."
    wanted, given = _encoders(host), dict(one.widths)
    if set(given) == {""} and len(wanted) == 1:
        given = {next(iter(wanted)): given[""]}
    spare = set(given) - set(wanted)
    if any(given.get(name) != width for name, width in wanted.items()) or (spare and set(wanted) != {"text_encoder_2"}):
        own, its = (" and ".join(f"{width:,}" for width in each.values()) for each in (wanted, one.widths))
        what = "text encoder reads" if len(wanted) == 1 else "text encoders read"
        return (
            f"embedding '{one.name}' has vectors of width {its}, and this model's {what} {own}: it was made for another family; "
            "choose one for this model."
        )
    return ""


def _encoders(host: Any) -> dict[str, int]:
    """The width of each text encoder that reads embeddings."""
    found = {name: getattr(host, name, None) for name in TOKENIZERS}
    return {name: one.get_input_embeddings().embedding_dim for name, one in found.items() if one is not None}


def _count(rows: Vectors) -> int:
    return len(next(iter(rows.values())))


def _characters(table: Table, word: str) -> str:
    if word not in table:
        return ""
    _, rows, first = table[word]
    return "".join(chr(FIRST + first + at) for at in range(_count(rows)))


def _ids(tokenizer: Any, count: int) -> list[int]:
    return list(tokenizer.convert_tokens_to_ids([chr(FIRST + at) for at in range(count)]))


def _hooked(encoder: Any, vectors: torch.Tensor, ids: Sequence[int]) -> list[Any]:
    """Hooks by which a text encoder reads `vectors` (N w) for the tokens `ids` in this thread.

    To the encoder itself such a token is number 0, so that whatever it looks for among the numbers (an end, the largest one) is
    found where it was.
    """
    places = torch.full((max(ids) + 1,), -1)
    places[list(ids)] = torch.arange(len(ids))
    thread, rows = threading.get_ident(), [torch.empty(0)]

    def before(_: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        if threading.get_ident() != thread:
            return None
        numbers = named["input_ids"] if "input_ids" in named else given[0]
        rows[0] = places.to(numbers.device)[numbers]
        plain = numbers.masked_fill(rows[0] >= 0, 0)
        return (given, {**named, "input_ids": plain}) if "input_ids" in named else ((plain, *given[1:]), named)

    def after(_: Any, __: Any, states: torch.Tensor) -> Any:
        if threading.get_ident() != thread:
            return None
        own = rows[0].to(states.device).view(states.shape[:-1])
        return torch.where((own >= 0)[..., None], vectors.to(states)[own.clamp_min(0)], states)

    return [
        encoder.register_forward_pre_hook(before, with_kwargs=True),
        encoder.get_input_embeddings().register_forward_hook(after),
    ]
