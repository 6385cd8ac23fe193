"""Weights set, mixed, swapped and taken off, in any order; the base comes back to the byte."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import random_lora

from latentpipe.lora.adapter import Lora, LoraLayer
from latentpipe.lora.delta import delta
from latentpipe.lora.fusion import LoraFuser
from latentpipe.lora.merge import weight_at
from latentpipe.lora.state_dict.io import write_lora
from latentpipe.lora.target_modules import leaves
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import content_hash

SITES = ["unet.all", "text", "vae.decoder"]


def digests(components: dict[str, Any]) -> dict[str, str]:
    return {name: content_hash(model.state_dict()) for name, model in components.items()}


def output(components: dict[str, Any]) -> torch.Tensor:
    """A UNet's answer to fixed inputs, with the text encoder's states."""
    generator = torch.Generator().manual_seed(0)
    unet, text = components["unet"], components["text_encoder"]
    with torch.no_grad():
        states = text(torch.arange(text.config.max_position_embeddings)[None])[0]
        size = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        return unet(torch.randn(size, generator=generator), torch.tensor(500), states, return_dict=False)[0]


@pytest.fixture
def mixer(pipe) -> LoraFuser:
    """Two adapters of different ranks and sites, and a DoRA, loaded and off."""
    mixer = pipe.loras.fuser
    for lora in (
        random_lora(mixer.components, SITES, "one"),
        random_lora(mixer.components, ["unet.attention"], "two", rank=3, alpha=1.0),
        random_lora(mixer.components, ["unet.attention"], "dora", dora=True),
    ):
        mixer.load(lora)
    return mixer


def test_fused_is_the_weighted_sum_and_unfused_is_the_same_function(mixer: LoraFuser) -> None:
    plain = {place: module.weight.detach().clone() for place, module in leaves(mixer.components["unet"]).items()}
    mixer.set({"one": 0.7, "two": -0.4})
    fused = output(mixer.components)
    one, two = mixer.loaded["one"].parts["unet"], mixer.loaded["two"].parts["unet"]
    for path, module in leaves(mixer.components["unet"]).items():
        wanted = plain[path] + 0.7 * delta(one[path], plain[path])
        if path in two:
            wanted = wanted - 0.4 * delta(two[path], plain[path])
        torch.testing.assert_close(module.weight.data, wanted, rtol=1e-6, atol=1e-6)
    mixer.set({"one": 0.7, "two": -0.4}, fuse=False)
    assert hasattr(mixer.components["unet"].conv_in, "base_layer")
    torch.testing.assert_close(output(mixer.components), fused, rtol=1e-4, atol=1e-4)


def test_weights_by_component_and_block(mixer: LoraFuser) -> None:
    before = digests(mixer.components)
    mixer.set({"one": {"text_encoder": 0.5}})
    after = digests(mixer.components)
    assert after["unet"] == before["unet"]
    assert after["vae"] == before["vae"]
    assert after["text_encoder"] != before["text_encoder"]
    mixer.set({"one": {"unet": 1.0, "unet.mid_block": 0.0}})
    names = {name for name, _ in mixer.components["unet"].named_parameters()}
    kept = {path for _, path in mixer._kept}
    assert kept
    assert not any(path.startswith("mid_block") for path in kept)
    assert any(name.startswith("mid_block") for name in names)
    weight = {"unet": 1.0, "unet.down_blocks": 0.5, "unet.down_blocks.1": 0.25}
    places = ["conv_in", "down_blocks.0.resnets.0.conv1", "down_blocks.1.resnets.0.conv1", "down_blocks.10.x"]
    assert [weight_at(weight, "unet", path) for path in places] == [1.0, 0.5, 0.25, 0.5]
    assert weight_at(weight, "vae", "decoder.conv_in") == 0.0


@pytest.mark.parametrize("weight", [0.5, 1.0, 1.7])
def test_a_dora_draws_what_diffusers_draws_at_any_weight(
    mixer: LoraFuser, model_folder: Any, tmp_path: Any, weight: float
) -> None:
    from latentpipe.checkpoints.pipeline_io import load_pipeline

    write_lora(mixer.loaded["dora"], tmp_path / "dora.safetensors")
    stock = load_pipeline(model_folder)
    stock.load_lora_weights(str(tmp_path), weight_name="dora.safetensors", adapter_name="dora")
    stock.set_adapters("dora", weight)
    wanted = output({"unet": stock.unet, "text_encoder": stock.text_encoder})
    plain = output(mixer.components)
    for fuse in (True, False):
        mixer.set({"dora": weight}, fuse=fuse)
        torch.testing.assert_close(output(mixer.components), wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - plain).abs().max() > 1e-2
    with pytest.raises(UserError, match="only fused"):
        mixer.set({"dora": weight, "one": 1.0}, fuse=False)


OPERATION = st.tuples(
    st.dictionaries(st.sampled_from(["one", "two", "dora"]), st.sampled_from([-1.0, 0.0, 0.3, 1.0]), max_size=3),
    st.booleans(),
)


@settings(max_examples=25)
@given(operations=st.lists(OPERATION, max_size=40), seed=st.integers(0, 3))
@pytest.mark.slow
def test_any_order_of_changes_ends_where_a_fresh_model_ends(tmp_path_factory, model_folder, operations, seed) -> None:
    """About 1,000 switches over all examples: same bytes when everything is off, same outputs as a fresh load when it is on."""
    from latentpipe import LatentPipeline

    cached = _models.setdefault(str(model_folder), [LatentPipeline.from_pretrained(model_folder) for _ in range(2)])
    mixers = []
    for pipe in cached:
        mixer = LoraFuser(pipe.loras.fuser.components)
        for name, how in (("one", {}), ("two", {"rank": 3}), ("dora", {"dora": True})):
            mixer.load(random_lora(mixer.components, ["unet.attention"] if name != "one" else SITES, name, **how))
        mixers.append(mixer)
    worked, fresh = mixers
    before = digests(worked.components)
    last: tuple[dict[str, float], bool] = ({}, True)
    for weights, fuse in operations:
        try:
            worked.set(weights, fuse)
        except UserError:
            assert not fuse
            assert "dora" in weights
            continue
        last = (weights, fuse)
    assert worked.weights == last[0]
    fresh.set(*last)
    assert torch.equal(output(worked.components), output(fresh.components))
    fresh.clear()
    worked.clear()
    assert digests(worked.components) == before == digests(fresh.components)


_models: dict[str, Any] = {}


@pytest.mark.slow
def test_a_thousand_switches_in_random_order_leave_no_trace(mixer: LoraFuser) -> None:
    """Attached, weighted, swapped, fused or not: same bytes at the end, and no tensor more than before."""
    import gc
    import random

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(entry, torch.Tensor) for entry in gc.get_objects())

    draw = random.Random(0)
    before, plain = digests(mixer.components), output(mixer.components)
    counts = []
    for turn in range(1000):
        chosen = draw.sample(["one", "two"], draw.randrange(3))
        mixer.set({name: draw.choice([-1.0, 0.3, 1.0]) for name in chosen}, fuse=draw.random() < 0.9)
        if turn % 200 == 0:
            mixer.clear()
            counts.append(tensors())
    mixer.clear()
    assert digests(mixer.components) == before
    assert torch.equal(output(mixer.components), plain)
    assert tensors() <= counts[0]


def test_what_is_kept_is_the_base_itself_not_a_copy(mixer: LoraFuser) -> None:
    places = {name: parameter.data_ptr() for name, parameter in mixer.components["unet"].named_parameters()}
    for _ in range(3):
        mixer.set({"one": 1.0})
        mixer.set({"two": 1.0})
        mixer.clear()
    assert places == {name: parameter.data_ptr() for name, parameter in mixer.components["unet"].named_parameters()}
    assert not mixer._kept
    assert not mixer._active


def test_a_model_that_was_moved_while_fused_comes_back_in_its_new_dtype(mixer: LoraFuser) -> None:
    wanted = {name: value.to(torch.float64) for name, value in mixer.components["unet"].state_dict().items()}
    mixer.set({"one": 1.0})
    mixer.components["unet"].to(torch.float64)
    mixer.clear()
    found = mixer.components["unet"].state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_adapters_may_change_after_the_model_was_moved(mixer: LoraFuser) -> None:
    mixer.set({"one": 1.0})
    for model in mixer.components.values():
        model.to(torch.bfloat16)
    mixer.set({"one": 0.5, "two": 1.0})
    assert {parameter.dtype for parameter in mixer.components["unet"].parameters()} == {torch.bfloat16}
    mixer.clear()
    assert {parameter.dtype for parameter in mixer.components["unet"].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_the_middle_of_wrapping_leaves_what_was_on(mixer: LoraFuser, monkeypatch, error: type[BaseException]) -> None:
    import latentpipe.lora.fusion as module

    plain = digests(mixer.components)
    mixer.set({"two": 0.5})
    before = digests(mixer.components)
    real = module.attach

    def fails(model, layers, name, weight) -> None:
        real(model, dict(list(layers.items())[:2]), name, weight)
        raise error("in the middle")

    monkeypatch.setattr(module, "attach", fails)
    with pytest.raises(error):
        mixer.set({"one": 1.0}, fuse=False)
    assert digests(mixer.components) == before
    assert mixer.weights == {"two": 0.5}
    mixer.clear()
    assert digests(mixer.components) == plain


def test_every_change_of_a_weight_is_seen_by_copies_made_of_it(mixer: LoraFuser) -> None:
    """A VAE that overflows is kept in a wider dtype, which is stamped with the versions of its weights."""
    weight = mixer.components["vae"].decoder.conv_in.weight
    seen = [weight._version]
    for weights in ({"one": 1.0}, {"one": 0.5}, {}):
        mixer.set(weights)
        assert weight._version > seen[-1]
        seen.append(weight._version)


def test_nothing_of_a_way_of_mixing_stays_when_all_are_off(mixer: LoraFuser) -> None:
    mixer.set({"two": 1.0}, fuse=False)
    mixer.set({}, fuse=False, method="cat")
    assert (mixer.fused, mixer.method) == (True, "sum")


@pytest.mark.parametrize(
    ("kind", "tensors"),
    [
        ("lokr", {"lokr_w1": (2, 2, 3, 3), "lokr_w2": (4, 4)}),
        ("lokr", {"lokr_w2": (8, 8)}),
        ("loha", {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 3), "hada_w2_b": (2, 8)}),
        ("lora", {"lora_A": (2, 8), "lora_B": (8, 3)}),
    ],
)
def test_tensors_that_do_not_fit_together_are_one_sentence(kind, tensors) -> None:
    mixer = LoraFuser({"unet": torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8)})})
    layer = LoraLayer(kind, {name: torch.ones(shape) for name, shape in tensors.items()}, 2, 2.0)
    with pytest.raises(UserError) as error:
        mixer.load(Lora({"unet": {"a": layer}}, "x"))
    assert "\n" not in str(error.value)


def test_a_kernel_of_another_shape_is_another_layer() -> None:
    mixer = LoraFuser({"unet": torch.nn.ModuleDict({"a": torch.nn.Conv2d(4, 4, 3)})})
    layer = LoraLayer("lora", {"lora_A": torch.ones(2, 4, 1, 9), "lora_B": torch.ones(4, 2, 1, 1)}, 2, 2.0)
    with pytest.raises(UserError, match="3 x 3 kernel here"):
        mixer.load(Lora({"unet": {"a": layer}}, "x"))


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="rank 0"):
        LoraLayer("lora", {}, 0, 1.0)


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_exact_merges_equal_the_sum(mixer: LoraFuser, method: str) -> None:
    plain = random_lora(mixer.components, ["unet.attention"], "three")
    mixer.load(plain)
    mixer.set({"two": 0.5, "three": 0.8})
    wanted = output(mixer.components)
    mixer.set({"two": 0.5, "three": 0.8}, method=method)
    tolerance = 1e-4 if method == "cat" else 0.5  # svd keeps the largest rank only
    torch.testing.assert_close(output(mixer.components), wanted, rtol=tolerance, atol=tolerance)
    assert mixer.method == method


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"nobody": 1.0}, "No LoRA 'nobody' is loaded"),
        ({"one": math.nan}, "is nan"),
        ({"one": math.inf}, "is inf"),
        ({"one": 11.0}, "from -10 to 10"),
        ({"one": {"unet": 1.0, "controlnet": 1.0}}, "no layer in 'controlnet'"),
        ({"two": {"vae": 1.0}}, "no layer in 'vae'"),
        ({"one": "much"}, "is much"),
    ],
)
def test_bad_weights_change_nothing(mixer: LoraFuser, weights: dict, said: str) -> None:
    mixer.set({"two": 0.5})
    before = digests(mixer.components)
    with pytest.raises(UserError, match=said):
        mixer.set(weights)
    assert mixer.weights == {"two": 0.5}
    assert digests(mixer.components) == before


def test_a_sum_that_is_not_finite_is_refused_before_anything_is_touched(mixer: LoraFuser) -> None:
    mixer.clear()
    for model in mixer.components.values():
        model.half()
    before = digests(mixer.components)
    mixer.loaded["huge"] = random_lora(mixer.components, ["unet.attention"], "huge", alpha=1e12)
    with pytest.raises(UserError, match="not finite in float16"):
        mixer.set({"huge": 10.0})
    assert digests(mixer.components) == before


@pytest.mark.parametrize("alpha", [1e9, math.nan])
def test_values_out_of_all_proportion_are_refused(mixer: LoraFuser, alpha: float) -> None:
    with pytest.raises(UserError, match="is no adapter but damage"):
        mixer.load(random_lora(mixer.components, ["unet.attention"], "huge", alpha=alpha))
    assert "huge" not in mixer.loaded


def test_adapters_that_are_not_ours_are_refused(pipe) -> None:
    from peft import LoraConfig

    pipe.host.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UserError, match="not ours"):
        pipe.loras.fuser.load(random_lora({"vae": pipe.host.vae}, ["vae.decoder"], "x"))


def test_two_files_of_one_name_are_refused(mixer: LoraFuser) -> None:
    other = random_lora(mixer.components, ["vae.decoder"], "one")
    mixer.load(other)  # the old one is off and gives way
    assert mixer.loaded["one"].hash == other.hash
    mixer.set({"one": 1.0})
    with pytest.raises(UserError, match="Two LoRA files have the name 'one'"):
        mixer.load(random_lora(mixer.components, ["vae.decoder"], "one", rank=3))


def test_nothing_matches_is_an_error_and_a_part_must_be_allowed(mixer: LoraFuser) -> None:
    whole = random_lora(mixer.components, ["unet.attention"], "whole")
    layers = dict(whole.parts["unet"])
    first = next(iter(layers))
    with pytest.raises(UserError, match=r"none of its \d+ layers? fits \(unet has no layer elsewhere"):
        mixer.load(Lora({"unet": {"elsewhere.0": layers[first]}}, "x"))
    with pytest.raises(UserError, match="this model has no transformer"):
        mixer.load(Lora({"transformer": layers}, "x"))
    wide = random_lora({"unet": torch.nn.ModuleDict({"a": torch.nn.Linear(5, 7)})}, ["a"], "x").parts["unet"]["a"]
    with pytest.raises(UserError, match="7 x 5 in the file"):
        mixer.load(Lora({"unet": {first: wide}}, "x"))
    half = Lora({"unet": {**layers, "elsewhere.0": wide}}, "half", unread=("some.key",))
    with pytest.raises(UserError, match=f"in part only: {len(layers)} of {len(layers) + 1} layers? and 1 other keys"):
        mixer.load(half)
    report = mixer.load(half, partial=True)
    assert (report.parts["unet"].matched, report.parts["unet"].layers) == (len(layers), len(layers) + 1)
    assert len(report.left_out) == 2
    assert "some.key" in str(report)


def test_the_report_counts_and_measures(mixer: LoraFuser) -> None:
    lora = random_lora(mixer.components, ["unet.attention"], "counted", rank=3, alpha=6.0)
    part = mixer.load(lora).parts["unet"]
    modules = leaves(mixer.components["unet"])
    changes = [delta(layer, modules[path].weight) for path, layer in lora.parts["unet"].items()]
    bases = [modules[path].weight for path in lora.parts["unet"]]
    wanted = math.sqrt(
        sum(change.square().sum().item() for change in changes) / sum(base.square().sum().item() for base in bases)
    )
    assert part.change == pytest.approx(wanted, rel=1e-5)
    assert (part.ranks, part.alphas, part.kinds) == ((3, 3), (6.0, 6.0), ("lora",))
    assert part.parameters == sum(3 * (base.shape[0] + base[0].numel()) for base in bases)
    assert part.share == pytest.approx(part.parameters / sum(p.numel() for p in mixer.components["unet"].parameters()))
