"""Note a tool's folder in folders.yaml, and list what lies in all of them."""

from __future__ import annotations

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
    if row not in rows:
        target = folders_file()
        with atomic_file(target) as part:
            part.write_text(HEAD + yaml.safe_dump([*rows, row], sort_keys=False, allow_unicode=True), "utf-8")
    lines = [f"{kind:12}{count:,}" for kind, count in counted_by_kind(found).items()]
    pickles = sum(not entry.opens for entry in found)
    if pickles:
        lines.append(
            f"{pickles:,} of them are pickles (.ckpt, .pt, ...): 'latentpipe convert FILE --out NEW.safetensors' turns one."
        )
    return [*lines, str(folders_file())]


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
