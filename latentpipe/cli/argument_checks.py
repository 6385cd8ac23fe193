"""What a call names, looked at before anything large is imported: names, folders, files, limits. UserError says what is wrong.

Which verb's parameter is looked at by which of these stands in `argument_rules`. What only the weights can tell (does a VAE fit,
whether a file is whole) is decided later, by the functions that read them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from latentpipe.checkpoints.registry import (
    available,
    find_adapter,
    find_embedding,
    find_lora,
    find_model,
    named_lora,
    one_of,
)
from latentpipe.checkpoints.registry import (
    named_embedding as named_embedding,
)
from latentpipe.checkpoints.single_file.refusals import check_kind
from latentpipe.utils.defaults import MAX_SEED
from latentpipe.utils.errors import UserError, near
from latentpipe.utils.reading import read_json

Rule = Callable[[str, Any], None]


# --- one value ----------------------------------------------------------------------------------------------


def within(low: float, high: float = math.inf) -> Rule:
    """From `low` to `high`, both included."""

    def rule(option: str, value: float) -> None:
        if not low <= value <= high:  # NaN is not
            expected = f"{low:,} or more" if high == math.inf else f"{low:g} to {high:.10g}"
            raise UserError(f"{option} is {value}; expected {expected}.")

    return rule


def above(low: float, high: float = math.inf) -> Rule:
    """Over `low`, to `high`."""

    def rule(option: str, value: float) -> None:
        if not (low < value <= high and math.isfinite(value)):
            raise UserError(
                f"{option} is {value}; expected more than {low:g}{'' if high == math.inf else f', at most {high:g}'}."
            )

    return rule


def each(rule: Rule) -> Rule:
    """The same for each of several values."""

    def all_of(option: str, values: Iterable[Any]) -> None:
        for value in values:
            rule(option, value)

    return all_of


def seed(option: str, value: int) -> None:
    """0 to MAX_SEED, or -1 for a random one."""
    if not -1 <= value <= MAX_SEED:
        raise UserError(f"{option} is {value}; expected a seed from 0 to {MAX_SEED}, or -1 for a random one.")


def device(option: str, value: str) -> None:
    """cpu, mps, cuda or cuda:NUMBER."""
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", value):
        raise UserError(
            f"{option} is '{value[:80]}'; expected cpu, cuda, cuda:NUMBER or mps.{near(value, ('cpu', 'cuda', 'mps'))}"
        )


def model(option: str, value: str | Path) -> None:
    """The name or folder of a whole model."""
    folder = find_model(value)
    if folder.is_file():
        check_kind(folder)
    elif not (folder / "model_index.json").is_file():
        raise UserError(
            f"{option} {value}: this folder holds no model; expected one with a model_index.json, as diffusers writes it."
        )


def vae(option: str, value: str | Path) -> None:
    """The name, folder or file of a VAE."""
    place = find_model(value, "vae")
    if place.is_dir() and not (place / "config.json").is_file():
        raise UserError(f"{option} {value}: this folder holds neither model_index.json (a pipeline) nor config.json (a VAE).")


def vaes(option: str, value: Iterable[str]) -> None:
    """Two or more of them."""
    names = list(value)
    if len(names) < 2:
        raise UserError(
            f"A comparison takes two VAEs or more; given {len(names)}. Name another ('latentpipe ls vae' lists them)."
        )
    for name in names:
        vae(option, name)


def part(option: str, value: str) -> None:
    """The name or folder of a model or of a VAE."""
    try:
        find_model(value)
    except UserError:
        if not Path(value).exists() and value not in available("vae"):
            known = {**available("models"), **available("vae")}
            there = f"neither a folder nor a file nor {one_of(known)}.{near(value, known)}"
            raise UserError(f"No model or VAE '{value}': {there}") from None
        vae(option, value)


def folder(option: str, value: Path) -> None:
    """A folder that there is."""
    if value.is_file():
        raise UserError(f"{option} {value} is a file; expected a folder of pictures.")
    if not value.is_dir():
        beside = [path.name for path in value.parent.iterdir() if path.is_dir()] if value.parent.is_dir() else []
        raise UserError(f"{option} {value}: no such folder; expected a folder of pictures.{near(value.name, beside, 0.75)}")


def file(option: str, value: Path) -> None:
    """A file that there is."""
    if value.is_dir():
        raise UserError(f"{option} {value} is a folder; expected a file.")
    if not value.exists():
        beside = [path.name for path in value.parent.iterdir()] if value.parent.is_dir() else []
        raise UserError(f"{option} {value}: no such file.{near(value.name, beside, 0.75)}")


def latents(option: str, value: Path) -> None:
    """A latent cache, or a folder of shards."""
    if not value.is_dir():
        file(option, value)
    elif not (value / "manifest.json").is_file():
        raise UserError(f"{option} {value}: this folder has no manifest.json; expected a latent cache, or a folder of shards.")


def picture(option: str, value: Path) -> None:
    """A file that begins as a picture does."""
    from latentpipe.utils.images import picture_file

    file(option, value)
    with picture_file(value):
        pass


def metric(option: str, value: str) -> None:
    """A network whose weights there are."""
    if value in ("inception", "squeezenet10"):
        from latentpipe.evaluate.metrics.weights import metric_file

        metric_file(value)


def loras(option: str, value: Iterable[str]) -> None:
    """Names or files with weights."""
    for text in value:
        name, number = weighted(text)
        find_lora(name)
        if not math.isfinite(number):
            raise UserError(f"{option} {text}: the weight is not finite; expected NAME=WEIGHT, such as flat=0.7.")


def embeddings(option: str, value: Iterable[str]) -> None:
    """Names or files of textual inversions."""
    for name in value:
        find_embedding(name)


def installed_loras(option: str, value: Iterable[str]) -> None:
    """Names with weights, none of them a path."""
    for text in value:
        named_lora(weighted(text)[0])


def found_loras(option: str, value: Iterable[str] | str) -> None:
    """Names or files."""
    for name in [value] if isinstance(value, str) else value:
        find_lora(name)


def adapter(option: str, value: str) -> None:
    """A name or file of an adapter between two VAEs."""
    find_adapter(value)


def drawn(option: str, value: str) -> None:
    """A side, or width and height."""
    size_of(value)


def weighted(text: str) -> tuple[str, float]:
    """``flat=0.7`` as name and weight."""
    name, mark, weight = text.rpartition("=")
    if not mark:
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise UserError(f"--lora {text}: '{weight}' is no number; expected NAME or NAME=WEIGHT, such as flat=0.7.") from None


def size_of(text: str | None) -> tuple[int, int] | None:
    """``64`` or ``64x96`` as width and height in pixels; UserError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text.strip())
    if not match:
        raise UserError(f"--size is '{text}'; expected a side such as 64, or WIDTHxHEIGHT such as 64x96.")
    return int(match[1]), int(match[2] or match[1])


