"""Merging adapters: exact sums, peft itself as the oracle, seeds, and what is refused."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from latentpipe.lora.adapter import Lora, LoraLayer
from latentpipe.lora.delta import as_plain, factored
from latentpipe.lora.merge import BY_SVD, MERGED_KEY, METHODS, SAME_RANK, merge, weight_at
from latentpipe.utils.errors import LatentpipeWarning, UserError

SHAPES: dict[str, tuple[int, ...]] = {
    "linear": (12, 10),
    "wide": (5, 18),
    "conv": (8, 6, 3, 3),
    "point": (7, 4, 1, 1),
    "single": (6, 1, 1, 1),  # where peft squeezes one dimension too many
}


def layer(shape: Sequence[int], rank: int, seed: int, alpha: float | None = None, rslora: bool = False) -> LoraLayer:
    """Random factors for a weight of a shape."""
    random = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=random)
    down = torch.randn(rank, *shape[1:], generator=random)
    return LoraLayer("lora", {"lora_A": down, "lora_B": up}, rank, rank if alpha is None else alpha, rslora)


def adapter(
    name: str, seed: int, rank: int = 3, alpha: float | None = None, rslora: bool = False, only: Sequence[str] = tuple(SHAPES)
) -> Lora:
    """An adapter on the modules of `SHAPES`, as a unet's."""
    layers = {path: layer(SHAPES[path], rank, seed * 100 + index, alpha, rslora) for index, path in enumerate(SHAPES)}
    return Lora({"unet": {path: layers[path] for path in only}}, name)


def change(lora: Lora, path: str, component: str = "unet") -> torch.Tensor:
    """B A times the scale, flattened; zero where the adapter lacks the module."""
    found = lora.parts.get(component, {}).get(path)
    if found is None:
        return torch.zeros(SHAPES[path][0], torch.Size(SHAPES[path][1:]).numel())
    up, down = (found.tensors[name].double().flatten(1) for name in ("lora_B", "lora_A"))
    scale = found.alpha / (found.rank**0.5 if found.rslora else found.rank)
    return (up @ down * scale).float()


def sums(loras: Sequence[Lora], weights: Sequence[float], path: str) -> torch.Tensor:
    """The weighted sum of the changes."""
    return torch.stack([weight * change(lora, path) for lora, weight in zip(loras, weights, strict=True)]).sum(0)


def far(first: torch.Tensor, second: torch.Tensor) -> float:
    """Relative distance."""
    return float((first - second).norm() / second.norm().clamp(min=1e-12))


class Host(nn.Module):
    """Real modules of the shapes, for peft itself."""

    def __init__(self) -> None:
        super().__init__()
        for path, shape in SHAPES.items():
            one: nn.Module = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2:])
            setattr(self, path, one)


def by_peft(loras: Sequence[Lora], weights: Sequence[float], method: str, **options: Any) -> dict[str, torch.Tensor]:
    """The changes that peft's own model, with real Linear and Conv2d layers, gives after add_weighted_adapter."""
    from peft import LoraConfig, LoraModel

    host = Host()
    configs = {}
    for lora in loras:
        ranks = {path: one.rank for path, one in lora.parts["unet"].items()}
        configs[lora.name] = LoraConfig(r=max(ranks.values()), target_modules=list(ranks), rank_pattern=ranks)
    tuner: Any = LoraModel(host, configs, loras[0].name)
    for lora in loras[1:]:
        tuner.inject_adapter(host, lora.name)
    for lora in loras:
        for path, one in lora.parts["unet"].items():
            wrapper = host.get_submodule(path)
            wrapper.lora_A[lora.name].weight.data = one.tensors["lora_A"].clone()
            wrapper.lora_B[lora.name].weight.data = one.tensors["lora_B"].clone()
            wrapper.scaling[lora.name] = one.scale
    tuner.add_weighted_adapter([lora.name for lora in loras], list(weights), "merged", method, **options)
    paths = {path for lora in loras for path in lora.parts["unet"]}
    return {path: host.get_submodule(path).get_delta_weight("merged").detach().flatten(1) for path in paths}


