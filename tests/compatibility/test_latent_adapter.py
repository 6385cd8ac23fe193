"""Adapters: closed forms that are exact where they should be, files that fit one pair only, pictures through them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import grey_levels, some_images, tiny_vae
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from latentpipe import LatentPipeline, LatentSpace, UserError, VAEStage, fit_adapter, replay, swap_vae
from latentpipe.checkpoints.vae_io import load_vae, save_vae, vae_hash
from latentpipe.cli.app import main
from latentpipe.compatibility.latent_adapter import (
    CANDIDATES,
    AdapterCard,
    LatentAdapter,
    bridged,
    find_adapter,
    open_adapter,
    read_card,
    save_adapter,
)
from latentpipe.train.latent_adapter import interval
from latentpipe.utils.io import content_hash
from latentpipe.vae.probe_images import probe_images
from latentpipe.vae.stage import fold_normalization

IMAGES = some_images(15, 16)


def scaled(**declared: Any) -> VAEStage:
    """The tiny VAE with another gain and offset in each channel, which its config does not declare."""
    vae = tiny_vae()
    fold_normalization(vae, LatentSpace(4, 2, (2.0, 0.5, 1.5, 3.0), (0.1, -0.2, 0.0, 0.3)))
    vae.register_to_config(**declared)
    return VAEStage(vae)


def reordered() -> VAEStage:
    vae, order = tiny_vae(), [2, 0, 3, 1]
    with torch.no_grad():
        both = order + [4 + channel for channel in order]
        vae.quant_conv.weight.copy_(vae.quant_conv.weight[both].clone())
        vae.quant_conv.bias.copy_(vae.quant_conv.bias[both].clone())
        vae.post_quant_conv.weight.copy_(vae.post_quant_conv.weight[:, order].clone())
    return VAEStage(vae)


def coarser(seed: int = 3, channels: int = 6) -> VAEStage:
    """A VAE of 6 channels at 1/4 size."""
    blocks = {"block_out_channels": (8, 8, 16), "down_block_types": ("DownEncoderBlock2D",) * 3}
    return VAEStage(tiny_vae(seed, latent_channels=channels, up_block_types=("UpDecoderBlock2D",) * 3, **blocks))


def test_a_gain_for_each_channel_is_found_exactly_and_chosen() -> None:
    adapter, ladder = fit_adapter(VAEStage(tiny_vae()), scaled(), IMAGES, steps=5)
    assert ladder.chosen == "per channel"
    assert ladder.scores[0].r2 == pytest.approx(1, abs=1e-5)
    latents = VAEStage(tiny_vae()).encode(IMAGES)
    assert torch.allclose(adapter(latents), scaled().encode(IMAGES), atol=1e-4)
    assert (ladder.fitted_on, ladder.held_out) == (12, 3)


def test_a_reordering_takes_the_linear_rung() -> None:
    _, ladder = fit_adapter(VAEStage(tiny_vae()), reordered(), IMAGES, steps=5)
    by_name = {score.name: score for score in ladder.scores}
    assert by_name["linear 1x1"].r2 == pytest.approx(1, abs=1e-4)
    assert by_name["per channel"].r2 < 0.5
    assert by_name["linear 1x1"].psnr_db == pytest.approx(ladder.bound.psnr_db, abs=0.05)


def test_ridge_regression_is_least_squares() -> None:
    """The 3x3 rung against numpy's solver on the same design matrix."""
    source, target = VAEStage(tiny_vae()), VAEStage(tiny_vae(5))
    adapter = LatentAdapter((4, 2), (4, 2), "linear 3x3")
    from latentpipe.train.latent_adapter import _solve

    with torch.no_grad():
        x, y = source.encode(IMAGES), target.encode(IMAGES)
    _solve(adapter, x, y)
    columns = functional.unfold(functional.pad(x, (1,) * 4, mode="replicate"), 3).transpose(1, 2).reshape(-1, 36).double().numpy()
    design = np.concatenate([columns, np.ones((len(columns), 1))], axis=1)
    wanted = y.permute(0, 2, 3, 1).reshape(-1, 4).double().numpy()
    solution = np.linalg.lstsq(design, wanted, rcond=None)[0]
    with torch.no_grad():
        ours = adapter(x).permute(0, 2, 3, 1).reshape(-1, 4).numpy()
    assert np.abs(ours - design @ solution).max() < 1e-2
    assert np.square(ours - wanted).mean() <= np.square(design @ solution - wanted).mean() * 1.001


