"""What a folder of shards says of itself: which pictures, by which VAE, how, and which of its files are done.

DIR/manifest.json              this
DIR/index.jsonl                a line for each picture that was listed, in order
DIR/shard-000000.safetensors   its latents
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from latentpipe.data.sources import Entry, as_line, changed, from_line
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.io import HASH_LENGTH, atomic_file, read_header
from latentpipe.utils.reading import MOST_HEADER, parse_json, read_text, validated

MANIFEST, INDEX, LOCK = "manifest.json", "index.jsonl", ".lock"
FORMAT = "latentpipe.shards.1"
Count = Annotated[int, Field(ge=0, le=2**53)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class ShardFile(BaseModel):
    """One shard: which pictures it is of, and, once it is known to be done, what it holds."""

    model_config = ConfigDict(extra="forbid")

    pictures: Annotated[int, Field(ge=1, le=2**20)]
    """Lines of the index."""
    begins: Count
    """Byte of the index that its first line begins at."""
    rows: Count | None = None
    """Pictures that could be read."""
    bytes: Count | None = None
    sha256: Digest | None = None


class Manifest(BaseModel):
    """What all shards of a folder have in common, and the list of them."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["latentpipe.shards.1"] = "latentpipe.shards.1"
    latentpipe: str
    """Versions of what made them: others may round otherwise."""
    torch: str
    vae_hash: Digest
    size_px: Annotated[int, Field(ge=1, le=2**16)]
    shape: tuple[Count, Count, Count]
    """Channels, height and width of the latents."""
    dtype: Literal["float16"] = "float16"
    device: Literal["cpu", "cuda", "mps"]
    threads: Annotated[int, Field(ge=1, le=1024)]
    """Of torch, in each worker."""
    per_shard: Annotated[int, Field(ge=1, le=2**20)]
    shards: list[ShardFile] = []

    @property
    def pictures(self) -> int:
        """That were listed."""
        return sum(shard.pictures for shard in self.shards)

    @property
    def rows(self) -> int:
        """That were encoded, in the shards that are done."""
        return sum(shard.rows or 0 for shard in self.shards)

    @property
    def missing(self) -> int:
        """Shards that are not known to be done."""
        return sum(shard.sha256 is None for shard in self.shards)


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:06d}.safetensors"


def is_sharded(folder: Path) -> bool:
    """Whether a folder has a manifest."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; UserError where there is none, or it is no such file."""
    path = folder / MANIFEST
    text = read_text(path, MOST_HEADER, "the manifest of shards that 'latentpipe encode --shards' writes")
    try:
        return validated(parse_json(text, most=MOST_HEADER), Manifest, str(path))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: not a manifest that is read here ({error}).") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it, whole or not at all."""
    with atomic_file(folder / MANIFEST) as part:
        part.write_text(manifest.model_dump_json(exclude_none=True).replace("},{", "},\n{") + "\n")


def begin(folder: Path, wanted: Manifest, listed: Iterable[Entry], source: Path) -> Manifest:
    """The manifest of a folder with the list of its shards: a new one, or the one that is there, which is the same run's.

    wanted  without shards
    UserError where what is there is another VAE's, was made otherwise, or is of other pictures.
    """
    lines = map(as_line, listed)
    if not is_sharded(folder):
        if any(folder.glob("shard-*.safetensors")):
            raise UserError(
                f"{folder} has shards and no {MANIFEST} that says what they are of; name another folder, or delete them."
            )
        manifest = wanted.model_copy(update={"shards": _write_index(folder, lines, wanted.per_shard)})
        if not manifest.shards:
            raise UserError(f"{source} holds no picture.")
        write_manifest(folder, manifest)
        return manifest
    there = read_manifest(folder)
    if there.vae_hash != wanted.vae_hash:
        raise UserError(
            f"{folder} holds latents of VAE {there.vae_hash[:HASH_LENGTH]}, and this one is {wanted.vae_hash[:HASH_LENGTH]}; "
            "name another folder for it."
        )
    for name in ("size_px", "per_shard", "threads", "device", "latentpipe", "torch"):
        before, now = getattr(there, name), getattr(wanted, name)
        if before != now:
            raise UserError(
                f"{folder} was begun with {name} {before}, and this run has {now}, whose results may differ; go on with the "
                "same, or name another folder."
            )
    with open(folder / INDEX, encoding="utf-8") as kept:
        for before, now in itertools.zip_longest(kept, lines):
            if before != now:
                raise UserError(changed(source, from_line(before or now or "").name))
    return there


def _write_index(folder: Path, lines: Iterable[str], per_shard: int) -> list[ShardFile]:
    shards: list[ShardFile] = []
    at = begins = count = 0
    with atomic_file(folder / INDEX) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
        for line in lines:
            file.write(line)
            at, count = at + len(line), count + 1  # JSON in ASCII: a byte a character
            if count == per_shard:
                shards.append(ShardFile(pictures=count, begins=begins))
                begins, count = at, 0
    return [*shards, ShardFile(pictures=count, begins=begins)] if count else shards


def entries_of(folder: Path, shard: ShardFile) -> list[Entry]:
    """The pictures that a shard is of."""
    with open(folder / INDEX, encoding="utf-8") as file:
        file.seek(shard.begins)
        try:
            return [from_line(file.readline()) for _ in range(shard.pictures)]
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{folder / INDEX} is not the index of its manifest ({error}); encode anew into another folder."
            ) from None


def is_whole(folder: Path, number: int, shard: ShardFile) -> bool:
    """Whether the file of a shard is there in its whole length."""
    path = shard_path(folder, number)
    if not path.is_file() or (shard.bytes is not None and path.stat().st_size != shard.bytes):
        return False
    try:
        return FORMAT in read_header(path).metadata
    except UserError:
        return False


def unfinished(folder: Path, manifest: Manifest) -> UserError:
    """What a person is told who wants to use shards that are not all there."""
    return UserError(
        f"{folder} is not finished: {manifest.missing} of {counted(len(manifest.shards), 'shard')} missing; give the same "
        "'latentpipe encode' again, which goes on from there."
    )
