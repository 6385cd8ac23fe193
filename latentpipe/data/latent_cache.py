"""The latent cache: posterior mean and standard deviation of every picture, keyed by the VAE's hash.

Mean and deviation are kept rather than one sample, so that each epoch draws afresh.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from latentpipe.checkpoints.vae_io import load_vae, open_vae, vae_hash
from latentpipe.data.image_folder import read_pictures
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import bytes_to_images
from latentpipe.utils.io import HASH_LENGTH, atomic_file, content_hash, read_header, read_tensors, refuse_name
from latentpipe.utils.reading import MOST_HEADER, parse_json
from latentpipe.vae.latent_space import LatentSpace
from latentpipe.vae.precision import all_finite
from latentpipe.vae.stage import VAEStage

FORMAT = "latentpipe.latents.1"


@dataclass(frozen=True)
class LatentCache:
    """Latents of N pictures: mean and std (N C h w), captions, the size they had, the VAE that made them, and their kinds."""

    mean: torch.Tensor
    std: torch.Tensor
    captions: Sequence[tuple[str, ...]]
    size_px: int
    vae_hash: str
    kinds: tuple[str, ...] = ()

    def weights(self, of_kinds: Mapping[str, float]) -> list[float]:
        """How often each picture is wanted: the weight of its kind, 1 where that has none; UserError for an unknown kind."""
        return weights_of_kinds(self.kinds or ("",) * len(self.captions), of_kinds)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents."""
        channels, height, width = self.mean.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.captions)

    def roll(self) -> Counter[str]:
        """What it was made of, to be compared with what a run began with: the captions, since a cache keeps no file names."""
        return Counter(" | ".join(texts) for texts in self.captions)

    def captioned(self) -> torch.Tensor:
        """The rows that have a caption."""
        return torch.tensor([index for index, texts in enumerate(self.captions) if texts], dtype=torch.long)

    def means(self, chosen: torch.Tensor) -> torch.Tensor:
        """The means (B C h w, fp32) of the chosen pictures."""
        return self.mean[chosen].float()

    def sample(self, chosen: torch.Tensor, generator: torch.Generator, mine: slice = slice(None)) -> torch.Tensor:
        """Fresh latents (B C h w) of the chosen pictures: ``mean + std * noise``.

        mine  which of the B are wanted; the noise of the others is drawn all the same, so that all processes draw alike
        """
        noise = torch.randn((len(chosen), *self.shape), generator=generator)[mine]
        return self.mean[chosen[mine]].float() + self.std[chosen[mine]].float() * noise


def weights_of_kinds(kinds: Sequence[str], of_kinds: Mapping[str, float]) -> list[float]:
    """The weight of each picture's kind, 1 where that has none; UserError for a kind that no picture is of."""
    unknown = sorted(set(of_kinds) - set(kinds))
    if unknown:
        known = ", ".join(sorted(set(kinds) - {""})) or "none"
        raise UserError(f"data.weights names the kind '{unknown[0]}'; the 'kind' column of the pictures' metadata has: {known}.")
    return [of_kinds.get(kind, 1.0) for kind in kinds]


