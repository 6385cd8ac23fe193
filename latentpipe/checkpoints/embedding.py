"""Textual inversion embeddings (arXiv:2208.01618) from safetensors files of every layout: vectors that stand for a word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentpipe.checkpoints.identify import looks_like
from latentpipe.checkpoints.single_file import parts
from latentpipe.checkpoints.tensor_source import PICKLES
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.io import check_file, content_hash, is_safetensors, printable, read_header, read_tensors

ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # SDXL's, as its files name them
FOLDER_FILE = "learned_embeds.safetensors"
UNNAMED = ("emb_params", "string_to_param", "string_to_param.*", "*")  # A1111's keys
MOST_WORDS, MOST_VECTORS = 64, 1024
Vectors = Mapping[str, torch.Tensor]
"""n w by text encoder ("text_encoder", "text_encoder_2"; "" where the file names none)."""


@dataclass(frozen=True)
class Embedding:
    """What a file teaches a text encoder.

    name    what a prompt calls all of it
    tokens  the vectors by the token that the file stores them under ("" where it names none)
    """

    name: str
    tokens: Mapping[str, Vectors]

    @property
    def words(self) -> dict[str, Vectors]:
        """The vectors by the words that a prompt may have for them, in lower case: the name for all, each token for its own."""
        slots = next(iter(self.tokens.values()))
        whole = {slot: torch.cat([vectors[slot] for vectors in self.tokens.values()]) for slot in slots}
        own = {bare(token): vectors for token, vectors in self.tokens.items() if bare(token)}
        return own | {bare(self.name): whole}

    @property
    def widths(self) -> dict[str, int]:
        """Width of the vectors by text encoder."""
        return {slot: vectors.shape[1] for slot, vectors in next(iter(self.tokens.values())).items()}

    @property
    def length(self) -> int:
        """How many tokens of a prompt it takes."""
        return sum(len(next(iter(vectors.values()))) for vectors in self.tokens.values())

    @property
    def hash(self) -> str:
        """Content hash of the vectors; a single token's name does not count, as layouts and people differ in it."""
        single = len(self.tokens) == 1
        named = {("" if single else token, slot): one for token, vectors in self.tokens.items() for slot, one in vectors.items()}
        return content_hash({f"{token}.{slot}": one for (token, slot), one in named.items()})


def bare(word: str) -> str:
    """A name or token as words are compared: lower case, without the angle brackets around it."""
    word = word.strip()
    return (word[1:-1] if word.startswith("<") and word.endswith(">") else word).strip().casefold()


def read_embedding(path: Path, name: str | None = None) -> Embedding:
    """The embedding in a safetensors file, or in a folder of one concept; `name`: None for that of the file.

    Layouts: A1111's (``emb_params``, ``string_to_param``), SDXL's (``clip_l`` and ``clip_g``), diffusers' (token: vectors).
    UserError for a pickle, another kind of file, vectors of different widths or values that are not finite.
    """
    path = Path(path)
    if path.is_dir():  # a repository of one concept
        path = path / FOLDER_FILE
    check_file(path)
    if path.suffix in PICKLES and not is_safetensors(path):  # judged by its first bytes, not by its name
        raise UserError(
            f"{path}: a {path.suffix} file is a pickle, which can run code when it is opened; "
            f"turn it into safetensors once: latentpipe convert {path} --out FILE.safetensors."
        )
    shapes = read_header(path).shapes
    if not 0 < len(shapes) <= MOST_WORDS or any(not 0 < len(shape) <= 2 for shape in shapes.values()):
        what = looks_like(shapes)
        raise UserError(f"{path} holds no textual inversion embedding; it looks like {what}.")
    tensors = read_tensors(path)
    if name is None and path.name == FOLDER_FILE and len(tensors) == 1:  # all such files have this name
        name = bare(next(iter(tensors)))
    return assembled(tensors, name or printable(path.stem), str(path))


def assembled(tensors: Mapping[str, torch.Tensor], name: str, where: str) -> Embedding:
    """An embedding of a file's tensors by their keys; `where` they are from, for messages. UserError as for `read_embedding`."""
    tokens: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        named = "" if key in UNNAMED or key in ENCODERS else key
        slot = ENCODERS.get(key, "")
        if slot in tokens.setdefault(named, {}):
            raise UserError(f"{where}: its vectors stand there twice, under {key} as well; keep one of them.")
        tokens[named][slot] = _vectors(value, key, where)
    if len({frozenset(vectors) for vectors in tokens.values()}) > 1:
        raise UserError(f"{where} mixes the layouts of two programs ({', '.join(list(tensors)[:3])}); keep one of them.")
    for slot in next(iter(tokens.values())):
        widths = sorted({vectors[slot].shape[1] for vectors in tokens.values()})
        if len(widths) > 1:
            raise UserError(
                f"{where} holds no textual inversion embedding: its vectors are {' and '.join(map(str, widths))} numbers wide; "
                "expected one width for each text encoder."
            )
    for vectors in tokens.values():
        if len(counts := sorted({len(one) for one in vectors.values()})) > 1:
            raise UserError(f"{where} has {counts[0]} and {counts[1]} vectors for its text encoders; expected as many for each.")
    found = Embedding(name, tokens)
    if found.length > MOST_VECTORS:
        raise UserError(f"{where} holds {counted(found.length, 'vector')}; an embedding has at most {MOST_VECTORS:,}.")
    if not bare(name) or set("<>:") & set(bare(name)):
        raise UserError(f"'{name}' is no name that a prompt can hold; give the embedding one without < > and : in it.")
    return found


def is_embedding(path: Path) -> bool:
    """Whether a safetensors file has the keys of an embedding alone."""
    if not path.is_file() or not is_safetensors(path):
        return False
    return parts.names_an_embedding(read_header(path).shapes)


def describe_embedding(path: Path) -> dict[str, Any]:
    """What an embedding's file says about itself."""
    one = read_embedding(path)
    return {
        "file": str(path),
        "role": "embedding",
        "words": [f"<{word}>" for word in one.words],
        "vectors": one.length,
        "widths": {slot or "text encoder": width for slot, width in one.widths.items()},
        "hash": one.hash,
    }


def _vectors(value: torch.Tensor, key: str, where: str) -> torch.Tensor:
    """Vectors as n w."""
    if value.ndim == 1:
        value = value[None]
    if value.ndim != 2 or not value.numel() or value.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise UserError(f"{where}: {key} is {tuple(value.shape)} of {value.dtype}; expected vectors of floats, one a token.")
    if not bool(torch.isfinite(value).all()):
        raise UserError(f"{where}: {key} holds values that are not finite; fetch or convert the file again.")
    return value


def as_tensors(embedding: Embedding) -> dict[str, torch.Tensor]:
    """The vectors by the keys that A1111 has for them beside a LoRA's layers, behind its name."""
    ends = {slot: key for key, slot in ENCODERS.items()} | {"": "string_to_param.*"}
    return {token or ends[slot]: one for token, vectors in embedding.tokens.items() for slot, one in vectors.items()}
