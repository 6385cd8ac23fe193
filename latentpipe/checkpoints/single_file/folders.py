"""Diffusers folders of other people: weights in pickles alone are refused; the dtype that they are stored in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from latentpipe.checkpoints.single_file.gather import Stated
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import read_header

if TYPE_CHECKING:
    import torch

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def check_folder(folder: Path, dtype: torch.dtype | None, stated: Stated | None) -> torch.dtype:
    """The dtype to open a diffusers folder in (None: as it is stored); UserError for what only a single file can be told."""
    if stated not in (None, Stated()):
        raise UserError(
            f"{folder} is a diffusers folder, which says itself what it is; leave family, prediction, config and parts out."
        )
    refuse_pickles(folder)
    return dtype or stored_dtype(folder)


def refuse_pickles(folder: Path) -> None:
    """UserError where a part's weights are pickles alone."""
    for part in sorted(path for path in folder.glob("*") if path.is_dir()):
        names = [path.name for path in sorted(part.iterdir()) if path.suffix in PICKLES]
        if names and not any(part.glob("*.safetensors")):
            raise UserError(
                f"{part} holds its weights as a pickle alone ({names[0]}), which can run code when it is opened; turn it into "
                f"safetensors once: latentpipe convert {part / names[0]} --out {part / Path(names[0]).stem}.safetensors."
            )


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that most values of a model's denoiser have in its folder; fp32 where it has none."""
    import torch

    counts: Counter[str] = Counter()
    for part in ("unet", "transformer"):
        for path in sorted((folder / part).glob("*.safetensors"))[:1]:
            counts.update(read_header(path).dtypes.values())
    kinds = {"F16": torch.float16, "BF16": torch.bfloat16}
    return kinds.get(counts.most_common(1)[0][0], torch.float32) if counts else torch.float32
