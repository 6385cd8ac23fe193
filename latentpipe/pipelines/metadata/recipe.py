"""What made a picture: written into the file, read back, replayed.

Two texts: `parameters`, as A1111 writes it and many tools read it, and `latentpipe`, a versioned JSON; text chunks of a PNG, EXIF
tags of a JPEG or WebP.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from PIL import Image, JpegImagePlugin, PngImagePlugin
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator

from latentpipe.pipelines.metadata.guides import Controlled, SecondPass, Unit
from latentpipe.pipelines.metadata.stated import StatedModel as StatedModel
from latentpipe.utils.defaults import MAX_BATCH as MAX_BATCH
from latentpipe.utils.defaults import MAX_PROMPT as MAX_PROMPT
from latentpipe.utils.defaults import MAX_SEED as MAX_SEED
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import flatten, picture_file
from latentpipe.utils.io import atomic_file
from latentpipe.utils.reading import parse_json

VERSION: Literal[1] = 1
CHUNK = "latentpipe"
GRID_CHUNK = "latentpipe-grid"
KINDS = {"": "PNG", ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
OPTIONS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
DESCRIPTION, EXIF_IFD, USER_COMMENT = 0x010E, 0x8769, 0x9286  # EXIF tags
MAX_JPEG_EXIF = 65_000
AnyRecipe = TypeVar("AnyRecipe", bound=BaseModel)


class Source(BaseModel):
    """The picture that img2img began from."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    sha256: str = Field(max_length=64)
    """Hash of its pixels (RGB, as encoded)."""
    strength: Unit
    """Share of the schedule that was run; 1 forgets the picture."""