# --- the exact methods -----------------------------------------------------------------------------------------


@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    weights=st.lists(st.floats(-3, 3).filter(lambda value: abs(value) > 0.01), min_size=3, max_size=3),
    alphas=st.lists(st.floats(0.5, 16), min_size=3, max_size=3),
    rslora=st.lists(st.booleans(), min_size=3, max_size=3),
    missing=st.lists(st.sampled_from(list(SHAPES)), min_size=3, max_size=3),
)
def test_cat_and_svd_at_full_rank_are_the_weighted_sum(
    ranks: list[int], weights: list[float], alphas: list[float], rslora: list[bool], missing: list[str]
) -> None:
    """Any ranks, alphas and rslora, modules that only some have, convolutions too."""
    loras = [
        adapter(f"a{index}", index + 1, rank, alphas[index], rslora[index], [path for path in SHAPES if path != missing[index]])
        for index, rank in enumerate(ranks)
    ]
    used = weights[: len(loras)]
    joined, reduced = merge(loras, used), merge(loras, used, "svd", rank=sum(ranks))
    for path in SHAPES:
        wanted = sums(loras, used, path)
        there = any(path in lora.parts["unet"] for lora in loras)
        assert (path in joined.parts["unet"]) == there
        if wanted.norm() > 1e-3:
            assert far(change(joined, path), wanted) < 1e-5
            assert far(change(reduced, path), wanted) < 1e-5


def test_cat_has_the_sum_of_the_ranks_layer_by_layer_and_keeps_shapes() -> None:
    """No padding where the adapters' ranks differ from layer to layer."""
    first = adapter("a", 1, 2)
    mixed = {"unet": {**first.parts["unet"], "linear": layer(SHAPES["linear"], 5, 9)}}
    merged = merge([replace(first, parts=mixed), adapter("b", 2, 3, only=["conv", "linear"])], [1, 1])
    found = {path: one.rank for path, one in merged.parts["unet"].items()}
    assert found == {"linear": 8, "wide": 2, "conv": 5, "point": 2, "single": 2}
    for path, one in merged.parts["unet"].items():
        assert tuple(one.tensors["lora_A"].shape) == (one.rank, *SHAPES[path][1:])
        assert tuple(one.tensors["lora_B"].shape) == (SHAPES[path][0], one.rank, *[1] * (len(SHAPES[path]) - 2))
        assert one.alpha == one.rank
        assert not one.rslora


def test_svd_is_the_best_of_its_rank() -> None:
    """Against the truncated SVD of the weighted sum; the default is the largest of the ranks."""
    loras = [adapter("a", 1, 3), adapter("b", 2, 2)]
    merged = merge(loras, [1, -0.5], "svd")
    for path in ("linear", "conv"):
        wanted = sums(loras, [1, -0.5], path)
        values = torch.linalg.svdvals(wanted)
        assert merged.parts["unet"][path].rank == 3
        assert (change(merged, path) - wanted).norm().item() == pytest.approx(values[3:].norm().item(), rel=1e-3)


# --- peft as the oracle ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [method for method in METHODS if "dare" not in method])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_every_method_without_masks_equals_peft(method: str, sign: Any) -> None:
    """On peft's own model with real convolutions, both adapters everywhere (but not where peft itself fails)."""
    paths = [path for path in SHAPES if path != "single"]
    loras = [adapter("a", 1, 3, 6.0, only=paths), adapter("b", 2, 3, 1.5, only=paths), adapter("c", 3, 3, only=paths)]
    weights = [0.8, -0.6, 1.3]
    options = {"density": 0.4, "majority_sign_method": sign}
    wanted = by_peft(loras, weights, method, **options | ({"svd_rank": 3} if method in BY_SVD else {}))
    merged = merge(loras, weights, method, density=0.4, rank=3 if method in BY_SVD else None, sign=sign)
    for path in paths:
        assert far(change(merged, path), wanted[path]) < 1e-4, path


