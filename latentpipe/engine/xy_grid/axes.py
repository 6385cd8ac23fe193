"""The axes of an X/Y plot: what varies, its values out of a text such as "1, 2, 3" or "1:9:2", and what a value changes."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr, ValidationError, model_validator

from latentpipe.pipelines.metadata.recipe import MAX_PROMPT, MAX_SEED
from latentpipe.pipelines.sampling import SCHEDULERS
from latentpipe.utils.defaults import LORA_LIMIT as LIMIT
from latentpipe.utils.errors import UserError

Kind = Literal["seed", "steps", "guidance", "vae", "lora", "scheduler", "prompt"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Value = StrictInt | StrictFloat | StrictStr
BUILT_IN = "built-in"
"""The value of a VAE axis that stands for the model's own."""

MAX_CELLS = 100
MAX_VAES = 8  # all of them are open while the plot is drawn
MAX_TEXT = 20_000
_WHOLE = {"seed": (0, MAX_SEED), "steps": (1, 1000)}
_REAL = {"guidance": (0.0, 100.0), "lora": (-LIMIT, LIMIT)}
_PART = re.compile(r'\s*+"((?:[^"]|"")*+)"\s*+,|([^",]*+),')  # possessive: a long text of blanks costs no more than others
_LONG = re.compile(r"[+-]?[0-9]+(?:\.[0-9]*)?")
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,10}(?:\.[0-9]{0,6})?|\.[0-9]{1,6})")


