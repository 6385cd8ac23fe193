"""train-vae: exact resume, what is saved, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import some_images, tiny_vae, vae_run, write_pictures

from latentpipe import LatentSpace, UserError, VAEStage
from latentpipe.checkpoints.tensor_source import VAE_FILE
from latentpipe.checkpoints.vae_io import load_vae, save_vae, vae_hash
from latentpipe.data.image_folder import read_pictures
from latentpipe.train import loop, losses
from latentpipe.train.config import Crops
from latentpipe.train.vae import train as training
from latentpipe.train.vae.augment import draw_crop
from latentpipe.utils.images import bytes_to_images, psnr, resized, to_bytes, to_images


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """The root of a run of four steps with validation and sheets."""
    root = tmp_path_factory.mktemp("train-vae")
    training.train_vae(
        vae_run(root, pictures, data={"train": pictures, "validation": pictures, "read_size_px": 24}, sample_every_steps=2)
    )
    return root


def interrupt_at(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Ctrl-C while the loss of step `calls` (from 0) is computed."""
    original, count = losses.l1, iter(range(10**6))

    def l1(*arguments: Any) -> torch.Tensor:
        if next(count) == calls:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(losses, "l1", l1)


def test_k_steps_are_k_half_stop_resume_k_half_bit_for_bit(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.train_vae(vae_run(tmp_path / "a", pictures))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            training.train_vae(vae_run(tmp_path / "b", pictures))
    assert not (tmp_path / "b" / "vae").exists()
    training.train_vae(vae_run(tmp_path / "b", pictures, resume=True))
    whole, halves = ((tmp_path / name / "vae" / VAE_FILE).read_bytes() for name in "ab")
    assert whole == halves
    assert vae_hash(tmp_path / "a" / "vae") == vae_hash(tmp_path / "b" / "vae")


def test_the_seed_decides_everything(tmp_path: Path, pictures: Path) -> None:
    runs = {"a": 1, "b": 1, "c": 2}
    for name, seed in runs.items():
        torch.manual_seed(hash(name) % 1000)  # whatever happened before
        training.train_vae(vae_run(tmp_path / name, pictures, seed=seed, optim={"steps": 2}))
    first, again, other = (vae_hash(tmp_path / name / "vae") for name in runs)
    assert first == again
    assert first != other


@pytest.mark.slow
def test_training_learns(tmp_path: Path, pictures: Path) -> None:
    optim = {"steps": 60, "batch_size": 8, "learning_rate": 3e-3}
    training.train_vae(vae_run(tmp_path, pictures, optim=optim, crops={"whole": 1.0, "flip": False}, loss={"equivariance": 0}))
    rows = [json.loads(line) for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()]
    totals = [row["l1"] + row["l2"] for row in rows]
    assert sum(totals[-5:]) < 0.6 * sum(totals[:5])


def test_the_saved_latents_have_mean_0_and_std_1(trained: Path, pictures: Path) -> None:
    stage = VAEStage(load_vae(trained / "vae"))
    assert stage.space == LatentSpace(4, 2, (1.0,) * 4, (0.0,) * 4)
    read = read_pictures(pictures, 24)
    pixels = torch.from_numpy(resized(read.pixels, 16)).permute(0, 3, 1, 2)
    with torch.no_grad():
        measured = LatentSpace.measure([stage.raw_posterior(bytes_to_images(pixels))], 2)
    assert measured.space.shift == pytest.approx([0] * 4, abs=2e-2)  # fp16 weights
    assert measured.space.scale == pytest.approx([1] * 4, abs=2e-2)
    assert json.loads((trained / "vae" / "config.json").read_text())["scaling_factor"] == 1


def test_the_card_says_what_was_measured_on_what_was_saved(trained: Path, pictures: Path) -> None:
    card = json.loads((trained / "vae" / "card.json").read_text())
    assert card["content_hash"] == vae_hash(trained / "vae")
    assert (card["pictures"], card["steps"], card["size_px"], card["normalization_measured_on"]) == (12, 4, 16, 12)
    assert len(card["latent_mean_standard_error"]) == 4
    assert card["validation"]["n"] == 12
    stage = VAEStage(load_vae(trained / "vae"))
    images = to_images(resized(read_pictures(pictures, 24).pixels, 16))
    with torch.no_grad():
        values = psnr(to_bytes(images), to_bytes(stage.decode(stage.encode(images))))
    assert card["validation"]["psnr_db"] == pytest.approx(values.mean().item(), abs=0.01)


def test_the_run_leaves_its_papers(trained: Path) -> None:
    work = trained / "work"
    rows = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "l1" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all(row.keys() >= {"l1", "l2", "kl", "gradient_norm", "seconds"} for row in steps)
    assert [row["step"] for row in rows if "validation_psnr_db" in row] == [2]
    assert (work / "rebuilt-000002.png").is_file()
    assert json.loads((work / "result.json").read_text())["steps"] == 4


def test_the_preview_map_is_the_least_squares_one(trained: Path, pictures: Path) -> None:
    found = json.loads((trained / "vae" / "latent_rgb.json").read_text())
    factors, bias = np.array(found["factors"]), np.array(found["bias"])
    stage = VAEStage(load_vae(trained / "vae"))
    images = to_images(resized(read_pictures(pictures, 24).pixels, 16))
    with torch.no_grad():
        values = stage.encode(images).permute(0, 2, 3, 1).reshape(-1, 4).double().numpy()
    colours = torch.nn.functional.avg_pool2d(images, 2).permute(0, 2, 3, 1).reshape(-1, 3).double().numpy()
    residual = colours - values @ factors - bias
    assert np.abs(values.T @ residual).max() / len(values) < 1e-3  # the normal equations
    assert np.abs(residual.mean(0)).max() < 1e-3


def test_two_runs_in_one_folder_are_refused(trained: Path, pictures: Path) -> None:
    with pytest.raises(UserError, match=r"--run\.resume"):
        training.train_vae(vae_run(trained, pictures))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"crops": {"size_px": 17}}, "multiple of 2"),
        ({"crops": {"size_px": 32}}, r"at most data\.read_size_px"),
        ({"crops": {"size_px": 17}, "loss": {"equivariance": 0}}, "multiple of 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path: Path, pictures: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        training.train_vae(vae_run(tmp_path, pictures, **changes))
    assert not (tmp_path / "vae").exists()


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        training.train_vae(vae_run(tmp_path, tmp_path / "none"))


def test_one_picture_is_enough(tmp_path: Path, pictures: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "x.png").write_bytes((pictures / "red-bar.png").read_bytes())
    training.train_vae(vae_run(tmp_path, folder, optim={"steps": 1}))
    card = json.loads((tmp_path / "vae" / "card.json").read_text())  # one picture has no standard error: still JSON
    assert card["pictures"] == 1
    assert "Infinity" not in (tmp_path / "vae" / "card.json").read_text()


# --- warm start ---------------------------------------------------------------------------------------------


def test_a_warm_start_begins_with_the_other_model(tmp_path: Path, pictures: Path, vae_folder: Path) -> None:
    optim = {"steps": 1, "learning_rate": 1e-9, "warmup_steps": 0, "ema_decay": 0.0, "weight_decay": 0.0}
    training.train_vae(vae_run(tmp_path, pictures, warm_start=vae_folder, optim=optim))
    images = some_images()
    with torch.no_grad():
        before, after = (
            stage.decode(stage.encode(images)) for stage in map(VAEStage, map(load_vae, (vae_folder, tmp_path / "vae")))
        )
    assert torch.allclose(before, after, atol=2e-2)  # the space was measured anew; the reconstruction is the same


@pytest.mark.parametrize("other", [{"latent_channels": 6}, {"block_out_channels": (8, 8)}])
def test_a_warm_start_of_another_shape_is_refused(tmp_path: Path, pictures: Path, other: dict[str, Any]) -> None:
    save_vae(tiny_vae(**other), tmp_path / "other", {})
    with pytest.raises(UserError, match="warm_start"):
        training.train_vae(vae_run(tmp_path, pictures, warm_start=tmp_path / "other"))


# --- crops --------------------------------------------------------------------------------------------------


def crop(pixels: torch.Tensor, crops: Crops, generator: torch.Generator) -> torch.Tensor:
    """The drawn cut of a batch."""
    return draw_crop(len(pixels), pixels.shape[-1], crops, generator).apply(pixels)


def numbered(n: int = 6, side: int = 24) -> torch.Tensor:
    """Pictures whose pixels tell their column."""
    columns = torch.arange(side, dtype=torch.uint8) * 10
    return columns.expand(n, 3, side, side).contiguous()


def test_whole_crops_are_the_resized_picture() -> None:
    pixels = numbered(side=16)
    crops = Crops(size_px=16, whole=1.0, flip=False)
    assert torch.equal(crop(pixels, crops, loop.generator_for(0, 0)), bytes_to_images(pixels))
    smaller = crop(numbered(side=24), crops, loop.generator_for(0, 0))
    assert smaller.shape == (6, 3, 16, 16)
    assert smaller.abs().max() <= 1


def test_about_half_of_the_pictures_are_mirrored() -> None:
    pixels = numbered(400, 16)
    crops = Crops(size_px=16, whole=1.0, flip=True)
    images = crop(pixels, crops, loop.generator_for(0, 0))
    plain = bytes_to_images(pixels)
    mirrored = [bool(torch.equal(image, original.flip(2))) for image, original in zip(images, plain, strict=True)]
    kept = [bool(torch.equal(image, original)) for image, original in zip(images, plain, strict=True)]
    assert sum(mirrored) + sum(kept) == 400
    assert 150 < sum(mirrored) < 250


def test_cut_crops_are_squares_inside_the_picture() -> None:
    pixels = numbered(2, 64)
    pixels = (torch.arange(64).view(1, 1, 1, 64) * 2 + torch.arange(64).view(1, 1, 64, 1)).to(torch.uint8).expand(2, 3, 64, 64)
    crops = Crops(size_px=16, whole=0.0, flip=False)
    sizes = set()
    for step in range(20):
        images = crop(pixels, crops, loop.generator_for(0, step))
        assert images.shape == (2, 3, 16, 16)
        slope = (images[0, 0, 8, 12] - images[0, 0, 8, 4]).item() * 127.5 / 2 / 8  # picture pixels per crop pixel
        across = (images[0, 0, 12, 8] - images[0, 0, 4, 8]).item() * 127.5 / 8
        assert slope == pytest.approx(across, abs=0.15)  # a square stays a square
        assert 0.9 < slope < 4.2
        sizes.add(round(slope, 1))
    assert len(sizes) > 5


def test_plain_cuts_keep_the_pixels_beside_whole_pictures() -> None:
    x, y = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="xy")
    pixels = torch.stack([x, y, x]).to(torch.uint8).expand(2, 3, 32, 32)  # each pixel tells its place
    crops, sides, places = Crops(size_px=32, whole=0.5, cut_px=16, flip=False), [], set()
    for step in range(40):
        images = crop(pixels, crops, loop.generator_for(0, step))
        sides.append(images.shape[-1])
        left, top = (round((images[0, channel, 0, 0].item() + 1) * 127.5) for channel in (0, 1))
        assert torch.equal(images, bytes_to_images(pixels[:, :, top : top + sides[-1], left : left + sides[-1]]))
        places.add((left, top))
    assert set(sides) == {16, 32}
    assert 10 < sides.count(16) < 30
    assert len(places) > 5


