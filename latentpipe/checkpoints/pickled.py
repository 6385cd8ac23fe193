"""A pickle of a whole model, a LoRA, an embedding or other weights as one safetensors file: the same tensors and names."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from latentpipe.checkpoints import ldm_keys as kl
from latentpipe.checkpoints import taesd_keys as taesd
from latentpipe.checkpoints.identify import carries_adapter, looks_like
from latentpipe.checkpoints.pickles.unpickle import Unpickled, is_pickle, unpickle, unpickled
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import atomic_file, content_hash, read_header, read_tensors

BESIDE = (  # what a file's names begin with where it holds more than a VAE
    "model.",
    "model_ema.",
    "cond_stage_model.",
    "conditioner.",
    "text_encoders.",
    "text_encoder.",
    "unet.",
    "transformer.",
)
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Kept:
    """What was written: the hash of its tensors, and what they look like."""

    digest: str
    what: str


class _Alone(Exception):
    """It is a VAE alone: nothing is to be written here."""


def whole(source: Path, out: Path, dtype: str | None = None) -> Kept | None:
    """Write a pickle's tensors to `out`, atomically; None, and nothing is written, where it is no pickle, or holds a VAE alone.

    dtype  "fp32", "bf16" or "fp16" for floats; None: as they are stored, bit for bit
    UserError for what the process that reads it refuses, and where it holds a list (of a LoRA: `lora convert` names its entries).
    """
    if not is_pickle(source):
        return None
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out} exists already; choose another name, or remove it first.")
    with suppress(_Alone):
        if dtype is None:
            with atomic_file(out) as part:
                return _checked(source, unpickle(source, part))
        with unpickled(source) as found, atomic_file(out) as part:
            _checked(source, found)
            return _cast(found.path, part, dtype)
    return None


def _checked(source: Path, found: Unpickled) -> Kept:
    shapes = read_header(found.path).shapes
    if found.listed:
        raise UserError(f"{source}: holds a list of {found.names:,} tensors without names; of a LoRA, take 'lora convert'.")
    if _is_vae(shapes):
        raise _Alone
    return Kept(content_hash(read_tensors(found.path)), looks_like(shapes))


def _cast(source: Path, target: Path, dtype: str) -> Kept:
    import torch
    from safetensors.torch import save_file

    kind = getattr(torch, DTYPES[dtype])
    tensors = {name: value.to(kind) if value.is_floating_point() else value for name, value in read_tensors(source).items()}
    header = read_header(source)
    save_file(tensors, target, metadata=header.metadata)
    return Kept(content_hash(tensors), looks_like(header.shapes))


def _is_vae(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether all that a file holds is a VAE that `convert` knows how to write complete, with its config."""
    if any(name.startswith(BESIDE) for name in shapes) or carries_adapter(shapes):
        return False
    own = {name.removeprefix("first_stage_model.").removeprefix("vae."): shape for name, shape in shapes.items()}
    return kl.is_ldm(own) or kl.is_diffusers(own) or bool(taesd.own_names(own))
