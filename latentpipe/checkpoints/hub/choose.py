"""Which files of a repository suffice: one copy of each part's weights, the smallest, safetensors before pickles."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from latentpipe.checkpoints.places.hub_cache import PASSIVE, SHOWN, WEIGHTS, parts_of
from latentpipe.utils.errors import UserError

SAFE = (".safetensors", ".sft")
HELD = (*SAFE, ".bin", ".ckpt", ".pt", ".pth", ".gguf")  # endings of weights that some verb takes
SMALL = (".json", ".txt", ".model")  # endings of configs, vocabularies and indexes
MOST_SMALL = 2**26  # bytes of one of these
SHARD = re.compile(
    r"(?P<stem>[A-Za-z_]+)(?:\.(?P<before>[\w-]+?))?(?:-(?P<at>\d{5})-of-(?P<of>\d{5}))?(?:\.(?P<after>[\w-]+))?\.(?P<kind>safetensors|bin)"
)

ReadJson = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Choice:
    """Paths to fetch, those that decide what the folder is last; and what a person should know about them."""

    paths: list[str]
    notes: list[str] = field(default_factory=list)


def choose(sizes: Mapping[str, int], read: ReadJson, inside: str = "", repo: str = "") -> Choice:
    """The smallest files of a repository, or of a folder in it, that make a whole model or part; a file, where `inside` is one.

    sizes  of all its files, by path; read: path to the content of a JSON file
    UserError where nothing there can be used, or where it holds several single files and does not say which.
    """
    if inside in sizes:
        return Choice([inside])
    base = f"{inside}/" if inside else ""
    own = {path.removeprefix(base): size for path, size in sizes.items() if path.startswith(base)}
    if not own:
        there = sorted({path.split("/")[0] for path in sizes})
        raise UserError(f"{repo} has no '{inside}'; there is {', '.join(there[: 2 * SHOWN]) or 'nothing'}.")
    if "model_index.json" in own:
        chosen = _pipeline(own, read(f"{base}model_index.json"), repo)
    elif "config.json" in own and any(path.rpartition("/")[2].startswith(WEIGHTS) for path in own if "/" not in path):
        chosen = _part(own, "", repo)
    else:
        chosen = _single(own, f"{repo}/{base}")
    return Choice([base + path for path in chosen.paths], chosen.notes)


def _pipeline(sizes: Mapping[str, int], index: Mapping[str, Any], repo: str) -> Choice:
    """Every part that a model_index.json names; the index itself last."""
    found = Choice([])
    for part, kind in parts_of(dict(index)).items():
        if not any(path.startswith(f"{part}/") for path in sizes):
            raise UserError(f"{repo}: its model_index.json names the part {part}, of which the repository has no file.")
        one = _part(sizes, f"{part}/", repo, weights=not (kind.endswith(PASSIVE) or "okenizer" in kind))
        found.paths.extend(one.paths)
        found.notes.extend(one.notes)
    if not found.paths:
        raise UserError(f"{repo}: its model_index.json names no parts; expected a model of diffusers.")
    return Choice([*found.paths, "model_index.json"], found.notes)


def _part(sizes: Mapping[str, int], base: str, repo: str, weights: bool = True) -> Choice:
    """The small files of one folder, and one copy of its weights."""
    names = {path.removeprefix(base): size for path, size in sizes.items() if path.startswith(base)}
    names = {name: size for name, size in names.items() if "/" not in name}
    small = [
        name for name, size in names.items() if name.endswith(SMALL) and ".index" not in name and 0 <= size <= MOST_SMALL
    ]  # an index belongs to its weights
    if not weights:
        return Choice([base + name for name in sorted(small)])
    sets = _sets(names)
    if not sets:
        where = base.rstrip("/") or "its folder"
        raise UserError(f"{repo}: {where} holds no complete weights that open here (safetensors or .bin of diffusers' names).")
    best = min(sets, key=lambda one: (not one[0].endswith(SAFE), *_rank(one, names)))
    notes = []
    if not best[0].endswith(SAFE):
        notes.append(f"{base}{best[0]} is a pickle; 'latentpipe convert' turns it into safetensors")
    return Choice([base + name for name in [*sorted(small), *best]], notes)


def _rank(names: list[str], sizes: Mapping[str, int]) -> tuple[bool, int, int]:
    """Weights that are averaged over the training before those that are not, then by size, then without a variant's name."""
    return "non_ema" in names[0], sum(sizes[name] for name in names), len(names[0])


def _sets(sizes: Mapping[str, int]) -> list[list[str]]:
    """Complete copies of a part's weights: one file, or all shards and their index."""
    groups: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for name in sizes:
        found = SHARD.fullmatch(name)
        if found and found["stem"] in WEIGHTS:
            groups[found["stem"], found["before"] or found["after"] or "", found["kind"], found["of"] or ""].append(name)
    complete = []
    for (stem, variant, kind, of), names in groups.items():
        if not of:
            complete.append(names[:1])
            continue
        indexes = [f"{stem}.{kind}.index.json"] if not variant else []
        indexes += [f"{stem}.{kind}.index.{variant}.json", f"{stem}.{variant}.{kind}.index.json"] if variant else []
        index = [name for name in indexes if name in sizes]
        if index and len(names) == int(of):
            complete.append([*sorted(names), index[0]])
    return complete


def _single(sizes: Mapping[str, int], base: str) -> Choice:
    """The only file of weights; a safetensors file before pickles of the same name."""
    held = [path for path in sizes if path.endswith(HELD) and "/" not in path] or [p for p in sizes if p.endswith(HELD)]
    safe = [path for path in held if path.endswith(SAFE)]
    held = safe or held
    if not held:
        raise UserError(f"{base.rstrip('/')} holds no weights that open here; expected safetensors, or a model of diffusers.")
    if len(held) > 1:
        names = ", ".join(f"{base}{path}" for path in sorted(held, key=lambda path: sizes[path])[: 2 * SHOWN])
        more = f" and {len(held) - 2 * SHOWN} more" if len(held) > 2 * SHOWN else ""
        raise UserError(f"{base.rstrip('/')} holds {len(held)} files of weights and no model folder; name one: {names}{more}.")
    path = PurePosixPath(held[0])
    beside = [str(path.with_suffix(ending)) for ending in (".yaml", ".json")]
    return Choice([*(one for one in beside if 0 <= sizes.get(one, -1) <= MOST_SMALL), held[0]])