@pytest.mark.parametrize("method", METHODS)
def test_a_module_of_one_adapter_counts_as_zero_in_the_other(method: str) -> None:
    """What peft gives where only one of two adapters has the module; masks are compared by what they leave."""
    first, second = adapter("a", 1, 3, only=["linear", "conv"]), adapter("b", 2, 3, only=["linear"])
    merged = merge([first, second], [0.7, 1.1], method, density=0.5, seed=3)
    assert set(merged.parts["unet"]) == {"linear", "conv"}
    if "dare" not in method:
        wanted = by_peft([first, second], [0.7, 1.1], method, density=0.5)
        assert far(change(merged, "conv"), wanted["conv"]) < 1e-4
    alone = merge([first], [0.7], method, density=0.5, seed=3)
    assert torch.equal(change(alone, "conv"), change(merged, "conv"))


def test_methods_differ_and_one_adapter_alone_is_pruned_too() -> None:
    """peft takes 'linear' for a single adapter, whatever was asked for; here the method is used."""
    one = adapter("a", 1, 3, only=["linear"])
    full = change(merge([one], [1.0], "linear"), "linear")
    assert far(full, change(one, "linear")) < 1e-5
    for method in ("ties", "magnitude_prune"):
        assert far(change(merge([one], [1.0], method, density=0.3), "linear"), full) > 0.05
    assert merge([one], [1.0], "svd", rank=1).parts["unet"]["linear"].rank == 1


