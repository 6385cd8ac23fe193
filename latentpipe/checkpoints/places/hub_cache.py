"""The local hub cache, read offline: ids such as ``org/name@revision``, the snapshot that they mean, and whether it is whole."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentpipe.utils.errors import UserError, near
from latentpipe.utils.reading import read_json, read_text

ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?P<inside>(?:/[^/@]+)*)(?:@(?P<revision>[^@\s]+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
LEAST_PREFIX = 7  # characters of a commit that stand for it
SHOWN = 5  # names in a sentence
WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")  # what diffusers and transformers name a part's weights
INDEXES = ("model_index.json", "config.json")  # of a model, of a part
PASSIVE = ("Tokenizer", "TokenizerFast", "Scheduler", "Processor", "Extractor")  # classes without weights


@dataclass(frozen=True)
class HubId:
    """``org/name``, its branch, tag or commit (None: main), and a folder or file inside ("": all of it)."""

    repo: str
    revision: str | None = None
    inside: str = ""

    def __str__(self) -> str:
        return self.repo + (f"/{self.inside}" if self.inside else "") + (f"@{self.revision}" if self.revision else "")


def parse_id(text: str) -> HubId | None:
    """``org/name``, ``org/name/sub/folder``, either with ``@revision``; None where a text is no such id."""
    found = ID.fullmatch(text)
    if found is None or "--" in found["repo"] or ".." in found["repo"]:
        return None
    parts = [*found["inside"].split("/"), *(found["revision"] or "").split("/")]
    if any(part in (".", "..") for part in parts):
        return None
    return HubId(found["repo"], found["revision"], found["inside"].strip("/"))


def default_cache() -> Path:
    """Where the hub's libraries keep what they fetch: $HF_HUB_CACHE, else $HF_HOME/hub, else ~/.cache/huggingface/hub."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return _expanded(os.environ[name])
    home = os.environ.get("HF_HOME")
    if home:
        return _expanded(home) / "hub"
    return _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def _expanded(text: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(text)))


def storage(cache: Path, repo: str) -> Path:
    """The folder of a repository in a cache."""
    return cache / f"models--{repo.replace('/', '--')}"


def cached(name: str, caches: Sequence[Path] | None = None) -> Path | None:
    """The folder or file in a local hub cache that an id means; None where no cache holds its repository, or it is no id.

    UserError where the repository is there, but not this revision, or not all of it: it says what is missing, and how to get it.
    """
    hub = parse_id(name)
    if hub is None:
        return None
    wrong: UserError | None = None
    for cache in [default_cache()] if caches is None else caches:
        folder = storage(cache, hub.repo)
        try:
            if (folder / "snapshots").is_dir():
                return _place(folder, hub)
        except UserError as error:
            wrong = wrong or error
        except OSError as error:
            raise UserError(f"{error.filename or folder}: cannot be read ({(error.strerror or str(error)).lower()}).") from None
    if wrong is not None:
        raise wrong
    return None


def repositories(cache: Path) -> dict[str, Path]:
    """Ids of the models in a cache, and the snapshot of main (of the only commit, where main is not known)."""
    found: dict[str, Path] = {}
    for folder in sorted(cache.glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        if parse_id(repo) is None or not (folder / "snapshots").is_dir():
            continue
        commits = _commits(folder)
        main = _ref(folder, "main")
        if main in commits:
            found[repo] = folder / "snapshots" / main
        elif len(commits) == 1:
            found[f"{repo}@{commits[0]}"] = folder / "snapshots" / commits[0]
    return found


def id_of(place: Path) -> str | None:
    """The id, with its commit, of a folder or file within a cache's snapshots; None for one elsewhere."""
    parts = place.parts
    for at, part in enumerate(parts[:-2]):
        if part.startswith("models--") and parts[at + 1] == "snapshots" and COMMIT.fullmatch(parts[at + 2]):
            hub = HubId(part.removeprefix("models--").replace("--", "/", 1), parts[at + 2], "/".join(parts[at + 3 :]))
            return str(hub) if parse_id(str(hub)) else None
    return None


# --- which snapshot -----------------------------------------------------------------------------------------


def _place(folder: Path, hub: HubId) -> Path:
    commit = _commit(folder, hub)
    snapshot = folder / "snapshots" / commit
    place = snapshot / hub.inside if hub.inside else snapshot
    if not place.exists():
        if os.path.islink(place):
            raise UserError(f"{_told(hub, commit)} is incomplete: {hub.inside} leads nowhere. {_pull(hub)}")
        there = sorted(path.name for path in place.parent.iterdir()) if place.parent.is_dir() else []
        raise UserError(
            f"{_told(hub, commit)} has no '{hub.inside}'; there is {', '.join(there[:SHOWN]) or 'nothing'}."
            f"{near(place.name, there)} {_pull(hub)}"
        )
    lacking = [*missing(place), *_cut(folder, snapshot, place, commit)]
    if lacking:
        more = f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
        raise UserError(f"{_told(hub, commit)} is incomplete; missing: {', '.join(lacking[:SHOWN])}{more}. {_pull(hub)}")
    return _alone(place, hub)


def _commit(folder: Path, hub: HubId) -> str:
    revision, commits = hub.revision or "main", _commits(folder)
    commit = revision if COMMIT.fullmatch(revision) else _ref(folder, revision)
    if commit is None:
        same = [one for one in commits if one.startswith(revision)] if len(revision) >= LEAST_PREFIX else []
        commit = same[0] if len(same) == 1 else None
    if commit in commits:
        return str(commit)
    there = f"there is {', '.join(f'{hub.repo}@{one}' for one in commits[:SHOWN])}" if commits else "there is no other"
    now = f" (now {commit[:12]})" if commit and commit != revision else ""
    raise UserError(f"{hub.repo} is in the hub cache, but not its revision '{revision}'{now}; {there}. {_pull(hub)}")


def _commits(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "snapshots").iterdir() if path.is_dir() and COMMIT.fullmatch(path.name))


