"""The codec: integers in and out exactly, on any number of threads; damaged files end in one sentence."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_vae
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentpipe import UserError
from latentpipe.checkpoints.vae_io import save_vae
from latentpipe.cli.app import main
from latentpipe.explore.codec import codec as files
from latentpipe.explore.codec import fit, frequency_tables, static_model, wavefront
from latentpipe.explore.codec.adaptive_model import Adaptive
from latentpipe.explore.codec.bd_rate import bd_rate, front
from latentpipe.explore.codec.container import Container, pack, unpack
from latentpipe.vae.entropy_model import ContextModel


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves_ = 128 + 90 * np.sin(np.stack([x / 5 + y / 9, x / 11 - y / 7, x / 8 + y / 3], -1))
    return Image.fromarray((waves_ + random.normal(0, 4, waves_.shape)).clip(0, 255).astype(np.uint8))


def learnt(channels: int, seed: int = 0) -> static_model.Weights:
    """Integer weights of a context model that is not trivial."""
    torch.manual_seed(seed)
    net = ContextModel(channels, hidden=16, groups=min(4, channels))
    with torch.no_grad():
        net.state.weight.normal_(0, 0.3)
        net.octave.normal_(0, 0.1)
    groups = [np.bincount(fit.group_of(n, min(4, channels)), minlength=min(4, channels)) for n in (channels, 16)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "GROUPS", min(4, channels))
        weights = fit.integers(net, 1.0)
    assert weights.groups.tolist() == [group.tolist() for group in groups]
    return weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny VAE whose codec has been learnt."""
    torch.manual_seed(0)
    save_vae(tiny_vae(), tmp_path / "codec", {})
    fit.write_codec(learnt(4), tmp_path / "codec")
    return tmp_path / "codec"


def test_counts_are_those_of_a_logistic_distribution() -> None:
    found = frequency_tables.counts().astype(np.int64)
    assert (found.sum(-1) == frequency_tables.TOTAL).all()
    assert found.min() >= 1
    edges = np.arange(-31.5, 31.5)
    for fraction in (0, 3, 7):
        for scale in (4, frequency_tables.ONE, 35):
            width = 2 ** ((scale - frequency_tables.ONE) / 4)
            below = 1 / (1 + np.exp(-(edges - fraction / 8) / width))
            wanted = np.diff(np.concatenate([[0], below, [1]]))
            assert np.abs(found[fraction, scale] / frequency_tables.TOTAL - wanted).max() < 1.2e-3


@pytest.mark.numeric
def test_counts_are_the_same_everywhere() -> None:
    # a file that was written once must open for ever: this hash belongs to version 1 of the container
    assert zlib.crc32(frequency_tables.counts().astype("<u2").tobytes()) == COUNTS_CRC


@given(h=st.integers(1, 9), w=st.integers(1, 9), c=st.integers(1, 6), spread=st.sampled_from([0.0, 0.3, 2.0, 40.0, 3e4]),
       seed=st.integers(0, 99), adapts=st.booleans())  # fmt: skip
@settings(max_examples=60, deadline=None)
@pytest.mark.numeric
def test_latents_come_back_exactly(h: int, w: int, c: int, spread: float, seed: int, adapts: bool) -> None:
    latents = np.rint(np.random.default_rng(seed).laplace(0, spread, (c, h, w))).astype(np.int64)
    weights = learnt(c)

    def model() -> wavefront.Model:
        return Adaptive(c, h, w) if adapts else static_model.Context(weights, seed - 50)

    data = wavefront.encode(latents, model())
    assert np.array_equal(wavefront.decode(data, (c, h, w), model()), latents)


def test_the_length_is_what_the_counts_say() -> None:
    latents = np.rint(np.random.default_rng(0).logistic(0, 1.0, (4, 12, 12))).astype(np.int64)
    weights, spent = learnt(4), 0.0

    def cost(mean: np.ndarray, scale: np.ndarray, values: np.ndarray | None) -> np.ndarray:
        nonlocal spent
        assert values is not None
        away = values - (mean >> 3) + frequency_tables.CENTRE
        symbols = away.clip(0, frequency_tables.SYMBOLS - 1)
        spent += frequency_tables.cost()[mean % 8, scale, symbols].sum()
        outermost = (symbols == 0) | (symbols == frequency_tables.SYMBOLS - 1)
        spent += sum(2 * int(further + 1).bit_length() - 1 for further in np.abs(away - symbols)[outermost])  # Elias' gamma code
        return values

    wavefront.walk_waves((4, 12, 12), static_model.Context(weights, 0), cost, latents)
    assert 8 * len(wavefront.encode(latents, static_model.Context(weights, 0))) == pytest.approx(spent, abs=10)


