"""The settings inside a picture, ours or another program's: bounded, put in our terms, within our limits.

Whoever made the file chose every byte of it: sizes are bounded before anything is parsed, nothing is evaluated, names are text.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import PngImagePlugin
from sd_parsers.exceptions import ParserError

from latentpipe.pipelines.metadata import recipe as recipes
from latentpipe.pipelines.metadata.recipe import MAX_PROMPT, MAX_SEED, Recipe
from latentpipe.pipelines.metadata.third_party import CHUNKS, Stated, exif_graph, readers, user_comment, word
from latentpipe.pipelines.sampling import MAX_SIDE, SCHEDULERS
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import Unreadable, picture_file
from latentpipe.utils.setting_names import shortened

MAX_PIXELS = 8192 * 8192
MAX_TEXT = 2**20
MAX_RAW = 100_000
MAX_LORAS = 64
KINDS = {"PNG": "PNG", "JPEG": "JPEG", "MPO": "JPEG", "WEBP": "WebP"}

# Samplers that solve the same equation in the same way.
SAMPLERS = {
    "dpm++": "dpm++", "dpm++2m": "dpm++", "dpmpp2m": "dpm++", "kdpmpp2m": "dpm++",
    "ddim": "ddim", "ddimv3": "ddim", "euler": "euler", "keuler": "euler", "unipc": "unipc", "unipcbh2": "unipc",
    **{name.lower(): key for key, name in SCHEDULERS.items()},
}  # fmt: skip
SCHEDULES = re.compile(r"(k|karras|exponential|polyexponential|sgmuniform|simple|normal|beta|automatic)$")
PLAIN_SCHEDULES = {"", "automatic", "normal", "none", "default"}
TAG = re.compile(r"<\s*(?:lora|lyco)\s*:([^<>:]*)(?::([^<>:]*))?[^<>]*>", re.IGNORECASE)


@dataclass(frozen=True)
class Info:
    """What a picture's metadata says, in our terms."""

    source: str
    """Whose format it is: "latentpipe", "A1111" (Forge, SD.Next and others write it too), "ComfyUI", "Fooocus", ..."""
    prompt: str
    """As written, with ``<lora:name:1>`` and ``(word:1.2)``."""
    negative_prompt: str
    settings: dict[str, Any]
    """Those fields of `latentpipe.Settings` but `negative_prompt` that the file states, within our limits."""
    seed: int | None
    """None where the file states none, or one that is out of our range."""
    width: int
    """The picture's own size in pixels; `settings` may name another."""
    height: int
    model: str | None
    """A name to show and to look up among the installed ones, never a path; so are the next two."""
    vae: str | None
    loras: dict[str, float | dict[str, float]]
    """Names and weights (one, or by component)."""
    changed: list[str]
    """A sentence for each thing that was clamped, or that has no counterpart here."""
    recipe: Recipe | None
    """Ours, where it is ours: `latentpipe.replay` draws the picture again."""
    raw: str
    """The text as found, at most MAX_RAW characters."""

    def shortened(self) -> dict[str, Any]:
        """All of it for a program, settings under the short names that recipes have."""
        return shortened(asdict(self)) | {"settings": shortened(self.settings)}


def read_info(path: str | Path) -> Info:
    """What the metadata of a PNG, JPEG or WebP says.

    UserError, in one sentence, where the file is no such picture, is damaged or too large, or carries no settings.
    """
    path = Path(path)
    texts, kind, size = _texts(path)
    raw = _clean("\n".join(f"{key}: {text}" for key, text in texts.items()), MAX_RAW)
    if recipes.CHUNK in texts:
        return _ours(recipes.read(path), size, raw)
    failures = []
    for source, reader in readers(texts):
        try:
            return _info(source, reader(), size, raw)
        except Exception as error:  # sd-parsers lets through whatever a damaged or hostile file provokes
            reason = _line(error, 120) if isinstance(error, ValueError | ParserError) else "not in its form"
            failures.append(f"{source}: {reason}")
    if failures:
        raise UserError(f"{path}: the settings in this {kind} picture are damaged or of an unknown kind ({'; '.join(failures)}).")
    raise UserError(
        f"{path} is a {kind} picture of {size[0]} x {size[1]} pixels without settings that latentpipe, A1111, ComfyUI, Fooocus, "
        "InvokeAI or NovelAI write (many sites and editors remove them)."
    )