class Axis(BaseModel):
    """What varies along one side of the plot.

    kind    seed, steps, guidance, vae, lora (its weight), scheduler, or prompt
    values  whole numbers (seed, steps), numbers (guidance, lora), names (vae, scheduler), or texts (prompt: the first one is
            what the others take the place of, as in A1111's "Prompt S/R")
    name    of the LoRA; else empty
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    kind: Kind
    values: tuple[Value, ...] = Field(min_length=1, max_length=MAX_CELLS)
    name: str = Field("", max_length=200)

    @model_validator(mode="after")
    def _is_sane(self) -> Axis:
        if wrong := _wrong(self.kind, self.values, self.name):
            raise ValueError(wrong)
        return self

    @property
    def title(self) -> str:
        """What varies, in words."""
        own = {"vae": "VAE", "lora": f"LoRA {self.name}", "prompt": f"'{self.values[0]}' in the prompt"}
        return own.get(self.kind, self.kind)

    @property
    def labels(self) -> list[str]:
        """The values in words."""
        return [f"{value:.12g}" if isinstance(value, float) else str(value) for value in self.values]

    def said(self, label: str) -> str:
        """A value with what it is of, in words."""
        return f"'{label}'" if self.kind == "prompt" else f"{self.title} {label}"

    def put(self, setup: dict[str, Any], value: Value) -> dict[str, Any]:
        """The setup of a picture (`latentpipe.engine.xy_grid.plot.Setup`'s fields) with one value of this axis.

        UserError where the text to be replaced is not in the prompt, or the prompt gets too long.
        """
        if self.kind == "vae":
            return setup | {"vae": None if str(value).lower() == BUILT_IN else value}
        if self.kind == "lora":
            return setup | {"loras": setup["loras"] | {self.name: value}}
        if self.kind == "prompt":
            old = str(self.values[0])
            if old not in setup["prompt"]:
                raise UserError(
                    f"The prompt '{setup['prompt'][:80]}' does not hold '{old}', the first value of the prompt axis, which the "
                    "others take the place of; begin the axis with a word of the prompt."
                )
            if len(setup["prompt"]) + setup["prompt"].count(old) * (len(str(value)) - len(old)) > MAX_PROMPT:
                raise UserError(
                    f"With '{str(value)[:80]}' in it the prompt is too long; at most {MAX_PROMPT:,} characters are taken."
                )
            return setup | {"prompt": setup["prompt"].replace(old, str(value))}
        return setup | {self.kind: value}


def read_axis(text: str) -> Axis:
    """An axis from ``seed=1,2,3``, ``guidance=1:7:2``, ``lora:flat=0,0.5,1``, ``prompt=red,green``; UserError for others."""
    head, mark, values = text.partition("=")
    kind, _, name = (part.strip() for part in head.partition(":"))
    if not mark:
        raise UserError(f"The axis '{text[:80]}' has no values; expected such as seed=1,2,3 or guidance=1:7:2.")
    return make_axis(kind, values, name)


def make_axis(kind: str, text: str, name: str = "") -> Axis:
    """An axis from its kind and its values as a text; UserError says what is wrong.

    text  values between commas, in double quotes where one holds a comma; for numbers also ranges, ``first:last`` or
          ``first:last:step``, whose last number is in it where the steps reach it
    name  of the LoRA
    """
    if kind not in KINDS:
        raise UserError(f"There is no axis '{kind[:80]}'; expected one of {', '.join(KINDS)} (lora:NAME for a LoRA's weight).")
    if len(text) > MAX_TEXT:
        raise UserError(f"The values of the {kind} axis have {len(text):,} characters; at most {MAX_TEXT:,} are taken.")
    parts = _parts(kind, text)
    if not any(parts):
        raise UserError(f"The {kind} axis has no values; give such as {_example(kind)}.")
    values: list[int | float | str] = []
    for part in parts:
        values += _numbers(kind, part) if kind in _WHOLE or kind in _REAL else [part]
    if wrong := _wrong(kind, tuple(values), name):
        raise UserError(wrong)
    try:
        return Axis(kind=kind, values=tuple(values), name=name)  # type: ignore[arg-type]  # checked above
    except ValidationError as error:
        raise UserError(f"The {kind} axis: {error.errors()[0]['msg']}.") from None


def _parts(kind: str, text: str) -> list[str]:
    """What stands between the commas; what is in double quotes, as it is."""
    found, place, text = [], 0, f"{text},"
    while place < len(text):
        match = _PART.match(text, place)
        if match is None:
            raise UserError(
                f'The values of the {kind} axis cannot be read from "{text[place : place + 40].rstrip(",")}" on; expected '
                'such as a, b, or "a, with a comma", b.'
            )
        found.append(match[2].strip() if match[1] is None else match[1].replace('""', '"'))
        place = match.end()
    return found


def _numbers(kind: str, part: str) -> list[int | float]:
    """One number, or those of a range."""
    pieces = [piece.strip() for piece in part.split(":")]
    if len(pieces) > 3 or not all(_NUMBER.fullmatch(piece) for piece in pieces):
        long = len(pieces) <= 3 and all(_LONG.fullmatch(piece) for piece in pieces)
        what = "has too many digits" if long else "is no number"
        raise UserError(f"'{part[:80]}' on the {kind} axis {what}; expected such as {_example(kind)}.")
    first, *rest = (Decimal(piece) for piece in pieces)
    if kind in _WHOLE and any(number != int(number) for number in (first, *rest)):
        raise UserError(f"'{part[:80]}' on the {kind} axis is no whole number; expected such as {_example(kind)}.")
    turn = int if kind in _WHOLE else float
    if not rest:
        return [turn(first)]
    last, step = rest[0], rest[1] if len(rest) > 1 else Decimal(1)
    if step == 0 or (last - first) * step < 0:
        raise UserError(f"The range '{part[:80]}' on the {kind} axis leads nowhere; expected FIRST:LAST:STEP, such as 1:9:2.")
    count = int((last - first) / step) + 1
    if count > MAX_CELLS:
        raise UserError(
            f"The range '{part[:80]}' on the {kind} axis has {count:,} values; at most {MAX_CELLS} pictures are drawn."
        )
    return [turn(first + step * index) for index in range(count)]


def _wrong(kind: str, values: tuple[Any, ...], name: str) -> str:
    """What is wrong with the values of an axis, in one sentence; empty where nothing is."""
    if (kind == "lora") != bool(name):
        return f"The {kind} axis has the name '{name[:80]}'; expected lora:NAME for a LoRA's weight, and no name elsewhere."
    if len(values) > (most := MAX_VAES if kind == "vae" else MAX_CELLS):
        return f"The {kind} axis has {len(values)} values; at most {most} are taken."
    for index, value in enumerate(values):
        if value in values[:index]:
            return f"The {kind} axis has the value '{value}' twice."
        if kind in _WHOLE or kind in _REAL:
            low, high = _WHOLE.get(kind) or _REAL[kind]
            typed = isinstance(value, int) and not isinstance(value, bool) if kind in _WHOLE else isinstance(value, float)
            if not typed or not math.isfinite(value) or not low <= value <= high:
                what = "whole number" if kind in _WHOLE else "number"
                return f"'{value}' on the {kind} axis; expected a {what} from {low:.10g} to {high:.10g}."
        elif not isinstance(value, str) or not value or len(value) > MAX_PROMPT:
            return f"The {kind} axis has an empty value; expected such as {_example(kind)}."
        elif kind == "scheduler" and value not in SCHEDULERS:
            return f"There is no scheduler '{value[:80]}'; expected one of {', '.join(SCHEDULERS)}."
    return ""


def _example(kind: str) -> str:
    examples = {"seed": "1, 2, 3 or 1:9:2", "steps": "5, 10, 20 or 5:20:5", "guidance": "1, 3, 5 or 1:7:2", "lora": "0, 0.5, 1"}
    return examples.get(kind, {"vae": "built-in, emoji-eq", "scheduler": "dpm++, ddim"}.get(kind, "red, green, blue"))
