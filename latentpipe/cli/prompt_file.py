"""A file of prompts, one a line: read and checked as a whole before anything is opened.

``red apple`` is a prompt; ``7<TAB>red apple`` has its own seed. A line without one counts on from the
seed of the call, by the pictures of the lines before it. Empty lines are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentpipe.cli.argument_checks import tagged
from latentpipe.cli.output_paths import is_picture
from latentpipe.lora.prompt_tags import split_tags
from latentpipe.utils.defaults import MAX_PROMPT, MAX_SEED
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.reading import read_text

MOST_BYTES = 2**22
MOST_LINES = 10_000
_SEEDED = re.compile(r"\s*([+-]?\d+)\t(.*)")


@dataclass(frozen=True)
class Line:
    """A prompt, the number of its line (from 1), and the seed that the line gives it."""

    number: int
    prompt: str
    seed: int | None = None


def read_prompts(path: Path, n: int = 1) -> list[Line]:
    """The prompts of a file, `n` pictures of each; UserError names the line of the first mistake.

    A mistake is a seed that is none (or whose last picture's is beyond the largest), a prompt without words or that is too long,
    a LoRA tag that cannot be read.
    """
    lines = []
    for number, text in enumerate(read_text(path, MOST_BYTES, "a text file with one prompt a line").splitlines(), 1):
        if not text.strip():
            continue
        with told(path, number):
            lines.append(_line(number, text, n))
    if not lines:
        raise UserError(f"{path} holds no prompt; expected one a line.")
    if len(lines) > MOST_LINES:
        raise UserError(f"{path} has {counted(len(lines), 'prompt')}; at most {MOST_LINES:,} are drawn in one call.")
    return lines


def _line(number: int, text: str, n: int) -> Line:
    before, tab, _ = text.partition("\t")
    seeded = _SEEDED.fullmatch(text)
    if tab and seeded is None:
        raise UserError(f"'{before[:40]}' stands before the tab; expected a seed, or a prompt without tabs.")
    prompt, seed = (seeded[2].strip(), int(seeded[1])) if seeded else (text.strip(), None)
    if seed is not None and not 0 <= seed <= MAX_SEED - n + 1:
        raise UserError(f"the seed is {seed}; expected 0 to {MAX_SEED - n + 1}.")
    if not prompt:
        raise UserError("no prompt stands behind the seed.")
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"the prompt has {len(prompt):,} characters; at most {MAX_PROMPT:,} are taken.")
    split_tags(prompt)
    return Line(number, prompt, seed)


@contextmanager
def told(path: Path, number: int) -> Iterator[None]:
    """A UserError inside names the file and the line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}, line {number}: {error}") from None


def prompted(values: dict[str, Any]) -> None:
    """UserError where a call gives neither a prompt nor a file of prompts, or both, or a file that has a mistake."""
    if values["prompts"] is None:
        if values["prompt"] is None:
            raise UserError("generate: PROMPT is missing; expected 'latentpipe generate PROMPT [options]', or --prompts FILE.")
        return
    if values["prompt"] is not None:
        raise UserError("generate: PROMPT and --prompts are both given; expected one of them.")
    if is_picture(values["out"]):
        raise UserError(f"--out {values['out']}: expected a folder for the pictures of --prompts, each has a name of its own.")
    for line in read_prompts(values["prompts"], values["n"]):
        with told(values["prompts"], line.number):
            tagged({**values, "prompt": line.prompt})


def prompted_pictures(lines: Sequence[Line], n: int, first: int) -> list[tuple[str, int]]:
    """Prompt and seed of each picture: `n` of each line; UserError where the seeds that count on from `first` end too high."""
    found = []
    for place, line in enumerate(lines):
        seed = first + place * n if line.seed is None else line.seed
        if seed > MAX_SEED - n + 1:
            raise UserError(
                f"line {line.number} comes to the seed {seed}; expected at most {MAX_SEED - n + 1}. Give a smaller one."
            )
        found += [(line.prompt, seed + i) for i in range(n)]
    return found
