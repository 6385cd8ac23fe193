"""The small files of a model's folder, checked before other libraries read them: cards, previews, tokenizers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from latentpipe.checkpoints.tensor_source import CARD_FILE
from latentpipe.utils.errors import UserError
from latentpipe.utils.reading import file_size, parse_object, read_bytes, read_json, read_text, validated

STABLE_DIFFUSION = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
MOST = 2**26  # bytes of a tokenizer's file
TOKENS = 2**24
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model")
Colour = Annotated[list[float], Field(min_length=3, max_length=3)]


class VerdictEntry(BaseModel):
    """What a swap was judged."""

    model_config = ConfigDict(extra="allow")
    forced: bool = False


class SwappedVAE(BaseModel):
    """The VAE that was put in."""

    model_config = ConfigDict(extra="allow")
    name: str | None = None
    hash: str | None = None
    verdict: VerdictEntry | None = None


class Card(BaseModel):
    """Those entries of a card.json that are read back; others may stand beside them."""

    model_config = ConfigDict(extra="allow")
    vae_hash: str | None = None
    swapped_vae: SwappedVAE | None = None
    content_hash: str | None = None


class Preview(BaseModel):
    """latent_rgb.json: a colour for each latent channel, and one to add."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    factors: Annotated[list[Colour], Field(min_length=1, max_length=2**16)]
    bias: Colour


def read_card(folder: Path) -> dict[str, Any] | None:
    """The content of a model's or VAE's card.json; None where it has none, UserError where it is damaged."""
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    card = read_json(path)
    validated(card, Card, str(path))
    return card


def read_preview(path: Path, channels: int) -> dict[str, Any] | None:
    """The linear map from latents to colours in a latent_rgb.json; None where there is none, UserError where it is damaged."""
    if not path.is_file():
        return None
    preview = read_json(path)
    found = len(validated(preview, Preview, str(path)).factors)
    if found != channels:
        raise UserError(f"{path} maps {found} channels to colours; the latents have {channels}.")
    return preview


def check_small_files(folder: Path) -> None:
    """UserError where a JSON file of a model's parts is none, or a file beside the weights is huge, or no tokenizer.

    Their content is for other libraries, so that what these tolerate (whole numbers of 31 digits) passes.
    """
    for path in sorted(folder.glob("*/*")):
        if path.suffix in (".txt", ".model"):
            if file_size(path) > MOST:
                raise UserError(f"{path} has {file_size(path):,} bytes; a file beside the weights has at most {MOST:,}.")
        elif path.suffix == ".json":
            try:
                content = parse_object(read_text(path, MOST, "a JSON file"), MOST, foreign=True)
            except UserError:
                raise
            except ValueError as error:
                raise UserError(f"{path}: not a JSON file that is read here ({error}).") from None
            model = content.get("model") if path.name == "tokenizer.json" else {"vocab": content}
            if path.name in ("tokenizer.json", "vocab.json") and not _is_vocabulary(model):
                raise UserError(f"{path}: no vocabulary; expected tokens and their numbers. Fetch or export the model again.")


def _is_vocabulary(model: Any) -> bool:
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # of unigrams: [token, score]
        return bool(vocab)
    return isinstance(vocab, dict) and bool(vocab) and all(type(each) is int and 0 <= each < TOKENS for each in vocab.values())


def check_parts(folder: Path) -> None:
    """UserError where a part is missing; transformers would otherwise come up with an empty tokenizer."""
    tokenizer = folder / "tokenizer"
    complete = (tokenizer / "tokenizer.json").is_file() or all(
        (tokenizer / name).is_file() for name in ("vocab.json", "merges.txt")
    )
    missing = [] if complete else ["tokenizer/tokenizer.json (or vocab.json and merges.txt)"]
    files = ["scheduler/scheduler_config.json", "unet/config.json", "text_encoder/config.json", "vae/config.json"]
    missing += [name for name in files if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is not a complete model; missing: {', '.join(missing)}. Fetch or export it again.")


def tokenizer_hash(folder: Path) -> str:
    """sha256 over a tokenizer's files; "" where the folder has none of them."""
    digest, files = hashlib.sha256(), [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for path in files:
        digest.update(read_bytes(path, MOST))
    return digest.hexdigest() if files else ""


def check_tokenizer(pipe: Any, folder: Path) -> Any:
    """The pipeline; UserError where a Stable Diffusion model's tokenizer gives numbers that its text encoder has no row for."""
    if type(pipe).__name__ != "StableDiffusionPipeline":
        return pipe
    lacking = [name for name in ("text_encoder", "tokenizer") if getattr(pipe, name, None) is None]
    if lacking:
        raise UserError(f"{folder}: the configs of this model name no {' and no '.join(lacking)}; give complete ones.")
    config, tokenizer = pipe.text_encoder.config, pipe.tokenizer
    rows, length = config.vocab_size, config.max_position_embeddings
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 1 < largest < rows:
        raise UserError(
            f"{folder}/tokenizer has the tokens 0 to {largest}; its text encoder reads 0 to {rows - 1}: they do not match."
        )
    if type(tokenizer.model_max_length) is not int or not 2 < tokenizer.model_max_length <= length:
        raise UserError(
            f"{folder}/tokenizer: model_max_length is {str(tokenizer.model_max_length)[:40]}; "
            f"its text encoder reads {length} tokens."
        )
    return pipe
