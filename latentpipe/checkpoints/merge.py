"""Plain tensors: pickles and safetensors files merged into one safetensors file, names unchanged (the weights of metrics)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from latentpipe.checkpoints.tensor_source import read_pickle
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import SUFFIXES, atomic_file, content_hash, file_hash, is_safetensors, read_tensors


def merge(sources: Sequence[Path], out: Path) -> str:
    """Write the tensors of all `sources` into the file `out`, atomically; returns their content hash.

    UserError where two files hold one name with other values, or `out` exists or is no safetensors file.
    """
    from safetensors.torch import save_file

    out = Path(out)
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out} with --to tensors: expected a file that ends in .safetensors.")
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out} exists already; choose another name, or remove it first.")
    merged: dict[str, torch.Tensor] = {}
    for path in map(Path, sources):
        found = read_tensors(path) if path.suffix in SUFFIXES or is_safetensors(path) else read_pickle(path)
        for name, tensor in found.items():
            if name in merged and not torch.equal(merged[name], tensor):
                raise UserError(f"{path}: '{name}' is in an earlier file too, with other values: they do not belong together.")
            merged[name] = tensor.contiguous()
    origin = [{"file": Path(path).name, "sha256": file_hash(path)} for path in sources]
    with atomic_file(out) as part:
        save_file(merged, part, metadata={"format": "pt", "latentpipe.source": json.dumps(origin)})
    return content_hash(merged)
