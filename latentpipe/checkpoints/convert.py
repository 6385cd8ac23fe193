"""Convert a VAE between files: any readable one, pickles included, to a diffusers folder or an LDM file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from latentpipe.checkpoints import ldm_keys
from latentpipe.checkpoints.tensor_source import CARD_FILE, CONFIG_KEY, VAE_FILE, Source, open_source, pair, read_pickle
from latentpipe.checkpoints.vae_file import StatedConfig, VAEFile, resolve
from latentpipe.utils.errors import LatentpipeWarning, UserError
from latentpipe.utils.images import psnr, to_bytes
from latentpipe.utils.io import (
    SUFFIXES,
    atomic_file,
    atomic_folder,
    content_hash,
    file_hash,
    is_gguf,
    is_safetensors,
    read_tensors,
)
from latentpipe.utils.reading import parse_object
from latentpipe.vae.probe_images import probe_images
from latentpipe.vae.stage import VAEStage

Layout = Literal["diffusers", "ldm"]
CARD_KEY = "latentpipe.card"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def convert(
    sources: Sequence[Path], out: Path, to: Layout | None = None, given: StatedConfig | None = None, dtype: str | None = None
) -> str:
    """Write the VAE of `sources` (one, or a tiny autoencoder's two halves) to `out`, atomically; return its content hash.

    to     "diffusers", a folder, or "ldm", a safetensors file with the keys that A1111 and ComfyUI read; None: by `out`
    dtype  "fp32", "bf16" or "fp16"; None: as stored, bit for bit

    The source's name and sha256 go into card.json, or into the file's metadata beside the config. The weights are
    loaded strictly before anything is written.
    """
    out, layout = Path(out), _layout(Path(out), to)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    source = _source(sources)
    vae = resolve(source, given or StatedConfig())
    tensors = {name: _cast(tensor, dtype) for name, tensor in vae.tensors.items()}
    vae = VAEFile(vae.path, vae.config, tensors)
    model = vae.build()
    vae = VAEFile(vae.path, parse_object(model.to_json_string()), tensors)
    if len(sources) == 2:
        _check_pair(model, vae)
    digest = content_hash(tensors, vae.space)
    card = {
        "source": [{"file": file.name, "sha256": file_hash(file)} for file in source.files],
        "content_hash": digest,
    }
    if layout == "ldm":
        _write_ldm(vae, out, card)
    else:
        _write_folder(vae, out, card)
    return digest


@torch.no_grad()
def _check_pair(model: Any, vae: VAEFile) -> None:
    """A warning where the two halves do not rebuild pictures together: they may come from two autoencoders."""
    stage = VAEStage(model, vae.space)
    images = probe_images(4, 16 * stage.space.downscale)
    flat = images.mean((2, 3), keepdim=True).expand_as(images)
    rebuilt, plain = (psnr(to_bytes(guess), to_bytes(images)).mean() for guess in (stage.decode(stage.encode(images)), flat))
    if rebuilt < plain:
        warnings.warn(
            f"the two halves do not rebuild pictures together ({rebuilt:.1f} dB; one colour for each gives {plain:.1f} dB): "
            "are they of the same autoencoder?",
            LatentpipeWarning,
            stacklevel=3,
        )


def _source(sources: Sequence[Path]) -> Source:
    if len(sources) not in (1, 2):
        raise UserError(f"{len(sources)} sources; expected one VAE, or the encoder and the decoder of a tiny autoencoder.")
    opened = [open_source(Path(path), pickles=True) for path in sources]
    return opened[0] if len(opened) == 1 else pair(*opened)


def _layout(out: Path, to: Layout | None) -> Layout:
    layout: Layout = to or ("ldm" if out.suffix == ".safetensors" else "diffusers")
    if layout not in ("diffusers", "ldm"):
        raise UserError(f"--to is {to!r}; expected diffusers (a folder) or ldm (a safetensors file).")
    if (layout == "ldm") != (out.suffix == ".safetensors"):
        raise UserError(f"--out {out} with --to {layout}: an LDM file ends in .safetensors, and a diffusers folder does not.")
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out} exists already; choose another name, or remove it first.")
    return layout


def _cast(tensor: torch.Tensor, dtype: str | None) -> torch.Tensor:
    return tensor.to(DTYPES[dtype]) if dtype is not None and tensor.is_floating_point() else tensor


def _write_folder(vae: VAEFile, out: Path, card: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    if vae.config["_class_name"] == "TinyVAE":
        from latentpipe.vae.tiny import OPENS_HERE_ONLY

        card = {**card, "note": OPENS_HERE_ONLY}
    with atomic_folder(out) as part:
        save_file({name: tensor.contiguous() for name, tensor in vae.tensors.items()}, part / VAE_FILE, metadata={"format": "pt"})
        (part / "config.json").write_text(json.dumps(vae.config, indent=2, sort_keys=True) + "\n")
        (part / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n")


def _write_ldm(vae: VAEFile, out: Path, card: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    kind = vae.config["_class_name"]
    if kind != "AutoencoderKL":
        raise UserError(f"{vae.path} is of class {kind}; an LDM file holds an AutoencoderKL only. Give --out a folder instead.")
    try:
        tensors = ldm_keys.to_ldm(vae.tensors)
    except KeyError as error:
        raise UserError(f"{vae.path}: LDM files have no name for {error.args[0]}; give --out a folder instead.") from None
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(vae.config, sort_keys=True), CARD_KEY: json.dumps(card)}
    with atomic_file(out) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata=metadata)


def merge_tensors(sources: Sequence[Path], out: Path) -> str:
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
        found = read_tensors(path) if path.suffix in SUFFIXES or is_safetensors(path) or is_gguf(path) else read_pickle(path)
        for name, tensor in found.items():
            if name in merged and not torch.equal(merged[name], tensor):
                raise UserError(f"{path}: '{name}' is in an earlier file too, with other values: they do not belong together.")
            merged[name] = tensor.contiguous()
    origin = [{"file": Path(path).name, "sha256": file_hash(path)} for path in sources]
    with atomic_file(out) as part:
        save_file(merged, part, metadata={"format": "pt", "latentpipe.source": json.dumps(origin)})
    return content_hash(merged)