@pytest.mark.numeric
def test_the_integer_model_is_the_network_that_was_learnt() -> None:
    torch.manual_seed(1)
    net = ContextModel(8)
    with torch.no_grad():
        net.state.weight.normal_(0, 0.1)
    latents = torch.randint(-3, 4, (1, 8, 6, 7)).float()
    with torch.no_grad():
        mean, log_scale = net(latents, torch.tensor([0.5]))
    found: list[np.ndarray] = []

    def note(means: np.ndarray, scales: np.ndarray, values: np.ndarray | None) -> np.ndarray:
        assert values is not None
        found.append(np.stack([means / 8, scales]))
        return values

    wavefront.walk_waves((8, 6, 7), static_model.Context(fit.integers(net, 1.0), 8), note, latents[0].numpy().astype(np.int64))
    wanted, at = [], 0
    for rows, columns in wavefront.waves(6, 7):
        for group in range(4):
            part = slice(2 * group, 2 * group + 2)
            scale = 4 * log_scale[0, part, rows, columns].T / np.log(2) + frequency_tables.ONE
            wanted.append(np.stack([mean[0, part, rows, columns].T, scale.clamp(0, frequency_tables.SCALES - 1)]))
            at += 1
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(one[0] - other[0]).max() < 0.08  # an eighth, rounded
        assert np.abs(one[1] - other[1]).max() < 0.6


@pytest.mark.slow
def test_learning_makes_files_smaller_than_adapting() -> None:
    random = torch.Generator().manual_seed(0)
    base = torch.randn(64, 1, 8, 8, generator=random)
    sets = [torch.cat([base, 2 * base + 0.2 * torch.randn(64, 1, 8, 8, generator=random)], 1).half()]
    weights = fit.integers(fit.learn(sets, 0.25, 150), 0.25)
    latents = files.steps(sets[0][0].double().numpy(), -32)
    small = len(wavefront.encode(latents, static_model.Context(weights, -32)))
    assert small < 0.9 * len(wavefront.encode(latents, Adaptive(2, 8, 8)))


@pytest.mark.parametrize("size", [(64, 64), (33, 7), (1, 1), (50, 131)])
@pytest.mark.parametrize("adapts", [True, False])
@pytest.mark.numeric
def test_any_size_comes_back_as_the_decoder_shows_it(folder: Path, size: tuple[int, int], adapts: bool) -> None:
    if adapts:
        (folder / static_model.FILE).unlink()
    codec = files.open_codec(folder)
    picture = photo(*size)
    data = files.compress(picture, codec, 0.5)
    back = files.decompress(data, codec)
    assert back.size == size
    latents = files.rounded(picture, codec, -16)
    content = unpack(data, "it")
    assert np.array_equal(wavefront.decode(content.latents, latents.shape, codec.model(latents.shape, -16)), latents)  # type: ignore[arg-type]
    assert np.array_equal(np.asarray(back), np.asarray(files.rebuilt(latents, codec, -16, *size)))


@pytest.mark.numeric
def test_threads_change_no_latent_and_no_pixel_by_more_than_a_level(folder: Path) -> None:
    codec = files.open_codec(folder)
    data = files.compress(photo(96, 80), codec)
    before = torch.get_num_threads()
    backs = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            backs.append(np.asarray(files.decompress(data, codec)).astype(int))
    finally:
        torch.set_num_threads(before)
    assert max(np.abs(backs[0] - other).max() for other in backs[1:]) <= 1


def test_damaged_files_are_refused_in_a_sentence(folder: Path) -> None:
    codec = files.open_codec(folder)
    whole = files.compress(photo(24, 16), codec)
    random = np.random.default_rng(0)
    for trial in range(500):
        data = bytearray(whole)
        for _ in range(random.integers(1, 5)):
            data[random.integers(0, len(data))] ^= int(random.integers(1, 256))
        if trial % 3 == 0:
            data = data[: random.integers(0, len(data))]
        if bytes(data) != whole:
            with pytest.raises(UserError, match=r"lpz|damaged|version"):
                files.decompress(bytes(data), codec)


@pytest.mark.slow
def test_files_that_lie_with_a_right_checksum_end_in_a_sentence_or_a_picture(folder: Path) -> None:
    for adapts in (False, True):
        if adapts:
            (folder / static_model.FILE).unlink()
        codec = files.open_codec(folder)
        content = unpack(files.compress(photo(24, 16), codec), "it")
        random = np.random.default_rng(0)
        for _ in range(60):
            latents = random.bytes(int(random.integers(0, 60)))
            step = int(random.integers(-128, 128))
            try:
                back = files.decompress(pack(replace(content, latents=latents, step=step)), codec)
                assert back.size == (24, 16)
            except UserError:
                pass


@pytest.mark.parametrize(("width", "height"), [(0, 5), (16_384, 1), (16_000, 16_000)])
def test_sizes_are_checked_before_anything_is_allocated(width: int, height: int) -> None:
    body = b"LPZ\x01" + b"abcd" + b"\x80" + b"".join(_number(side) for side in (width, height)) + b"x"
    with pytest.raises(UserError, match="pixels does not go into"):
        unpack(body + zlib.crc32(body).to_bytes(4), "it")