@pytest.mark.parametrize(("source", "target"), [("fine", "coarse"), ("coarse", "fine")])
def test_channels_and_scale_may_change(source: str, target: str) -> None:
    stages = {"fine": VAEStage(tiny_vae()), "coarse": coarser()}
    adapter, ladder = fit_adapter(stages[source], stages[target], IMAGES, steps=10)
    assert [score.name for score in ladder.scores] == list(CANDIDATES[1:])
    for rung in CANDIDATES[1:]:
        mapped = LatentAdapter(adapter.source, adapter.target, rung)(stages[source].encode(IMAGES))
        assert mapped.shape == stages[target].encode(IMAGES).shape
    assert ladder.bound.r2 == 1
    text = str(ladder)
    assert "upper bound" in text
    assert f"chosen: {ladder.chosen}" in text
    json.dumps(ladder.as_dict())


@pytest.mark.slow
def test_each_rung_explains_no_less_than_the_one_before() -> None:
    _, ladder = fit_adapter(VAEStage(tiny_vae()), VAEStage(tiny_vae(5)), probe_images(60, 32), steps=200)
    values = [score.r2 for score in ladder.scores]
    assert values[0] < values[1] < values[2]
    assert values[3] > values[1]


@given(st.sampled_from([(4, 2), (6, 4), (3, 8)]), st.sampled_from([(4, 2), (6, 4), (3, 8)]), st.sampled_from(CANDIDATES[1:]))
def test_the_picture_keeps_its_size(source: tuple[int, int], target: tuple[int, int], rung: Any) -> None:
    latents = torch.zeros(2, source[0], 16 // source[1], 32 // source[1])
    assert LatentAdapter(source, target, rung)(latents).shape == (2, target[0], 16 // target[1], 32 // target[1])


@given(st.lists(st.floats(0, 50), min_size=3, max_size=30))
def test_intervals_hold_the_mean(values: list[float]) -> None:
    low, high = interval(torch.tensor(values))
    assert min(values) - 1e-3 <= low <= high <= max(values) + 1e-3
    assert low - 1e-3 <= sum(values) / len(values) <= high + 1e-3 or len(set(values)) > 1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"1/3 to 1/2 does not"):
        LatentAdapter((4, 3), (4, 2), "linear 1x1")
    with pytest.raises(UserError, match=r"takes 4-channel latents .* given \(1, 5, 8, 8\)"):
        LatentAdapter((4, 2), (6, 4), "linear 1x1")(torch.zeros(1, 5, 8, 8))
    with pytest.raises(UserError, match="2 divides; given"):
        LatentAdapter((4, 2), (6, 4), "linear 1x1")(torch.zeros(1, 4, 7, 8))
    with pytest.raises(UserError, match="4 pictures are too few"):
        fit_adapter(VAEStage(tiny_vae()), VAEStage(tiny_vae(1)), IMAGES[:4])
    with pytest.raises(UserError, match="maps 4 channels at 1/2 to 6 channels at 1/4; given VAEs of"):
        bridged(coarser(), VAEStage(tiny_vae()), LatentAdapter((4, 2), (6, 4), "linear 1x1"))


# --- files --------------------------------------------------------------------------------------------------


@pytest.fixture
def card() -> AdapterCard:
    return AdapterCard("a" * 64, "b" * 64, (4, 2), (6, 4), "convolution", {"scores": []})


def test_a_file_is_read_back_bit_for_bit(tmp_path: Path, card: AdapterCard) -> None:
    adapter = LatentAdapter((4, 2), (6, 4), "convolution")
    digest = save_adapter(adapter, card, tmp_path / "x.safetensors")
    again = open_adapter(tmp_path / "x.safetensors", ["c", "a" * 64], {"b" * 64})
    assert read_card(tmp_path / "x.safetensors") == card
    latents = torch.randn(2, 4, 8, 8)
    assert torch.equal(again(latents), adapter(latents))
    assert content_hash(again.state_dict()) == digest
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_file_serves_one_pair_only(tmp_path: Path, card: AdapterCard) -> None:
    path = tmp_path / "x.safetensors"
    save_adapter(LatentAdapter((4, 2), (6, 4), "convolution"), card, path)
    with pytest.raises(UserError, match=rf"fitted from VAE {'a' * 16}, but the one given is {'c' * 16}"):
        open_adapter(path, ["c" * 64], ["b" * 64])
    with pytest.raises(UserError, match=rf"fitted to VAE {'b' * 16}, but the one given is {'a' * 16}"):
        open_adapter(path, ["a" * 64], ["a" * 64])


def test_files_that_are_none_are_refused(tmp_path: Path, card: AdapterCard, vae_folder: Path) -> None:
    with pytest.raises(UserError, match="not an adapter of this version"):
        read_card(next(vae_folder.glob("*.safetensors")))
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="not a complete safetensors file"):
        read_card(tmp_path / "noise.safetensors")
    with pytest.raises(UserError, match="give it that ending"):
        save_adapter(LatentAdapter((4, 2), (6, 4), "linear 1x1"), card, tmp_path / "x.bin")
    with pytest.raises(UserError, match="No adapter 'nothing': neither a file nor an installed one"):
        find_adapter("nothing")
    save_adapter(LatentAdapter((4, 2), (6, 4), "linear 1x1"), card, tmp_path / "wrong.safetensors")  # the card says convolution
    with pytest.raises(UserError, match=r"missing curve\.0"):
        open_adapter(tmp_path / "wrong.safetensors", ["a" * 64], ["b" * 64])


