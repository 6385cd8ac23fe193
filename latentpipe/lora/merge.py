"""Several adapters merged into one, by peft's methods, on an empty layer: no base model is needed."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from latentpipe.lora.adapter import Lora, LoraLayer
from latentpipe.lora.metadata import BASE, WORDS, stated_base, trigger_words
from latentpipe.utils.defaults import LORA_LIMIT as LIMIT
from latentpipe.utils.errors import UserError

SAME_RANK = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")  # they merge A and B apart
BY_SVD = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")  # they merge the product B A
METHODS = ("cat", *SAME_RANK, *BY_SVD)
MERGED_KEY = "latentpipe.merged"  # in the metadata: what an adapter was merged from
Weight = float | Mapping[str, float]
Sign = Literal["total", "frequency"]
Factors = tuple[torch.Tensor, torch.Tensor]  # A and B


def merge(
    loras: Sequence[Lora],
    weights: Sequence[Weight],
    method: str = "cat",
    *,
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
    sign: Sign = "total",
) -> Lora:
    """One plain LoRA, in fp32, in place of several; alpha = rank in every layer.

    weights  a number for each adapter, or numbers by component and by blocks of it ("unet", "unet.down_blocks.0"); the
             longest name that a layer's begins with counts. A layer that no name covers has the weight 0, and an adapter
             with the weight 0 at a layer counts as not being there (it has no vote in "ties").
    method   one of `METHODS`. "cat" (the default) is the weighted sum, exactly; its rank is the sum of the ranks. "svd" is
             the best of `rank` to that sum. "linear", "ties" (arXiv:2306.01708), "dare_linear", "dare_ties"
             (arXiv:2311.03099) and "magnitude_prune" merge A and B apart, which is rough and needs equal ranks; with
             "_svd" they merge the product. Signs are elected before the weights are applied, and "ties" takes the mean over
             the adapters that agree, as peft does.
    density  share of the values that "ties", "dare" and "magnitude_prune" keep, in (0, 1]
    rank     of the result of the "svd" methods; None: the largest of the adapters', layer by layer
    seed     of the masks that "dare" draws; the global random state is left alone
    sign     how "ties" elects: by the sum of the values ("total") or by their count ("frequency")

    A module that only some adapters change counts as zero in the others. UserError for other kinds than plain LoRA, for
    adapters of two bases, and for arguments out of range. The result may have no layers where every weight is 0.
    """
    _check(loras, weights, method, density, rank, sign)
    base = _common_base(loras)
    _check_plain(loras)
    parts: dict[str, dict[str, LoraLayer]] = {}
    for component, path in sorted({(component, path) for lora in loras for component, path, _ in lora.layers()}):
        held: list[tuple[str, LoraLayer, float]] = []
        for lora, weight in zip(loras, weights, strict=True):
            layer = lora.parts.get(component, {}).get(path)
            factor = weight_at(weight, component, path)
            if layer is not None and factor:
                held.append((lora.name, layer, factor))
        if held:
            place = f"{component}.{path}"
            own = int.from_bytes(hashlib.sha256(f"{seed}|{place}".encode()).digest()[:7], "big")
            parts.setdefault(component, {})[path] = _merged(place, held, method, density, rank, own, sign)
    used = {"method": method, "sources": _sources(loras, weights), **_options(method, density, rank, seed, sign)}
    metadata = {MERGED_KEY: json.dumps(used)} | ({BASE: json.dumps(base)} if base else {})
    words = list(dict.fromkeys(word for lora in loras for word in trigger_words(lora)))
    metadata |= {WORDS: json.dumps(words)} if words else {}
    brought = {one.name: one for lora in loras for one in lora.embeddings}
    return Lora(parts, "+".join(lora.name for lora in loras), metadata, embeddings=tuple(brought.values()))


def weight_at(weight: Weight, component: str, path: str) -> float:
    """The number that a weight gives to one layer; 0 where it names others only."""
    if not isinstance(weight, Mapping):
        return float(weight)
    names = [name for name in weight if covers(name, component, path)]
    return float(weight[max(names, key=len)]) if names else 0.0


def covers(name: str, component: str, path: str) -> bool:
    """Whether the name of a component or of a block of it covers a layer."""
    return f"{component}.{path}.".startswith(f"{name}.")


def _sources(loras: Sequence[Lora], weights: Sequence[Weight]) -> list[dict[str, Any]]:
    """Name, content hash and weight of each."""
    return [
        {"name": lora.name, "hash": lora.hash, "weight": dict(weight) if isinstance(weight, Mapping) else weight}
        for lora, weight in zip(loras, weights, strict=True)
    ]


def _options(method: str, density: float, rank: int | None, seed: int, sign: str) -> dict[str, Any]:
    """The arguments that a method looks at."""
    found: dict[str, Any] = {}
    if not method.startswith(("cat", "linear", "svd")):
        found["density"] = density
    if method in BY_SVD:
        found["rank"] = rank
    if method.startswith("dare"):
        found["seed"] = seed
    if "ties" in method:
        found["sign"] = sign
    return found


def _check(loras: Sequence[Lora], weights: Sequence[Weight], method: str, density: float, rank: int | None, sign: str) -> None:
    """UserError for arguments out of range."""
    if not loras:
        raise UserError("No LoRA is given; expected one or more to merge.")
    if len(weights) != len(loras):
        raise UserError(f"{len(weights)} weights for {len(loras)} LoRA files; expected one for each.")
    names = [lora.name for lora in loras]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"Two LoRA files have the name '{twice}'; give one of them another name.")
    if method not in METHODS:
        raise UserError(f"The method is '{method}'; expected one of {', '.join(METHODS)}.")
    if not 0 < density <= 1:
        raise UserError(f"The density is {density}; expected a share above 0, at most 1.")
    if rank is not None and method not in BY_SVD:
        raise UserError(f"The method '{method}' has no rank of its own; a rank goes with {', '.join(BY_SVD)}.")
    if rank is not None and rank < 1:
        raise UserError(f"The rank is {rank}; expected 1 or more.")
    if sign not in ("total", "frequency"):
        raise UserError(f"The sign is elected by '{sign}'; expected total or frequency.")
    for lora, weight in zip(loras, weights, strict=True):
        for name, value in weight.items() if isinstance(weight, Mapping) else [("", weight)]:
            if name and not any(covers(name, component, path) for component, path, _ in lora.layers()):
                raise UserError(f"LoRA '{lora.name}' has no layer in '{name}'; it has some in {', '.join(lora.parts)}.")
            if not math.isfinite(value) or abs(value) > LIMIT:
                raise UserError(f"The weight of LoRA '{lora.name}' is {value}; expected a number from {-LIMIT:g} to {LIMIT:g}.")


def _check_plain(loras: Sequence[Lora]) -> None:
    """UserError where an adapter has layers of another kind than plain LoRA."""
    for lora in loras:
        for component, path, layer in lora.layers():
            if layer.dora:
                raise UserError(
                    f"LoRA '{lora.name}' has a DoRA layer ({component}.{path}), which depends on the base's weights and cannot "
                    "be merged into another file; mix it unmerged (the method 'sum')."
                )
            if layer.kind != "lora":
                kind = {"loha": "LoHa", "lokr": "LoKr"}[layer.kind]
                raise UserError(
                    f"LoRA '{lora.name}' has a {kind} layer ({component}.{path}), and only plain LoRA can be merged; turn it "
                    "into plain LoRA first ('latentpipe lora convert --plain'), or mix it unmerged (the method 'sum')."
                )


def _common_base(loras: Sequence[Lora]) -> dict[str, str]:
    """Hashes of the base by component, where adapters name one; UserError where two name different ones."""
    found: dict[str, tuple[str, str]] = {}
    for lora in loras:
        for component, digest in stated_base(lora).items():
            known, name = found.setdefault(component, (digest, lora.name))
            if known != digest:
                raise UserError(
                    f"LoRA '{name}' and LoRA '{lora.name}' were trained for two bases: their {component} is {known[:16]} and "
                    f"{digest[:16]}. Merge adapters of one base."
                )
    return {component: digest for component, (digest, _) in found.items()}


@torch.no_grad()
def _merged(
    place: str, held: list[tuple[str, LoraLayer, float]], method: str, density: float, rank: int | None, seed: int, sign: str
) -> LoraLayer:
    """The merged layer of one module; `held` has name, layer and weight of each adapter that changes it.

    A convolution is merged as the linear layer over its unfolded patches, which is the same: peft's own way through
    convolutions fails where a rank is above the number of channels, and where a 1x1 kernel has one channel.
    """
    shape, square = _shape(place, held)
    pairs = [(layer.tensors["lora_A"].float().flatten(1), layer.tensors["lora_B"].float().flatten(1)) for _, layer, _ in held]
    scales = [layer.scale for _, layer, _ in held]
    factors = [factor for _, _, factor in held]
    ranks = [down.shape[0] for down, _ in pairs]
    if method in SAME_RANK and len(set(ranks)) > 1:
        told = ", ".join(f"{own} in '{name}'" for (name, _, _), own in zip(held, ranks, strict=True))
        raise UserError(
            f"The method '{method}' merges A and B apart and needs equal ranks, but {place} has rank {told}; use cat, svd or "
            f"{'svd' if method == 'linear' else f'{method}_svd'}."
        )
    if len(held) == 1 and method not in ("cat", "linear"):
        # peft takes "linear" for one adapter alone, whatever it was asked for; a second one of zeros changes no other method
        down, up = pairs[0]
        pairs, scales, factors = [*pairs, (down * 0, up * 0)], [*scales, 1.0], [*factors, 1.0]
    pairs, back = _narrowed(pairs) if method == "svd" else (pairs, None)
    most = min(rank or max(ranks), pairs[0][1].shape[0], pairs[0][0].shape[1])
    down, up = _by_peft(pairs, scales, factors, method, density, most, seed, sign)
    if back is not None:
        down, up = down @ back[0].T, back[1] @ up
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise UserError(f"With these weights {place} is not finite; lower them.")
    own = down.shape[0]
    down = down.reshape(own, *shape)
    up = up[:, :, None, None] if square else up
    return LoraLayer("lora", {"lora_A": down.contiguous(), "lora_B": up.contiguous()}, own, float(own))


def _narrowed(pairs: list[Factors]) -> tuple[list[Factors], Factors]:
    """The pairs in orthonormal bases of the spaces that they span together, and those bases (in R, out R).

    The sum lies within these spaces, so its singular values are the same there, and the SVD is of R x R instead of out x in.
    """
    inside, _ = torch.linalg.qr(torch.cat([down for down, _ in pairs]).T)
    outside, _ = torch.linalg.qr(torch.cat([up for _, up in pairs], 1))
    return [(down @ inside, outside.T @ up) for down, up in pairs], (inside, outside)


def _shape(place: str, held: list[tuple[str, LoraLayer, float]]) -> tuple[tuple[int, ...], bool]:
    """Shape of A behind its rank, and whether it is a convolution's; UserError where the adapters differ in it."""
    shapes = {name: (layer.tensors["lora_B"].shape[0], tuple(layer.tensors["lora_A"].shape[1:])) for name, layer, _ in held}
    first = next((name for name, (_, rest) in shapes.items() if len(rest) == 3), next(iter(shapes)))
    out, rest = shapes[first]
    for name, (other, own) in shapes.items():
        if other != out or math.prod(own) != math.prod(rest) or (len(own) == len(rest) and own != rest):
            raise UserError(
                f"LoRA '{first}' and LoRA '{name}' are for two bases: {place} is {out} x {_words(rest)} in the one and "
                f"{other} x {_words(own)} in the other. Merge adapters of one base."
            )
    return rest, len(rest) == 3


