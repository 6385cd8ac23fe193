"""The base of all configs, what they share, and reading them: strict, and every problem of a file is reported at once."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentpipe.utils.errors import UserError
from latentpipe.utils.reading import read_yaml

Precision = Literal["auto", "fp32", "bf16", "fp16"]
# A number is bounded where it is read: what no machine computes is a sentence, not an hour of allocating
Positive = Annotated[int, Field(ge=1, le=10**9)]
Side = Annotated[int, Field(ge=1, le=16_384)]
Width = Annotated[int, Field(ge=1, le=65_536)]
Weight = Annotated[float, Field(ge=0)]
Layers = Annotated[int, Field(ge=1, le=128)]
Widths = Annotated[tuple[Width, ...], Field(min_length=1, max_length=16)]


class Strict(BaseModel):
    """A model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class PictureData(Strict):
    """Folders of pictures (imagefolder convention) and the size in pixels that they are read at."""

    train: Path
    """Folder of training pictures."""
    validation: Path | None = None
    """Folder of pictures that are measured and never trained on."""
    read_size_px: Side = 128
    """Side at which pictures are kept in memory; crops are cut from this."""


class Optimization(Strict):
    """AdamW or Muon with a linear warm-up and a decay to zero, EMA of the weights."""

    steps: Positive
    """Optimizer steps in all."""
    batch_size: Width = 32
    """Pictures in each step, over all processes and parts."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the matrices and convolutions inside of the model, AdamW for the rest, at one learning rate."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    warmup_steps: int = Field(100, ge=0, le=10**9)
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: half a cosine to zero at the last step; constant: the peak until `decay_share`, so a run can be made longer."""
    decay_share: float = Field(0.0, ge=0, le=1)
    """Share of the steps, the last ones, in which a constant rate falls linearly to zero; 0: it stays."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest norm of the whole gradient."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Decay of the moving average of the weights, which is what gets saved."""
    ema_decay_slow: float | None = Field(None, ge=0, lt=1)
    """Decay of a second moving average (train-denoiser); of the two the one with the lower loss on fixed noise gets saved."""


class SplitSteps(Optimization):
    """The same, in equal parts."""

    accumulate: Width = 1
    """Equal parts that a process computes its share of a step's pictures in, one after the other: less memory, the same step."""


class Run(Strict):
    """Where a run writes and how it is computed."""

    out: Path
    """Folder of the finished model."""
    work: Path
    """Folder of checkpoints, log.jsonl, sheets and the resolved config."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of weights, data order, crops and noise."""
    precision: Precision = "auto"
    """bf16 or fp16 autocast, fp32, or auto: bf16 where the processor has it."""
    save_every_steps: Positive = 250
    """Steps between checkpoints; the last two are kept."""
    sample_every_steps: Positive = 500
    """Steps between sheets of pictures and validation figures."""
    resume: bool = False
    """Go on from the newest checkpoint in `work`."""
    warm_start: Path | None = None
    """Name, folder or file of an earlier model whose weights this run begins with."""
    tensorboard: bool = False
    """Also write TensorBoard files to `work`/tensorboard (needs the tensorboard package)."""


Config = TypeVar("Config", bound=Strict)


def load(path: Path, schema: type[Config]) -> Config:
    """Read a YAML file into `schema`; UserError lists every problem, with the nearest known key."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such config file. The shipped ones are listed by 'latentpipe ls configs'.")
    return parse(read_yaml(path, "a config, a YAML file"), schema, str(path))


def config_from(given: Config | str | Path | Mapping[str, Any], schema: type[Config]) -> Config:
    """A config as it is, from a YAML file, or from a mapping; UserError lists every problem."""
    if isinstance(given, schema):
        return given
    if isinstance(given, (str, Path)):
        return load(Path(given), schema)
    return parse(dict(given) if isinstance(given, Mapping) else given, schema, "config")


def parse(raw: Any, schema: type[Config], source: str) -> Config:
    """A plain mapping as a `schema`; UserError names `source` and every problem."""
    if not isinstance(raw, dict):
        raise UserError(f"{source}: expected a mapping of {sorted(schema.model_fields)}; given {type(raw).__name__}.")
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        problems = [_sentence(problem, schema) for problem in error.errors()]
        raise UserError("\n".join(f"{source}: {problem}" for problem in problems)) from None


def dump(config: Strict) -> str:
    """A config as YAML that `load` reads back to the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _sentence(problem: Any, schema: type[BaseModel]) -> str:
    """One pydantic error in the reader's words."""
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = [f"{prefix}{name}" for prefix, name in _keys(schema)]
        near = difflib.get_close_matches(place, known, n=1)
        return f"unknown key '{place}'." + (f" Did you mean '{near[0]}'?" if near else f" Known keys: {', '.join(known)}.")
    if problem["type"] == "missing":
        return f"missing key '{place}'."
    given = problem.get("input")
    shown = "" if isinstance(given, dict) else f" (given: {given!r})"
    return f"{place or 'config'}: {problem['msg']}{shown}."


def _keys(schema: type[BaseModel], prefix: str = "") -> list[tuple[str, str]]:
    keys: list[tuple[str, str]] = []
    for name, field in schema.model_fields.items():
        keys.append((prefix, name))
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys(field.annotation, f"{prefix}{name}.")
    return keys
