"""Paths: their ends are the ends, slerp and lerp are the closed forms, density keeps nearer to the bank than the line does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import draw_shape, grey_levels, tiny_vae
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latentpipe import LatentPipeline, UserError, VAEStage
from latentpipe.cli.app import main
from latentpipe.data.image_set import encode
from latentpipe.explore import interpolate, smoothness
from latentpipe.utils.images import to_images

RED, BLUE = draw_shape("red", "circle", 64), draw_shape("blue", "square", 64)


@pytest.fixture(scope="module")
def stage() -> VAEStage:
    return VAEStage(tiny_vae()).eval()


def latents(n: int, seed: int = 0, shape: tuple[int, int, int] = (2, 3, 3)) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def ring(n: int = 60) -> torch.Tensor:
    """Latents on a half circle of radius 3 in the first two numbers: the line between its ends crosses empty space."""
    angle = torch.linspace(0, torch.pi, n)
    rows = 0.01 * latents(n, 1)
    rows[:, 0, 0, 0], rows[:, 0, 0, 1] = 3 * angle.cos(), 3 * angle.sin()
    return rows


@given(n=st.integers(2, 12), seed=st.integers(0, 99), way=st.sampled_from(interpolate.WAYS[:2]))
def test_a_line_is_the_closed_form(n: int, seed: int, way: str) -> None:
    first, second = latents(2, seed).split(1)
    found = interpolate.path(first, second, n, way)
    assert torch.equal(found[:1], first)
    assert torch.equal(found[-1:], second)
    share = torch.arange(n).view(-1, 1, 1, 1) / (n - 1)
    if way == "lerp":
        wanted = first + share * (second - first)
    else:
        angle = torch.arccos((first * second).sum() / first.norm() / second.norm())
        wanted = (torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * second) / angle.sin()
    assert torch.allclose(found, wanted, atol=1e-4)


def test_density_goes_round_where_there_is_nothing() -> None:
    bank = ring()
    first, second = bank[:1], bank[-1:]
    line = interpolate.path(first, second, 9, "lerp")
    found = interpolate.path(first, second, 9, "density", bank)
    away = [torch.cdist(each.flatten(1), bank.flatten(1)).min(1).values.max().item() for each in (line, found)]
    assert away[1] < 0.6 * away[0]
    assert torch.equal(found[:1], first)
    assert torch.equal(found[-1:], second)
    known = interpolate.density(bank)
    points, straight = (((each.flatten(1).double() - known.mean) @ known.axes.T) for each in (found, line))
    least = interpolate.energy(points, known)
    assert least < 0.7 * interpolate.energy(straight, known)
    for seed in range(20):  # no path near it costs less
        moved = points.clone()
        moved[1:-1] += 0.02 * torch.randn(moved[1:-1].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert interpolate.energy(moved, known) > least


def test_what_the_bank_does_not_span_goes_straight() -> None:
    bank = ring()
    bank[:, 1] = 0.5  # never varies
    first, second = bank[:1].clone(), bank[-1:].clone()
    second[:, 1] = -0.5
    found = interpolate.path(first, second, 5, "density", bank)
    assert torch.allclose(found[:, 1], torch.linspace(0.5, -0.5, 5).view(-1, 1, 1).expand(5, 3, 3), atol=1e-5)


def test_equal_ends_stay_where_they_are() -> None:
    bank = ring()
    found = interpolate.path(bank[:1], bank[:1], 4, "density", bank)
    assert torch.allclose(found, bank[:1].expand_as(found))


def test_a_bank_that_tells_nothing_is_refused() -> None:
    first, second = latents(2).split(1)
    with pytest.raises(UserError, match="needs a bank"):
        interpolate.path(first, second, 3, "density")
    with pytest.raises(UserError, match="10 pictures and more; given 4"):
        interpolate.path(first, second, 3, "density", latents(4))
    with pytest.raises(UserError, match="all the same"):
        interpolate.density(torch.ones(20, 2, 3, 3))
    with pytest.raises(ValueError, match="one picture each"):
        interpolate.path(latents(2), latents(2), 3)


def test_pictures_are_decoded_along_the_path(stage: VAEStage) -> None:
    bank = encode(
        stage,
        to_images([draw_shape(colour, shape, 64) for colour in ("red", "blue") for shape in ("circle", "square", "bar")] * 2),
    )
    bank = bank + 0.1 * torch.randn(bank.shape, generator=torch.Generator().manual_seed(0))
    straight = interpolate.between_pictures(stage, RED, BLUE, 3, "lerp")
    dense = interpolate.between_pictures(stage, RED, BLUE, 3, "density", bank=bank)
    assert grey_levels(straight[0], dense[0]) <= 1
    assert grey_levels(straight[2], dense[2]) <= 1
    assert interpolate.between_pictures(stage, RED, BLUE, 2, size_px=32)[0].size == (32, 32)


def test_prompts_have_no_bank(pipe: LatentPipeline) -> None:
    with pytest.raises(UserError, match="one of slerp, lerp"):
        interpolate.between_prompts(pipe, "red", "blue", 3, "density")
    with pytest.raises(UserError, match="seed is -1"):
        interpolate.between_prompts(pipe, "red", "blue", 3, seed=-1)
    plain = interpolate.between_prompts(pipe, "red bar", "blue bar", 2, num_inference_steps=2, guidance_scale=1.0)
    assert plain[0].tobytes() == pipe("red bar", seed=0, num_inference_steps=2, guidance_scale=1.0)[0].image.tobytes()


def test_a_cross_fade_is_a_line_in_images() -> None:
    ends = to_images([RED, BLUE])
    fade = smoothness.cross_fade(ends[0], ends[1], 3)
    assert torch.equal(fade[0], ends[0])
    assert torch.allclose(fade[1], ends.mean(0), atol=1e-6)
    assert torch.equal(fade[2], ends[1])


def test_path_length_is_the_sum_of_the_steps() -> None:
    features = np.array([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0], [3.0, 5.0]])
    assert smoothness.lengths(features) == (6.0, 5.0, pytest.approx(np.hypot(3, 5)))
    with pytest.raises(ValueError, match="2 frames"):
        smoothness.lengths(features[:1])


def test_paths_are_compared_with_the_same_pairs() -> None:
    generator = np.random.default_rng(0)
    middles = generator.standard_normal((40, 3))
    near = smoothness.Walks(np.full(40, 2.0), np.full(40, 0.5), np.full(40, 1.9), middles)
    far = smoothness.Walks(np.full(40, 3.0), np.full(40, 2.0), np.full(40, 1.9), middles + 4)
    rows = smoothness.compare(near, far, middles)
    assert rows["n"] == 40
    assert rows["path length"]["difference"] == {"value": -1.0, "low": -1.0, "high": -1.0}
    assert rows["largest step"]["difference"]["value"] == -1.5
    assert rows["Frechet distance of midpoints"]["path"] == pytest.approx(0, abs=1e-9)
    assert rows["Frechet distance of midpoints"]["difference"]["high"] < 0
    with pytest.raises(UserError, match="100 pairs"):
        smoothness.compare(near, far, middles, least=100)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(list(arguments))
    return status, *capsys.readouterr()


def test_the_verb_tells_pictures_from_prompts(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], vae_folder: object, installed: str
) -> None:
    monkeypatch.chdir(str(tmp_path))
    RED.save("a.png")
    BLUE.save("b.png")
    status, out, _ = run(capsys, "interpolate", "a.png", "b.png", "--vae", str(vae_folder), "--n", "3", "--size", "16")
    assert (status, out) == (0, "interpolate.png\n")
    with Image.open("interpolate.png") as strip:
        assert strip.size == (3 * 16 + 6, 16)
        assert not strip.info
    status, out, _ = run(
        capsys, "interpolate", "red bar", "blue bar", "--model", installed, "--n", "2", "--steps", "2", "--out", "p.gif"
    )
    assert (status, out) == (0, "p.gif\n")
    for ends, message in (
        (("a.png", "missing.png"), "missing.png: no such file"),
        (("a.png", "a blue bar"), "give two pictures or two prompts"),
        (("a.png", "b.png", "--n", "1"), "expected 2 to 48"),
        (("a.png", "b.png", "--out", "x.avi"), "ends in one of .png, .gif"),
    ):
        status, _, error = run(capsys, "interpolate", *ends)
        assert status == 2
        assert message in error
        assert error.count("\n") == 1
