r"""Prompt weights as A1111 writes them: (x) is 1.1, [x] is 1 / 1.1, (x:1.3) is 1.3, and nesting multiplies.

\( \) \[ \] \\ are the characters themselves; brackets without a partner are plain text. The words are encoded
without the marks, then each token's embedding is multiplied by its weight, and the whole is scaled back.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from latentpipe.pipelines import families
from latentpipe.utils.defaults import MAX_PROMPT
from latentpipe.utils.errors import LatentpipeWarning, UserError

STEP = 1.1
MAX_WEIGHT = 5.0
MEAN_FLOOR = 0.02  # share of the root mean square below which a mean is chance
_ITEM = re.compile(r"\\[()\[\]\\]|[()\[\]]|[^\\()\[\]]+|\\")  # an escape, a bracket, a run of text, a lone backslash
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)


def parse(prompt: str) -> list[tuple[str, float]]:
    """The text of a prompt in pieces with their weights; neighbours of the same weight are one piece, none is empty.

    UserError for a weight beyond 0 to 5, for one that is no number ("(red:high)": one word after a colon before the
    closing parenthesis), and for A1111's prompt editing ("[a:b:0.5]", "[a|b]"), which would be read as something else.
    """
    items = _ITEM.findall(prompt)
    ends = _pairs(items)
    starts = set(ends.values())
    pieces: list[tuple[str, float]] = []
    weights = [1.0]
    for place, item in enumerate(items):
        if place in ends:
            end = ends[place]
            weight = round(weights[-1] * _factor(items, place, end), 12)  # so that [(x)] is 1
            if not 0 <= weight <= MAX_WEIGHT:
                raise UserError(
                    f"{_shown(items, place, end)} in the prompt comes to a weight of {weight:g}; expected 0 to {MAX_WEIGHT:g}, "
                    r"or \( \) for the parentheses themselves."
                )
            if _number(items, place, end) is not None:
                items[end - 1] = items[end - 1].rpartition(":")[0]
            weights.append(weight)
        elif place in starts:
            weights.pop()
        else:
            text = item[1:] if len(item) == 2 and item[0] == "\\" else item
            if pieces and pieces[-1][1] == weights[-1]:
                pieces[-1] = (pieces[-1][0] + text, weights[-1])
            elif text:
                pieces.append((text, weights[-1]))
    return pieces


def plain(prompt: str) -> str:
    """The text that is encoded: the prompt without its marks; UserError as for `parse`."""
    return "".join(text for text, _ in parse(prompt))


def check(host: Any, *prompts: str) -> None:
    """UserError for a prompt that is no text, is too long, or has marks that a host's family cannot follow."""
    if any(0xD800 <= ord(char) <= 0xDFFF for char in "".join(prompts)):
        raise UserError("the prompt holds bytes that are no text; expected UTF-8.")
    if max(map(len, prompts)) > MAX_PROMPT:
        raise UserError(f"the prompt has {max(map(len, prompts)):,} characters; at most {MAX_PROMPT:,} are taken.")
    for text in prompts:
        refuse(host, text)


def refuse(host: Any, prompt: str) -> None:
    """UserError for weights that cannot be read, or that the host's family cannot follow.

    Families other than Stable Diffusion 1/2 read the prompt as it stands: a stated weight, (x:1.3), is an error there;
    other marks are plain text, which a warning says.
    """
    family = families.family_of(host)
    if family is families.FAMILIES[0]:
        parse(prompt)
        return
    items = _ITEM.findall(prompt)
    for start, end in _pairs(items).items():
        weight = _number(items, start, end)
        if items[start] == "(" and weight is not None and 0 <= weight <= MAX_WEIGHT:
            raise UserError(
                f"{family.name} takes no prompt weights, and {_shown(items, start, end)} in the prompt states one; leave it out."
            )
    if _pairs(items) or any(len(item) == 2 and item[0] == "\\" for item in items):
        warnings.warn(
            f"{family.name} takes no prompt weights; brackets and backslashes in the prompt are plain text",
            LatentpipeWarning,
            stacklevel=3,
        )


