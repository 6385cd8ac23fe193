"""The difference of two checkpoints as a LoRA, by SVD, and how much of it that holds."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from latentpipe.checkpoints.pipeline_io import hashes, networks, tensors_of_part
from latentpipe.checkpoints.registry import find_model, name_of
from latentpipe.checkpoints.vae_io import open_vae, vae_hash
from latentpipe.lora.adapter import COMPONENTS, Lora, LoraLayer
from latentpipe.lora.delta import plain_layer
from latentpipe.lora.metadata import BASE
from latentpipe.lora.target_modules import PREFIX
from latentpipe.utils.errors import LatentpipeWarning, UserError, counted
from latentpipe.utils.io import read_json
from latentpipe.utils.reading import parse_object
from latentpipe.vae.latent_space import LatentSpace

EXTRACTED_KEY = "latentpipe.extracted"  # in the metadata: what an adapter holds of the difference
SHOWN = 4
# tables of vectors by number, which look like the weight of a linear layer
_TABLES = re.compile(r"(.*\.)?(\w*_embedding|embed_tokens|shared|wte|wpe|relative_attention_bias)")


@dataclass(frozen=True)
class Explained:
    """How much of a component's difference an adapter holds.

    layers      that differ and are in it; ranks: smallest and largest of them
    share       of ||dW||, over these layers: the norm of what is held by the norm of the difference (Frobenius)
    left_out    other tensors that differ (biases, norms, embeddings), which no LoRA carries
    left_share  their share of the norm of the component's whole difference
    """

    layers: int
    ranks: tuple[int, int]
    share: float
    left_out: tuple[str, ...]
    left_share: float

    def __str__(self) -> str:
        low, high = self.ranks
        rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
        left = f"; {len(self.left_out)} other tensors hold {self.left_share:.1%} of it and are left out" if self.left_out else ""
        return f"{counted(self.layers, 'layer')}, {rank}, {self.share:.1%} of their difference held{left}"


def extract(
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    component: str,
    rank: int | float,
    *,
    paths: Collection[str] | None = None,
    base_hash: str | None = None,
    name: str = "extracted",
) -> Lora:
    """The difference `after` - `before` of one component's state dicts as plain LoRA in fp32, alpha = rank.

    component  "unet", "text_encoder", "vae", ...; a text encoder's names may begin with ``text_model.``
    rank       an int: of every layer, at most; a float in (0, 1): as little as holds that share of each layer's energy (the
               sum of its squared differences)
    paths      the modules that an adapter can go on; None: every weight with two or four dimensions, but no embedding table
    base_hash  content hash of the component before, for the metadata

    Every linear and convolution weight that differs is factored (`factored`); `Explained` is in the metadata as JSON, and a
    A warning names what differs and cannot be carried. Weights of two dtypes are compared in the coarser one. UserError where
    nothing that can be carried differs, names or shapes are not the same, values are not finite, or the rank is none.
    """
    _check_rank(rank)
    layers, told = _difference(component, before, after, rank, paths)
    _note({component: told})
    if not layers:
        raise UserError(_nothing({component: told}))
    return _lora({component: layers}, {component: told}, {component: base_hash} if base_hash else {}, rank, name)


def extract_models(before: str | Path, after: str | Path, rank: int | float) -> Lora:
    """As `extract`, over all components of two pipelines, or of two VAEs; each is a name, a folder or a VAE's file.

    Where one of them is a VAE, the other's VAE is compared with it. The metadata has the hashes of the base that was `before`.
    A warning names parts that differ and are no networks (tokenizer, scheduler, the VAE's normalization).
    """
    _check_rank(rank)
    first, second = _places(before, after)
    parts: dict[str, dict[str, LoraLayer]] = {}
    told: dict[str, Explained] = {}
    base: dict[str, str] = {}
    others: list[str] = []
    for component, old, new in _components(first, second, base, others):
        layers, said = _difference(component, old, new, rank, None)
        if layers or said.left_out:
            told[component] = said
        if layers:
            parts[component] = layers
    _note(told, others)
    if not parts:
        raise UserError(_nothing(told))
    kept = {component: digest for component, digest in base.items() if component in parts or component == "vae"}
    model = name_of(first, "models" if (first / "model_index.json").is_file() else "vae")
    lora = _lora(parts, told, kept, rank, name_of(second, "models" if (second / "model_index.json").is_file() else "vae"))
    return Lora(lora.parts, lora.name, {**lora.metadata, "latentpipe.base_model": model})


def explained(lora: Lora) -> dict[str, Explained]:
    """What `extract` said about an adapter, by component; empty where it comes from elsewhere."""
    try:
        said = parse_object(lora.metadata.get(EXTRACTED_KEY, "{}")).get("components", {})
        return {
            component: Explained(**{**value, "ranks": tuple(value["ranks"]), "left_out": tuple(value["left_out"])})
            for component, value in said.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"LoRA '{lora.name}': its metadata's {EXTRACTED_KEY} is damaged; extract it again.") from None


def _check_rank(rank: int | float) -> None:
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not whole and not (isinstance(rank, float) and 0 < rank < 1):
        raise UserError(f"The rank is {rank}; expected a whole number from 1, or a share of the energy between 0 and 1.")


@torch.no_grad()
def _difference(
    component: str,
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    rank: int | float,
    paths: Collection[str] | None,
) -> tuple[dict[str, LoraLayer], Explained]:
    """The layers of one component's difference, and how much of it they hold."""
    old, new = (_named(component, tensors) for tensors in (before, after))
    _check_same(component, old, new)
    layers: dict[str, LoraLayer] = {}
    left_out: list[str] = []
    held = whole = left = 0.0
    for key, value in old.items():
        change = _change(f"{component}.{key}", value, new[key])
        if change is None:
            continue
        path, energy = key.removesuffix(".weight"), change.double().square().sum().item()
        if key.endswith(".weight") and change.ndim in (2, 4) and _carries(path, paths):
            layers[path], share = plain_layer(change, rank)
            held, whole = held + share * energy, whole + energy
        else:
            left_out.append(key)
            left += energy
    ranks = [layer.rank for layer in layers.values()] or [0]
    share = math.sqrt(held / whole) if whole else 0.0
    rest = math.sqrt(left / (whole + left)) if left else 0.0
    return layers, Explained(len(layers), (min(ranks), max(ranks)), share, tuple(left_out), rest)


def _named(component: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors by our names; position ids are no weights."""
    tensors = {name: value for name, value in tensors.items() if not name.endswith("position_ids")}
    if component.startswith("text_encoder"):
        return {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    return tensors


def _carries(path: str, paths: Collection[str] | None) -> bool:
    return path in paths if paths is not None else not _TABLES.fullmatch(path)


def _check_same(component: str, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> None:
    """UserError where the two are not of one architecture."""
    problems = [f"{name} is only in one of them" for name in sorted(set(old) ^ set(new))]
    problems += [
        f"{name} is {tuple(old[name].shape)} before and {tuple(new[name].shape)} after"
        for name in old
        if name in new and old[name].shape != new[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError(f"The two checkpoints are not of one architecture: {component}: {'; '.join(problems[:SHOWN])}{more}.")


def _change(place: str, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor | None:
    """The difference in fp32; None where there is none in the coarser of the two dtypes."""
    if not (old.is_floating_point() and new.is_floating_point()):
        return None if torch.equal(old, new) else (new.double() - old.double()).float()
    if not (torch.isfinite(old).all() and torch.isfinite(new).all()):
        raise UserError(f"{place} holds values that are not finite; nothing can be extracted from it.")
    coarse = max(old.dtype, new.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    if torch.equal(old.to(coarse), new.to(coarse)):
        return None
    return new.float() - old.float()


def _note(told: Mapping[str, Explained], others: Collection[str] = ()) -> None:
    """A warning on what differs and is not in the adapter."""
    named = [f"{component}.{key}" for component, said in told.items() for key in said.left_out]
    named = [*others, *named]
    if named:
        more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
        worst = max((said.left_share for said in told.values()), default=0.0)
        weight = f" (up to {worst:.1%} of the norm of a component's difference)" if worst else ""
        warnings.warn(
            f"these differ too and cannot be carried by a LoRA, so they are left out: {', '.join(named[:SHOWN])}{more}{weight}.",
            LatentpipeWarning,
            stacklevel=3,
        )


def _nothing(told: Mapping[str, Explained]) -> str:
    if any(said.left_out for said in told.values()):
        return "No weight of a linear or convolution layer differs between the two, so there is nothing that a LoRA could carry."
    return "The two have the same weights, so there is nothing to extract; give the model before and after its training."


def _lora(
    parts: dict[str, dict[str, LoraLayer]], told: Mapping[str, Explained], base: Mapping[str, str], rank: int | float, name: str
) -> Lora:
    said = {"rank": rank, "components": {component: asdict(value) for component, value in told.items()}}
    ordered = {component: parts[component] for component in COMPONENTS if component in parts} or parts
    metadata = {EXTRACTED_KEY: json.dumps(said)} | ({BASE: json.dumps(dict(base), sort_keys=True)} if base else {})
    return Lora(ordered, name, metadata)


def _places(before: str | Path, after: str | Path) -> tuple[Path, Path]:
    """The two models' folders, or the two VAEs' places where either is one."""
    try:
        folders = find_model(before), find_model(after)
    except UserError:
        folders = None
    if folders and all((folder / "model_index.json").is_file() for folder in folders):
        return folders
    return find_model(before, "vae"), find_model(after, "vae")


def _components(
    first: Path, second: Path, base: dict[str, str], others: list[str]
) -> Iterator[tuple[str, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Component and its tensors before and after, of those that differ; fills `base` with hashes and `others` with what else."""
    if not (first / "model_index.json").is_file():
        vaes = open_vae(first), open_vae(second)
        base["vae"] = vae_hash(first)
        others += _space(vaes[0].space, vaes[1].space)
        yield "vae", vaes[0].tensors, vaes[1].tensors
        return
    old, new = (networks(read_json(folder / "model_index.json")) for folder in (first, second))
    if set(old) != set(new):
        raise UserError(f"The two models have different parts: {', '.join(sorted(old))}, and {', '.join(sorted(new))}.")
    had, has = hashes(first), hashes(second)
    base |= {part: digest for part, digest in had.items() if part in COMPONENTS}
    for part in had:
        if had[part] == has.get(part):
            continue
        if part == "vae":
            spaces = [open_vae(folder / part).space for folder in (first, second)]
            others += _space(*spaces)
        if part in COMPONENTS:
            yield part, _tensors(first / part), _tensors(second / part)
        else:
            others.append(f"the {part}")


def _space(old: LatentSpace, new: LatentSpace) -> list[str]:
    return [] if old == new else ["the VAE's normalization"]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of one component's folder, whole or in shards."""
    if folder.name == "vae":
        return open_vae(folder).tensors
    return tensors_of_part(folder)
