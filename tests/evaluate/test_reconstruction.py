"""One VAE on a folder of pictures: every figure by hand, every kind of picture, every mistake."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import draw_shape, tiny_vae, write_pictures
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from latentpipe import UserError, VAEStage
from latentpipe.checkpoints.vae_io import vae_hash
from latentpipe.cli.evaluate import evaluate_vae as verb
from latentpipe.evaluate import accumulator, reconstruction
from latentpipe.evaluate.metrics import latents as latent
from latentpipe.evaluate.metrics.features import open_features
from latentpipe.evaluate.metrics.frechet import frechet
from latentpipe.evaluate.metrics.lpips import LPIPS
from latentpipe.evaluate.protocol import PROTOCOLS, find_protocol, round_images
from latentpipe.evaluate.reconstruction import evaluate_vae
from latentpipe.evaluate.report.text import table, write_csv
from latentpipe.evaluate.results import Evaluation
from latentpipe.utils.images import bytes_to_images, psnr, to_bytes, to_images

N = 12


@pytest.fixture(scope="module")
def stage() -> VAEStage:
    return VAEStage(tiny_vae(scaling_factor=0.5))


@pytest.fixture(scope="module")
def result(stage: VAEStage, pictures: Path) -> Evaluation:
    return evaluate_vae(stage, pictures, full=True, probe=5)


@pytest.fixture(scope="module")
def by_hand(stage: VAEStage, pictures: Path, result: Evaluation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images in the order of the evaluation's names, their latents, and the rebuilt bytes."""
    images = to_images([Image.open(pictures / name) for name in result.names])
    with torch.no_grad():
        latents = stage.encode(images)
        return images, latents, to_bytes(stage.decode(latents))


def quick(vae: Any, folder: Path, **given: Any) -> Evaluation:
    return evaluate_vae(vae, folder, **({"full": True, "probe": 1, "cost": False} | given))


