"""The latents of any number of pictures, in shards: files that workers make independently, each of them whole or not there.

A shard's bytes depend on its pictures, the VAE, the number of threads and the versions alone: not on how many workers there are
or which of them died. That its file is there is all that is kept of a run, so a run that was ended is given again and goes on.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import load_vae, open_vae, vae_hash
from latentpipe.data.image_folder import read_square
from latentpipe.data.shard_manifest import (
    FORMAT,
    LOCK,
    Manifest,
    begin,
    entries_of,
    is_whole,
    read_manifest,
    shard_path,
    write_manifest,
)
from latentpipe.data.sources import Entry, Reader, entries
from latentpipe.utils.atomic import sweep
from latentpipe.utils.cluster import kind_of_devices, opened_on
from latentpipe.utils.errors import LatentpipeWarning, UserError, counted
from latentpipe.utils.images import Unreadable, bytes_to_images
from latentpipe.utils.io import HASH_LENGTH, atomic_file, content_hash, file_hash, printable, read_header, refuse_name
from latentpipe.utils.reading import MOST_HEADER, parse_json
from latentpipe.utils.worker_process import Emit, Job
from latentpipe.utils.workers import MOST_WORKERS, Pool
from latentpipe.vae.precision import all_finite
from latentpipe.vae.stage import VAEStage
from latentpipe.version import VERSION

PER_SHARD = 1024  # pictures
BATCH, BATCH_PIXELS = 32, 2**21  # at most, of pictures and of their pixels; fixed, since another batch may round otherwise
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
    vae = open_vae(place)
    device = kind_of_devices(cluster)
    wanted = Manifest(
        latentpipe=VERSION,
        torch=torch.__version__,
        vae_hash=content_hash(vae.tensors, vae.space),
        size_px=size_px,
        shape=vae.space.shape(1, size_px, size_px)[1:],
        device=device,  # type: ignore[arg-type]
        threads=threads,
        per_shard=per_shard,
    )
    del vae
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        manifest = begin(out, wanted, entries(folder, column), folder)
        missing = [number for number, shard in enumerate(manifest.shards) if not _kept(out, number, manifest)]
        result = EncodedShards(out, manifest.pictures, 0, len(manifest.shards))
        arguments = {"folder": str(folder), "vae": str(place), "out": str(out)}
        with opened_on(cluster, "latentpipe.data.shards", arguments, threads) as opened:
            _make(missing, manifest, result, workers, opened, progress)
        _fill_in(out, manifest)
        write_manifest(out, manifest)
        sweep(out)
        result.rows = manifest.rows
    if not result.rows:
        raise UserError(f"No picture in {folder} could be read.\n{result.report()}")
    return result


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
    import warnings

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
    import warnings

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


# --- in a worker --------------------------------------------------------------------------------------------


def open_job(arguments: dict[str, str], device: str) -> Job:
    """The work of one worker: a shard's number -> its rows, bytes, sha256 and broken pictures."""
    folder, out = Path(arguments["folder"]), Path(arguments["out"])
    manifest = read_manifest(out)
    place = find_model(arguments["vae"], "vae")
    if (digest := vae_hash(place)) != manifest.vae_hash:
        raise UserError(
            f"{out} is of VAE {manifest.vae_hash[:HASH_LENGTH]}, and {place} is {digest[:HASH_LENGTH]} for this worker."
        )
    if torch.__version__ != manifest.torch:
        raise UserError(
            f"{out} was begun with torch {manifest.torch}, and this worker has {torch.__version__}; install the same."
        )
    stage = VAEStage(load_vae(place), tile=None).to(device).eval()
    reader = Reader(folder)

    def work(number: Any, emit: Emit, cancel: threading.Event) -> dict[str, Any]:
        shard = entries_of(out, manifest.shards[number])
        return make_shard(shard_path(out, number), shard, reader, stage, manifest.size_px)

    return work


@torch.no_grad()
def make_shard(path: Path, listed: list[Entry], reader: Reader, stage: VAEStage, size_px: int) -> dict[str, Any]:
    """Encode the pictures of a shard, and write its file; returns its rows, bytes, sha256 and broken pictures."""
    skipped: dict[str, str] = {}
    kept: list[Entry] = []
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch, pixels in _batches(listed, reader, size_px, skipped):
        mean, std = stage.posterior(bytes_to_images(torch.from_numpy(pixels).permute(0, 3, 1, 2)).to(stage.device))
        half = mean.half().cpu(), std.half().cpu()
        if not all_finite(half):
            raise UserError(
                f"The VAE gives latents beyond the range of fp16 (65,504) for {batch[0].name} or a picture near it; its "
                "normalization is not that of its weights. Expected latents of about mean 0 and standard deviation 1."
            )
        parts.append(half)
        kept += batch
    side = stage.space.shape(0, size_px, size_px)
    mean, std = (torch.cat([torch.empty(side, dtype=torch.float16), *(pair[index] for pair in parts)]) for index in range(2))
    texts = [json.dumps(entry.captions).encode() if entry.captions else b"" for entry in kept]
    kinds = sorted({entry.kind for entry in kept})
    tensors = {"mean": mean.contiguous(), "std": std.contiguous(), **_packed(texts)}
    if any(kinds):
        tensors["kinds"] = torch.tensor([kinds.index(entry.kind) for entry in kept], dtype=torch.int32)
    facts = {"kinds": kinds if any(kinds) else [], "skipped": skipped}
    with atomic_file(path) as part:
        save_file(tensors, part, metadata={FORMAT: json.dumps(facts)})  # one entry: several would be written in any order
        digest, size = file_hash(part), part.stat().st_size
    return {"rows": len(kept), "bytes": size, "sha256": digest, "skipped": skipped}


def _packed(texts: list[bytes]) -> dict[str, torch.Tensor]:
    """Texts end to end, and where each of them ends: of a mapped file one is read without the others."""
    ends = torch.tensor([len(text) for text in texts], dtype=torch.int64).cumsum(0)
    return {"captions": torch.from_numpy(np.frombuffer(b"".join(texts), np.uint8).copy()), "caption_ends": ends}


def _batches(
    listed: list[Entry], reader: Reader, size_px: int, skipped: dict[str, str]
) -> Iterator[tuple[list[Entry], np.ndarray]]:
    """The pictures that can be read with their pixels, so many at a time as depend on their size alone."""
    most = max(1, min(BATCH, BATCH_PIXELS // size_px**2))
    batch: list[Entry] = []
    pixels: list[np.ndarray] = []
    for entry in listed:
        data = reader.bytes_of(entry)
        if data is None:
            skipped[printable(entry.name)] = "no such file"
            continue
        try:
            pixels.append(read_square(Path(entry.name), size_px, data))
        except UserError as error:
            if not isinstance(error, Unreadable):
                raise
            skipped[printable(entry.name)] = error.reason
            continue
        batch.append(entry)
        if len(batch) == most:
            yield batch, np.stack(pixels)
            batch, pixels = [], []
    if batch:
        yield batch, np.stack(pixels)


def skipped_in(path: Path) -> dict[str, str]:
    """The broken pictures that a shard names, with the reason."""
    return parse_json(read_header(path).metadata.get(FORMAT, "{}"), most=MOST_HEADER).get("skipped", {})
