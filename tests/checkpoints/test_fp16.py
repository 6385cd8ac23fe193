"""make-fp16-safe, against plain diffusers in fp16 and the given VAE in fp32."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import edit_json, some_images, tiny_vae
from planted import PLACES, decode, encode, planted, psnr, times, tiny_ae

from latentpipe.checkpoints.fp16 import HALF_DB, _observe, make_fp16_safe
from latentpipe.checkpoints.fp16_rescale import TARGET, rescale
from latentpipe.checkpoints.vae_io import load_vae, save_vae, vae_hash
from latentpipe.cli.app import main
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import content_hash
from latentpipe.vae.precision import all_finite


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def mean_of(encoded: Any) -> torch.Tensor:
    return encoded if isinstance(encoded, torch.Tensor) else encoded.mean


def tiny_with_pool() -> Any:
    """A TinyVAE with blocks that hold a GroupNorm branch, before and after a wider layer."""
    from latentpipe.vae.tiny import TinyVAE

    torch.manual_seed(0)
    encoder = [
        ["conv", 3, 8, 1, True],
        ["block", 8, 8, True],
        ["conv", 8, 8, 2, False],
        ["block", 8, 8, False],
        ["conv", 8, 4, 1, True],
    ]
    decoder = [["conv", 4, 8, 1, True], ["relu"], ["block", 8, 8, True], ["up"], ["block", 8, 16, True], ["conv", 16, 3, 1, True]]
    return TinyVAE(4, 2, encoder, decoder).eval()


@pytest.mark.parametrize("place", PLACES)
def test_plain_fp16_is_finite_and_near_afterwards(place: str) -> None:
    vae, images, latents = planted(place), some_images(), torch.randn(4, 4, 8, 8)
    before = content_hash(vae.state_dict()), dict(vae.config)
    encoded, decoded = mean_of(encode(vae, images)), decode(vae, latents)
    new, report = make_fp16_safe(vae, images)
    assert (content_hash(vae.state_dict()), dict(vae.config)) == before
    assert report.scales
    assert all(after <= TARGET for _, after in report.largest.values())
    assert all(math.log2(scale).is_integer() for scale in report.scales.values())
    assert psnr(mean_of(encode(new, images)), encoded) > 100  # the same in fp32
    assert psnr(decode(new, latents), decoded) > 100
    half = new.half()  # and in fp16, by the processor itself
    assert psnr(mean_of(encode(half, images.half())), encoded) > HALF_DB
    assert psnr(decode(half, latents.half()), decoded) > HALF_DB


def test_the_report_is_what_happened() -> None:
    vae, images = planted("conv1"), some_images()
    vae.decoder.conv_in.weight *= 1.001  # no power of two
    new, report = make_fp16_safe(vae, images)
    block = PLACES["conv1"][1]
    assert report.n == 4
    assert report.overflowed
    assert list(report.scales) == [block]
    assert next(iter(report.largest)) == block
    raw, seen = encode(vae, images).mean, []
    vae.get_submodule(block).register_forward_hook(lambda module, args, output: seen.append(output.abs().max().item()))
    right = decode(vae, raw)
    before, after = report.largest[block]
    assert before == pytest.approx(seen[0], rel=1e-5)
    assert after == pytest.approx(before * report.scales[block], rel=1e-5)
    assert TARGET / 2 < after <= TARGET
    difference = (decode(new, raw) - right).abs().max().item()
    assert report.decode.difference == pytest.approx(difference, abs=1e-6)
    assert report.decode.half_db == pytest.approx(psnr(decode(new.half(), raw.half()), right), abs=5)
    assert "overflows in fp16; 1 layer rescaled" in report.table()


def test_emulated_fp16_is_as_good_as_the_processors() -> None:
    vae, images = tiny_vae(mid_block_add_attention=True), some_images()
    right = _observe(vae, images)
    rounded = _observe(copy.deepcopy(vae).half().float(), images, right.mean, rounded=True)
    real = decode(copy.deepcopy(vae).half(), right.mean.half())
    assert psnr(rounded.images, right.images) == pytest.approx(psnr(real, right.images), abs=3)
    broken = _observe(planted("add").half().float(), images, right.mean, rounded=True)
    assert not all_finite(broken.images)


def test_a_healthy_vae_stays_bit_for_bit() -> None:
    vae = tiny_vae()
    new, report = make_fp16_safe(vae, some_images())
    assert not report.overflowed
    assert not report.scales
    assert report.decode.difference == 0
    assert content_hash(new.state_dict()) == content_hash(vae.state_dict())
    assert new.config.force_upcast is False  # else diffusers' SDXL pipeline decodes in fp32 all the same


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_queries_and_keys_are_balanced(half: str) -> None:
    vae, images = tiny_vae(mid_block_add_attention=True), some_images()
    attention = getattr(vae, half).mid_block.attentions[0]
    times(attention.to_q, 2.0**17)
    attention.to_k.weight /= 2.0**12
    attention.to_k.bias /= 2.0**12
    new, report = make_fp16_safe(vae, images)
    name = f"{half}.mid_block.attentions.0."
    assert report.overflowed
    assert report.scales[name + "to_q"] * report.scales[name + "to_k"] == 1
    assert max(_observe(new, images).largest[name + end] for end in ("to_q", "to_k")) < TARGET


def test_stages_get_scales_of_their_own() -> None:
    """A stream that grows on the way keeps its size where it is small: GroupNorm's eps would weigh there."""
    vae = tiny_vae(mid_block_add_attention=True)
    shortcut = vae.decoder.up_blocks[1].resnets[0]
    times(shortcut.conv_shortcut, 2.0**18)
    times(shortcut.conv2, 2.0**18)
    _, report = make_fp16_safe(vae, some_images())
    assert report.overflowed
    assert set(report.scales) == {
        f"decoder.up_blocks.1.resnets.{name}" for name in ("0.conv2", "0.conv_shortcut", "1.conv2")
    }  # fmt: skip


