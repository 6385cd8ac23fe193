"""What an adapter is trained on: captioned pictures without the held-out ones, their latents, and their pixels."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentpipe.data import emoji
from latentpipe.data.image_folder import read_index, read_pictures
from latentpipe.data.latent_cache import LatentCache, default_path, encode_folder, open_cache
from latentpipe.data.shard_manifest import is_sharded
from latentpipe.data.sharded_latents import ShardedLatents, open_latents
from latentpipe.train.config import LoraData
from latentpipe.train.distributed import DistributedContext
from latentpipe.utils.errors import LatentpipeWarning, UserError, counted
from latentpipe.utils.io import read_header


@dataclass(frozen=True)
class LoraPictures:
    """The pictures of a folder that may be trained on.

    cache     the latents of all of its pictures
    rows      which of them (N) are trained on; sampled latents and `pixels` are looked up by these numbers
    captions  of every picture of the cache, with the trigger words
    left_out  how many were left out for a held-out caption
    pixels    uint8 (all pictures of the cache, 3 H W), or None where they are not asked for
    """

    cache: LatentCache | ShardedLatents
    rows: torch.Tensor
    captions: list[tuple[str, ...]]
    left_out: int
    pixels: torch.Tensor | None = None

    def captions_of(self, chosen: torch.Tensor) -> list[tuple[str, ...]]:
        """Captions of the chosen pictures."""
        return [self.captions[index] for index in chosen.tolist()]


def open_pictures(
    folder: Path,
    vae_folder: Path,
    size_px: int,
    work: Path,
    *,
    held_out: frozenset[str],
    trigger: str = "",
    captioned: bool = True,
    pixels: bool = False,
    column: str | None = None,
    team: DistributedContext | None = None,
) -> LoraPictures:
    """The pictures of a folder with their latents by the VAE in `vae_folder`, encoded on first use.

    folder     of pictures; or what `latentpipe encode` wrote of them, a cache file or a folder of shards

    held_out   captions as `plain` writes them; a picture that has one is left out, in whatever style it is drawn
    captioned  leave out pictures without a caption; UserError where none has one
    pixels     also read the pictures themselves
    column     of the metadata that holds the captions (`image_folder.read_index`)
    team       of which the first process encodes, while the others wait
    """
    if folder.is_file() or is_sharded(folder):
        cache: LatentCache | ShardedLatents = open_latents(folder, vae_folder)
        if cache.size_px != size_px:
            raise UserError(f"{folder} holds latents of {cache.size_px} px, expected {size_px} (data.size_px).")
    elif team is None or team.is_first:
        cache = _latents(folder, vae_folder, size_px, work, column)
        if team is not None:
            team.wait()
    else:
        team.wait()
        cache = _latents(folder, vae_folder, size_px, work, column)
    told = team is None or team.is_first
    all_captions = list(cache.captions)
    held = {index for index, texts in enumerate(all_captions) if any(plain(text) in held_out for text in texts)}
    rows = [index for index, texts in enumerate(all_captions) if index not in held and (texts or not captioned)]
    if held and told:
        warnings.warn(
            LatentpipeWarning(
                f"{folder}: {len(held)} of {counted(len(cache), 'picture')} left out, since their captions are held out"
            ),
            stacklevel=3,
        )
    if not rows:
        none = "have no caption: add 'text' to metadata.jsonl, or a file NAME.txt beside each picture"
        reason = "are held out" if len(held) == len(cache) else none
        raise UserError(f"{folder}: none of its {counted(len(cache), 'picture')} can be trained on; they {reason}.")
    bare = len(cache) - len(held) - len(rows)
    if bare and told:
        warnings.warn(
            LatentpipeWarning(f"{folder}: {bare} of {counted(len(cache), 'picture')} left out, since they have no caption"),
            stacklevel=3,
        )
    captions = [tuple(f"{trigger} {text}".strip() for text in texts) for texts in all_captions]
    images = None
    if pixels:
        images = torch.from_numpy(read_pictures(folder, size_px).pixels).permute(0, 3, 1, 2)
        if len(images) != len(captions):
            raise UserError(f"{folder} changed while it was read; start again.")
    return LoraPictures(cache, torch.tensor(rows), captions, len(held), images)


def roll_of(data: LoraData, vae: Path) -> Counter[str]:
    """What a run is trained on, by name; UserError now where it is no folder of pictures, or no latents of this VAE."""
    if data.train is None:
        return open_latents(data.source, vae).roll()
    return Counter(item.path.relative_to(data.train).as_posix() for item in read_index(data.train, data.caption_column))


def plain(caption: str) -> str:
    """A caption as captions are compared: plain lower-case words (`emoji.caption_of`), whatever their order."""
    return " ".join(sorted(emoji.caption_of("x", caption).split()))


def held_out(exclude: Path | None) -> frozenset[str]:
    """The captions that no training may see, as `plain` writes them: the emoji set's held-out ones, and those of a text file."""
    captions: Iterable[str] = emoji.held_out_captions()
    if exclude is not None:
        try:
            captions = [*captions, *exclude.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.exclude {exclude} cannot be read ({error}); expected a text file, a caption a line.") from None
    return frozenset(plain(text) for text in captions) - {""}


def note_long_captions(tokenizer: Any, captions: Iterable[tuple[str, ...]]) -> None:
    """A warning on how many captions are longer than a text encoder reads."""
    length = tokenizer.model_max_length
    texts = sorted({text for own in captions for text in own})
    long = sum(len(ids) > length for ids in tokenizer(texts, verbose=False).input_ids) if texts else 0
    if long:
        message = (
            f"{long} of {counted(len(texts), 'caption')} are longer than the {length - 2} tokens that the text "
            f"encoder reads; they are cut"
        )
        warnings.warn(LatentpipeWarning(message), stacklevel=3)


def _latents(folder: Path, vae_folder: Path, size_px: int, work: Path, column: str | None) -> LatentCache:
    """The cache of a folder in `work`, made anew where it is stale; one that `latentpipe encode` put into the folder serves too.

    Nothing is written beside people's pictures: a cache there would be taken for a part of the set by whoever copies it.
    """
    usual = default_path(folder, vae_folder, size_px)
    other = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]
    place = work / "latents" / f"{other}-{usual.name}"
    for path in (usual, place):
        if path.is_file() and _is_fresh(path, folder, column):
            return open_cache(path, vae_folder)
    print(f"Encoding the pictures of {folder} at {size_px} px into {place}")
    return encode_folder(folder, vae_folder, place, size_px, column=column)


def _is_fresh(path: Path, folder: Path, column: str | None) -> bool:
    """Whether a cache holds what the folder holds now: the same captions, and no file is newer."""
    items = read_index(folder, column)
    if read_header(path).metadata.get("captions") != json.dumps([item.captions for item in items]):
        return False  # other pictures or other captions; or some could not be read, which may have been mended
    made = path.stat().st_mtime
    return all(item.path.is_file() and item.path.stat().st_mtime <= made for item in items)