def test_density_one_prunes_nothing() -> None:
    """magnitude_prune and dare become the sum; peft's advice on it is kept from people."""
    loras = [adapter("a", 1, only=["linear", "conv"]), adapter("b", 2, only=["linear", "conv"])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ("magnitude_prune_svd", "dare_linear_svd"):
            merged = merge(loras, [0.5, 0.9], method, density=1.0, rank=6)
            for path in ("linear", "conv"):
                assert far(change(merged, path), sums(loras, [0.5, 0.9], path)) < 1e-5


# --- seeds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_is_seeded_and_leaves_the_global_state_alone(method: str) -> None:
    """The same call gives the same bytes, another seed others, whatever was drawn before; masks belong to the module."""
    loras = [adapter("a", 1), adapter("b", 2)]
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = merge(loras, [1, 1], method, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert merge(loras, [1, 1], method, seed=5).hash == first.hash
    assert merge(loras, [1, 1], method, seed=6).hash != first.hash
    backwards = [replace(lora, parts={"unet": dict(reversed(lora.parts["unet"].items()))}) for lora in loras]
    assert merge(backwards, [1, 1], method, seed=5).hash == first.hash


def test_dare_keeps_the_expected_value() -> None:
    """The mean over many seeds is the weighted sum (rescaled by 1 / density), and each mask drops about half."""
    loras = [adapter("a", 1, only=["linear"]), adapter("b", 2, only=["linear"])]
    drawn = torch.stack([change(merge(loras, [1, 0.5], "dare_linear_svd", seed=seed, rank=10), "linear") for seed in range(300)])
    wanted = sums(loras, [1, 0.5], "linear")
    assert far(drawn.mean(0), wanted) < 0.12
    zeros = (drawn.abs() < 1e-4).float().mean().item()
    assert 0.2 < zeros < 0.3  # both masks drop a value a quarter of the time


# --- weights ---------------------------------------------------------------------------------------------------


def both(name: str, seed: int) -> Lora:
    """An adapter with a text encoder beside its unet."""
    one = adapter(name, seed, only=["linear", "wide"])
    return replace(one, parts={"unet": one.parts["unet"], "text_encoder": {"linear": layer(SHAPES["linear"], 2, seed)}})


def test_weights_by_component_and_block() -> None:
    """A component that is not named has the weight 0, and is left out where all are 0."""
    loras = [both("a", 1), both("b", 2)]
    merged = merge(loras, [{"unet": 0.5}, {"unet": 1.0, "unet.wide": 0.0}])
    assert set(merged.parts) == {"unet"}
    assert far(change(merged, "linear"), sums(loras, [0.5, 1.0], "linear")) < 1e-5
    assert far(change(merged, "wide"), sums(loras, [0.5, 0.0], "wide")) < 1e-5
    assert merged.parts["unet"]["wide"].rank == 3
    assert merge(loras, [0, {"unet": 0.0}]).parts == {}
    assert weight_at({"unet": 1, "unet.down": 2}, "unet", "down.x") == 2
    assert weight_at({"unet.dow": 1}, "unet", "down.x") == 0


def test_an_adapter_of_weight_zero_has_no_vote() -> None:
    """'ties' with one adapter at 0 is 'ties' without it."""
    loras = [adapter("a", 1), adapter("b", 2), adapter("c", 3)]
    assert merge(loras, [1, 0, 0.5], "ties").hash == merge([loras[0], loras[2]], [1, 0.5], "ties").hash


# --- what the result says about itself -------------------------------------------------------------------------


def test_metadata_names_sources_method_base_and_words() -> None:
    """Names, hashes and weights; the base all agree on; every trigger word once."""
    base = {"latentpipe.base": json.dumps({"unet": "u" * 64})}
    first = replace(adapter("a", 1), metadata=base | {"latentpipe.trigger_words": '["flat", "emoji"]'})
    second = replace(adapter("b", 2), metadata={"latentpipe.base": json.dumps({"unet": "u" * 64, "vae": "v" * 64})})
    third = replace(adapter("c", 3), metadata={"latentpipe.trigger_words": '["emoji"]'})
    merged = merge([first, second, third], [1, {"unet": 0.5}, 0.2], "dare_ties", seed=7, density=0.25)
    said = json.loads(merged.metadata[MERGED_KEY])
    assert said["method"] == "dare_ties"
    assert (said["seed"], said["density"], said["sign"]) == (7, 0.25, "total")
    assert said["sources"][1] == {"name": "b", "hash": second.hash, "weight": {"unet": 0.5}}
    assert json.loads(merged.metadata["latentpipe.base"]) == {"unet": "u" * 64, "vae": "v" * 64}
    assert json.loads(merged.metadata["latentpipe.trigger_words"]) == ["flat", "emoji"]
    assert merged.name == "a+b+c"
    assert "latentpipe.base" not in merge([adapter("a", 1)], [1]).metadata


def test_sources_are_left_as_they_are() -> None:
    """No tensor of a source is written to or shared."""
    loras = [adapter("a", 1), adapter("b", 2)]
    before = [lora.hash for lora in copy.deepcopy(loras)]
    for method in METHODS:
        for _, path, one in merge(loras, [0.5, 0.5], method).layers():
            one.tensors["lora_A"].zero_()
            one.tensors["lora_B"].zero_()
            assert path in SHAPES
    assert [lora.hash for lora in loras] == before


def test_fp16_sources_are_merged_in_fp32() -> None:
    """Rounded sources, exact sum of them."""
    half = [
        replace(lora, parts={"unet": {path: halved(one) for path, one in lora.parts["unet"].items()}})
        for lora in (adapter("a", 1), adapter("b", 2))
    ]
    merged = merge(half, [0.3, 0.7])
    assert merged.parts["unet"]["linear"].tensors["lora_A"].dtype == torch.float32
    assert far(change(merged, "linear"), sums(half, [0.3, 0.7], "linear")) < 1e-5


def halved(one: LoraLayer) -> LoraLayer:
    """The layer in fp16."""
    return replace(one, tensors={name: value.half() for name, value in one.tensors.items()})


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SAME_RANK)
def test_unequal_ranks_are_told_before_peft_fails(method: str) -> None:
    """One sentence with both ranks and the methods that take them."""
    other = "svd" if method == "linear" else f"{method}_svd"
    with pytest.raises(UserError, match=rf"rank 3 in 'a', 2 in 'b'; use cat, svd or {other}"):
        merge([adapter("a", 1, 3), adapter("b", 2, 2)], [1, 1], method)
    merge([adapter("a", 1, 3, only=["linear"]), adapter("b", 2, 2, only=["conv"])], [1, 1], method)  # they never meet


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": [1, float("nan")]}, "weight of LoRA 'b' is nan"),
        ({"weights": [1, float("inf")]}, "is inf"),
        ({"weights": [1, {"unet": -10.5}]}, "from -10 to 10"),
        ({"weights": [1]}, "1 weights for 2"),
        ({"weights": [1, {"unte": 1.0}]}, "'b' has no layer in 'unte'; it has some in unet"),
        ({"method": "average"}, "method is 'average'"),
        ({"density": 0.0}, "density is 0.0"),
        ({"density": 1.5}, "density is 1.5"),
        ({"density": float("nan")}, "density is nan"),
        ({"method": "svd", "rank": 0}, "rank is 0"),
        ({"rank": 4}, "'cat' has no rank"),
        ({"sign": "loudest"}, "'loudest'"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], words: str) -> None:
    """One sentence each."""
    arguments: dict[str, Any] = {"loras": [adapter("a", 1), adapter("b", 2)], "weights": [1, 1], "method": "cat"} | options
    with pytest.raises(UserError, match=words):
        merge(**arguments)


