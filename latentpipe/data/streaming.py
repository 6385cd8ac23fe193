"""A folder of any size as training pictures: read when they are needed, kept as far as memory allows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
import torch

from latentpipe.data.image_folder import Item, read_index, read_square
from latentpipe.utils.errors import LatentpipeWarning, UserError, counted
from latentpipe.utils.images import Unreadable
from latentpipe.utils.io import printable
from latentpipe.vae import memory

READERS = 4
EAGER = 4096  # files that are read before the first step, so that bad ones are told at once
KEPT_SHARE = 0.25  # of the free memory, for pictures that were read


class PictureStream:
    """Pictures of a folder as uint8 squares of `size_px`, in the order of its index.

    A file that cannot be read is named once and replaced by the next one that can, so that the order of the others, and
    with it an exact resume, does not depend on it. Several `processes` share the machine's memory.
    """

    def __init__(self, folder: Path, size_px: int, processes: int = 1) -> None:
        self.folder, self.size_px = Path(folder), size_px
        self.items: list[Item] = read_index(self.folder, captions=False)
        self.skipped: dict[str, str] = {}
        each = size_px * size_px * 3
        room = int(memory.available(torch.device("cpu")) * KEPT_SHARE / processes) // each
        kept = min(len(self.items), max(room, 1))
        self._kept = np.empty((kept, size_px, size_px, 3), np.uint8)  # pages are used only once they are written
        self._known = np.zeros(len(self.items), np.uint8)  # 1: in _kept, 2: cannot be read
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="pictures")
        self._ahead: dict[int, Future[np.ndarray | None]] = {}
        if len(self.items) <= EAGER:
            list(self._pool.map(self._try, range(len(self.items))))
        self._one_is_readable()

    def __len__(self) -> int:
        return len(self.items)

    def report(self) -> str:
        """One line on what there is, and one for each file that was skipped so far."""
        if len(self.items) > EAGER:
            head = f"{counted(len(self.items), 'picture')}, read as they are needed"
        else:
            head = f"{counted(len(self.items) - len(self.skipped), 'picture')} read, {len(self.skipped)} skipped"
        return printable("\n".join([head, *(f"  skipped {name}: {reason}" for name, reason in sorted(self.skipped.items()))]))

    def batch(self, chosen: Sequence[int], ahead: Sequence[int] = ()) -> torch.Tensor:
        """The chosen pictures, uint8 B 3 H W; those of `ahead` are begun to be read for the next call."""
        reading = self._ahead | {index: self._submit(index) for index in map(int, chosen) if index not in self._ahead}
        pixels = [self._picture(index, reading[index].result()) for index in map(int, chosen)]
        self._ahead = {int(index): self._submit(int(index)) for index in ahead}
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)

    def sample(self, max_images: int) -> list[int]:
        """At most `most` indices of readable pictures: all of them in order, or a fixed random choice."""
        good = [index for index in range(len(self.items)) if self._known[index] != 2]
        if len(good) <= max_images:
            return good
        return sorted(np.random.default_rng(0).choice(good, max_images, replace=False).tolist())

    def _submit(self, index: int) -> Future[np.ndarray | None]:
        return self._pool.submit(self._try, index)

    def _picture(self, index: int, pixels: np.ndarray | None) -> np.ndarray:
        """One picture, or the next that can be read."""
        for step in range(len(self.items)):
            place = (index + step) % len(self.items)
            if step:
                pixels = self._try(place)
            if pixels is not None:
                return pixels
        raise UserError(f"No picture in {self.folder} could be read.\n{self.report()}")

    def _try(self, index: int) -> np.ndarray | None:
        """One file's picture; None where it cannot be read, which is noted."""
        if self._known[index]:
            return self._kept[index] if self._known[index] == 1 else None
        item = self.items[index]
        try:
            pixels = read_square(item.path, self.size_px)
        except UserError as error:
            name = item.path.relative_to(self.folder).as_posix()
            with self._lock:  # two readers may have met it at once
                first, self._known[index] = self._known[index] != 2, 2
                self.skipped[name] = error.reason if isinstance(error, Unreadable) else str(error)
            if first and len(self.items) > EAGER:
                warnings.warn(LatentpipeWarning(f"{self.folder}: skipped {name}: {self.skipped[name]}"), stacklevel=2)
            return None
        if index < len(self._kept):
            self._kept[index] = pixels
            self._known[index] = 1
        return pixels

    def _one_is_readable(self) -> None:
        self._picture(0, self._try(0))
