"""The precision ladder, against the same weights in fp32."""

from __future__ import annotations

import copy
import gc
import json
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import some_images, tiny_vae
from hypothesis import given
from hypothesis import strategies as st
from planted import PLACES, decode, encode, planted, psnr, times

from latentpipe.utils.errors import LatentpipeWarning, UserError
from latentpipe.utils.io import content_hash
from latentpipe.vae import precision
from latentpipe.vae.precision import all_finite, first_overflow, run_with_dtype_fallback, unchecked


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Each test is a process of its own; no gradients."""
    precision._climbs.clear()
    with torch.no_grad():
        yield


def half(place: str = "conv1") -> Any:
    return planted(place).half()


def float_of(vae: Any) -> Any:
    return copy.deepcopy(vae).float()


def raw_latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def input_of(direction: str) -> torch.Tensor:
    return some_images() if direction == "encode" else raw_latents()


class Counted:
    """Decode, and note in which dtypes."""

    def __init__(self) -> None:
        self.dtypes: list[torch.dtype] = []

    def __call__(self, vae: Any, raw: torch.Tensor) -> torch.Tensor:
        self.dtypes.append(raw.dtype)
        return decode(vae, raw)


def quietly(vae: Any, run: Any = decode, given: torch.Tensor | None = None) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LatentpipeWarning)
        return run_with_dtype_fallback(vae, "decode", run, raw_latents() if given is None else given)


@pytest.mark.parametrize("place", PLACES)
def test_the_ladder_mends_the_black_picture_and_names_the_block(place: str) -> None:
    direction, block = PLACES[place]
    vae, given = half(place), input_of(direction)
    run: Any = encode if direction == "encode" else decode
    before = content_hash(vae.state_dict()), dict(vae.config), len(vae._forward_hooks)
    naive = run(vae, given.half())
    assert not all_finite(naive if isinstance(naive, torch.Tensor) else naive.mean)
    with pytest.warns(LatentpipeWarning) as notes:
        result = run_with_dtype_fallback(vae, direction, run, given)
    value, right = [each if isinstance(each, torch.Tensor) else each.mean for each in (result, run(float_of(vae), given))]
    assert value.dtype == torch.float16
    assert psnr(value, right) > 30
    assert len(notes) == 1
    message = str(notes[0].message)
    assert message.startswith(f"{block} of this VAE overflows in fp16 when it {direction}s, so it runs in bf16.")
    assert "latentpipe make-fp16-safe" in message
    assert (content_hash(vae.state_dict()), dict(vae.config), len(vae._forward_hooks)) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vae.modules())


def test_a_posterior_samples_as_a_plain_one_does() -> None:
    vae, images = half("encoder conv1"), some_images()
    with pytest.warns(LatentpipeWarning):
        posterior = run_with_dtype_fallback(vae, "encode", encode, images)
    right = encode(float_of(vae), images)
    first, second = (each.sample(torch.Generator().manual_seed(1)) for each in (posterior, right))
    assert first.dtype == torch.float16
    assert psnr(first, second) > 30


def test_a_healthy_vae_runs_as_it_is(own_home: Path) -> None:
    vae, run = tiny_vae().half(), Counted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run_with_dtype_fallback(vae, "decode", run, raw_latents())
    assert torch.equal(result, decode(vae, raw_latents().half()))
    assert run.dtypes == [torch.float16]
    assert not precision._states[vae].copies
    assert not precision._states[vae].digest  # sha256 over every weight is not paid for nothing
    assert not list(own_home.iterdir())


def test_the_second_call_starts_where_the_first_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, run = half(), Counted()
    first = quietly(vae, run)
    assert run.dtypes == [torch.float16, torch.float16, torch.bfloat16]  # one more run finds the block
    kept = precision._states[vae].copies[torch.bfloat16]
    run.dtypes.clear()
    monkeypatch.setattr(precision, "content_hash", None)  # it reads every weight: once is enough
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = run_with_dtype_fallback(vae, "decode", run, raw_latents())
    assert run.dtypes == [torch.bfloat16]
    assert precision._states[vae].copies == {torch.bfloat16: kept}
    assert torch.equal(first, second)


def test_encode_and_other_vaes_are_not_affected() -> None:
    vae = half()
    quietly(vae)
    other, run = tiny_vae(7).half(), Counted()
    quietly(other, run)
    assert run.dtypes == [torch.float16]
    images = some_images()
    assert torch.equal(run_with_dtype_fallback(vae, "encode", encode, images).mean, encode(vae, images.half()).mean)


def test_two_objects_of_one_vae_are_told_of_once_and_both_remember() -> None:
    first, second, run = half(), half(), Counted()
    assert (
        run_with_dtype_fallback(second, "decode", lambda vae, raw: raw * 0, raw_latents()).dtype == torch.float16
    )  # nothing known yet
    quietly(first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_with_dtype_fallback(second, "decode", decode, raw_latents())
        run_with_dtype_fallback(second, "decode", run, raw_latents())
    assert run.dtypes == [torch.bfloat16]


def test_the_next_process_remembers(own_home: Path) -> None:
    quietly(half())
    rows = json.loads((own_home / "precision.json").read_text())
    digest = content_hash(half().state_dict())
    assert rows == {f"{digest}/decode/fp16": {"dtype": "bf16", "block": "decoder.up_blocks.1.resnets.1.conv1"}}
    precision._climbs.clear()
    run = Counted()
    with pytest.warns(LatentpipeWarning, match=r"resnets\.1\.conv1 .*runs in bf16"):
        run_with_dtype_fallback(half(), "decode", run, raw_latents())
    assert run.dtypes == [torch.bfloat16]
    precision._climbs.clear()
    quietly(half("add"))
    assert len(json.loads((own_home / "precision.json").read_text())) == 2


ROWS = ("1", "{}", '{"dtype": "fp9", "block": ""}', '{"dtype": "fp16", "block": "x"}')
DAMAGED = ["", "[]", "{", "3", "\x00\xff", "[" * 100_000, *(f'{{"KEY": {row}}}' for row in ROWS)]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_memory_is_ignored(own_home: Path, content: str) -> None:
    vae, run = half(), Counted()
    key = f"{content_hash(vae.state_dict())}/decode/fp16"
    (own_home / "precision.json").write_text(content.replace("KEY", key), encoding="latin-1")
    quietly(vae, run)
    assert run.dtypes == [torch.float16, torch.float16, torch.bfloat16]
    assert json.loads((own_home / "precision.json").read_text())[key]["dtype"] == "bf16"  # and written anew


def test_a_home_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LATENTPIPE_HOME", str(tmp_path / "file" / "home"))
    vae, run = half(), Counted()
    quietly(vae, run)
    quietly(vae, run)
    assert run.dtypes[-2:] == [torch.bfloat16] * 2


def test_fp32_is_the_last_rung() -> None:
    """bf16 has fp32's range, so the second overflow is made in `run`."""

    def run(vae: Any, raw: torch.Tensor) -> torch.Tensor:
        return decode(vae, raw) * (torch.nan if vae.dtype == torch.bfloat16 else 1)

    vae = half()
    with pytest.warns(LatentpipeWarning, match=r"resnets\.1\.conv1 .* so it runs in fp32"):
        result = run_with_dtype_fallback(vae, "decode", run, raw_latents())
    assert psnr(result, decode(float_of(vae), raw_latents())) > 60
    assert list(precision._states[vae].copies) == [torch.float32]  # the bf16 copy is gone


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_input_that_is_not_finite_is_refused(dtype: torch.dtype, bad: float) -> None:
    vae = tiny_vae().to(dtype)
    latents, images = raw_latents(), some_images()
    latents[0, 1, 2, 3] = images[1, 0, 0, 0] = bad
    with pytest.raises(UserError, match=r"1 of the 512 values of the latents .* not finite.*before the VAE"):
        run_with_dtype_fallback(vae, "decode", decode, latents)
    with pytest.raises(UserError, match=r"values of the images"):
        run_with_dtype_fallback(vae, "encode", encode, images)


