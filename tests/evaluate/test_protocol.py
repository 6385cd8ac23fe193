"""Protocols, and the pictures that they feed in, against the published expressions and Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import some_images
from PIL import Image

from latentpipe import LatentSpace, UserError
from latentpipe.evaluate import preprocessing
from latentpipe.evaluate.accumulator import Accumulator, MetricNetworks
from latentpipe.evaluate.protocol import PROTOCOLS, Protocol, find_protocol, round_images

DEFAULT = PROTOCOLS["latentpipe"]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def folder_of(root: Path, *sizes: tuple[int, int]) -> Path:
    root.mkdir()
    for index, size in enumerate(sizes):
        noise(*size, index).save(root / f"{index:02}.png")
    return root


def test_nearest_is_what_the_published_scripts_cast() -> None:
    images = some_images(side=32) * 1.2
    lightning = torch.clamp(127.5 * images + 128.0, 0, 255).to(torch.uint8)
    dc_ae = (255 * ((images + 1) / 2) + 0.5).clamp(0, 255).to(torch.uint8)
    ours = round_images(images, "nearest")
    assert torch.equal(ours, lightning)
    # (x + 1) / 2 * 255 and 127.5 x + 127.5 differ by rounding errors, which decide ties
    assert (ours.int() - dc_ae.int()).abs().sum() <= 2
    truth = (images.double().clamp(-1, 1) * 127.5 + 127.5).numpy()
    assert np.abs(ours.numpy() - truth).max() <= 0.5 + 1e-4


def test_truncation_darkens_by_half_a_grey_level() -> None:
    images = some_images(side=64) * 0.9
    truth = (images.double() * 127.5 + 127.5).numpy()
    assert abs((truth - round_images(images, "truncate").numpy()).mean() - 0.5) < 0.01
    assert abs((truth - round_images(images, "nearest").numpy()).mean()) < 0.01


def test_either_rounding_keeps_bytes_as_they_are() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    for rounding in ("nearest", "truncate"):
        assert torch.equal(round_images(bytes_.float() / 127.5 - 1, rounding), bytes_)


def test_an_unknown_protocol_or_rounding_is_refused() -> None:
    with pytest.raises(UserError, match="latentpipe, lightningdit, dc-ae, coco-5k"):
        find_protocol("imagenet")
    with pytest.raises(UserError, match="nearest or truncate"):
        round_images(some_images(), "up")  # type: ignore[arg-type]


def test_a_changed_protocol_says_so_in_its_name() -> None:
    assert find_protocol("dc-ae") is PROTOCOLS["dc-ae"]
    assert find_protocol("dc-ae", posterior="mode") is PROTOCOLS["dc-ae"]
    changed = find_protocol("lightningdit", "mode", "truncate", 128)
    assert changed.name == "lightningdit with posterior mode, rounding truncate, size_px 128"
    assert (changed.posterior, changed.rounding, changed.size_px) == ("mode", "truncate", 128)
    assert find_protocol("latentpipe", size_px=64).name == "latentpipe"


def test_what_cannot_be_repeated_is_in_the_output() -> None:
    for name, protocol in PROTOCOLS.items():
        assert bool(protocol.about()["open"]) == (name != "latentpipe")
        assert "filter" in protocol.about()["resize"] or "interpolation" in protocol.about()["resize"]


@pytest.mark.parametrize("size", [(90, 70), (64, 200), (33, 32), (32, 32), (20, 25)])
def test_the_tensor_resize_is_the_triangle_filter_without_rounding(size: tuple[int, int]) -> None:
    """Pillow's bilinear filter on float pictures is the oracle."""
    picture = noise(*size)
    short = min(size)
    wide, high = int(32 * size[0] / short), int(32 * size[1] / short)
    left, top = round((wide - 32) / 2), round((high - 32) / 2)
    channels = [
        np.asarray(Image.fromarray(band).resize((wide, high), Image.Resampling.BILINEAR))
        for band in np.asarray(picture, np.float32).transpose(2, 0, 1).copy()
    ]
    wanted = np.stack(channels)[:, top : top + 32, left : left + 32] / 127.5 - 1
    found = preprocessing.tensor_square(torch.from_numpy(np.asarray(picture, np.float32).transpose(2, 0, 1) / 127.5 - 1), 32)
    assert np.abs(found.numpy() - wanted).max() < 1e-4


def test_the_adm_crop_halves_by_boxes_then_is_bicubic() -> None:
    picture = noise(100, 70)
    by_hand = picture.resize((50, 35), Image.Resampling.BOX).resize((46, 32), Image.Resampling.BICUBIC).crop((7, 0, 39, 32))
    assert preprocessing.adm_square(picture, 32).tobytes() == by_hand.tobytes()