def test_the_names_are_the_folder_s_and_every_n_is_stated(result: Evaluation, pictures: Path) -> None:
    listed = [json.loads(line)["file_name"] for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    assert result.names == listed
    assert result.pictures["n"] == N
    for metric, score in result.scores.items():
        assert score.n == (5 if "cycle" in metric or "equivariance" in metric else N), metric
        assert score.low <= score.value <= score.high, metric
    assert all(len(values) == N for values in result.per_picture.values())
    assert sum(np.isfinite(result.per_picture["PSNR after 10 cycles"])) == 5


@pytest.mark.numeric
def test_psnr_l1_and_ssim_by_hand(result: Evaluation, by_hand: tuple[torch.Tensor, ...]) -> None:
    images, _, rebuilt = by_hand
    metrics = pytest.importorskip("skimage.metrics")
    originals = to_bytes(images)
    assert result.per_picture["PSNR"] == pytest.approx(psnr(rebuilt, originals).tolist(), abs=0.01)
    assert result.scores["PSNR"].value == pytest.approx(float(psnr(rebuilt, originals).mean()), abs=0.01)
    difference = rebuilt.double() - originals.double()
    assert result.per_picture["L1"] == pytest.approx(difference.abs().mean((1, 2, 3)).tolist(), abs=0.01)
    pooled = 10 * np.log10(255**2 / float(difference.square().mean()))
    score = result.scores["PSNR of the pooled error"]
    assert score.value == pytest.approx(pooled, abs=0.01)
    assert score.low < pooled < score.high
    for value, one, other in zip(result.per_picture["SSIM"], originals.numpy(), rebuilt.numpy(), strict=True):
        rules = {"gaussian_weights": True, "use_sample_covariance": False, "data_range": 255, "channel_axis": 0, "sigma": 1.5}
        _, full = metrics.structural_similarity(one, other, full=True, **rules)
        assert value == pytest.approx(full[:, 5:-5, 5:-5].mean(), abs=1e-3)


def test_distances_carry_the_features_name_and_are_those_of_the_sets(
    stage: VAEStage, result: Evaluation, by_hand: tuple[torch.Tensor, ...]
) -> None:
    images, latents, rebuilt = by_hand
    network = open_features("emoji-words")
    real = network(images)
    wanted = frechet(real, network(bytes_to_images(rebuilt)))
    assert result.scores["Frechet distance on emoji-words"].value == pytest.approx(wanted, rel=1e-3)
    assert not any("FID" in name or "KID" in name for name in result.scores)
    flat = latents.flatten(1).half().float()
    nearest = torch.cdist(flat, flat).fill_diagonal_(torch.inf).argmin(1)
    a, b = flat, flat[nearest]
    angle = torch.arccos(torch.nn.functional.cosine_similarity(a, b))
    middle = ((angle / 2).sin() / angle.sin())[:, None] * (a + b)
    with torch.no_grad():
        between = to_bytes(stage.decode(middle.view(latents.shape)))
    wanted = frechet(real, network(bytes_to_images(between)))
    assert result.scores["interpolation Frechet distance on emoji-words"].value == pytest.approx(wanted, rel=1e-2)
    wanted = frechet(real, network((images + images[nearest]) / 2))
    assert result.scores["cross-fade Frechet distance on emoji-words"].value == pytest.approx(wanted, rel=5e-2)


@torch.no_grad()
def test_the_rate_is_the_kl_of_the_autoencoder_s_own_posterior(
    stage: VAEStage, result: Evaluation, by_hand: tuple[torch.Tensor, ...]
) -> None:
    posterior = stage.vae.encode(by_hand[0]).latent_dist
    bits = float(posterior.kl().mean()) / np.log(2)  # diffusers' own sum
    assert result.scores["rate per picture"].value == pytest.approx(bits, rel=1e-4)
    assert result.scores["rate"].value == pytest.approx(bits / 32**2, rel=1e-4)
    assert sum(result.curves["KL per channel"]) * 16**2 == pytest.approx(bits, rel=1e-4)
    assert result.scores["rate of normalized latents"].value != pytest.approx(bits / 32**2, rel=0.01)


def test_latent_statistics_and_spectra_have_a_value_for_each_channel_and_ring(
    result: Evaluation, by_hand: tuple[torch.Tensor, ...]
) -> None:
    assert len(result.curves["std per channel"]) == len(result.curves["standard error of std per channel"]) == 4
    assert result.curves["mean per channel"] == pytest.approx(by_hand[1].mean((0, 2, 3)).tolist(), abs=1e-5)
    assert len(result.curves["spectrum of pictures"]) == len(result.curves["spectrum of reconstructions"]) == 16


@pytest.mark.numeric
def test_the_same_call_gives_the_same_figures_and_batches_do_not_matter(
    stage: VAEStage, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = find_protocol("latentpipe", posterior="sample")
    first, again = (quick(stage, pictures, protocol=sampled).as_dict() for _ in range(2))
    assert first == again
    monkeypatch.setattr(latent, "MOST", 5)
    other = quick(stage, pictures, protocol=sampled)
    assert other.per_picture["PSNR"] == pytest.approx(first["per_picture"]["PSNR"], abs=0.01)
    assert other.pictures == first["pictures"]


@pytest.mark.slow
def test_protocols_change_what_they_say(stage: VAEStage, pictures: Path) -> None:
    found = {name: quick(stage, pictures, max_images=4, protocol=find_protocol(name, size_px=32)) for name in PROTOCOLS}
    values = {name: one.per_picture["PSNR"] for name, one in found.items()}
    assert values["latentpipe"] == values["dc-ae"]  # at 32 pixels nothing is resized, both decode the mode
    assert values["lightningdit"] == values["coco-5k"]  # both decode the same sample
    assert values["latentpipe"] != values["lightningdit"]
    assert found["lightningdit"].protocol["name"] == "lightningdit with size_px 32"
    truncated = quick(stage, pictures, max_images=4, protocol=find_protocol("latentpipe", rounding="truncate"))
    assert truncated.per_picture["PSNR"] != values["latentpipe"]
    assert truncated.per_picture["PSNR"] == pytest.approx(values["latentpipe"], abs=0.5)
    assert truncated.pictures["sha256"] == found["latentpipe"].pictures["sha256"]


def test_the_hash_is_of_the_pixels(stage: VAEStage, pictures: Path, tmp_path: Path) -> None:
    copy = write_pictures(tmp_path / "copy")
    before = quick(stage, copy, max_images=3).pictures["sha256"]
    assert before == quick(stage, pictures, max_images=3).pictures["sha256"]
    picture = Image.open(copy / "red-circle.png")
    picture.putpixel((0, 0), (254, 255, 255))
    picture.save(copy / "red-circle.png")
    assert quick(stage, copy, max_images=3).pictures["sha256"] != before


def test_json_goes_there_and_back(result: Evaluation) -> None:
    text = json.dumps(result.as_dict(), allow_nan=False)
    back = Evaluation.from_dict(json.loads(text))
    assert json.dumps(back.as_dict(), allow_nan=False) == text
    assert back.scores == result.scores
    assert np.array_equal(back.per_picture["PSNR after 2 cycles"], result.per_picture["PSNR after 2 cycles"], equal_nan=True)


def test_the_csv_has_a_row_for_each_picture(result: Evaluation, tmp_path: Path) -> None:
    write_csv(result, tmp_path / "values.csv")
    with (tmp_path / "values.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file_name"] for row in rows] == result.names
    assert [float(row["PSNR"]) for row in rows] == result.per_picture["PSNR"]
    assert [row["PSNR after 1 cycle"] == "" for row in rows] == [False] * 5 + [True] * 7


def test_the_table_says_figures_set_protocol_and_hashes(result: Evaluation) -> None:
    text = table(result)
    for word in (*result.scores, *result.not_measured, result.hash, result.pictures["sha256"], "Protocol: latentpipe", "ms"):
        assert word in text
    assert "far too large" in text  # 12 pictures, 128 features
    assert all(word in text for word in ("LPIPS (alex) needs its own weights", "MS-SSIM needs sides of 44"))


def test_ms_ssim_is_named_by_its_scales(stage: VAEStage, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    draw_shape("red", "bar", 176).save(tmp_path / "set" / "a.png")
    assert "MS-SSIM" in quick(stage, tmp_path / "set").scores
    small = quick(stage, tmp_path / "set", protocol=find_protocol("latentpipe", size_px=64))
    assert "MS-SSIM-3" in small.scores
    assert "MS-SSIM" not in small.scores


def test_one_tiny_picture_gives_what_can_be_measured(stage: VAEStage, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    draw_shape("red", "bar", 6).save(tmp_path / "set" / "a.png")
    found = quick(stage, tmp_path / "set")
    assert {"PSNR", "L1", "rate"} <= set(found.scores)
    assert {"SSIM", "MS-SSIM", "distances on emoji-words", "equivariance (half size)"} <= set(found.not_measured)
    json.dumps(found.as_dict(), allow_nan=False)
    draw_shape("red", "bar", 32).save(tmp_path / "set" / "a.png")
    found = quick(stage, tmp_path / "set")
    assert {"interpolation distance", "Frechet distance on emoji-words"} <= set(found.not_measured)
    assert table(found)


def test_a_deterministic_autoencoder_has_no_rate(pictures: Path) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    vae = AutoencoderTiny(latent_channels=4, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), **blocks)
    found = quick(VAEStage(vae.eval()), pictures, max_images=3)
    assert not any("rate" in name for name in found.scores)
    assert "deterministic" in found.not_measured["rate"]
    assert "KL per channel" not in found.curves
    assert found.scores["PSNR"].n == 3


def test_lpips_is_measured_where_its_weights_are_installed(stage: VAEStage, tmp_path: Path, own_home: Path) -> None:
    torch.manual_seed(0)
    network = LPIPS("alex").eval()
    (own_home / "metrics").mkdir()
    save_file(network.state_dict(), own_home / "metrics" / "lpips-alex.safetensors")
    (tmp_path / "set").mkdir()
    for colour in ("red", "blue"):
        draw_shape(colour, "bar", 64).save(tmp_path / "set" / f"{colour}.png")
    found = quick(stage, tmp_path / "set")
    images = to_images([Image.open(tmp_path / "set" / name) for name in found.names])
    with torch.no_grad():
        wanted = network(images, bytes_to_images(to_bytes(stage.decode(stage.encode(images)))))
    assert found.per_picture["LPIPS (alex)"] == pytest.approx(wanted.tolist(), rel=1e-3)
    assert found.scores["LPIPS (alex)"].better == "lower"
    assert "LPIPS (alex)" not in found.not_measured
    other = quick(stage, tmp_path / "set", protocol=find_protocol("lightningdit", size_px=64))
    assert "LPIPS (vgg)" in other.not_measured
    assert "LPIPS (alex)" not in other.scores


def test_interpolation_is_of_the_latents_that_were_kept(stage: VAEStage, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent, "MOST", 4)
    monkeypatch.setattr(accumulator, "NEIGHBOURS", 9 * 4 * 16 * 16 * 2)  # nine pictures: two batches of four
    found = quick(stage, pictures)
    assert found.scores["interpolation Frechet distance on emoji-words"].n == 8
    assert found.scores["Frechet distance on emoji-words"].n == N
    assert "interpolation is of the first 8 pictures" in " ".join(found.pictures["notes"])


def write_odd_pictures(folder: Path) -> Path:
    """Every kind of picture, most of them 32 x 20; five that are left out."""
    folder.mkdir()
    base = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 32, 3), dtype=np.uint8))
    base.save(folder / "plain.png")
    base.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(640, dtype=np.uint16).reshape(20, 32) * 100).save(folder / "sixteen.png")
    base.save(folder / "moving.gif", save_all=True, append_images=[base.rotate(180)])
    clear = base.convert("RGBA")
    clear.putalpha(0)
    clear.save(folder / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    base.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    whole = (folder / "plain.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "none.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no picture")
    return folder


def test_every_kind_of_picture_is_read_or_named(stage: VAEStage, tmp_path: Path) -> None:
    folder = write_odd_pictures(tmp_path / "odd")
    plan = reconstruction.preprocessing.plan(folder, find_protocol("latentpipe", size_px=16), 2)
    pairs = [
        pair
        for names, images in reconstruction.preprocessing.read(plan, plan.names, 3)
        for pair in zip(names, images, strict=True)
    ]
    read = {name: round_images(image[None], "nearest")[0] for name, image in pairs}
    assert set(read) == {"plain.png", "cmyk.jpg", "sixteen.png", "moving.gif", "clear.png", "turned.png"}
    assert torch.equal(read["turned.png"], read["plain.png"])
    assert (read["clear.png"] == 255).all()
    assert read["sixteen.png"].float().std() > 20  # scaled, not clipped
    found = quick(stage, folder, protocol=find_protocol("latentpipe", size_px=16))
    assert sorted(found.names) == sorted(read)
    assert found.pictures["n"] == found.scores["PSNR"].n == 6
    assert set(found.pictures["skipped"]) == {"pixel.png", "cut.png", "none.png", "text.jpg"}
    assert "smaller" in found.pictures["skipped"]["pixel.png"]


def test_a_folder_of_several_sizes_needs_no_size(stage: VAEStage, tmp_path: Path) -> None:
    found = quick(stage, write_odd_pictures(tmp_path / "odd"))
    assert found.pictures["size_px"] == 20
    assert "differ in size" in found.pictures["chosen"]


def test_mistakes_are_told(stage: VAEStage, pictures: Path, tmp_path: Path, vae_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"x")
    (tmp_path / "cut").mkdir()
    whole = (pictures / "red-bar.png").read_bytes()
    (tmp_path / "cut" / "a.png").write_bytes(whole[:60])
    mistakes: list[tuple[str, Any]] = [
        ("holds no picture", lambda: quick(stage, tmp_path / "empty")),
        ("is not a folder", lambda: quick(stage, tmp_path / "nowhere")),
        ("skipped a.png", lambda: quick(stage, tmp_path / "broken")),
        ("skipped a.png", lambda: quick(stage, tmp_path / "cut")),
        ("at least 1 picture", lambda: quick(stage, pictures, probe=0)),
        ("at least 1 picture", lambda: quick(stage, pictures, max_images=0)),
        ("No protocol", lambda: quick(stage, pictures, protocol="best")),
        ("No features", lambda: quick(stage, pictures, features="vgg")),
        ("needs its own weights", lambda: quick(stage, pictures, features="inception")),
        ("No VAE", lambda: quick("nothing", pictures)),
        ("cannot be used", lambda: quick(vae_folder, pictures, device="cuda:99")),
    ]
    for message, call in mistakes:
        with pytest.raises(UserError, match=message):
            call()


def test_an_encoder_alone_is_refused(pictures: Path) -> None:
    vae = tiny_vae()
    vae.decoder = None
    with pytest.raises(UserError, match="encoder alone"):
        quick(VAEStage(vae), pictures)


def test_a_picture_that_vanishes_meanwhile_is_told(stage: VAEStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pictures(tmp_path / "set")
    rebuild = reconstruction._rebuild

    def then_delete(*given: Any) -> Any:
        found = rebuild(*given)
        (folder / found.names[0]).unlink()
        return found

    monkeypatch.setattr(reconstruction, "_rebuild", then_delete)
    with pytest.raises(UserError, match="changed while it was measured"):
        quick(stage, folder)


def test_the_verb_prints_json_and_writes_its_files(
    vae_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"csv": tmp_path / "values.csv", "sheet": tmp_path / "examples.png"}
    verb(str(vae_folder), images=pictures, most=5, posterior="sample", device="cpu", json=True, **files)
    found = Evaluation.from_dict(json.loads(capsys.readouterr().out))
    assert (found.name, found.hash) == ("tiny-vae", vae_hash(vae_folder))
    assert found.protocol["name"] == "latentpipe with posterior sample"
    assert found.about["class"] == "AutoencoderKL"
    assert (found.about["channels"], found.about["downscale"], found.about["dtype"]) == (4, 2, "fp32")
    assert found.cost == {}  # --full measures it
    assert any("--full" in reason for reason in found.not_measured.values())
    assert len(files["csv"].read_text().splitlines()) == 6
    with Image.open(files["sheet"]) as sheet:
        assert sheet.width == 3 * (32 + 4) + 4
        assert np.asarray(sheet)[8, 20].min() >= 0


def test_the_sheet_shows_best_median_and_worst(stage: VAEStage, pictures: Path, tmp_path: Path) -> None:
    found = quick(stage, pictures, sheet=tmp_path / "sheet.png")
    order = sorted(range(N), key=lambda index: -found.per_picture["PSNR"][index])
    with Image.open(tmp_path / "sheet.png") as sheet:
        height = (sheet.height - 4) // 3
        for row, index in enumerate((order[0], order[6], order[11])):
            top = 4 + row * height
            with Image.open(pictures / found.names[index]) as original:
                assert sheet.crop((4, top, 36, top + 32)).tobytes() == original.convert("RGB").tobytes()


def test_the_verb_refuses_files_before_it_measures(pictures: Path, tmp_path: Path) -> None:
    for option, path in (("csv", tmp_path / "a.txt"), ("sheet", tmp_path / "a.jpg"), ("csv", tmp_path)):
        with pytest.raises(UserError, match=f"--{option}"):
            verb("nothing", images=pictures, **{option: path})


class PublishedBlock(nn.Module):
    """A block of TAESD as its authors wrote it down: relu(conv(x) + x), with x + pool(x) before where there is a pool."""

    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 1, 1)
        )
        parts = (nn.Conv2d(64, 256, 1, bias=False), nn.GroupNorm(4, 256), nn.ReLU(), nn.Conv2d(256, 64, 1, bias=False))
        self.pool = nn.Sequential(*parts) if pool else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.pool is None else x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


def published(channels: int = 32) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder and decoder of the tiny FLUX.2 autoencoder, in the published order of layers; images in [0, 1]."""

    def down() -> nn.Module:
        return nn.Conv2d(64, 64, 3, 2, 1, bias=False)

    def up() -> list[nn.Module]:
        return [nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, 1, 1, bias=False)]

    def three(pool: bool = False) -> list[nn.Module]:
        return [PublishedBlock(pool) for _ in range(3)]

    first = [nn.Conv2d(3, 64, 3, 1, 1), PublishedBlock(False)]
    last = [PublishedBlock(False), nn.Conv2d(64, 3, 3, 1, 1)]
    encoder = [*first, down(), *three(), down(), *three(), down(), *three(True), nn.Conv2d(64, channels, 3, 1, 1)]
    start = [Clamp(), nn.Conv2d(channels, 64, 3, 1, 1), nn.ReLU()]
    decoder = [*start, *three(True), *up(), *three(), *up(), *three(), *up(), *last]
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


@torch.no_grad()
def rebuilt_by_hand(encoder: nn.Module, decoder: nn.Module, picture: Image.Image) -> float:
    """PSNR in dB of a picture after the published autoencoder, clamped and rounded."""
    before = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    after = (decoder(encoder(before.float() / 255)).clamp(0, 1) * 255).round()
    return float(10 * torch.log10(255**2 / (after - before).double().square().mean()))


def check_published(weights: list[Path], crops: Path, tmp_path: Path) -> list[float]:
    """Convert the two files, evaluate on `crops`, and compare each PSNR; returns them."""
    from latentpipe.checkpoints.convert import convert
    from latentpipe.checkpoints.vae_file import StatedConfig

    convert(weights, tmp_path / "taef2", None, StatedConfig(1.0), None)
    found = quick(tmp_path / "taef2", crops)
    halves = published()
    for half, path in zip(halves, weights, strict=True):
        half.load_state_dict({key: value.float() for key, value in torch.load(path, weights_only=True).items()})
    for name, value in zip(found.names, found.per_picture["PSNR"], strict=True):
        assert value == pytest.approx(rebuilt_by_hand(*halves, Image.open(crops / name)), abs=0.05)
    return found.per_picture["PSNR"]


@pytest.mark.slow
def test_the_flux2_tiny_vae_on_photographs_is_the_published_one(assets: Path, tmp_path: Path) -> None:
    (tmp_path / "crops").mkdir()
    for name, box in (("chelsea", (100, 60, 228, 188)), ("coffee", (200, 100, 328, 228)), ("astronaut", (180, 30, 308, 158))):
        with Image.open(assets / "data" / "photos" / f"{name}.png") as picture:
            picture.convert("RGB").crop(box).save(tmp_path / "crops" / f"{name}.png")
    weights = [assets / "weights" / "taesd" / f"taef2_{half}.pth" for half in ("encoder", "decoder")]
    values = check_published(weights, tmp_path / "crops", tmp_path)
    assert len(values) == 3
    assert min(values) > 24


@pytest.mark.filterwarnings("ignore:the two halves do not rebuild")
@pytest.mark.slow
def test_an_autoencoder_of_the_published_layers_needs_no_files(tmp_path: Path) -> None:
    """The sibling with random weights, written as the published files are."""
    torch.manual_seed(0)
    weights = [tmp_path / "encoder.pth", tmp_path / "decoder.pth"]
    for half, path in zip(published(), weights, strict=True):
        torch.save({key: value.half() for key, value in half.state_dict().items()}, path)
    (tmp_path / "crops").mkdir()
    draw_shape("red", "circle", 32).save(tmp_path / "crops" / "a.png")
    check_published(weights, tmp_path / "crops", tmp_path)