@pytest.mark.parametrize("dtype", precision.LADDER)
def test_weights_that_are_not_finite_are_named(dtype: torch.dtype) -> None:
    vae = tiny_vae().to(dtype)
    vae.decoder.mid_block.resnets[1].conv2.bias[3] = torch.nan
    with pytest.raises(UserError, match=r"^decoder\.mid_block\.resnets\.1\.conv2\.bias of this VAE is not finite"):
        run_with_dtype_fallback(vae, "decode", decode, raw_latents())


@pytest.mark.filterwarnings("ignore::latentpipe.utils.errors.LatentpipeWarning")
def test_overflow_in_fp32_is_an_error_that_names_the_block() -> None:
    vae = tiny_vae()
    times(vae.decoder.conv_in, 1e38)
    said = r"decoder\.conv_in gives values that are not finite even in fp32.*at most 10{1,2}0,000 in size"
    with pytest.raises(UserError, match=said):
        run_with_dtype_fallback(vae, "decode", decode, raw_latents().sign() * 1e5)


def test_the_last_fault_is_the_one_named() -> None:
    vae = half()
    with pytest.raises(UserError, match="cannot decode: an operation outside the modules gives values that are not finite"):
        run_with_dtype_fallback(vae, "decode", lambda model, raw: decode(model, raw) * torch.inf, raw_latents())


