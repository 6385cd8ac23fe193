"""The laboratory's figures against the evaluation's, its seam score against planted errors, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import draw_shape, some_images, tiny_vae
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from latentpipe import UserError, VAEStage
from latentpipe.checkpoints.vae_io import save_vae
from latentpipe.cli.app import main
from latentpipe.engine.jobs import Cancelled
from latentpipe.evaluate.metrics import latents as latent
from latentpipe.evaluate.metrics.latents import cycles, rebuild_batch
from latentpipe.evaluate.protocol import find_protocol
from latentpipe.evaluate.reconstruction import evaluate_vae
from latentpipe.evaluate.vae_lab import FEWEST, GAIN, MOST, Laboratory, Rebuilt, compare_pictures, decode_same, seam
from latentpipe.pipelines.swap import stage_of
from latentpipe.train.latent_adapter import fit_and_save
from latentpipe.utils.images import to_images, to_pixels

SIDE = 16


@pytest.fixture(scope="module")
def squares() -> list[Image.Image]:
    """Pictures of the side that is measured, so that nothing resizes them."""
    return to_pixels(some_images(FEWEST, SIDE))


def perfect() -> VAEStage:
    """A stage that gives every picture back."""
    stage = VAEStage(tiny_vae(latent_channels=12))
    stage.encode = lambda images: torch.nn.functional.pixel_unshuffle(images, 2)  # type: ignore[method-assign]
    stage.decode = lambda latents: torch.nn.functional.pixel_shuffle(latents, 2)  # type: ignore[method-assign]
    stage.raw_posterior = lambda images: (stage.encode(images), stage.encode(images) * 0)  # type: ignore[method-assign]
    return stage


def laboratory(*values: list[float]) -> Laboratory:
    """A result with these PSNRs."""
    picture = Image.new("RGB", (8, 8))
    vaes = [
        Rebuilt(name, "", "", "fp32", 0.0, [picture], [picture], {"PSNR": list(scores)}, {})
        for name, scores in zip("abc", values, strict=False)
    ]
    return Laboratory([picture] * len(values[0]), 8, vaes)


@pytest.mark.numeric
@pytest.mark.parametrize("at_once", [4, 16])
def test_figures_equal_the_evaluation(
    at_once: int, squares: list[Image.Image], vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit: both roads do the same operations on the same numbers, so there is nothing to tolerate."""
    monkeypatch.setattr(latent, "MOST", at_once)
    for index, square in enumerate(squares):
        square.save(tmp_path / f"{index}.png")
    rows = evaluate_vae(vae_folder, tmp_path, full=True, cost=False).per_picture
    scores = compare_pictures(squares, [vae_folder], SIDE).vaes[0].scores
    for name in ("PSNR", "SSIM", "PSNR after 2 cycles", "PSNR after 10 cycles"):
        assert scores[name] == rows[name], name


@pytest.mark.numeric
def test_how_the_pixels_lie_in_memory_changes_no_figure(vae_folder: Path) -> None:
    """Pixels of a file are channels_last; oneDNN sums those in another order, and a byte may round otherwise."""
    images = some_images(FEWEST, SIDE)
    stage = stage_of(vae_folder)
    protocol = find_protocol("latentpipe")
    seeds = range(FEWEST)
    with torch.no_grad():
        for layout in (torch.contiguous_format, torch.channels_last):
            given = images.contiguous(memory_format=layout)
            made = rebuild_batch(stage, given, protocol, seeds)
            assert torch.equal(made.images, rebuild_batch(stage, images, protocol, seeds).images)
            assert cycles(stage, given, protocol, seeds) == cycles(stage, images, protocol, seeds)


def test_psnr_is_of_the_pictures_that_are_shown(squares: list[Image.Image]) -> None:
    lab = compare_pictures(squares, [VAEStage(tiny_vae())], SIDE)
    for original, rebuilt, decibels in zip(lab.originals, lab.vaes[0].pictures, lab.vaes[0].scores["PSNR"], strict=True):
        error = np.square(np.asarray(original, np.float64) - np.asarray(rebuilt, np.float64)).mean()
        assert decibels == pytest.approx(10 * math.log10(255**2 / error), abs=1e-6)


