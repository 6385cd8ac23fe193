"""One worker of an encoding in shards: it reads the pictures of a shard, encodes them, and writes its file."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import load_vae, vae_hash
from latentpipe.data.image_folder import read_square
from latentpipe.data.shard_manifest import FORMAT, entries_of, read_manifest, shard_path
from latentpipe.data.sources import Entry, Reader
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import Unreadable, bytes_to_images
from latentpipe.utils.io import HASH_LENGTH, atomic_file, file_hash, printable, read_header
from latentpipe.utils.reading import MOST_HEADER, parse_json
from latentpipe.utils.worker_process import Emit, Job
from latentpipe.vae.precision import all_finite
from latentpipe.vae.stage import VAEStage

BATCH, BATCH_PIXELS = 32, 2**21  # at most, of pictures and of their pixels; fixed, since another batch may round otherwise
READERS = 4  # threads that decode pictures for a GPU


def open_shards(arguments: dict[str, str], device: str) -> Job:
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
    threads = 0 if stage.device.type == "cpu" else READERS  # a worker of the processor has one thread, and uses it
    for batch, pixels in _batches(listed, reader, size_px, skipped, threads):
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
    listed: list[Entry], reader: Reader, size_px: int, skipped: dict[str, str], threads: int
) -> Iterator[tuple[list[Entry], np.ndarray]]:
    """The pictures that can be read with their pixels, so many at a time as depend on their size alone."""
    most = max(1, min(BATCH, BATCH_PIXELS // size_px**2))
    batch: list[Entry] = []
    pixels: list[np.ndarray] = []
    for entry, found in _squares(listed, reader, size_px, threads, 2 * most):
        if isinstance(found, str):
            skipped[printable(entry.name)] = found
            continue
        batch.append(entry)
        pixels.append(found)
        if len(batch) == most:
            yield batch, np.stack(pixels)
            batch, pixels = [], []
    if batch:
        yield batch, np.stack(pixels)


def _squares(
    listed: list[Entry], reader: Reader, size_px: int, threads: int, ahead: int
) -> Iterator[tuple[Entry, np.ndarray | str]]:
    """Each picture's pixels, or why it cannot be read; in order, decoded in so many threads beside this one, so far ahead."""
    if not threads:
        for entry in listed:
            yield entry, _square(entry, reader.bytes_of(entry), size_px)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="pictures") as pool:
        waiting: deque[tuple[Entry, Future[np.ndarray | str]]] = deque()
        for entry in listed:
            waiting.append((entry, pool.submit(_square, entry, reader.bytes_of(entry), size_px)))
            if len(waiting) > ahead:
                first, found = waiting.popleft()
                yield first, found.result()
        for first, found in waiting:
            yield first, found.result()


def _square(entry: Entry, data: bytes | str, size_px: int) -> np.ndarray | str:
    if isinstance(data, str):
        return data
    try:
        return read_square(Path(entry.name), size_px, data)
    except Unreadable as error:
        return error.reason


def skipped_in(path: Path) -> dict[str, str]:
    """The broken pictures that a shard names, with the reason."""
    return parse_json(read_header(path).metadata.get(FORMAT, "{}"), most=MOST_HEADER).get("skipped", {})
