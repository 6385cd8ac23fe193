"""The latents in a folder of shards, to train on: mapped, so that memory holds the rows of a step and not those of the set."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from latentpipe.checkpoints.vae_io import vae_hash
from latentpipe.data.latent_cache import LatentCache, open_cache, weights_of_kinds
from latentpipe.data.shard_manifest import FORMAT, Manifest, is_sharded, read_manifest, shard_path, unfinished
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import HASH_LENGTH, read_header
from latentpipe.utils.reading import MOST_HEADER, parse_json
from latentpipe.vae.precision import all_finite

MOST_OPEN = 512  # shards that are mapped at once; the system allows a process some 65,000 maps


def open_latents(path: Path, vae_folder: Path) -> LatentCache | ShardedLatents:
    """The latents that `latentpipe encode` wrote: a cache file, or a folder of shards.

    UserError where they are damaged or unfinished, or were made by another VAE than the one in `vae_folder`.
    """
    if path.is_dir() and not is_sharded(path):
        raise UserError(f"{path} is a folder without a manifest; expected a latent cache, or shards ('latentpipe encode').")
    return ShardedLatents(path, vae_folder) if path.is_dir() else open_cache(path, vae_folder)


class ShardedLatents:
    """As `LatentCache`, of a folder of shards; rows are numbered through all of them.

    shape     channels, height and width of the latents
    captions  of each row, read when they are asked for
    """

    def __init__(self, folder: Path, vae_folder: Path) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest.missing:
            raise unfinished(self.folder, manifest)
        digest = vae_hash(vae_folder)
        if manifest.vae_hash != digest:
            raise UserError(
                f"{self.folder} holds latents of VAE {manifest.vae_hash[:HASH_LENGTH]}, but {vae_folder} is "
                f"{digest[:HASH_LENGTH]}; encode the pictures again with 'latentpipe encode --shards'."
            )
        self._check_sizes(manifest)
        self.size_px, self.vae_hash, self.shape = manifest.size_px, manifest.vae_hash, manifest.shape
        self._manifest = manifest
        self._starts = np.cumsum([0, *(shard.rows or 0 for shard in manifest.shards)])
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self.captions: Sequence[tuple[str, ...]] = _Captions(self)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def roll(self) -> Counter[str]:
        """What it was made of, to be compared with what a run began with: each shard's hash, with its rows."""
        return Counter({str(shard.sha256): shard.rows or 0 for shard in self._manifest.shards})

    def captioned(self) -> torch.Tensor:
        """The rows that have a caption."""
        found = [
            start + np.flatnonzero(np.diff(shard.ends, prepend=0))
            for start, shard in zip(self._starts.tolist(), self._each(), strict=False)
        ]
        return torch.from_numpy(np.concatenate(found))

    def weights(self, of_kinds: Mapping[str, float]) -> list[float]:
        """As `LatentCache.weights`."""
        kinds = [kind for shard in self._each() for kind in shard.kinds()]
        return weights_of_kinds(kinds, of_kinds)

    def means(self, chosen: torch.Tensor) -> torch.Tensor:
        """The means (B C h w, fp32) of the chosen rows."""
        return self._rows("mean", chosen)

    def sample(self, chosen: torch.Tensor, generator: torch.Generator, mine: slice = slice(None)) -> torch.Tensor:
        """As `LatentCache.sample`; rows that are not `mine` are not read."""
        noise = torch.randn((len(chosen), *self.shape), generator=generator)[mine]
        return self._rows("mean", chosen[mine]) + self._rows("std", chosen[mine]) * noise

    def _rows(self, name: str, chosen: torch.Tensor) -> torch.Tensor:
        found = torch.empty((len(chosen), *self.shape))
        for place, row in enumerate(chosen.tolist()):
            shard, own = self._place(row)
            found[place] = (shard.mean if name == "mean" else shard.std)[own : own + 1][0]
        if not all_finite((found,)):
            raise UserError(f"{self.folder}: its shards hold values that are not finite; encode the pictures again.")
        return found

    def _place(self, row: int) -> tuple[_Shard, int]:
        """The shard of a row, and the row in it."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self._shard(number), row - int(self._starts[number])

    def _shard(self, number: int) -> _Shard:
        if number not in self._open:
            while len(self._open) >= MOST_OPEN:
                self._open.popitem(last=False)
            rows = self._manifest.shards[number].rows or 0
            self._open[number] = _Shard.at(shard_path(self.folder, number), (rows, *self.shape))
        self._open.move_to_end(number)
        return self._open[number]

    def _each(self) -> Iterator[_Shard]:
        for number in range(len(self._manifest.shards)):
            yield self._shard(number)

    def _check_sizes(self, manifest: Manifest) -> None:
        """UserError where a shard is gone or cut short."""
        for number, shard in enumerate(manifest.shards):
            path = shard_path(self.folder, number)
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                state = "is gone" if size is None else f"has {size:,} bytes, expected {shard.bytes:,}"
                raise UserError(f"{path} {state}; give the same 'latentpipe encode' again, which makes it anew.")


@dataclass
class _Shard:
    """A mapped file: mean and std as safetensors' slices, the captions' bytes and their ends, the kinds."""

    mean: Any
    std: Any
    text: Any
    ends: np.ndarray
    _names: list[str]
    _kinds: np.ndarray | None

    @classmethod
    def at(cls, path: Path, shape: tuple[int, ...]) -> _Shard:
        from safetensors import safe_open

        header = read_header(path)
        wanted = {"mean": (shape, "F16"), "std": (shape, "F16"), "caption_ends": (shape[:1], "I64")}
        found = {name: (header.shapes[name], header.dtypes[name]) for name in wanted if name in header.shapes}
        texts = header.shapes.get("captions", ())
        if found != wanted or len(texts) != 1 or header.dtypes["captions"] != "U8":
            raise UserError(f"{path} is damaged: its tensors are {header.shapes}; delete it, and encode the pictures again.")
        file: Any = safe_open(path, "pt")
        ends = file.get_tensor("caption_ends").numpy()
        kinds = file.get_tensor("kinds").numpy() if header.dtypes.get("kinds") == "I32" else None
        try:
            names = list(map(str, parse_json(header.metadata[FORMAT], most=MOST_HEADER)["kinds"]))
        except (ValueError, KeyError, TypeError):
            names = []
        numbered = kinds is None or (kinds.shape == shape[:1] and (kinds >= 0).all() and (kinds < len(names)).all())
        if not numbered or (np.diff(ends, prepend=0) < 0).any() or (ends[-1:] != texts).any():
            raise UserError(f"{path} is damaged: its captions or kinds are cut; delete it, and encode the pictures again.")
        return cls(file.get_slice("mean"), file.get_slice("std"), file.get_slice("captions"), ends, names, kinds)

    def captions(self, row: int) -> tuple[str, ...]:
        """Those of one row."""
        begin, end = int(self.ends[row - 1]) if row else 0, int(self.ends[row])
        return _parsed(self.text[begin:end].numpy().tobytes()) if end > begin else ()

    def all_captions(self) -> Iterator[tuple[str, ...]]:
        """Those of all rows, in order."""
        data = self.text[: int(self.ends[-1])].numpy().tobytes() if len(self.ends) and self.ends[-1] else b""
        begin = 0
        for end in self.ends.tolist():
            yield _parsed(data[begin:end]) if end > begin else ()
            begin = end

    def kinds(self) -> list[str]:
        """The kind of each row; "" where it has none."""
        return [""] * len(self.ends) if self._kinds is None else [self._names[kind] for kind in self._kinds.tolist()]


def _parsed(data: bytes) -> tuple[str, ...]:
    try:
        return tuple(map(str, parse_json(data.decode())))
    except (ValueError, TypeError) as error:
        raise UserError(f"A shard's captions are damaged ({error}); encode the pictures again.") from None


class _Captions(Sequence[tuple[str, ...]]):
    """The captions of all rows, none of which is kept."""

    def __init__(self, of: ShardedLatents) -> None:
        self._of = of

    def __len__(self) -> int:
        return len(self._of)

    @overload
    def __getitem__(self, row: int) -> tuple[str, ...]: ...

    @overload
    def __getitem__(self, row: slice) -> list[tuple[str, ...]]: ...

    def __getitem__(self, row: int | slice) -> tuple[str, ...] | list[tuple[str, ...]]:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        shard, own = self._of._place(row)
        return shard.captions(own)

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        for shard in self._of._each():
            yield from shard.all_captions()
