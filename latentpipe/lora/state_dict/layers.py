"""One module's tensors, as a file has them, checked and made a `LoraLayer`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from latentpipe.lora.adapter import Kind, LoraLayer
from latentpipe.lora.state_dict.keys import LOHA, LOKR
from latentpipe.lora.state_dict.kohya import as_magnitudes, fold, is_whole, magnitudes
from latentpipe.utils.errors import UserError

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOST = 10**6  # rank that a file may name
SAME = 1e-5  # two scales that differ by less, relatively, are one number in two precisions


@dataclass(frozen=True)
class LayerMetadata:
    """What a file says about a layer besides its tensors; None where it is silent."""

    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False


def build_layer(
    where: str, roles: Mapping[str, torch.Tensor], told: LayerMetadata, exact: Mapping[str, object]
) -> LoraLayer | None:
    """A layer from tensors by role (`keys.take_apart`); None where there is no factor of an update among them.

    where  names the layer in messages
    told   of the file's peft config; a tensor ``alpha`` goes before it, and without either alpha is the rank
    exact  of our own metadata: rank, alpha and rslora where nothing else in the file gives them back to the last bit;
           believed only where its scale is that of the file, or the file is silent
    """
    kind = _kind(roles, where)
    if kind is None:
        return None
    for name, tensor in roles.items():
        if name == "alpha" and not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
            continue  # some trainers store it as a whole number
        _check(f"{where}.{name}", tensor)
    alpha = _alpha(roles["alpha"], where) if "alpha" in roles else None
    build = {"lora": _lora, "loha": _loha, "lokr": _lokr}[kind]
    tensors, rank = build({name: value for name, value in roles.items() if name != "alpha"}, where)
    if rank == 0:
        raise UserError(f"{where}: its rank is 0; a layer of rank 1 or more is expected.")
    if rank is not None:
        layer = _scaled(kind, tensors, rank, alpha, told)
    elif alpha is None and told.rank:
        layer = _scaled(kind, tensors, told.rank, alpha, told)
    else:  # kohya gives two whole factors no rank and scale 1; the trainers write alpha = rank
        rank = int(alpha) if alpha and alpha >= 1 and alpha == int(alpha) else (told.rank or 1)
        layer = LoraLayer(kind, tensors, rank, float(rank))
    return _exact(layer, exact, silent=alpha is None and told.alpha is None)


def _scaled(kind: Kind, tensors: dict[str, torch.Tensor], rank: int, alpha: float | None, told: LayerMetadata) -> LoraLayer:
    if alpha is not None:
        return LoraLayer(kind, tensors, rank, alpha)
    return LoraLayer(kind, tensors, rank, float(rank) if told.alpha is None else told.alpha, told.rslora)


def _exact(layer: LoraLayer, exact: Mapping[str, object], silent: bool) -> LoraLayer:
    rank, alpha, rslora = exact.get("rank"), exact.get("alpha"), exact.get("rslora")
    if not isinstance(rank, int) or not isinstance(alpha, float) or not isinstance(rslora, bool) or not 0 < rank < MOST:
        return layer
    tensors = dict(layer.tensors)
    if exact.get("whole") is True and "lokr_w1_b" in tensors and "lokr_w2" in tensors:
        first, second = tensors["lokr_w1_a"], tensors["lokr_w1_b"]
        if torch.equal(second, torch.eye(len(second), dtype=second.dtype)):
            del tensors["lokr_w1_a"], tensors["lokr_w1_b"]
            tensors["lokr_w1"] = first
    better = LoraLayer(layer.kind, tensors, rank, alpha, rslora)
    believed = math.isfinite(alpha) and (silent or math.isclose(better.scale, layer.scale, rel_tol=SAME))
    return better if believed and (rank == layer.rank or is_whole(tensors)) else layer


def _kind(roles: Mapping[str, torch.Tensor], where: str) -> Kind | None:
    pairs = {"lora": ("lora_A", "lora_B", "lora_mid"), "loha": LOHA, "lokr": LOKR}
    kinds = [kind for kind, names in pairs.items() if any(name in roles for name in names)]
    if len(kinds) > 1:
        raise UserError(f"{where}: holds tensors of {' and '.join(kinds)} at once; expected one kind of update for a module.")
    if kinds and kinds[0] != "lora" and ("dora_scale" in roles or "lora_magnitude_vector" in roles):
        raise UserError(f"{where}: is DoRA over {kinds[0]}; peft has DoRA over LoRA only, so it cannot be attached.")
    return kinds[0] if kinds else None  # type: ignore[return-value]


def _check(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise UserError(f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}; expected fp32, fp16 or bf16.")
    if not torch.isfinite(tensor).all():
        raise UserError(f"{name} holds values that are not finite; the file is damaged, or its training failed.")


def _alpha(tensor: torch.Tensor, where: str) -> float:
    if tensor.numel() != 1:
        raise UserError(f"{where}: its alpha is {tuple(tensor.shape)}, expected one number.")
    return float(tensor.item())


def _need(roles: Mapping[str, torch.Tensor], names: tuple[str, ...], where: str) -> None:
    missing = [name for name in names if name not in roles]
    if missing:
        raise UserError(f"{where}: has {' and '.join(sorted(roles))} but no {' and no '.join(missing)}; the file is not whole.")


def _lora(roles: dict[str, torch.Tensor], where: str) -> tuple[dict[str, torch.Tensor], int]:
    _need(roles, ("lora_A", "lora_B"), where)
    down, up = roles["lora_A"], roles["lora_B"]
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != down.shape[0] or up[0].numel() != up.shape[1]:
        raise UserError(
            f"{where}: its factors {tuple(down.shape)} (down) and {tuple(up.shape)} (up) do not multiply; "
            "expected (rank, in, ...) and (out, rank)."
        )
    if 0 in (*down.shape, *up.shape):
        return {}, 0
    if "lora_mid" in roles:
        down = fold(roles["lora_mid"], down, where)
    tensors = {"lora_A": down, "lora_B": up}
    if "dora_scale" in roles:
        tensors["lora_magnitude_vector"] = magnitudes(roles["dora_scale"], down, up, where)
    elif "lora_magnitude_vector" in roles:
        values = roles["lora_magnitude_vector"]
        if values.numel() != up.shape[0]:
            raise UserError(f"{where}: it has {values.numel()} magnitudes, expected one for each of {up.shape[0]} rows.")
        tensors["lora_magnitude_vector"] = as_magnitudes(values, down)
    return tensors, down.shape[0]


def _loha(roles: dict[str, torch.Tensor], where: str) -> tuple[dict[str, torch.Tensor], int]:
    _need(roles, LOHA[:4], where)
    if ("hada_t1" in roles) != ("hada_t2" in roles):
        _need(roles, LOHA, where)
    shapes = [_product(roles, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}", where) for n in (1, 2)]
    if shapes[0] != shapes[1]:
        raise UserError(f"{where}: its two products are {shapes[0]} and {shapes[1]}; expected the same shape.")
    return {name: roles[name] for name in LOHA if name in roles}, roles["hada_w1_b"].shape[0]


def _lokr(roles: dict[str, torch.Tensor], where: str) -> tuple[dict[str, torch.Tensor], int | None]:
    rank = None
    for n in (1, 2):
        whole = f"lokr_w{n}" in roles
        if whole and (f"lokr_w{n}_a" in roles or f"lokr_w{n}_b" in roles):
            raise UserError(f"{where}: has lokr_w{n} both whole and in two factors; the file is damaged.")
        if whole:
            if roles[f"lokr_w{n}"].ndim < 2 or not roles[f"lokr_w{n}"].numel():
                raise UserError(f"{where}: its lokr_w{n} is {tuple(roles[f'lokr_w{n}'].shape)}; expected a matrix.")
            continue
        _need(roles, (f"lokr_w{n}_a", f"lokr_w{n}_b"), where)
        _product(roles, f"lokr_w{n}_a", f"lokr_w{n}_b", f"lokr_t{n}", where)
        rank = roles[f"lokr_w{n}_b"].shape[0]
    return {name: roles[name] for name in LOKR if name in roles}, rank


def _product(roles: Mapping[str, torch.Tensor], a: str, b: str, core: str, where: str) -> tuple[int, ...]:
    """Shape of a product of two factors, or of three with a core (r r kh kw), whose first factor lies on its side."""
    first, second = roles[a], roles[b]
    ranks = first.shape[0 if core in roles else -1] if first.ndim == 2 else -1
    fits = second.ndim == 2 and ranks == second.shape[0]
    if core in roles:
        fits = fits and roles[core].ndim in (3, 4) and tuple(roles[core].shape[:2]) == (ranks, ranks)
    if not fits:
        raise UserError(f"{where}: its factors {a} {tuple(first.shape)} and {b} {tuple(second.shape)} do not multiply.")
    return (first.shape[1 if core in roles else 0], second.shape[1], *(roles[core].shape[2:] if core in roles else ()))
