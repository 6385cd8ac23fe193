"""Content hashes of a single file's parts, the same as of a diffusers folder with the same weights; each when it is asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from latentpipe.checkpoints.single_file.gather import Opened, Stated, open_file
from latentpipe.checkpoints.single_file.gguf_tensors import as_stored
from latentpipe.checkpoints.single_file.opening import part_tensors
from latentpipe.checkpoints.text_names import as_hashed
from latentpipe.utils.io import content_hash
from latentpipe.vae.latent_space import LatentSpace


class Hashes(Mapping[str, str]):
    """Names of parts -> hashes that are computed when they are first asked for; how many there are is known at once."""

    def __init__(self, compute: Mapping[str, Callable[[], str]]) -> None:
        self._compute = dict(compute)
        self._found: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        if name not in self._found:
            self._found[name] = self._compute[name]()
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._compute)

    def __len__(self) -> int:
        return len(self._compute)


def file_hashes(path: Path, stated: Stated | None = None) -> Hashes:
    """Hashes of what decides the pictures of a file: networks by their contents, tokenizers and the scheduler."""
    opened = open_file(path, stated)
    jobs: dict[str, Callable[[], str]] = {name: lambda name=name: _network(opened, name) for name in opened.sources}  # type: ignore[misc]
    for name in sorted(opened.configs.index):
        if name.startswith("tokenizer") and opened.configs.index[name][0]:
            jobs[name] = lambda name=name: _tokenizer(opened, name)  # type: ignore[misc]
    scheduler = {key: value for key, value in opened.configs.scheduler.items() if key != "_diffusers_version"}
    jobs["scheduler"] = lambda: hashlib.sha256(json.dumps(scheduler, sort_keys=True).encode()).hexdigest()
    return Hashes(jobs)


def former_file_hash(path: Path, stated: Stated | None, component: str) -> str | None:
    """The hash of a text encoder over its tensors as they are named where they lie, as it was taken before."""
    opened = open_file(path, stated)
    return content_hash(part_tensors(opened, component)) if component in opened.sources else None


def _network(opened: Opened, component: str) -> str:
    tensors = part_tensors(opened, component)
    if component == "vae":
        return content_hash(tensors, LatentSpace.from_config(opened.config("vae")))
    return content_hash(as_hashed(as_stored(tensors), str(opened.configs.index[component][1])))


def _tokenizer(opened: Opened, name: str) -> str:
    folder = opened.configs.folder
    if folder is None:
        return hashlib.sha256(json.dumps(opened.configs.tokenizers[name], sort_keys=True).encode()).hexdigest()
    digest = hashlib.sha256()
    for file in ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model"):
        if (folder / name / file).is_file():
            digest.update((folder / name / file).read_bytes())
    return digest.hexdigest()