def test_no_adapter_and_duplicate_names() -> None:
    """Nothing to merge, and two files that a report could not tell apart."""
    with pytest.raises(UserError, match="No LoRA is given"):
        merge([], [])
    with pytest.raises(UserError, match="Two LoRA files have the name 'a'"):
        merge([adapter("a", 1), adapter("a", 2)], [1, 1])


def test_two_bases_are_refused_by_shape_and_by_hash() -> None:
    """Shapes that differ, kernels that differ, and hashes that differ."""
    first = adapter("a", 1, only=["linear"])
    wider = Lora({"unet": {"linear": layer((12, 11), 3, 1)}}, "b")
    with pytest.raises(UserError, match=r"two bases: unet\.linear is 12 x 10 in the one and 12 x 11"):
        merge([first, wider], [1, 1])
    kernels = [Lora({"unet": {"conv": layer(shape, 3, 1)}}, name) for name, shape in (("a", (8, 6, 1, 9)), ("b", (8, 6, 3, 3)))]
    with pytest.raises(UserError, match="6 x 1 x 9 in the one and 8 x 6 x 3 x 3"):
        merge(kernels, [1, 1])
    named = [replace(adapter(name, 1), metadata={"latentpipe.base": json.dumps({"unet": name * 64})}) for name in ("a", "b")]
    with pytest.raises(UserError, match="their unet is aaaaaaaaaaaaaaaa and bbbbbbbbbbbbbbbb"):
        merge(named, [1, 1])


def test_a_flattened_convolution_takes_the_kernel_of_the_other() -> None:
    """A (r, in kh kw), as some files have it, beside A (r in kh kw)."""
    first, second = adapter("a", 1, only=["conv"]), adapter("b", 2, only=["conv"])
    tensors = {name: value.flatten(1) for name, value in first.parts["unet"]["conv"].tensors.items()}
    flat = replace(first, parts={"unet": {"conv": replace(first.parts["unet"]["conv"], tensors=tensors)}})
    assert merge([flat, second], [1, 1]).hash == merge([first, second], [1, 1]).hash


def test_values_that_overflow_are_told() -> None:
    """Not a file of infinities."""
    one = layer(SHAPES["linear"], 2, 1, alpha=1e38)
    huge = replace(one, tensors={name: value * 1e25 for name, value in one.tensors.items()})
    with pytest.raises(UserError, match=r"unet\.linear is not finite"):
        merge([Lora({"unet": {"linear": huge}}, "a")], [10])


