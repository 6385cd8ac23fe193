"""The latent cache: posterior mean and standard deviation of every picture, keyed by the VAE's hash.

Mean and deviation are kept rather than one sample, so that each epoch draws afresh.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from latentpipe.data.folder import read_pictures
from latentpipe.errors import UserError
from latentpipe.files import HASH_LENGTH, atomic_file, read_tensors
from latentpipe.images import bytes_to_images
from latentpipe.vae import VAEStage
from latentpipe.weights import load_vae, vae_hash

FORMAT = "latentpipe.latents.1"


@dataclass(frozen=True)
class LatentCache:
    """Latents of N pictures: mean and std (N C h w), captions, the size they had, the VAE that made them, and their kinds."""

    mean: torch.Tensor
    std: torch.Tensor
    captions: list[tuple[str, ...]]
    size_px: int
    vae_hash: str
    kinds: tuple[str, ...] = ()

    def weights(self, of_kinds: Mapping[str, float]) -> list[float]:
        """How often each picture is wanted: the weight of its kind, 1 where that has none; UserError for an unknown kind."""
        unknown = sorted(set(of_kinds) - set(self.kinds))
        if unknown:
            known = ", ".join(sorted(set(self.kinds) - {""})) or "none"
            raise UserError(
                f"data.weights names the kind '{unknown[0]}'; the 'kind' column of the pictures' metadata has: {known}."
            )
        return [of_kinds.get(kind, 1.0) for kind in self.kinds or ("",) * len(self.captions)]

    def sample(self, chosen: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Fresh latents (B C h w) of the chosen pictures: ``mean + std * noise``."""
        mean = self.mean[chosen].float()
        return mean + self.std[chosen].float() * torch.randn(mean.shape, generator=generator)


@torch.no_grad()
def encode_folder(folder: Path, vae_folder: Path, out: Path, size_px: int, batch: int = 32, progress=None) -> LatentCache:
    """Encode every picture of a folder and write the cache file `out` (safetensors), atomically."""
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: the cache is a safetensors file; give it that ending.")
    digest = vae_hash(vae_folder)
    stage = VAEStage(load_vae(vae_folder))
    stage.space.shape(1, size_px, size_px)
    pictures = read_pictures(folder, size_px)
    print(pictures.report())
    pixels = torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2)
    parts: Iterable[torch.Tensor] = pixels.split(batch)
    pairs = [stage.posterior(bytes_to_images(part)) for part in (progress(parts) if progress else parts)]
    mean, std = (torch.cat([pair[index] for pair in pairs]).half().contiguous() for index in range(2))
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
    """Read a cache; UserError where it was made by another VAE than the one in `vae_folder`."""
    tensors = read_tensors(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    complete = {"mean", "std"} <= set(tensors) and {"vae_hash", "size_px", "captions"} <= set(metadata)
    if metadata.get("format") != FORMAT or not complete:
        raise UserError(f"{path} is not a latent cache of this version; make one with 'latentpipe encode'.")
    digest = vae_hash(vae_folder)
    if metadata["vae_hash"] != digest:
        raise UserError(
            f"{path} holds latents of VAE {metadata['vae_hash'][:HASH_LENGTH]}, but {vae_folder} is "
            f"{digest[:HASH_LENGTH]}; encode the pictures again with 'latentpipe encode'."
        )
    captions = [tuple(texts) for texts in json.loads(metadata["captions"])]
    kinds = tuple(json.loads(metadata.get("kinds", "[]")))
    return LatentCache(tensors["mean"], tensors["std"], captions, int(metadata["size_px"]), digest, kinds)


def default_path(folder: Path, vae_folder: Path, size_px: int) -> Path:
    """``FOLDER/.latents/VAEHASH-64.safetensors``: one file for each VAE and size."""
    return folder / ".latents" / f"{vae_hash(vae_folder)[:HASH_LENGTH]}-{size_px}{os.extsep}safetensors"