@torch.no_grad()
def encode_folder(
    folder: Path, vae_folder: Path, out: Path, size_px: int, batch: int = 32, progress=None, column: str | None = None
) -> LatentCache:
    """Encode every picture of a folder, and write the cache file `out` atomically.

    folder      pictures with captions, subfolders included; broken ones are skipped and told
    vae_folder  of the VAE; the cache holds its hash
    out         a safetensors file
    size_px     side that pictures are brought to
    batch       pictures that are encoded at once
    progress    wraps the iterable of batches, as tqdm does
    column      that captions are read from; None: text, caption or prompt

    UserError: nothing to read, another ending of `out`, a size that the VAE does not take, or latents beyond the range of fp16.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: the cache is a safetensors file; give it that ending.")
    refuse_name(out)
    digest = vae_hash(vae_folder)
    stage = VAEStage(load_vae(vae_folder))
    stage.space.shape(1, size_px, size_px)
    pictures = read_pictures(folder, size_px, column=column)
    print(pictures.report())
    pixels = torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2)
    parts: Iterable[torch.Tensor] = pixels.split(batch)
    pairs = [stage.posterior(bytes_to_images(part)) for part in (progress(parts) if progress else parts)]
    mean, std = (torch.cat([pair[index] for pair in pairs]).half().contiguous() for index in range(2))
    if not all_finite((mean, std)):
        raise UserError(
            f"{vae_folder} gives latents beyond the range of fp16 (65,504) for pictures of {folder}; its normalization is not "
            "that of its weights. Expected latents of about mean 0 and standard deviation 1."
        )
    cache = LatentCache(mean, std, pictures.captions, size_px, digest, tuple(pictures.kinds) if any(pictures.kinds) else ())
    metadata = {
        "format": FORMAT,
        "vae_hash": digest,
        "size_px": str(size_px),
        "captions": json.dumps(cache.captions),
    }
    if cache.kinds:
        metadata["kinds"] = json.dumps(cache.kinds)
    with atomic_file(out) as part:
        save_file({"mean": mean, "std": std}, part, metadata=metadata)
    return cache


def open_cache(path: Path, vae_folder: Path) -> LatentCache:
    """Read a cache; UserError where it is damaged, or was made by another VAE than the one in `vae_folder`."""
    tensors, metadata = read_tensors(path), read_header(path).metadata
    complete = {"mean", "std"} <= set(tensors) and {"vae_hash", "size_px", "captions"} <= set(metadata)
    if metadata.get("format") != FORMAT or not complete:
        raise UserError(f"{path} is not a latent cache of this version; make one with 'latentpipe encode'.")
    vae = open_vae(vae_folder)
    digest = content_hash(vae.tensors, vae.space)
    if metadata["vae_hash"] != digest:
        raise UserError(
            f"{path} holds latents of VAE {metadata['vae_hash'][:HASH_LENGTH]}, but {vae_folder} is "
            f"{digest[:HASH_LENGTH]}; encode the pictures again with 'latentpipe encode'."
        )
    try:
        captions = _captions(metadata["captions"])
        size_px = _size(metadata["size_px"])
        kinds = _kinds(metadata.get("kinds"), len(captions))
        _check_tensors(tensors["mean"], tensors["std"], len(captions), vae.space, size_px)
    except ValueError as error:
        raise UserError(
            f"{path} is damaged: {error}. Delete it, and encode the pictures again with 'latentpipe encode'."
        ) from None
    return LatentCache(tensors["mean"], tensors["std"], captions, size_px, digest, kinds)


def _captions(stored: str) -> list[tuple[str, ...]]:
    """The captions of every picture; ValueError where they are not lists of texts."""
    try:
        found = parse_json(stored, most=MOST_HEADER)
    except ValueError as error:
        raise ValueError(f"its captions are no JSON ({error})") from None
    if not isinstance(found, list) or not all(isinstance(texts, list) for texts in found):
        raise ValueError("its captions are not a list of texts for each picture")
    if not all(isinstance(text, str) for texts in found for text in texts):
        raise ValueError("its captions hold something that is no text")
    return [tuple(texts) for texts in found]


def _kinds(stored: str | None, pictures: int) -> tuple[str, ...]:
    """The kind of every picture; none where none were stored, ValueError where they are not one text for each."""
    if stored is None:
        return ()
    try:
        found = parse_json(stored, most=MOST_HEADER)
    except ValueError as error:
        raise ValueError(f"its kinds are no JSON ({error})") from None
    if not isinstance(found, list) or len(found) != pictures or not all(isinstance(kind, str) for kind in found):
        raise ValueError("its kinds are not one text for each picture")
    return tuple(found)


def _size(stored: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,5}", stored):
        raise ValueError(f"its size_px is {stored[:20]!r}, expected a number of pixels")
    return int(stored)


def _check_tensors(mean: torch.Tensor, std: torch.Tensor, pictures: int, space: LatentSpace, size_px: int) -> None:
    """ValueError where the latents are not those of so many pictures of this size, or not finite."""
    wanted = space.shape(pictures, size_px, size_px)
    for name, tensor in (("mean", mean), ("std", std)):
        if not tensor.is_floating_point():
            raise ValueError(f"its {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, expected floats")
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"its {name} is {tuple(tensor.shape)}, expected {wanted}: {pictures} pictures with captions, {size_px} px"
            )
        if not all_finite(tensor):
            raise ValueError(f"its {name} holds values that are not finite")
    if not mean.numel():
        raise ValueError("it holds no picture")
    if std.min() < 0:
        raise ValueError("its std holds values below 0")


def default_path(folder: Path, vae_folder: Path, size_px: int) -> Path:
    """``FOLDER/.latents/VAEHASH-64.safetensors``: one file for each VAE and size."""
    return folder / ".latents" / f"{vae_hash(vae_folder)[:HASH_LENGTH]}-{size_px}{os.extsep}safetensors"
