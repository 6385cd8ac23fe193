"""The verbs for LoRA files: each is one call into the public API, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from latentpipe.lora.adapter import Lora

Layout = Literal["diffusers", "kohya", "peft"]
DType = Literal["fp32", "fp16", "bf16"]
# as in latentpipe.lora.merge.METHODS, which cannot be imported before the arguments are read
Method = Literal[
    "cat",
    "linear",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "svd",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]
CONVERTED_KEY = "latentpipe.converted"  # in the metadata: the file that an adapter was converted from


def lora_inspect(path: str, /) -> None:
    """Print what a LoRA file is and says about itself, as JSON.

    Args:
        path: A name ('latentpipe ls lora'), a .safetensors file, or a peft folder.
    """
    from json import dumps

    from latentpipe.checkpoints.registry import find_lora
    from latentpipe.lora.state_dict.describe import lora_facts

    print(dumps(lora_facts(find_lora(path)), indent=2, ensure_ascii=False))


def lora_convert(
    source: str,
    /,
    *,
    out: Path,
    to: Layout = "diffusers",
    dtype: DType | None = None,
    plain: bool = False,
    rank: int | None = None,
) -> None:
    """Write a LoRA in another layout, with its true alpha; any layout is read, pickles too.

    Args:
        source: Name or file of the LoRA: .safetensors, .bin, .pt, .pth, .ckpt, or a peft folder.
        out: File to write; it ends in .safetensors.
        to: Layout: diffusers, kohya (A1111, ComfyUI) or peft.
        dtype: What to store the weights as; left out: as they are.
        plain: Turn LoHa and LoKr layers into plain LoRA.
        rank: With --plain, the most that a layer may have; left out: as many as it takes to be exact.
    """
    import warnings
    from dataclasses import replace
    from json import dumps

    from latentpipe.checkpoints.registry import find_lora
    from latentpipe.lora.delta import as_plain
    from latentpipe.lora.state_dict.io import read_lora
    from latentpipe.utils.errors import LatentpipeWarning, UserError
    from latentpipe.utils.io import file_hash

    _check_out(out)
    if rank is not None and not plain:
        raise UserError(f"--rank {rank} belongs to --plain, which was not given.")
    path = find_lora(source)
    lora = read_lora(path, pickles=True)
    if lora.unread:
        shown = ", ".join(lora.unread[:3]) + (f" and {len(lora.unread) - 3} more" if len(lora.unread) > 3 else "")
        warnings.warn(LatentpipeWarning(f"{path}: keys of no layer are not written: {shown}."), stacklevel=2)
    origin = {"file": path.name} | ({"sha256": file_hash(path)} if path.is_file() else {})
    kept = {key: value for key, value in lora.metadata.items() if not (plain and key.startswith("ss_network_"))}
    lora = replace(lora, metadata={**kept, CONVERTED_KEY: dumps(origin)})
    _write(as_plain(lora, rank) if plain else lora, out, to, dtype)


def lora_merge(
    files: tuple[str, ...],
    /,
    *,
    out: Path,
    weights: tuple[str, ...] = (),
    method: Method = "ties_svd",
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
    sign: Literal["total", "frequency"] = "total",
    to: Layout = "diffusers",
    dtype: DType | None = None,
) -> None:
    """Merge several LoRA files into one.

    Args:
        files: Names or files.
        out: File to write; it ends in .safetensors.
        weights: One for each file: a number, or numbers by component (unet=0.7,text_encoder=0.3; what is not named counts
            as 0); left out: 1 each.
        method: ties_svd keeps content best in our measurements; cat is the exact sum; svd is the nearest to it of a smaller
            rank; linear, ties, dare and magnitude_prune merge A and B apart and need equal ranks, with _svd their product.
        density: Share of the values that ties, dare and magnitude_prune keep.
        rank: Rank of the svd methods' result; left out: the largest of the files'.
        seed: Of the masks that dare draws.
        sign: How ties elects signs.
        to: Layout: diffusers, kohya (A1111, ComfyUI) or peft.
        dtype: What to store the weights as; left out: the widest of the files'.
    """
    from latentpipe.checkpoints.registry import find_lora
    from latentpipe.lora.merge import merge
    from latentpipe.lora.state_dict.io import read_lora
    from latentpipe.utils.errors import UserError

    _check_out(out)
    amounts = [_weight(text) for text in weights] or [1.0] * len(files)
    loras = [read_lora(find_lora(name)) for name in files]
    lora = merge(loras, amounts, method, density=density, rank=rank, seed=seed, sign=sign)
    if not lora.parts:
        raise UserError("Every weight is 0, so the merged LoRA would change nothing; give at least one other weight.")
    _write(lora, out, to, dtype or _widest(loras), _merged_card(lora, loras, amounts))


def _merged_card(lora: Lora, loras: list[Lora], weights: list[Any]) -> dict[str, str]:
    from latentpipe.lora.state_dict.io import card, stated_base, trigger_words

    return card(
        lora,
        title=lora.name,
        base_hashes=stated_base(lora),
        trigger_words=trigger_words(lora),
        base_model=_agreed(loras, "ss_base_model_version"),
        architecture=_agreed(loras, "modelspec.architecture"),
        loras=dict(zip((one.name for one in loras), weights, strict=True)),
    )


def lora_extract(
    before: str, after: str, /, *, out: Path, rank: float = 8, to: Layout = "diffusers", dtype: DType = "fp16"
) -> None:
    """Make a LoRA of the difference of two models, or of two VAEs, and say how much of it that holds.

    Args:
        before: Name or folder of the model, or of the VAE, that the LoRA shall go on.
        after: The same after it was trained on.
        out: File to write; it ends in .safetensors.
        rank: A whole number, of each layer; or a share of the squared difference to hold, such as 0.9.
        to: Layout: diffusers, kohya (A1111, ComfyUI) or peft.
        dtype: What to store the weights as.
    """
    from latentpipe.lora.extract import explained, extract_models
    from latentpipe.lora.state_dict.io import card, stated_base

    _check_out(out)
    lora = extract_models(before, after, int(rank) if float(rank).is_integer() else float(rank))
    said = card(lora, title=lora.name, base_hashes=stated_base(lora), base_model=lora.metadata.get("latentpipe.base_model", ""))
    _write(lora, out, to, dtype, said)
    for component, held in explained(lora).items():
        print(f"{component}: {held}")


def _check_out(out: Path) -> None:
    """UserError where --out is taken or has another ending, before anything is read."""
    from latentpipe.utils.errors import UserError
    from latentpipe.utils.io import refuse_name

    if refuse_name(out).suffix != ".safetensors":
        raise UserError(f"--out {out}: a LoRA is a safetensors file; give it that ending.")
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out} exists already; choose another name, or remove it first.")


def _write(lora: Lora, out: Path, to: Layout, dtype: str | None, said: dict[str, str] | None = None) -> None:
    from latentpipe.lora.state_dict.io import write_lora

    print(f"{out}  {write_lora(lora, out, to, dtype, said)[:16]}")


def _weight(text: str) -> float | dict[str, float]:
    """A number, or numbers by component as in unet=0.7,text_encoder=0.3."""
    from latentpipe.utils.errors import UserError

    try:
        if "=" not in text:
            return float(text)
        pairs = [part.partition("=") for part in text.split(",")]
        found = {name.strip(): float(value) for name, _, value in pairs}
        if len(found) < len(pairs):
            raise UserError(f"--weights {text}: names a component twice.")
        return found
    except ValueError:
        raise UserError(f"--weights {text}: expected a number, or numbers by component as in unet=0.7,vae=0.3.") from None


def _widest(loras: list[Lora]) -> str:
    """The name of the dtype that holds the values of all of them; fp32 at most."""
    from functools import reduce

    import torch

    dtypes = {tensor.dtype for lora in loras for _, _, layer in lora.layers() for tensor in layer.tensors.values()}
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(reduce(torch.promote_types, dtypes), "fp32")


def _agreed(loras: list[Lora], key: str) -> str:
    """What all of them say under a key of their metadata; empty where they do not agree."""
    said = {lora.metadata.get(key, "") for lora in loras}
    return said.pop() if len(said) == 1 else ""
