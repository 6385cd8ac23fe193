"""The latents of any number of pictures, in shards: files that workers make independently, each of them whole or not there.

A shard's bytes depend on its pictures, the VAE, the number of threads and the versions alone: not on how many workers there are
or which of them died. That its file is there is all that is kept of a run, so a run that was ended is given again and goes on.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import open_vae
from latentpipe.data.shard_manifest import (
    LOCK,
    Manifest,
    begin,
    is_whole,
    shard_path,
    write_manifest,
)
from latentpipe.data.sources import entries
from latentpipe.utils.atomic import sweep
from latentpipe.utils.cluster import kind_of_devices, opened_on
from latentpipe.utils.errors import LatentpipeWarning, UserError, counted
from latentpipe.utils.io import content_hash, file_hash, printable, read_header, refuse_name
from latentpipe.utils.workers import MOST_WORKERS, Pool
from latentpipe.version import VERSION

PER_SHARD = 1024  # pictures
WRITE_S = 30.0  # between two manifests on the way
SHOWN = 20  # broken pictures that a report names


@dataclass
class EncodedShards:
    """What `encode_shards` did.

    folder    with the manifest and the shards
    pictures  that were listed
    rows      that were encoded, in this run or before
    shards    files in all
    made      shards that this run made; the others were there
    skipped   broken pictures with the reason, of the shards that this run made
    deaths    workers that died and were replaced
    """

    folder: Path
    pictures: int
    rows: int
    shards: int
    made: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    deaths: int = 0

    def report(self) -> str:
        """What was done, in words; the first broken pictures with the reason."""
        broken = self.pictures - self.rows
        lines = [f"{counted(self.rows, 'picture')} in {counted(self.shards, 'shard')} ({self.made} made now), {broken} skipped"]
        lines += [f"  skipped {name}: {reason}" for name, reason in list(self.skipped.items())[:SHOWN]]
        if len(self.skipped) > SHOWN:
            lines.append(f"  and {len(self.skipped) - SHOWN:,} more, which their shards name")
        return printable("\n".join(lines))


def encode_shards(
    folder: Path,
    vae_folder: Path,
    out: Path,
    size_px: int,
    workers: int = 1,
    cluster: str | None = None,
    column: str | None = None,
    per_shard: int = PER_SHARD,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EncodedShards:
    """Encode every picture of a folder into shards in `out`; given again, it makes what is missing.

    folder      of pictures with captions, of WebDataset tars, or of parquet or arrow files; `data.sources`
    vae_folder  name, folder or file of the VAE
    size_px     side that pictures are brought to
    workers     processes, each on a device of its own where there are several
    cluster     address of a Ray cluster whose nodes see `folder`, the VAE and `out` under the same names; None: this machine
    column      that captions are read from; None: text, caption or prompt
    per_shard   pictures in each shard but the last
    threads     of torch in each worker
    progress    is called with the pictures that are done, and all of them

    UserError: nothing to read, a folder of another VAE or of other pictures, a picture that changed, memory or disk that ran out.
    """
    if not 1 <= workers <= MOST_WORKERS:
        raise UserError(f"workers is {workers}; expected 1 to {MOST_WORKERS:,}.")
    folder, out = Path(folder).resolve(), refuse_name(Path(out)).resolve()
    place = find_model(vae_folder, "vae")
    wanted = _wanted(place, size_px, kind_of_devices(cluster), threads, per_shard)
    listed = entries(folder, column)
    first = [*itertools.islice(listed, 1)]  # refused before there is a folder
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        manifest = begin(out, wanted, itertools.chain(first, listed), folder)
        missing = [number for number, shard in enumerate(manifest.shards) if not _kept(out, number, manifest)]
        result = EncodedShards(out, manifest.pictures, 0, len(manifest.shards))
        arguments = {"folder": str(folder), "vae": str(place), "out": str(out)}
        with opened_on(cluster, "latentpipe.data.shard_worker:open_shards", arguments, threads) as opened:
            _make(missing, manifest, result, workers, opened, progress)
        _fill_in(out, manifest)
        write_manifest(out, manifest)
        sweep(out)
        result.rows = manifest.rows
    if not result.rows:
        raise UserError(f"No picture in {folder} could be read.\n{result.report()}")
    return result


def _wanted(place: Path, size_px: int, device: str, threads: int, per_shard: int) -> Manifest:
    """The manifest of a run, without its shards; UserError where the VAE does not take pictures of this size."""
    vae = open_vae(place)
    return Manifest(
        latentpipe=VERSION,
        torch=torch.__version__,
        vae_hash=content_hash(vae.tensors, vae.space),
        size_px=size_px,
        shape=vae.space.shape(1, size_px, size_px)[1:],
        device=device,  # type: ignore[arg-type]
        threads=threads,
        per_shard=per_shard,
    )


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """No other run encodes into a folder inside; the lock ends with the process, however that ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"Another run encodes into {out}; wait until it has ended, or name another folder.") from None
    except NotImplementedError:  # a file system without locks
        pass
    try:
        yield
    finally:
        lock.release()


def _kept(out: Path, number: int, manifest: Manifest) -> bool:
    """Whether a shard need not be made; one that was cut short is told."""
    shard = manifest.shards[number]
    if is_whole(out, number, shard):
        return True
    if shard_path(out, number).exists():
        warnings.warn(LatentpipeWarning(f"{shard_path(out, number)} is damaged, and is made again"), stacklevel=4)
    manifest.shards[number] = shard.model_copy(update={"rows": None, "bytes": None, "sha256": None})
    return False


def _make(
    missing: list[int],
    manifest: Manifest,
    result: EncodedShards,
    workers: int,
    opened: Callable[[int], Any],
    progress: Callable[[int, int], None],
) -> None:
    """Have the missing shards made, and write down what is known of them."""
    done = manifest.pictures - sum(manifest.shards[number].pictures for number in missing)
    progress(done, manifest.pictures)
    written = time.monotonic()

    def died(number: int, how: str) -> None:
        result.deaths += 1
        warnings.warn(LatentpipeWarning(f"the worker of shard {number} died ({how}); it is made again"), stacklevel=2)

    with Pool(workers, opened, lambda number: f"Shard {number}", died) as pool:
        for number, facts in pool.run(missing):
            skipped = facts.pop("skipped")
            manifest.shards[number] = manifest.shards[number].model_copy(update=facts)
            result.skipped |= skipped
            result.made += 1
            done += manifest.shards[number].pictures
            progress(done, manifest.pictures)
            if time.monotonic() - written > WRITE_S:
                write_manifest(result.folder, manifest)
                written = time.monotonic()


def _fill_in(out: Path, manifest: Manifest) -> None:
    """What a run that was ended did not come to write down of its shards."""
    for number, shard in enumerate(manifest.shards):
        if shard.sha256 is None:
            path = shard_path(out, number)
            facts = {"rows": read_header(path).shapes["mean"][0], "bytes": path.stat().st_size, "sha256": file_hash(path)}
            manifest.shards[number] = shard.model_copy(update=facts)