def test_the_default_resize_is_lanczos_of_the_centre_square(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", (90, 60))
    plan = preprocessing.plan(folder, Protocol("test", size_px=32), 2)
    [(names, images)] = preprocessing.read(plan, plan.names, 4)
    # a box and no crop: the filter sees what lies beside the square
    by_hand = noise(90, 60).resize((32, 32), Image.Resampling.LANCZOS, box=(15, 0, 75, 60))
    assert names == ["00.png"]
    assert np.array_equal(round_images(images, "nearest")[0].permute(1, 2, 0).numpy(), np.asarray(by_hand))


def test_the_protocols_feed_in_different_pixels(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", (600, 520))
    seen = set()
    for name in PROTOCOLS:
        plan = preprocessing.plan(folder, find_protocol(name, size_px=64), 8)
        [(_, images)] = preprocessing.read(plan, plan.names, 1)
        seen.add(images.numpy().tobytes())
    assert len(seen) == 3  # the COCO cards' filter is not known, so it is the default's


@pytest.mark.parametrize(
    ("sizes", "downscale", "size", "words"),
    [
        ([(32, 48)] * 2, 8, (48, 32), "as they are"),
        ([(35, 50)] * 2, 8, (48, 32), "centre crops of 35 x 50"),
        ([(300, 400), (500, 300)], 8, (256, 256), "differ in size"),
        ([(100, 400), (500, 300)], 8, (96, 96), "differ in size"),
        ([(1, 1), (500, 300)], 8, (256, 256), "differ in size"),
    ],
)
def test_the_size_follows_from_the_folder(
    tmp_path: Path, sizes: list[tuple[int, int]], downscale: int, size: tuple[int, int], words: str
) -> None:
    plan = preprocessing.plan(folder_of(tmp_path / "set", *sizes), DEFAULT, downscale)
    assert (plan.height, plan.width) == size
    assert words in plan.how
    assert len(plan.names) + len(plan.skipped) == len(sizes)
    for _, images in preprocessing.read(plan, plan.names, 1):
        assert images.shape == (1, 3, *size)


def test_pictures_of_one_size_are_cropped_and_never_filtered(tmp_path: Path) -> None:
    plan = preprocessing.plan(folder_of(tmp_path / "set", (35, 50)), DEFAULT, 8)
    [(_, images)] = preprocessing.read(plan, plan.names, 1)
    wanted = np.asarray(noise(35, 50))[1:49, 1:33]
    assert np.array_equal(round_images(images, "nearest")[0].permute(1, 2, 0).numpy(), wanted)


def test_small_pictures_are_skipped_by_name_or_enlarged_where_the_protocol_does(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", (40, 20), (64, 64))
    ours = preprocessing.plan(folder, find_protocol("latentpipe", size_px=32), 8)
    assert ours.names == ["01.png"]
    assert ours.skipped == {"00.png": "40 x 20 is smaller than 32 x 32"}
    assert preprocessing.plan(folder, find_protocol("lightningdit", size_px=32), 8).names == ["00.png", "01.png"]


def test_sizes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", (40, 20))
    for size, message in ((30, "Give --size 32"), (0, "multiples of 8"), (-8, "multiples of 8"), (64, "Give --size 16 or less")):
        with pytest.raises(UserError, match=message):
            preprocessing.plan(folder, find_protocol("latentpipe", size_px=size), 8)
    with pytest.raises(UserError, match="at least 1 picture"):
        preprocessing.plan(folder, DEFAULT, 8, max_images=0)
    with pytest.raises(UserError, match="at least 64 x 64"):
        preprocessing.plan(folder, DEFAULT, 64)
    with pytest.raises(UserError, match="the least that this VAE takes"):
        preprocessing.plan(folder_of(tmp_path / "two", (1, 1), (3, 2)), DEFAULT, 8)
    with pytest.raises(UserError, match="This VAE needs at least 64 x 64"):
        preprocessing.plan(folder, find_protocol("latentpipe", size_px=64), 64)


def test_ssim_is_computed_where_each_protocol_does() -> None:
    """torchmetrics as the two published scripts call it."""
    torchmetrics = pytest.importorskip("torchmetrics.image")
    images = torch.nn.functional.interpolate(some_images(side=16), scale_factor=4, mode="bicubic").clamp(-1, 1)
    rebuilt = images + 0.3 * some_images(side=64, seed=1)
    before, after = (round_images(part, "nearest").float() for part in (images, rebuilt))
    wanted = {
        "lightningdit": ((-1.0, 1.0), rebuilt.clamp(-1, 1), images),
        "dc-ae": ((0.0, 255.0), after, before),
    }
    found = {}
    for name, protocol in PROTOCOLS.items():
        tally = Accumulator(LatentSpace(3, 1, (1.0,) * 3, (0.0,) * 3))
        tally.add(list("abcd"), images, rebuilt, protocol, MetricNetworks(ssim=True))
        found[name] = float(np.mean(tally.values["SSIM"]))
        if name in wanted:
            data_range, *pair = wanted[name]
            truth = torchmetrics.StructuralSimilarityIndexMeasure(data_range=data_range)(*pair)
            assert found[name] == pytest.approx(float(truth), abs=2e-5)
    assert found["latentpipe"] == found["coco-5k"]
    assert len(set(found.values())) == 3


def test_white_noise_has_a_flat_spectrum_and_a_wave_a_peak() -> None:
    random = np.random.default_rng(0)
    grey = torch.from_numpy(random.integers(0, 256, (40, 1, 64, 64), dtype=np.uint8)).expand(-1, 3, -1, -1)
    power = preprocessing.radial_spectrum(grey).mean(0)
    assert power.shape == (32,)
    assert power[3:] == pytest.approx(np.full(29, (256**2 - 1) / 12), rel=0.1)
    wave = 127.5 + 100 * np.cos(2 * np.pi * 10 * np.arange(64) / 64)
    one = torch.from_numpy(np.tile(wave.round().astype(np.uint8), (1, 3, 64, 1)))
    assert preprocessing.radial_spectrum(one)[0].argmax() == 10