def _ref(folder: Path, revision: str) -> str | None:
    """The commit that a branch or tag meant when it was fetched last; None where that is not known."""
    path = folder / "refs" / revision
    if not path.is_file():
        return None
    try:
        commit = read_text(path, 100, "a commit of 40 hexadecimal digits").strip()
    except UserError:
        return None
    return commit if COMMIT.fullmatch(commit) else None


def _told(hub: HubId, commit: str) -> str:
    return f"{hub.repo} in the hub cache (commit {commit[:12]})"


def _pull(hub: HubId) -> str:
    return f"'latentpipe pull {hub}' fetches what is missing."


def _alone(place: Path, hub: HubId) -> Path:
    """The folder of a model or a part; of a repository of single files the only one."""
    if place.is_file() or any((place / name).is_file() for name in INDEXES):
        return place
    files = sorted(path for path in place.glob("*") if path.suffix in (".safetensors", ".sft"))
    if len(files) == 1:
        return files[0]
    if len(files) > 1:
        base = f"{hub.repo}/{hub.inside}".rstrip("/")
        tail = f"@{hub.revision}" if hub.revision else ""
        names = ", ".join(f"{base}/{path.name}{tail}" for path in files[:SHOWN])
        raise UserError(f"{hub} holds {len(files)} files of weights and no model folder; name one of them: {names}.")
    raise UserError(f"{place} holds neither a model nor a part of one ({' or '.join(INDEXES)}) nor safetensors. {_pull(hub)}")


# --- whether it is whole ------------------------------------------------------------------------------------


def missing(place: Path) -> list[str]:
    """What a model's or a part's folder (or a file) lacks, by its names in there: files that its index names, links that lead
    nowhere, weights.
    """
    if place.is_file():
        return []
    lacking = [path.relative_to(place).as_posix() for path in _links(place) if not path.exists()]
    index = place / "model_index.json"
    if index.is_file():
        for part, kind in parts_of(read_json(index)).items():
            lacking += [f"{part}/{name}" for name in _lacks(place / part, kind)]
    elif (place / "config.json").is_file() and "_class_name" in read_json(place / "config.json"):
        lacking += _lacks(place, "")
    return list(dict.fromkeys(lacking))


def parts_of(index: dict[str, Any]) -> dict[str, str]:
    """Class of each part that a model_index.json names."""
    return {
        name: source[1]
        for name, source in index.items()
        if isinstance(source, list) and len(source) == 2 and all(isinstance(one, str) for one in source) and name.isidentifier()
    }


def _lacks(folder: Path, kind: str) -> list[str]:
    """What one part lacks."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return ["(all of it)"]
    if kind.endswith(PASSIVE) or "okenizer" in kind:
        return []
    if not os.path.lexists(folder / "config.json"):
        return ["config.json"]
    indexes = [path for stem in WEIGHTS for path in sorted(folder.glob(f"{stem}*.index*.json")) if path.exists()]
    sets = [_shards(index) for index in indexes]
    single = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin") and "-of-" not in path.name]
    if single or any(all(os.path.lexists(folder / name) for name in names) for names in sets):
        return []
    return [name for name in sets[0] if not os.path.lexists(folder / name)] if sets else [f"{WEIGHTS[0]}.safetensors (weights)"]


def _shards(index: Path) -> list[str]:
    listed = read_json(index).get("weight_map")
    return sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []


def _links(place: Path) -> Iterator[Path]:
    for at, folders, names in os.walk(place):
        yield from (path for path in (Path(at, name) for name in [*folders, *names]) if path.is_symlink())


def _cut(folder: Path, snapshot: Path, place: Path, commit: str) -> list[str]:
    """An index that is not there, and files of another size than the hub said, where its libraries kept what it said."""
    listing = folder / "trees" / f"{commit}.json"
    if not listing.is_file():
        return []
    try:
        files = read_json(listing).get("files")
    except UserError:
        return []  # of another version, or damaged: nothing is known
    wrong = []
    for name, known in files.items() if isinstance(files, dict) else ():
        path = snapshot / str(name)
        size = known.get("size") if isinstance(known, dict) else None
        inside = path == place or place in path.parents
        if path.parent == place and path.name in INDEXES and not os.path.lexists(path):
            wrong.append(path.name)
        if inside and isinstance(size, int) and path.is_file() and path.stat().st_size != size:
            wrong.append(f"{name} (it has {path.stat().st_size:,} of {size:,} bytes)")
    return wrong