def _words(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _by_peft(
    pairs: list[Factors],
    scales: list[float],
    factors: list[float],
    method: str,
    density: float,
    rank: int,
    seed: int,
    sign: str,
) -> Factors:
    """A and B of the merged layer by ``LoraModel.add_weighted_adapter``, on a linear layer whose weight takes no memory."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    site = nn.Linear(pairs[0][0].shape[1], pairs[0][1].shape[0], bias=False, device="meta")
    site.weight = nn.Parameter(torch.zeros(1).expand(site.weight.shape), requires_grad=False)
    carrier = nn.Module()
    carrier.site = site
    names = [f"a{index}" for index in range(len(pairs))]
    # alpha and rslora are left out: each adapter's scale is set below, and peft would hand rslora on to the result
    configs: dict[str, Any] = {
        name: LoraConfig(r=down.shape[0], lora_alpha=down.shape[0], target_modules=["site"], inference_mode=True)
        for name, (down, _) in zip(names, pairs, strict=True)
    }
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density .* no pruning will be performed")
        tuner: Any = LoraModel(carrier, configs, names[0])
        for name in names[1:]:
            tuner.inject_adapter(carrier, name)
        wrapper: Any = carrier.site
        for name, (down, up), scale in zip(names, pairs, scales, strict=True):
            wrapper.lora_A[name].weight.data, wrapper.lora_B[name].weight.data = down, up
            wrapper.scaling[name] = scale
        torch.manual_seed(seed)  # here, so that the masks do not depend on what peft drew for its own start
        tuner.add_weighted_adapter(
            names, factors, "merged", method, svd_rank=rank, svd_full_matrices=False, density=density, majority_sign_method=sign
        )
    return wrapper.lora_A["merged"].weight.data, wrapper.lora_B["merged"].weight.data