def test_decoding_its_own_latents_is_its_reconstruction(squares: list[Image.Image]) -> None:
    stage, other = VAEStage(tiny_vae()), VAEStage(tiny_vae(3))
    lab = compare_pictures(squares, [stage], SIDE)
    originals, [(_, same), (_, strange)] = decode_same(squares, stage, [stage, other], SIDE)
    assert [picture.tobytes() for picture in originals] == [picture.tobytes() for picture in squares]
    assert [picture.tobytes() for picture in same] == [picture.tobytes() for picture in lab.vaes[0].pictures]
    assert [picture.tobytes() for picture in strange] != [picture.tobytes() for picture in same]


def test_latents_of_another_shape_are_a_sentence(squares: list[Image.Image]) -> None:
    stage, wide = VAEStage(tiny_vae()), VAEStage(tiny_vae(latent_channels=8))
    _, [(_, said)] = decode_same(squares, stage, [wide], SIDE)
    assert isinstance(said, str)
    assert "4" in said
    assert "8" in said


def test_the_difference_of_a_perfect_reconstruction_is_grey(squares: list[Image.Image]) -> None:
    found = compare_pictures(squares, [perfect()], SIDE).vaes[0]
    assert {value for picture in found.differences for value in set(picture.tobytes())} <= {127, 128}
    assert found.scores["seam"] == [1.0] * FEWEST
    assert all(math.isfinite(value) for values in found.scores.values() for value in values)
    assert min(found.scores["PSNR"]) >= 100


def test_differences_are_times_the_gain() -> None:
    grey = Image.new("RGB", (SIDE, SIDE), (100, 100, 100))
    stage = perfect()
    encode = stage.encode
    stage.encode = lambda images: encode(images) + 10 / 127.5  # type: ignore[method-assign]
    found = compare_pictures([grey], [stage], SIDE).vaes[0]
    assert set(found.pictures[0].tobytes()) == {110}
    assert all(abs(value - (127.5 + 10 * GAIN)) <= 1 for value in set(found.differences[0].tobytes()))


def test_seam_of_no_error_and_of_no_border() -> None:
    images = some_images(3, 32)
    assert seam(images, images, 8).tolist() == [1.0] * 3
    assert seam(images, some_images(3, 32, 1), 32).tolist() == [1.0] * 3  # one cell: no border


@given(seed=st.integers(0, 2**16), downscale=st.sampled_from([2, 4, 8, 16]))
def test_seam_of_white_noise_is_about_one(seed: int, downscale: int) -> None:
    images = torch.zeros(2, 3, 64, 64)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    assert seam(images, noise, downscale).tolist() == pytest.approx([1.0, 1.0], abs=0.1)