def test_an_operation_between_modules_is_its_modules() -> None:
    class Between(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Identity(), torch.nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x) * 1e30 * 1e30)

    model = torch.nn.Sequential(torch.nn.Identity(), Between(), torch.nn.Identity())
    assert first_overflow(model, lambda part, x: part(x), torch.ones(1)) == "1"


def test_input_too_large_for_fp16_climbs_too() -> None:
    vae, latents = tiny_vae().half(), raw_latents() * 1e5
    with pytest.warns(LatentpipeWarning, match=r"^the input of this VAE overflows in fp16"):
        result = run_with_dtype_fallback(vae, "decode", decode, latents)
    assert psnr(result, decode(float_of(vae), latents)) > 30


def test_a_result_too_large_for_fp16_stays_wide() -> None:
    vae = tiny_vae().half()
    vae.quant_conv.bias[0] = vae.quant_conv.bias[1] = 65000
    vae.quant_conv.weight[0] = 4000
    with pytest.warns(LatentpipeWarning, match="quant_conv"):
        posterior = run_with_dtype_fallback(vae, "encode", encode, some_images())
    assert posterior.mean.dtype == torch.bfloat16
    assert all_finite((posterior.mean, posterior.std))


def test_changed_weights_are_copied_and_hashed_again() -> None:
    vae = half()
    old = quietly(vae)
    times(vae.decoder.conv_out, 2)
    new, right = quietly(vae), decode(float_of(vae), raw_latents())
    assert psnr(old, right) < 25
    assert psnr(new, right) > 30
    vae.load_state_dict(tiny_vae(3, mid_block_add_attention=True).state_dict())
    run = Counted()
    quietly(vae, run)
    assert run.dtypes == [torch.float16]


def test_switches_of_the_lent_vae_reach_the_copy() -> None:
    vae = half()
    quietly(vae)
    vae.enable_slicing()
    seen: list[bool] = []
    quietly(vae, lambda model, raw: seen.append(model.use_slicing) or decode(model, raw))
    assert seen == [True]


def test_the_copy_dies_with_its_vae() -> None:
    vae = half()
    quietly(vae)
    kept = weakref.ref(precision._states[vae].copies[torch.bfloat16])
    assert kept() is not None
    del vae
    gc.collect()
    assert kept() is None


def test_autocast_climbs_out_of_fp16() -> None:
    vae, run = planted("conv1"), Counted()
    right = decode(vae, raw_latents())
    with torch.autocast("cpu", torch.float16):
        assert not all_finite(decode(vae, raw_latents()))
        first, second = quietly(vae, run), quietly(vae, run)
    assert psnr(first, right) > 30
    assert torch.equal(first, second)
    assert run.dtypes == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]


def test_inference_mode_leaves_a_copy_that_carries_gradients() -> None:
    vae = half()
    with torch.inference_mode():
        quietly(vae)
    with torch.enable_grad():
        latents = raw_latents().requires_grad_()
        quietly(vae, given=latents).sum().backward()
    assert latents.grad is not None
    assert latents.grad.any()


def test_training_and_unchecked_runs_are_plain() -> None:
    vae, run = half(), Counted()
    with unchecked():
        assert not all_finite(run_with_dtype_fallback(vae, "decode", run, raw_latents()))
    with torch.enable_grad():
        assert not all_finite(run_with_dtype_fallback(vae.train(), "decode", run, raw_latents()))
    assert run.dtypes == [torch.float16] * 2
    assert all_finite(quietly(vae))  # forgotten eval() is no training


@given(st.integers(0, 59), st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.sampled_from(precision.LADDER))
def test_one_bad_value_is_found_wherever_it_is(index: int, bad: float, dtype: torch.dtype) -> None:
    tensor = torch.full((60,), torch.finfo(dtype).max, dtype=dtype)  # their sum is infinite; they are not
    assert all_finite({"a": [tensor.view(3, 4, 5)]})
    tensor[index] = bad
    assert not all_finite(({"a": tensor.view(3, 4, 5)},))


def test_what_holds_no_number_is_finite() -> None:
    assert all_finite((torch.zeros(0, 3), torch.tensor([1, 2]), None, "word", 1.0))