@pytest.mark.parametrize("make", [tiny_ae, tiny_with_pool])
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_tiny_autoencoders_pass_a_scale_through(make: Any, half: str) -> None:
    vae, images = make(), some_images()
    convolutions = [module for module in getattr(vae, half).modules() if isinstance(module, torch.nn.Conv2d)]
    times(convolutions[0], 2.0**19)
    times(convolutions[1 if make is tiny_ae else 4], 2.0**-3)
    convolutions[-1].weight /= 2.0**12
    raw = mean_of(encode(vae, images)).tanh()
    encoded, decoded = mean_of(encode(vae, images)), decode(vae, raw)
    new, report = make_fp16_safe(vae, images)
    assert report.overflowed
    assert psnr(mean_of(encode(new, images)), encoded) > 100
    assert psnr(decode(new, raw), decoded) > 100
    plain = new.half()
    value, right = (mean_of(encode(plain, images.half())), encoded) if half == "encoder" else (decode(plain, raw.half()), decoded)
    assert psnr(value, right) > HALF_DB


def test_what_cannot_be_rescaled_is_refused() -> None:
    vae = tiny_vae()
    vae.decoder.conv_norm_out.weight *= 30000  # what SiLU gets, and it knows no scale
    vae.decoder.conv_out.weight /= 30000
    with pytest.raises(UserError, match=r"decoder\.conv_norm_out is still not finite in fp16 on decode"):
        make_fp16_safe(vae, some_images())


def test_a_proof_that_fails_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(vae: Any, largest: Any) -> dict[str, float]:
        vae.decoder.mid_block.resnets[0].conv2.bias *= 0.5
        return rescale(vae, largest)

    monkeypatch.setattr("latentpipe.checkpoints.fp16.rescale", wrong)
    with pytest.raises(UserError, match=r"decode has a PSNR of \d+\.\d dB in fp32 .* expected at least 60 and 40"):
        make_fp16_safe(planted("stream"), some_images())