@given(seed=st.integers(0, 2**16), downscale=st.sampled_from([2, 4, 8, 16]), strength=st.floats(0.5, 4))
def test_seam_of_planted_cells(seed: int, downscale: int, strength: float) -> None:
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, 64, 64, generator=random)
    noise = 0.1 * torch.randn(images.shape, generator=random)
    cells = strength * torch.randn(2, 3, 64 // downscale, 64 // downscale, generator=random)
    planted = images + noise + torch.nn.functional.interpolate(cells, scale_factor=downscale, mode="nearest")
    plain = seam(images, images + noise, downscale)
    assert (seam(images, planted, downscale) > 2 * plain).all()
    moved = torch.roll(planted - images, (1, 1), (2, 3)) + images  # the same pattern beside the borders is no seam
    assert (seam(images, moved, downscale) < 1).all()


def test_seam_in_closed_form() -> None:
    """Steps of 3 at the borders of cells of 4 and of 1 within them."""
    steps = torch.tensor([3.0 if column % 4 == 3 else 1.0 for column in range(15)])
    row = torch.cat([torch.zeros(1), steps.cumsum(0)])
    error = row + row.unsqueeze(1)
    images = torch.zeros(1, 3, 16, 16)
    assert seam(images, images + error, 4).tolist() == pytest.approx([3.0])


def test_no_best_of_equal_vaes(squares: list[Image.Image], vae_folder: Path) -> None:
    lab = compare_pictures(squares, [vae_folder, vae_folder], SIDE)
    assert lab.best() is None
    [(_, _, mean, low, high)] = lab.differences()
    assert (mean, low, high) == (0, 0, 0)


def test_a_damaged_copy_is_worse(squares: list[Image.Image], tmp_path: Path) -> None:
    good, damaged = perfect(), perfect()
    decode = damaged.decode
    damaged.decode = lambda latents: decode(latents) * 0.8  # type: ignore[method-assign]
    for vaes, sign in (((damaged, good), -1), ((good, damaged), 1)):
        lab = compare_pictures(squares, vaes, SIDE)
        [(_, _, mean, low, high)] = lab.differences()
        assert min(sign * mean, sign * low, sign * high) > 0
    save_vae(tiny_vae(), tmp_path / "poor", {})  # random weights
    assert compare_pictures(squares, [tmp_path / "poor", good], SIDE).best() == "AutoencoderKL"


def test_best_in_closed_form() -> None:
    low, high = [20.0, 21, 22, 20, 21, 22], [30.0, 31, 32, 30, 31, 32]
    assert laboratory(low, high).best() == "b"
    assert laboratory(high, low, low).best() == "a"
    assert laboratory(high, high, low).best() is None  # two are as good as each other
    assert laboratory([1.0, 5, 1, 5, 1, 5], [5.0, 1, 5, 1, 5, 1]).best() is None
    assert laboratory(high).best() is None
    assert [(one, other) for one, other, *_ in laboratory(high, high, low).differences()] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert laboratory(low, high).differences()[0][2:] == (-10, -10, -10)


def test_too_few_pictures_for_intervals() -> None:
    few, enough = [20.0] * (FEWEST - 1), [20.0] * FEWEST
    lab = laboratory(few, [30.0] * len(few))
    assert lab.best() is None
    assert lab.differences() == []
    assert lab.vaes[0].mean("PSNR") == (20, None, None)
    assert laboratory(enough).vaes[0].mean("PSNR") == (20, 20, 20)


@pytest.mark.parametrize("stop_at", range(4))
def test_a_cancel_at_any_report(stop_at: int, squares: list[Image.Image]) -> None:
    told: list[str] = []

    def report(done: int, total: int, what: str) -> None:
        if len(told) == stop_at:
            raise Cancelled("stopped")
        assert (done, total) == (len(told), 3)
        told.append(what)

    with pytest.raises(Cancelled):
        compare_pictures(squares[:1], [VAEStage(tiny_vae())], SIDE, report)
    assert len(told) == stop_at


def test_hostile_arguments(squares: list[Image.Image]) -> None:
    stage, encoder = VAEStage(tiny_vae()), VAEStage(tiny_vae())
    del encoder.vae.decoder
    one = squares[:1]
    cases: list[tuple[Any, Any, Any, str]] = [
        ([], [stage], SIDE, f"0 pictures were given; expected 1 to {MOST}"),
        (one * (MOST + 1), [stage], SIDE, f"{MOST + 1} pictures were given"),
        (one, [stage], 17, "The side is 17 pixels; expected 8 to 1024, a multiple of 2"),
        (one, [stage], -16, "The side is -16 pixels"),
        (one, [stage], 2048, "The side is 2048 pixels"),
        (one, [], SIDE, "No VAE was chosen"),
        (one, [encoder], SIDE, "is an encoder alone"),
        (one, ["no-such-vae"], SIDE, "no-such-vae"),
    ]
    for pictures, vaes, side, said in cases:
        with pytest.raises(UserError, match=said):
            compare_pictures(pictures, vaes, side)
        with pytest.raises(UserError, match=said):
            decode_same(pictures, vaes[0] if vaes else stage, vaes, side)


@pytest.mark.parametrize("vaes", [1, 2])
def test_equal_pictures_of_any_size_give_figures_for_a_program(vaes: int, vae_folder: Path) -> None:
    pytest.importorskip("gradio")
    from latentpipe.ui.lab_view import comparison_json

    lab = compare_pictures([draw_shape("red", "bar", 45).convert("L")] * FEWEST, [vae_folder] * vaes, 8)
    assert all(picture.size == (8, 8) for picture in lab.originals)
    found = json.loads(json.dumps(comparison_json(lab), allow_nan=False))
    assert found["n"] == FEWEST
    assert found["best"] is None
    assert len(found["differences"]) == vaes - 1
    assert "SSIM" not in found["vaes"][0]["scores"]  # its window has 11 pixels


@pytest.mark.slow
def test_the_verb_and_the_function_write_the_same_adapter(pictures: Path, tmp_path: Path, vae_folder: Path, capsys: Any) -> None:
    from latentpipe.cli.common import pictures_of

    save_vae(tiny_vae(5), tmp_path / "to", {})
    ends = (vae_folder, tmp_path / "to")
    arguments = ["--from", str(ends[0]), "--to", str(ends[1]), "--images", str(pictures), "--size", "16"]
    assert main(["fit-adapter", *arguments, "--out", str(tmp_path / "verb.safetensors"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    ladder, path = fit_and_save(*ends, pictures_of(pictures, 16), pictures.resolve().name, tmp_path / "function.safetensors")
    with safe_open(path, "pt") as function, safe_open(tmp_path / "verb.safetensors", "pt") as verb:
        assert function.metadata() == verb.metadata()
        assert sorted(function.keys()) == sorted(verb.keys())
        assert all(torch.equal(function.get_tensor(key), verb.get_tensor(key)) for key in function.keys())  # noqa: SIM118
    assert printed == json.loads(json.dumps(ladder.as_dict())) | {"adapter": str(tmp_path / "verb.safetensors")}


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_a_cancelled_fit_leaves_nothing(stop_at: int, pictures: Path, tmp_path: Path, vae_folder: Path, own_home: Path) -> None:
    calls = 0

    def report(done: int, total: int, what: str) -> None:
        nonlocal calls
        calls += 1
        if calls > stop_at:
            raise Cancelled("stopped")

    save_vae(tiny_vae(5), tmp_path / "to", {})
    with pytest.raises(Cancelled):
        fit_and_save(vae_folder, tmp_path / "to", some_images(12), "noise", None, report)
    assert calls == stop_at + 1
    assert [path for path in own_home.rglob("*") if path.is_file()] == []


def test_images_of_the_laboratory_are_the_pictures(squares: list[Image.Image]) -> None:
    """What is measured is what is shown: squares of the side go through unchanged."""
    lab = compare_pictures(squares[:2], [perfect()], SIDE)
    assert torch.equal(to_images(lab.originals), to_images(squares[:2]))
    assert [picture.tobytes() for picture in lab.vaes[0].pictures] == [picture.tobytes() for picture in squares[:2]]


def test_vaes_are_compared_at_the_size_they_were_trained_at() -> None:
    from latentpipe.evaluate.vae_lab import LARGEST_USUAL, usual_side

    def stage(**config: Any) -> VAEStage:
        return VAEStage(tiny_vae(**config))

    assert usual_side([stage(sample_size=32)]) == 64  # diffusers' own default says nothing
    assert usual_side([stage(sample_size=128)]) == 128
    assert usual_side([stage(sample_size=128), stage(sample_size=256), stage(sample_size=32)]) == 256
    assert usual_side([stage(sample_size=1024)]) == LARGEST_USUAL
    assert usual_side([stage(sample_size=(96, 97))]) == 96  # a multiple of the downscale