def kinds() -> dict[str, tuple[LoraLayer, torch.Tensor]]:
    """Layers of the other kinds from peft itself, on a weight of 12 x 10 and one of 8 x 6 x 3 x 3, and peft's change of it."""
    from peft import LoHaConfig, LoHaModel, LoKrConfig, LoKrModel

    found: dict[str, tuple[LoraLayer, torch.Tensor]] = {}
    for kind, config, model in (("loha", LoHaConfig, LoHaModel), ("lokr", LoKrConfig, LoKrModel)):
        for effective in (False, True):
            host = Host()
            torch.manual_seed(3)
            settings = config(r=2, alpha=3, target_modules=["linear", "conv"], use_effective_conv2d=effective, init_weights=False)
            model(host, settings, "x")
            for path in ("linear", "conv"):
                wrapper = host.get_submodule(path)
                tensors = {
                    name: getattr(wrapper, name)["x"].detach()
                    for name in wrapper.adapter_layer_names
                    if "x" in getattr(wrapper, name)
                }
                one = LoraLayer(kind, tensors, 2, 3.0)  # type: ignore[arg-type]
                found[f"{kind}.{path}.{effective}"] = (one, wrapper.get_delta_weight("x").detach().flatten(1))
    return found


@pytest.mark.parametrize("name", [f"{kind}.{path}.{effective}" for kind in ("loha", "lokr") for path in ("linear", "conv")
                                  for effective in (False, True)])  # fmt: skip
def test_loha_and_lokr_become_plain_exactly(name: str) -> None:
    """peft's own change of the weight, again from B A."""
    one, wanted = kinds()[name]
    lora = Lora({"unet": {"linear": one}}, "odd")
    with pytest.raises(UserError, match=r"Lo(Ha|Kr) layer"):
        merge([lora], [1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = as_plain(lora)
    assert plain.parts["unet"]["linear"].kind == "lora"
    assert far(change(plain, "linear"), wanted) < 1e-5
    if name.startswith("loha"):
        assert plain.parts["unet"]["linear"].rank <= 4
    merge([plain], [1])


def test_a_small_rank_is_the_best_and_its_error_is_told() -> None:
    """The Note gives the relative error of the truncated SVD."""
    one, wanted = kinds()["loha.linear.False"]
    values = torch.linalg.svdvals(wanted)
    error = float(values[2:].norm() / values.norm())
    with pytest.warns(LatentpipeWarning, match=f"of rank 2 is not exact.*{error:.2%}"):
        plain = as_plain(Lora({"unet": {"linear": one}}, "odd"), rank=2)
    assert plain.parts["unet"]["linear"].rank == 2
    assert far(change(plain, "linear"), wanted) == pytest.approx(error, rel=1e-3)


def test_plain_layers_pass_through_and_dora_is_refused() -> None:
    """The same objects; a DoRA needs its base."""
    lora = adapter("a", 1)
    assert as_plain(lora).parts["unet"]["conv"] is lora.parts["unet"]["conv"]
    with pytest.warns(LatentpipeWarning, match="rank 1"):
        assert {one.rank for _, _, one in as_plain(lora, 1).layers()} == {1}
    one = layer(SHAPES["linear"], 2, 1)
    dora = replace(one, tensors={**one.tensors, "lora_magnitude_vector": torch.ones(12)})
    for action in (as_plain, lambda lora: merge([lora], [1])):
        with pytest.raises(UserError, match="DoRA"):
            action(Lora({"unet": {"linear": dora}}, "d"))
    with pytest.raises(UserError, match="rank is 0"):
        as_plain(lora, 0)


def test_factors_by_share_of_energy() -> None:
    """As few columns as hold the share; zero matrices have rank 1 and no NaN."""
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    for share, count in ((0.5, 1), (0.64, 1), (0.65, 2), (0.95, 3), (0.999, 3)):
        up, down, held = factored(matrix, share)
        assert up.shape[1] == down.shape[0] == count
        assert held >= share
    assert far(torch.mm(*factored(matrix)[:2]), matrix) < 1e-6
    up, down, held = factored(torch.zeros(3, 4), 2)
    assert (up.shape, down.shape, held) == ((3, 1), (1, 4), 1.0)
    assert not (up @ down).any()