def encode(host: Any, prompts: Sequence[str], guided: bool, negative: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weighted embeddings of prompts and negative prompt, each B L D in the dtype of the text encoder.

    host     a pipeline of Stable Diffusion 1/2; prompts are cut and padded to the length L of its tokenizer
    guided   whether the negative prompt is wanted; otherwise None comes back for it

    Where all weights are 1 the embeddings are those of `host.encode_prompt`, bit for bit.
    """
    read = [parse(prompt) for prompt in prompts]
    read_negative = parse(negative)
    texts, against = (["".join(text for text, _ in pieces) for pieces in each] for each in (read, [read_negative]))
    positive, unwanted = host.encode_prompt(texts, host._execution_device, 1, guided, against * len(texts) if guided else None)
    positive = torch.stack([_weigh(row, token_weights(host, pieces)) for row, pieces in zip(positive, read, strict=True)])
    if not guided:
        return positive, None
    weights = token_weights(host, read_negative)
    return positive, torch.stack([_weigh(row, weights) for row in unwanted])


def token_weights(host: Any, pieces: Sequence[tuple[str, float]]) -> torch.Tensor:
    """One weight for each token (L) that the host makes of the joined pieces; begin, end and padding have 1.

    A token that lies across two pieces, as in "(app:1.5)le", has the mean of its characters' weights.
    """
    # The host writes out each learned token of several vectors (textual inversion) before it tokenizes.
    pieces = [(host.maybe_convert_prompt(text, host.tokenizer), weight) for text, weight in pieces]
    by_character = [weight for text, weight in pieces for _ in text]
    spans = host.tokenizer(
        "".join(text for text, _ in pieces),
        padding="max_length",
        max_length=host.tokenizer.model_max_length,
        truncation=True,
        return_offsets_mapping=True,
    ).offset_mapping
    weights = []
    for start, end in spans:
        own = by_character[start:end] or [1.0]
        weights.append(own[0] if len(set(own)) == 1 else sum(own) / len(own))
    return torch.tensor(weights)


def _weigh(embeddings: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Embeddings (L D) times the tokens' weights (L), scaled back to what they were as a whole.

    A1111 restores the mean. Where the mean is near 0 that divides chance by chance and turns signs around (its pull request
    14874); the root mean square is restored there.
    """
    if bool((weights == 1).all()):
        return embeddings
    before = embeddings.float()
    after = before * weights.to(before.device)[:, None]
    sizes = [each.square().mean().sqrt() for each in (before, after)]
    means = [each.mean() for each in (before, after)]
    steady = all(bool(mean.abs() >= MEAN_FLOOR * size) for mean, size in zip(means, sizes, strict=True))
    old, new = means if steady and bool(means[0] * means[1] > 0) else sizes
    return (after * (old / new)).to(embeddings.dtype)


def _pairs(items: Sequence[str]) -> dict[int, int]:
    """Opening to closing places of the brackets that have partners; a bracket closes the nearest one of its kind."""
    found: dict[int, int] = {}
    waiting: list[int] = []
    still_open = {"(": 0, "[": 0}
    for place, item in enumerate(items):
        if item in ("(", "["):
            waiting.append(place)
            still_open[item] += 1
        elif item in (")", "]"):
            partner = "(" if item == ")" else "["
            while still_open[partner] and items[waiting[-1]] != partner:
                still_open[items[waiting.pop()]] -= 1  # opened inside and never closed: plain text
            if still_open[partner]:
                still_open[partner] -= 1
                found[waiting.pop()] = place
    return found


def _stated(items: Sequence[str], start: int, end: int) -> str | None:
    """What stands between the last colon and the closing bracket; None where there is no colon."""
    last = items[end - 1]
    return last.rpartition(":")[2] if end - 1 > start and ":" in last else None


def _number(items: Sequence[str], start: int, end: int) -> float | None:
    """The number between the last colon and the closing bracket; None where there is none."""
    stated = _stated(items, start, end)
    return float(stated) if stated is not None and _NUMBER.fullmatch(stated) else None


def _factor(items: Sequence[str], start: int, end: int) -> float:
    """What a pair of brackets multiplies the weights inside by."""
    stated, number = _stated(items, start, end), _number(items, start, end)
    if items[start] == "[":
        if number is not None or "|" in items[start + 1] + items[end - 1]:
            raise UserError(
                f"{_shown(items, start, end)} in the prompt: words cannot change while a picture is drawn; "
                r"write (TEXT:WEIGHT) for a weight, or \[ \] for the brackets themselves."
            )
        return 1 / STEP
    if number is None and stated and len(stated.split()) == 1 and any(letter.isalnum() for letter in stated):
        raise UserError(
            f"{_shown(items, start, end)} in the prompt: '{stated.strip()[:40]}' is no number; expected (TEXT:WEIGHT) with a "
            rf"weight from 0 to {MAX_WEIGHT:g}, or \( \) for the parentheses themselves."
        )
    return STEP if number is None else number


def _shown(items: Sequence[str], start: int, end: int) -> str:
    """A group as it is typed, shortened for a message."""
    text = "".join(items[start : end + 1])
    return f"'{text}'" if len(text) <= 60 else f"'{text[:40]} ... {text[-15:]}'"