# --- several values -----------------------------------------------------------------------------------------


def drawn_size(values: dict[str, Any]) -> None:
    """UserError where a model cannot draw pictures of this size; its configs tell."""
    size, unit = size_of(values["size"]), unit_of(find_model(values["model"]))
    if size is None or unit is None:
        return
    if min(size) <= 0 or any(side % unit for side in size):
        nearest = "x".join(str(max(unit, round(side / unit) * unit)) for side in size)
        raise UserError(f"--size is {size[0]} x {size[1]} pixels; sides must be multiples of {unit}. Try --size {nearest}.")


def unit_of(place: Path) -> int | None:
    """What both sides of a Stable Diffusion model's pictures must be multiples of; None for other families."""
    from latentpipe.vae.latent_space import downscale_of

    unet, own = _json(place / "unet" / "config.json"), _json(place / "vae" / "config.json")
    if not unet.get("block_out_channels") or not own:
        return None
    return math.lcm(8, downscale_of(own) * 2 ** (len(unet["block_out_channels"]) - 1))


def vae_size(values: dict[str, Any]) -> None:
    """UserError where a VAE cannot take pictures of this side; its config tells."""
    from latentpipe.vae.latent_space import downscale_of

    size, place = values["size"], find_model(values["vae"], "vae")
    config = _json(place / "config.json") if place.is_dir() else {}
    if size is None or not any("block_out_channels" in key for key in config):
        return
    unit = downscale_of(config)
    if size % unit:
        raise UserError(
            f"--size is {size} pixels; VAE {values['vae']} takes multiples of {unit}. Try {max(1, round(size / unit)) * unit}."
        )


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none (whoever needs it says so)."""
    try:
        return read_json(path)
    except UserError:
        return {}


def interval(values: dict[str, Any]) -> None:
    """UserError for a guidance interval that is none."""
    low, high = values["guidance_interval"]
    if not 0 <= low <= high <= 1:
        raise UserError(f"--guidance-interval is {low:g} {high:g}; expected two shares of the steps, 0 <= low <= high <= 1.")


def tagged(values: dict[str, Any]) -> None:
    """UserError for a tag of the prompt that is none, or names a LoRA that is not installed."""
    from latentpipe.lora.prompt_tags import split_tags

    varied = any(str(values.get(axis)).startswith("prompt=") for axis in ("x", "y"))  # then other prompts are drawn
    files = any(weighted(text)[0] not in available("lora") for text in values.get("lora", ()))  # whose names stand inside
    for name in split_tags(values["prompt"] or "")[1]:
        if not varied and not files:
            named_lora(name)