def _texts(path: Path) -> tuple[dict[str, str], str, tuple[int, int]]:
    """The text that may hold settings, the kind of file and its size in pixels; all pixels are decoded, as a check."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such picture.")
        with picture_file(path, ("PNG", "JPEG", "WEBP"), MAX_PIXELS) as picture:
            picture.load()  # PNG: text may follow the pixels
            info, kind, size = dict(picture.info), KINDS[picture.format or ""], picture.size
        known = CHUNKS | {recipes.CHUNK}
        texts = {key: _utf8(text) for key, text in info.items() if key in known and isinstance(text, str)}
        exif = info.get("exif")
        if isinstance(exif, bytes) and len(exif) > 4 * MAX_TEXT:
            raise UserError(f"{path} holds more text than the {MAX_TEXT} bytes that are read.")
        if isinstance(exif, bytes) and (comment := user_comment(exif)):
            texts.setdefault("parameters", comment)
        if own := recipes.in_exif(exif):
            texts.setdefault(recipes.CHUNK, own)
        for key, text in (exif_graph(exif) if isinstance(exif, bytes) else {}).items():
            texts.setdefault(key, _utf8(text))
    except Unreadable as error:
        if "MAX_TEXT" in error.reason:  # Pillow's own limit
            raise UserError(f"{path} holds more text than the {MAX_TEXT} bytes that are read.") from None
        raise
    except UserError:
        raise
    except Exception as error:  # Pillow raises nearly every type for damaged EXIF
        raise UserError(f"{path} cannot be read as a picture ({_line(error, 200)}).") from None
    if sum(map(len, texts.values())) > MAX_TEXT:
        raise UserError(f"{path} holds more text than the {MAX_TEXT} bytes that are read.")
    return texts, kind, size


def _utf8(text: str) -> str:
    """A tEXt chunk is Latin-1 by the standard; some programs write UTF-8 into it."""
    if not isinstance(text, PngImagePlugin.iTXt):
        try:
            return text.encode("latin-1").decode("utf-8")
        except UnicodeError:
            pass
    return str(text)


def _ours(old: Recipe, size: tuple[int, int], raw: str) -> Info:
    stated: Stated = {key: getattr(old, key) for key in ("prompt", "steps", "guidance", "seed", "model", "vae")}
    stated |= {"size": f"{old.width}x{old.height}", "strength": old.source.strength if old.source else None}
    stated |= {"sampler": old.scheduler if old.scheduler in SCHEDULERS else None}  # else it was the model's own
    info = _info("latentpipe", stated, size, raw)
    info.settings["guidance_interval"] = old.guidance_interval
    loras = info.loras | {text: weight for name, weight in old.loras.items() if (text := _name(name))}
    return replace(info, prompt=old.prompt, negative_prompt=old.negative, loras=loras, recipe=old)


def _info(source: str, stated: Stated, size: tuple[int, int], raw: str) -> Info:
    """Everything that is stated, cleaned and clamped; what is lost is told."""
    changed: list[str] = []
    texts = [text if isinstance(text := stated.get(key), str) else "" for key in ("prompt", "negative")]
    if max(map(len, texts)) > MAX_PROMPT:
        changed.append(f"The prompts were cut to {MAX_PROMPT} characters.")
    prompt, negative = (_clean(text, MAX_PROMPT) for text in texts)
    if not prompt and source != "latentpipe":
        changed.append("No prompt was found among the settings; the raw text may hold it.")
    settings = {
        "num_inference_steps": _within("steps", stated.get("steps"), 1, 1000, changed),
        "guidance_scale": _within("guidance", stated.get("guidance"), 0, 100, changed),
        "scheduler": _scheduler(stated, changed),
        "size": _size(stated.get("size"), size, changed),
        "strength": _strength(stated.get("strength"), changed),
    }
    if isinstance(steps := settings["num_inference_steps"], float):
        settings["num_inference_steps"] = int(steps)
    seed = _seed(stated.get("seed"), changed)
    if stated.get("samplers", 1) > 1:
        changed.append(f"The picture went through {stated['samplers']} samplers; the settings are those of the first.")
    lost = [f"{_line(key, 40)} {_line(value, 40)}" for key, value in stated.get("elsewhere", {}).items() if _counts(value)]
    if lost:
        changed.append(f"These settings have no counterpart here: {', '.join(lost[:12])}.")
    if nodes := stated.get("nodes"):
        changed.append(f"These nodes have no counterpart here: {', '.join(_line(node, 40) for node in nodes[:12])}.")
    used = {key: value for key, value in settings.items() if value is not None}
    return Info(
        source=source, prompt=prompt, negative_prompt=negative, settings=used, seed=seed, width=size[0], height=size[1],
        model=_name(stated.get("model")), vae=_name(stated.get("vae")), loras=_loras(stated.get("loras"), prompt, changed),
        changed=changed, recipe=None, raw=raw,
    )  # fmt: skip


def _within(name: str, value: Any, low: float, high: float, changed: list[str]) -> float | None:
    if value is None:
        return None
    number = _number(value)
    if number is None:
        changed.append(f"{name} '{_line(value, 40)}' is no number and was left out.")
        return None
    if not low <= number <= high:
        changed.append(f"{name} {_line(value, 40)} was set to {min(max(number, low), high):g}; {low} to {high} can be used here.")
    return min(max(number, low), high)


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or len(str(value)[:41]) > 40:
        return None
    try:
        return float(value) if math.isfinite(float(value)) else None
    except (ValueError, OverflowError):
        return None


def _scheduler(stated: Stated, changed: list[str]) -> str | None:
    """One of SCHEDULERS, where the sampler means the same."""
    name, schedule = stated.get("sampler"), stated.get("schedule")
    if not name:
        return None
    found = SAMPLERS.get(word(name)) or SAMPLERS.get(SCHEDULES.sub("", word(name)))
    if found is None:
        changed.append(f"The sampler '{_line(name, 40)}' has no counterpart here; the model's own scheduler stands in.")
    elif word(name) not in SAMPLERS:
        schedule = schedule or name
    if found and word(schedule or "") not in PLAIN_SCHEDULES:
        changed.append(f"The noise schedule of '{_line(schedule, 40)}' has no counterpart here; the model's own stands in.")
    return found


def _size(value: Any, picture: tuple[int, int], changed: list[str]) -> tuple[int, int] | None:
    found = re.fullmatch(r"\(?\s*(\d{1,6})\s*[x×,]\s*(\d{1,6})\s*\)?", str(value)[:40].strip())
    if found is None:
        return None
    width, height = (max(int(side), 1) for side in found.groups())
    if (width, height) != picture:
        changed.append(f"The file says {width} x {height} pixels, the picture has {picture[0]} x {picture[1]}; it was resized.")
    if max(width, height) > MAX_SIDE:
        share = MAX_SIDE / max(width, height)
        new = (max(8, round(width * share / 8) * 8), max(8, round(height * share / 8) * 8))
        changed.append(
            f"The size {width} x {height} was set to {new[0]} x {new[1]}; at most {MAX_SIDE} x {MAX_SIDE} can be drawn."
        )
        return new
    return width, height


def _strength(value: Any, changed: list[str]) -> float | None:
    number = _number(value)
    if number is None or not 0 < number < 1:  # 1 is what a picture from noise alone has
        return None
    changed.append(f"Strength {number:g} is of img2img or of a second pass; the picture that it began from is not in the file.")
    return number


def _seed(value: Any, changed: list[str]) -> int | None:
    number = value if isinstance(value, int) and not isinstance(value, bool) else None
    if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,20}\s*", value):
        number = int(value)
    if number is not None and 0 <= number <= MAX_SEED:
        return number
    if value is not None:
        changed.append(f"The seed {_line(value, 40)} cannot be used; expected a whole number from 0 to {MAX_SEED}.")
    return None


def _loras(value: Any, prompt: str, changed: list[str]) -> dict[str, float | dict[str, float]]:
    """Names and weights: from the tags in the prompt, and from a list in one of several programs' forms."""
    found: dict[str, float | dict[str, float]] = {}
    pairs: list[tuple[Any, Any]] = [(tag[1], tag[2] or 1.0) for tag in TAG.finditer(prompt)]
    for entry in value if isinstance(value, list) else []:
        if isinstance(entry, dict):
            pairs.append((entry.get("model") or entry.get("lora") or entry.get("name"), entry.get("weight", 1.0)))
        elif isinstance(entry, list) and entry:
            pairs.append((entry[0], entry[1] if len(entry) > 1 else 1.0))
    for name, weight in pairs[:MAX_LORAS]:
        if text := _name(name):
            number = _number(weight)
            if number is None:
                changed.append(f"The weight '{_line(weight, 40)}' of the LoRA '{text}' is no number; 1 stands in.")
            found.setdefault(text, 1.0 if number is None else number)
    if len(pairs) > MAX_LORAS:
        changed.append(f"Only the first {MAX_LORAS} of {len(pairs)} LoRAs are listed.")
    return found


def _name(value: Any) -> str | None:
    """The last part of a name or a path, as text."""
    if isinstance(value, dict):
        value = value.get("name") or value.get("model_name")
    text = _line(re.split(r"[/\\]", value[:4096].strip())[-1], 200) if isinstance(value, str) else ""
    return None if text in {"", ".", ".."} else text


def _counts(value: Any) -> bool:
    """Whether a setting was in use."""
    return word(value) not in {"", "0", "00", "1", "false", "none"} if not isinstance(value, list | dict) else bool(value)


def _line(value: Any, limit: int) -> str:
    text = value if isinstance(value, str) else str(value)
    return " ".join(_clean(text[: 4 * limit], 4 * limit).split())[:limit]


def _clean(text: str, limit: int) -> str:
    """Without control characters and what UTF-8 cannot hold; at most `limit` characters."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text[:limit].replace("\r\n", "\n"))
    return text.encode("utf-8", "replace").decode("utf-8").strip()