@pytest.mark.parametrize(
    "change",
    [{"source": (8, 0)}, {"source": ("8", 4)}, {"target": (6, -4)}, {"rung": "foo"}, {"target": (10**9, 4)}, {"target": (6,)}],
)
def test_tampered_cards_are_refused(tmp_path: Path, card: AdapterCard, change: dict[str, Any]) -> None:
    save_adapter(LatentAdapter((4, 2), (6, 4), "convolution"), replace(card, **change), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not an adapter of this version"):
        read_card(tmp_path / "x.safetensors")


# --- in use -------------------------------------------------------------------------------------------------


def hashed(host: Any) -> dict[str, str]:
    return {name: content_hash(part.state_dict()) for name, part in host.components.items() if hasattr(part, "state_dict")}


def test_swapped_in_through_an_adapter(pipe: LatentPipeline) -> None:
    host, other = pipe.host, coarser()
    before = hashed(host)
    adapter, _ = fit_adapter(VAEStage(host.vae), other, IMAGES, steps=5)
    new = swap_vae(host, other, adapter=adapter)
    drawn = [
        p("red circle", generator=torch.Generator().manual_seed(1), num_inference_steps=2, output_type=kind).images
        for p, kind in ((host, "latent"), (new, "pt"))
    ]
    with torch.no_grad():
        wanted = other.decode(adapter(drawn[0]))
    assert (drawn[1] - (wanted / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5
    assert hashed(host) == before
    swapped = swap_vae(replace(pipe, hashes=pipe.hashes), other, adapter=adapter)("red circle", seed=1, num_inference_steps=2)[0]
    assert (swapped.recipe.vae, swapped.recipe.adapter) == ("(given)", "(given)")
    assert swapped.recipe.hashes["vae"] != pipe.hashes["vae"]
    assert "adapter" in swapped.recipe.hashes
    ours = swapped.image
    assert ours.size == pipe("red circle", seed=1, num_inference_steps=2)[0].image.size


@pytest.fixture(scope="module")
def home_with_adapter(model_folder: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a coarser VAE, and an adapter to it made by the verb; not to be written to."""
    home = tmp_path_factory.mktemp("with-adapter")
    save_vae(coarser().vae, home / "vae" / "coarse", {})
    ends = ["--from", str(model_folder / "vae"), "--to", "coarse", "--images", str(pictures)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTPIPE_HOME", str(home))
        assert main(["fit-adapter", *ends, "--out", str(home / "adapters" / "mine.safetensors")]) == 0
    return home


@pytest.fixture
def fitted(home_with_adapter: Path, own_home: Path) -> Path:
    """The adapter in the user's own folder, beside its VAE."""
    shutil.copytree(home_with_adapter, own_home, dirs_exist_ok=True)
    return own_home / "adapters" / "mine.safetensors"


@pytest.mark.slow
def test_fit_draw_replay(fitted: Path, installed: str, tmp_path: Path) -> None:
    assert read_card(fitted).report["bound"]["name"] == "upper bound"
    assert main(["inspect", "mine"]) == 0
    arguments = ["generate", "red circle", "--model", installed, "--steps", "2", "--seed", "3", "--out", str(tmp_path)]
    assert main([*arguments, "--vae", "coarse", "--adapter", "mine"]) == 0
    picture = next(tmp_path.glob("*.png"))
    drawn = replay(picture, device="cpu")
    assert drawn.difference == 0
    assert drawn.picture.recipe.adapter == "mine"
    assert {"adapter", "vae"} <= set(drawn.picture.recipe.hashes)
    card = read_card(fitted)
    card = replace(card, report={})
    adapter = open_adapter(fitted, [card.source_hash], [card.target_hash])
    with torch.no_grad():
        adapter.linear.bias.add_(1)  # type: ignore[operator]
    save_adapter(adapter, card, fitted)
    with pytest.raises(UserError, match="made with other weights: adapter is"):
        replay(picture, device="cpu")
    fitted.unlink()
    with pytest.raises(UserError, match="adapter 'mine', which is not installed"):
        replay(picture, device="cpu")


@pytest.mark.slow
def test_an_adapter_for_another_vae_is_refused(fitted: Path, installed: str, own_home: Path, capsys: Any) -> None:
    save_vae(coarser(4).vae, own_home / "vae" / "other", {})
    assert main(["generate", "x", "--model", installed, "--vae", "other", "--adapter", "mine"]) == 2
    assert f"fitted to VAE {vae_hash(own_home / 'vae' / 'coarse')[:16]}" in capsys.readouterr().err
    assert main(["generate", "x", "--model", installed, "--adapter", "mine"]) == 2
    assert "--adapter does something only with --vae" in capsys.readouterr().err


@pytest.mark.slow
def test_pictures_begin_from_the_hosts_own_encoding(fitted: Path, installed: str, own_home: Path) -> None:
    from PIL import Image

    pipe = LatentPipeline.from_pretrained(installed, vae="coarse", adapter="mine", device="cpu")
    plain = LatentPipeline.from_pretrained(installed, device="cpu")
    images = IMAGES[:1]
    with torch.no_grad():
        assert torch.equal(pipe.stage.encode(images), plain.stage.encode(images))
        decoder = VAEStage(load_vae(own_home / "vae" / "coarse"))
        latents = plain.stage.encode(images)
        assert torch.equal(pipe.stage.decode(latents), decoder.decode(pipe.stage.adapter(latents)))
    source = Image.new("RGB", (16, 16), (200, 30, 30))
    drawn = pipe("red circle", seed=1, num_inference_steps=4, image=source, strength=0.5)[0]
    assert grey_levels(drawn.image, plain("red circle", seed=1, num_inference_steps=4, image=source, strength=0.5)[0].image) > 0
