"""Note a tool's folder in folders.yaml, and list what lies in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from latentpipe.checkpoints.hub.pull import size_of
from latentpipe.checkpoints.places import glance
from latentpipe.checkpoints.places.hub_cache import default_cache
from latentpipe.checkpoints.places.tool_folders import (
    EXPECTED,
    Import,
    as_rows,
    counted_by_kind,
    entries,
    folders_file,
    imports,
    roots,
)
from latentpipe.utils.atomic import atomic_file
from latentpipe.utils.errors import UserError

HEAD = "# Folders of other tools whose files latentpipe uses where they lie; written by 'latentpipe import'.\n"
WORDS = {"models": "model", "parts": "part", "vae": "vae", "lora": "lora", "embeddings": "embedding", "upscalers": "upscaler"}


def note(tool: str, path: Path) -> list[str]:
    """Add a folder to folders.yaml (once); what was found there, in lines. UserError where it is no folder of that tool."""
    import yaml

    if not path.exists():
        raise UserError(f"{path}: no such folder; expected {EXPECTED[tool]}.")
    place = path.resolve()
    found = entries(Import(tool, place, tool))
    known = roots(tool, place) if tool in ("comfyui", "a1111") else found or sorted(place.glob("models*"))
    if not known:
        raise UserError(f"{path}: nothing of {tool} is there; expected {EXPECTED[tool]}.")
    rows = as_rows(imports())
    row = {"from": tool, "path": str(place)}
    noted = [one for one in imports() if one.tool == tool and (one.path == place or _holds(one, known))]
    if not noted:
        target = folders_file()
        with atomic_file(target) as part:
            part.write_text(HEAD + yaml.safe_dump([*rows, row], sort_keys=False, allow_unicode=True), "utf-8")
    lines = [f"{kind:12}{count:,}" for kind, count in counted_by_kind(found).items()]
    pickles = sum(not entry.opens for entry in found)
    if pickles:
        are = "is a pickle" if pickles == 1 else "are pickles"
        lines.append(f"{pickles:,} of them {are} (.ckpt, .pt, ...): 'latentpipe convert FILE --out NEW.safetensors' turns one.")
    if noted and noted[0].path != place:
        lines.append(f"nothing was added: {noted[0].path} is noted already, and holds all of it")
    return [*lines, str(folders_file())]


def _holds(one: Import, known: Sequence[object]) -> bool:
    """Whether a folder that is noted has the same places, as ComfyUI's folder and its models folder do."""
    try:
        return one.tool in ("comfyui", "a1111") and set(known) <= set(roots(one.tool, one.path))
    except (UserError, OSError):  # it is away
        return False


def rows_of(kind: str = "all") -> dict[str, list[str]]:
    """A line for each file and model of other tools and of the hub's cache, by what `ls` calls its kind; and what is away."""
    lines: dict[str, list[str]] = {}
    known = imports()
    cache = default_cache()
    if cache.is_dir() and not any(one.tool == "diffusers-cache" and one.path == cache.resolve() for one in known):
        known = [*known, Import("diffusers-cache", cache, "hub cache")]
    for one in known:
        try:
            found = entries(one)
        except (UserError, OSError) as error:
            lines.setdefault("problems", []).append(str(error))
            continue
        for entry in found:
            if kind not in ("all", entry.kind, WORDS[entry.kind]):
                continue
            family = glance.family(entry.path) if entry.opens else "a pickle: convert it"
            facts = f"({family}, {size_of(glance.size(entry.path))}, {entry.origin})"
            lines.setdefault(entry.kind, []).append(f"{WORDS[entry.kind]:7} {entry.name:19} {entry.path}  {facts}")
    return lines