class Machine(BaseModel):
    """Where the picture was computed; other machines may differ in the last bits."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    device: str = Field(max_length=64)
    dtype: str = Field(max_length=32)
    threads: int = Field(ge=1, le=65536)
    processor: str = Field(max_length=200)
    versions: dict[str, str]


class Recipe(BaseModel):
    """Everything that decides a picture's pixels."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    version: Literal[1] = VERSION
    prompt: str = Field(max_length=MAX_PROMPT)
    negative: str = Field("", max_length=MAX_PROMPT)
    """What the picture should not show."""
    seed: int = Field(ge=0, le=MAX_SEED)
    """Of this picture's noise, drawn on the CPU."""
    steps: int = Field(ge=1, le=1000)
    """Denoising steps of the schedule."""
    guidance: float = Field(ge=0, le=100)
    """Scale of classifier-free guidance."""
    guidance_interval: tuple[Unit, Unit] = (0.0, 1.0)
    """Part of the steps that was guided, as shares."""
    scheduler: str = Field(max_length=64)
    width: int = Field(ge=1, le=16384)
    """Pixels."""
    height: int = Field(ge=1, le=16384)
    """Pixels."""
    batch_index: int = Field(0, ge=0, lt=MAX_BATCH)
    """Place in the batch that it was drawn in."""
    batch_size: int = Field(1, ge=1, le=MAX_BATCH)
    model: str = Field(max_length=200)
    """Name of the model."""
    stated: StatedModel | None = None
    """What the model's file does not say itself; left out of the JSON where nothing was stated."""
    vae: str | None = Field(None, max_length=200)
    """Name of the VAE that decoded it; None: the model's own."""
    adapter: str | None = Field(None, max_length=200)
    """Name of the adapter to that VAE, where there was one."""
    loras: dict[str, float | dict[str, float]] = Field(default_factory=dict, max_length=64)
    """Adapters and their weights (one, or by component)."""
    lora_method: str = Field("sum", max_length=32)
    """How they were put together."""
    lora_fused: bool = True
    """Whether they were added to the weights, or lay beside them."""
    embeddings: list[Annotated[str, Field(max_length=200)]] = Field(default_factory=list, max_length=64)
    """Textual inversions that the prompts name; left out of the JSON where there is none."""
    source: Source | None = None
    controls: list[Controlled] = Field(default_factory=list, max_length=16)
    second_pass: SecondPass | None = None
    """Left out of the JSON where there was none."""
    stopped_after: int | None = Field(None, ge=0)
    """Steps done when the job was cancelled; None for a finished picture."""
    hashes: dict[str, str]
    """Content hash (sha256) of each part that made the picture."""
    machine: Machine

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        low, high = self.guidance_interval
        if self.batch_index >= self.batch_size or self.seed < self.batch_index or low > high:
            raise ValueError("batch_index, batch_size, seed and guidance_interval contradict each other")
        return self

    @model_serializer(mode="wrap")
    def _written(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        found = write(self)
        for name in ("stated", "embeddings", "controls", "second_pass"):
            if not getattr(self, name):
                found.pop(name, None)  # such a recipe is then read by versions that do not know the field
        return found


def this_machine(device: str, dtype: str, threads: int) -> Machine:
    """The machine's part of a recipe."""
    names = ("latentpipe", "torch", "diffusers", "transformers")
    return Machine(
        device=device, dtype=dtype, threads=threads, processor=_processor(), versions={name: _version(name) for name in names}
    )


def save(picture: Image.Image, path: Path, recipe: Recipe | None = None) -> None:
    """Write a picture with its recipe as its ending says, atomically: PNG (also without one) and WebP without loss, or JPEG.

    UserError for other endings, and where a JPEG cannot hold the recipe.
    """
    path = Path(path)
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise UserError(
            f"{path}: pictures are written with their recipe as {', '.join(filter(None, KINDS))}; give one of these endings."
        )
    if kind == "PNG":
        return save_png(picture, path, recipe)
    exif = b"" if recipe is None else _exif(recipe)
    if kind == "JPEG" and len(exif) > MAX_JPEG_EXIF:
        raise UserError(
            f"{path}: the recipe has {len(exif):,} bytes, and a JPEG holds {MAX_JPEG_EXIF:,}; write a .png or a .webp."
        )
    with atomic_file(path) as part:
        picture.save(part, format=kind, exif=exif, **OPTIONS[kind])


def as_stored(picture: Image.Image, kind: str | None) -> Image.Image:
    """A picture as a file of this kind ("PNG", "JPEG", "WEBP") that was written here gives it back: JPEG loses some of it."""
    if kind != "JPEG":
        return picture
    stream = io.BytesIO()
    picture.save(stream, format=kind, **OPTIONS[kind])
    stream.seek(0)
    return JpegImagePlugin.JpegImageFile(stream).convert("RGB")


def _exif(recipe: Recipe) -> bytes:
    """Both forms of a recipe as EXIF: A1111's text as the user comment, as that program does, and the JSON as the description."""
    tags = Image.Exif()
    tags[DESCRIPTION] = json.dumps(recipe.model_dump(mode="json"))  # ASCII, as the tag has to be
    tags.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + a1111_text(recipe).encode("utf-16-be")
    return tags.tobytes()


def save_png(
    picture: Image.Image, path: Path, recipe: Recipe | None = None, texts: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write a PNG with its recipe in both formats, and other text chunks by name, atomically."""
    info = PngImagePlugin.PngInfo()
    if recipe is not None:
        info.add_itxt("parameters", a1111_text(recipe))
        info.add_itxt(CHUNK, recipe.model_dump_json())
    for name, text in texts.items():
        info.add_itxt(name, text)
    with atomic_file(path) as part:
        picture.save(part, format="PNG", pnginfo=info)


def read(path: Path) -> Recipe:
    """The recipe in a PNG, JPEG or WebP; UserError where the file has none, or one of another version."""
    text = text_in(path, CHUNK)
    if text is None:
        raise UserError(f"{path} carries no latentpipe recipe; only pictures written by latentpipe can be replayed.")
    return parsed(path, text, Recipe)


def text_in(path: Path, chunk: str) -> str | None:
    """A text of a picture by its name, None where it has none; UserError where the file is no readable picture."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such picture.")
    with picture_file(path) as picture:
        picture.load()  # PNG: text may follow the pixels
        text = picture.info.get(chunk)
        if text is None and chunk == CHUNK:
            text = in_exif(picture.info.get("exif"))
        return text if isinstance(text, str) else None


def in_exif(exif: object) -> str | None:
    """The recipe's JSON in EXIF, where there is one."""
    if not isinstance(exif, bytes):
        return None
    tags = Image.Exif()
    try:
        tags.load(exif)
        text = tags.get(DESCRIPTION)
    except Exception:  # Pillow raises nearly every type for damaged EXIF; other programs' is none of ours
        return None
    return text if isinstance(text, str) and text.startswith('{"version": ') and '"hashes"' in text else None


def parsed(path: Path, text: str, schema: type[AnyRecipe]) -> AnyRecipe:
    """A recipe from the text in a file; UserError where it is damaged, or of another version than VERSION."""
    try:
        raw = parse_json(text)
        if not isinstance(raw, dict) or raw.get("version") != VERSION:
            raw = raw if isinstance(raw, dict) else {}
            raise UserError(f"{path}: recipe version {raw.get('version')!r}; this program reads version {VERSION}.")
        return schema.model_validate(raw)
    except UserError:
        raise
    except ValidationError as error:
        where = ", ".join(".".join(map(str, problem["loc"])) or "recipe" for problem in error.errors())
        raise UserError(f"{path}: its recipe is damaged in: {where}.") from None
    except ValueError as error:
        raise UserError(f"{path}: its recipe is not JSON ({error}).") from None


def a1111_text(recipe: Recipe) -> str:
    """The settings as the A1111 interface writes them into `parameters`."""
    pairs = {
        "Steps": recipe.steps,
        "Sampler": recipe.scheduler,
        "CFG scale": recipe.guidance,
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}",
        "Model hash": recipe.hashes.get("unet", "unknown")[:10],
        "Model": recipe.model,
        "VAE hash": recipe.hashes.get("vae", "unknown")[:10],
        "VAE": recipe.vae or "built in",
    }
    if recipe.source:
        pairs["Denoising strength"] = recipe.source.strength
    pairs |= {"RNG": "CPU", "Version": f"latentpipe {_version('latentpipe')}"}
    plain = {name: weight for name, weight in recipe.loras.items() if not isinstance(weight, dict)}
    if recipe.loras:
        pairs["Lora hashes"] = ", ".join(f"{name}: {recipe.hashes.get(f'lora:{name}', 'unknown')[:12]}" for name in recipe.loras)
    if recipe.embeddings:
        digests = {name: recipe.hashes.get(f"embedding:{name}", "unknown")[:12] for name in recipe.embeddings}
        pairs["TI hashes"] = ", ".join(f"{name}: {digest}" for name, digest in digests.items())
    words, against = (_plain_names(text, recipe.embeddings) for text in (recipe.prompt, recipe.negative))
    prompt = " ".join([words, *(f"<lora:{name}:{weight:g}>" for name, weight in plain.items())])
    lines = [prompt] + ([f"Negative prompt: {against}"] if against else [])
    return "\n".join([*lines, ", ".join(f"{key}: {_quoted(str(value))}" for key, value in pairs.items())])


def _plain_names(text: str, names: Sequence[str]) -> str:
    """A prompt with the names of embeddings as other programs write them, without angle brackets."""
    either = "|".join(map(re.escape, names))
    return re.sub(rf"<\s*({either})\s*>", r"\1", text, flags=re.IGNORECASE) if names else text


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(char in value for char in ",\n:") else value


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()[:200]
    return (platform.processor() or platform.machine())[:200]


def pixel_hash(picture: Image.Image) -> str:
    """sha256 of a picture's size and upright RGB pixels."""
    picture = flatten(picture)
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