def test_other_classes_and_broken_vaes_are_refused() -> None:
    from diffusers import AutoencoderTiny

    smooth = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "act_fn": "silu"}
    with pytest.raises(UserError, match="given AutoencoderTiny"):
        make_fp16_safe(AutoencoderTiny(**smooth, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)), some_images())
    with pytest.raises(UserError, match="given Linear"):
        make_fp16_safe(torch.nn.Linear(1, 1), some_images())
    encoder = tiny_with_pool()
    encoder.decoder = None
    with pytest.raises(UserError, match="no decoder"):
        make_fp16_safe(encoder, some_images())
    broken = tiny_vae()
    broken.decoder.conv_in.bias[0] = torch.nan
    with pytest.raises(UserError, match="not finite on these images even in fp32"):
        make_fp16_safe(broken, some_images())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_new_vae_has_the_dtype_of_the_old(dtype: torch.dtype) -> None:
    vae = planted("conv1").to(dtype)
    new, _ = make_fp16_safe(vae, some_images())
    assert new.dtype == dtype
    assert all_finite(decode(copy.deepcopy(new).half(), torch.randn(1, 4, 8, 8).half()))


@pytest.mark.slow
def test_the_verb_writes_a_vae_that_diffusers_runs_in_fp16(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import AutoencoderKL

    base, out = tmp_path / "base", tmp_path / "safe"
    save_vae(planted("conv1"), base, {"data": "drawn"}, {"factors": [[0.0] * 3] * 4, "bias": [0.0] * 3})
    assert main(["make-fp16-safe", str(base), "--out", str(out), "--images", str(pictures), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "12 images: this VAE overflows in fp16; 1 layer rescaled" in printed
    assert printed.splitlines()[-1] == str(out)
    card = json.loads((out / "card.json").read_text())
    assert card["data"] == "drawn"
    assert card["content_hash"] == vae_hash(out) != vae_hash(base)
    facts = card["fp16_safe"]
    assert (facts["base"], facts["n"], facts["images"]) == (vae_hash(base), 12, "shapes")
    assert facts["decode"]["exact_db"] > 100
    assert (out / "latent_rgb.json").is_file()
    latents = torch.randn(2, 4, 8, 8)
    stock = AutoencoderKL.from_pretrained(out, torch_dtype=torch.float16)
    assert psnr(decode(stock, latents.half()), decode(load_vae(base), latents)) > HALF_DB
    assert main(["make-fp16-safe", str(base), "--out", str(out)]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err


def test_the_verb_without_out_only_measures(tmp_path: Path, vae_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in vae_folder.parent.iterdir())
    assert main(["make-fp16-safe", str(vae_folder), "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["overflowed"], report["scales"], report["n"]) == (False, {}, 16)
    assert report["decode"]["difference"] == 0
    assert sorted(path.name for path in vae_folder.parent.iterdir()) == before


def test_a_config_may_state_both_sides(tmp_path: Path, vae_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """diffusers takes a list as sample_size; pictures are measured at the shorter side, as at one number."""
    reports = []
    for name, side in (("one", 16), ("both", [24, 16])):
        shutil.copytree(vae_folder, tmp_path / name)
        edit_json(tmp_path / name / "config.json", sample_size=side)
        assert main(["make-fp16-safe", str(tmp_path / name), "--json", "--device", "cpu"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0] == reports[1]


def test_a_refused_vae_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae = tiny_vae()
    vae.decoder.conv_norm_out.weight *= 30000
    save_vae(vae, tmp_path / "base", {})
    assert main(["make-fp16-safe", str(tmp_path / "base"), "--out", str(tmp_path / "safe"), "--device", "cpu"]) == 2
    assert "cannot be made safe" in capsys.readouterr().err
    assert not (tmp_path / "safe").exists()