def test_crops_follow_the_generator() -> None:
    pixels = numbered(4, 32)
    crops = Crops(size_px=16, whole=0.5)
    assert torch.equal(crop(pixels, crops, loop.generator_for(1, 2)), crop(pixels, crops, loop.generator_for(1, 2)))


def test_the_folder_can_hold_pictures_of_every_size(tmp_path: Path) -> None:
    from PIL import Image

    folder = write_pictures(tmp_path / "set")
    (folder / "metadata.jsonl").unlink()
    Image.new("L", (3, 50), 7).save(folder / "thin.png")
    training.train_vae(vae_run(tmp_path, folder, optim={"steps": 1}))
    assert json.loads((tmp_path / "vae" / "card.json").read_text())["pictures"] == 13


@pytest.mark.parametrize(
    "changes",
    [
        {
            "loss": {"equivariance": 0.5, "warps": ["scale", "rotate", "flip"], "free_bits": 0.2, "schedule": "cyclical"},
            "adversarial": {"weight": 0.5, "width": 8, "layers": 1, "start_step": 1},
            "run": {"patience": 3, "sample_every_steps": 2},
        },
        {
            "loss": {"target_bits": 2.0, "kl": 0.01, "equivariance": 0},
            "mode": "encoder-head",
            "run": {"warm_start": Path("emoji")},
        },
    ],
)
@pytest.mark.slow
@pytest.mark.numeric
def test_resuming_is_exact_with_everything_that_changes(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """EMA, optimizer, schedule, data order, discriminator, controller and patience."""

    def config(name: str, **run: Any) -> Any:
        data = {"train": pictures, "validation": pictures, "read_size_px": 24}
        base = vae_run(tmp_path / name, pictures, data=data, loss=changes["loss"], **changes["run"], **run).model_dump()
        base |= {"model": {}} if "mode" in changes else {}
        return type(vae_run(tmp_path, pictures)).model_validate(
            base | {key: value for key, value in changes.items() if key not in ("loss", "run")}
        )

    training.train_vae(config("a"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            training.train_vae(config("b"))
    training.train_vae(config("b", resume=True))
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name / "vae").glob("*.safetensors")} for name in "ab")
    assert first == second
    states = [
        json.loads((sorted((tmp_path / name / "work" / "checkpoints").iterdir())[-1] / "state.json").read_text()) for name in "ab"
    ]
    assert states[0] == states[1]
    rows = [json.loads(line) for line in (tmp_path / "b" / "work" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "l1" in row] == [1, 2, 3, 4]


@pytest.mark.numeric
def test_five_steps_give_their_recorded_losses(tmp_path: Path, pictures: Path) -> None:
    """A refactoring is exact; a change of these numbers is a change of what people train (say so in CHANGELOG.md)."""
    training.train_vae(vae_run(tmp_path, pictures, optim={"steps": 5}, loss={"structure": 0.1, "perceptual": 0.2}))
    rows = [json.loads(line) for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()]
    totals = [sum(row[name] for name in ("l1", "l2", "kl", "structure", "perceptual") if name in row) for row in rows]
    # The longest sums are of 16 channels x 9 taps: in another order they differ by at most 144 x 2^-24 = 8.6e-6 of their size,
    # which five steps carry on: 4.3e-5. With AVX2 in place of AVX-512 the difference is 8e-7, a unit of the last logged digit.
    assert totals == pytest.approx([2.060918, 1.863928, 1.780421, 1.354708, 1.242589], rel=5e-5)