def _number(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([128 | value & 127]) + _number(value >> 7)


@given(step=st.integers(-128, 127), width=st.integers(1, 4096), height=st.integers(1, 4096), latents=st.binary(max_size=40))
@settings(max_examples=60, deadline=None)
def test_the_container_holds_what_it_was_given(step: int, width: int, height: int, latents: bytes) -> None:
    content = Container(b"1234", step, width, height, latents)
    assert unpack(pack(content), "it") == content
    assert len(pack(content)) - len(latents) <= 17


def test_a_file_of_another_vae_or_other_probabilities_is_refused(folder: Path, tmp_path: Path) -> None:
    data = files.compress(photo(16, 16), files.open_codec(folder))
    fit.write_codec(learnt(4, seed=1), folder)
    with pytest.raises(UserError, match="was not made with VAE"):
        files.decompress(data, files.open_codec(folder))
    with pytest.raises(UserError, match="No installed VAE made this file"):
        files.decompress(data)


def test_the_verbs(folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    photo(40, 30).save("in.png")
    clear = photo(40, 30).convert("RGBA")
    clear.putalpha(100)
    clear.save("clear.png")
    assert main(["compress", "in.png", "out.lpz", "--vae", str(folder)]) in (0, None)
    assert "bits for each of 40 x 30 pixels" in capsys.readouterr().out
    assert main(["inspect", "out.lpz"]) in (0, None)
    assert json.loads(capsys.readouterr().out)["width"] == 40
    assert main(["decompress", "out.lpz", "back.png", "--vae", str(folder)]) in (0, None)
    assert Image.open("back.png").size == (40, 30)
    assert main(["compress", "clear.png", "clear.lpz", "--vae", str(folder)]) in (0, None)
    assert "laid on white" in capsys.readouterr().err
    clear.convert("RGB").save("moving.gif", save_all=True, append_images=[photo(40, 30).rotate(180)])
    Image.fromarray(np.full((30, 40), 40_000, np.uint16)).save("deep.png")
    for name, note in (("moving.gif", "has 2 frames, of which the first"), ("deep.png", "more than 8 bits")):
        assert main(["compress", name, "more.lpz", "--vae", str(folder)]) in (0, None)
        assert note in capsys.readouterr().err
    before = Path("in.png").read_bytes()
    Path("taken.lpz").mkdir()
    for wrong, message in (
        (["compress", "none.png", "x.lpz", "--vae", str(folder)], "no such file"),
        (["compress", "in.png", "x.lpz", "--vae", str(folder), "--step", "0"], "--step is 0"),
        (["compress", "in.png", "in.png", "--vae", str(folder)], "ends in .lpz"),
        (["compress", "in.png", "taken.lpz", "--vae", str(folder)], "taken.lpz is a folder; expected the name of a file"),
        (["compress", "taken.lpz", "x.lpz", "--vae", str(folder)], "taken.lpz is a folder"),
        (["decompress", "in.png", "x.png"], "is no .lpz file"),
        (["decompress", "out.lpz", "x.txt"], "no kind of picture"),
        (["decompress", "none.lpz", "x.png"], "no such file"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("x.*"))
    assert Path("in.png").read_bytes() == before


def test_fit_codec_writes_what_compress_reads(tmp_path: Path, pictures: Path, capsys: Any) -> None:
    save_vae(tiny_vae(), tmp_path / "vae", {})
    assert main(["fit-codec", str(tmp_path / "vae"), str(pictures), "--size", "16", "--steps", "3", "--step", "0.5"]) in (0, None)
    assert str(tmp_path / "vae" / static_model.FILE) in capsys.readouterr().out
    codec = files.open_codec(tmp_path / "vae")
    assert codec.weights is not None
    assert codec.step == 0.5


def test_weights_that_do_not_belong_together_are_refused(folder: Path) -> None:
    weights = learnt(4)
    fit.write_codec(replace(weights, bias=weights.bias[:-1]), folder)
    with pytest.raises(UserError, match="do not belong together"):
        files.open_codec(folder)
    fit.write_codec(learnt(6), folder)
    with pytest.raises(UserError, match="is for 6 channels"):
        files.open_codec(folder)


def test_bd_rate_of_curves_in_closed_form() -> None:
    quality = np.linspace(30, 40, 6)
    rate = np.exp(0.2 * quality)
    assert bd_rate(0.8 * rate, quality, rate, quality) == pytest.approx(-20)
    # log-rates a + b q and a + c q: the mean of their difference over the common range 32 .. 40 is (b - c) * 36
    later = np.linspace(32, 44, 5)
    assert bd_rate(np.exp(0.19 * later), later, rate, quality) == pytest.approx(100 * (np.exp(-0.01 * 36) - 1))
    with pytest.raises(UserError, match="share no range"):
        bd_rate(rate, quality, rate, quality + 20)
    assert front(np.array([1.0, 2.0, 3.0]), np.array([5.0, 4.0, 6.0])).tolist() == [0, 2]


COUNTS_CRC = 0x700A047D
