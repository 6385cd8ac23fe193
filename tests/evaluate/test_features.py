"""Named feature networks: shapes, by-hand computations, refusals, and the small network that ships."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import some_images, write_pictures
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter

from latentpipe.checkpoints.registry import bundled_weights_dir
from latentpipe.data.emoji_bank import open_bank
from latentpipe.evaluate.metrics import inception, train_emoji_words
from latentpipe.evaluate.metrics.emoji_words import WordNetwork
from latentpipe.evaluate.metrics.features import Features, SqueezeNet10, metric_names, open_features
from latentpipe.evaluate.metrics.frechet import frechet, kernel_score
from latentpipe.evaluate.metrics.inception import Inception
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import content_hash, read_tensors

WORDS = bundled_weights_dir() / "features" / "emoji-words"


def randomized(network: torch.nn.Module) -> torch.nn.Module:
    """Weights that keep the scale of their input, through any depth."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, inception.FrozenNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def emoji_images(n: int = 200) -> torch.Tensor:
    """The first pictures of the bank that ships, N 3 32 32."""
    pixels = open_bank().pixels[:: len(open_bank().keys) // n][:n].reshape(-1, 32, 32, 3)
    return torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2)


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    return torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, sigma, sigma)))


def noisy(images: torch.Tensor, sigma: float) -> torch.Tensor:
    return (images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)


def assert_degradations_are_ordered(features: Features, images: torch.Tensor) -> None:
    """Frechet and kernel distances grow with blur and with noise, and are 0 for the pictures themselves."""
    clean = features(images)
    assert clean.dtype == np.float64
    assert clean.shape == (len(images), features.size)
    assert frechet(clean, features(images)) == pytest.approx(0, abs=1e-6)
    for degrade, levels in ((blurred, (0.4, 0.7, 1.2, 2.0)), (noisy, (0.05, 0.1, 0.2, 0.4))):
        degraded = [features(degrade(images, level)) for level in levels]
        for distance in (frechet, lambda a, b: kernel_score(a, b)[0]):
            values = [distance(clean, other) for other in degraded]
            assert 0 < values[0] < values[1] < values[2] < values[3], (degrade.__name__, values)


def test_only_inception_makes_an_fid() -> None:
    assert metric_names("inception") == ("FID", "KID")
    assert metric_names("emoji-words") == ("Frechet distance on emoji-words", "kernel distance on emoji-words")


def test_weights_that_are_not_installed_are_named(own_home: Path) -> None:
    for name, title in (("inception", "FID"), ("squeezenet10", "squeezenet10")):
        with pytest.raises(UserError, match=f"{title} needs its own weights") as error:
            open_features(name)
        assert str(own_home / "metrics" / f"{name}.safetensors") in str(error.value)
    with pytest.raises(UserError, match="inception, squeezenet10, emoji-words"):
        open_features("vgg")


def test_inception_has_the_parameters_of_the_published_network() -> None:
    # 23,834,568 of torchvision's inception_v3 without its auxiliary head, less the classifier's 2,049,000.
    tensors = Inception().state_dict()
    counted = [tensor.numel() for name, tensor in tensors.items() if "running" not in name]
    assert sum(counted) == 23_834_568 - 2_049_000
    assert len(tensors) == 94 * 5
    assert {"Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch_pool.bn.running_var", "Mixed_7c.branch3x3dbl_3b.conv.weight"} <= set(
        tensors
    )


def test_inception_pools_as_the_network_of_the_fid() -> None:
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert inception._mean_pool(x)[0, 0, 0, 0] == 2  # (0 + 1 + 3 + 4) / 4: the padding does not count
    network = Inception()
    assert torch.equal(network.Mixed_7b.pool(x), inception._mean_pool(x))
    assert network.Mixed_7c.pool(x)[0, 0, 0, 0] == 4
    norm = randomized(inception.FrozenNorm(4))
    reference = torch.nn.BatchNorm2d(4, eps=0.001).eval()
    reference.load_state_dict(norm.state_dict(), strict=False)
    images = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(norm(images), reference(images))


def inception_by_hand(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The network of 2015-12-05 from its graph: branches in the order of their concatenation, "a+b" side by side."""

    def conv(x: torch.Tensor, name: str, stride: int = 1, same: bool = True) -> torch.Tensor:
        weight = tensors[f"{name}.conv.weight"]
        padding = [side // 2 for side in weight.shape[2:]] if same else [0, 0]
        mean, variance, gain, offset = (
            tensors[f"{name}.bn.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((F.conv2d(x, weight, stride=stride, padding=padding) - mean) / (variance + 1e-3).sqrt() * gain + offset).relu()

    def chain(x: torch.Tensor, block: str, names: str, last_stride: int = 1) -> torch.Tensor:
        *first, last = names.split()
        for name in first:
            x = conv(x, f"{block}.branch{name}")
        return torch.cat([conv(x, f"{block}.branch{name}", last_stride, last_stride == 1) for name in last.split("+")], 1)

    def means(x: torch.Tensor) -> torch.Tensor:
        ones = torch.ones_like(x[:1, :1])
        counts = F.avg_pool2d(ones, 3, 1, 1)
        return F.avg_pool2d(x, 3, 1, 1) / counts

    for name, stride, same in (("1a_3x3", 2, False), ("2a_3x3", 1, False), ("2b_3x3", 1, True)):
        x = conv(x, f"Conv2d_{name}", stride, same)
    x = conv(conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3", same=False)
    x = F.max_pool2d(x, 3, 2)
    a = ("1x1", "5x5_1 5x5_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3")
    c = ("1x1", "7x7_1 7x7_2 7x7_3", "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5")
    e = ("1x1", "3x3_1 3x3_2a+3x3_2b", "3x3dbl_1 3x3dbl_2 3x3dbl_3a+3x3dbl_3b")
    b, d = ("3x3", "3x3dbl_1 3x3dbl_2 3x3dbl_3"), ("3x3_1 3x3_2", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4")
    for letters, branches in (("5b 5c 5d", a), ("6a", b), ("6b 6c 6d 6e", c), ("7a", d), ("7b 7c", e)):
        for letter in letters.split():
            block = f"Mixed_{letter}"
            if branches in (b, d):
                x = torch.cat([*(chain(x, block, names, 2) for names in branches), F.max_pool2d(x, 3, 2)], 1)
                continue
            pooled = F.max_pool2d(x, 3, 1, 1) if letter == "7c" else means(x)
            x = torch.cat([*(chain(x, block, names) for names in branches), conv(pooled, f"{block}.branch_pool")], 1)
    return x.mean((2, 3))


@pytest.mark.slow
def test_inception_opens_from_its_file_and_resizes_by_itself(tmp_path: Path, own_home: Path) -> None:
    tensors = dict(randomized(Inception()).state_dict())
    path = own_home / "metrics" / "inception.safetensors"
    path.parent.mkdir()
    unread = {"fc.weight": torch.zeros(1008, 2), "Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(0)}
    save_file(tensors | unread, path)
    features = open_features("inception")
    images = some_images(2, 40)
    found = features(images)
    assert found.shape == (2, 2048)
    assert found.std() > 0
    resized = F.interpolate(images, (299, 299), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(features(resized[:1]), found[:1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(inception_by_hand(tensors, resized[:1]).numpy(), found[:1], rtol=1e-3, atol=1e-4)
    tensors.pop("Mixed_7c.branch_pool.conv.weight")
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match=r"missing Mixed_7c\.branch_pool"):
        open_features("inception", tmp_path / "short.safetensors")


def by_hand(tensors: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """SqueezeNet 1.0 as its Caffe description says, layer by layer: B 1000 scores and B 512 features."""

    def conv(x: torch.Tensor, name: str, **rest: int) -> torch.Tensor:
        return F.conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], **rest).relu()

    pixels = (images.double().clamp(-1, 1) + 1) / 2 * 255
    bgr = torch.stack([pixels[:, 2] - 104, pixels[:, 1] - 117, pixels[:, 0] - 123], 1)
    x = conv(bgr.float(), "conv1", stride=2)
    for name in ("pool", "fire2", "fire3", "fire4", "pool", "fire5", "fire6", "fire7", "fire8", "pool", "fire9"):
        if name == "pool":
            # Caffe rounds up: a last window that is cut off at the border counts.
            more = [(side - 3) % 2 for side in x.shape[-2:]]
            x = F.max_pool2d(F.pad(x, (0, more[1], 0, more[0]), value=-torch.inf), 3, 2)
        else:
            inner = conv(x, f"{name}/conv1x1_1")
            x = torch.cat([conv(inner, f"{name}/conv1x1_2"), conv(inner, f"{name}/conv3x3_2", padding=1)], 1)
    return x.mean((2, 3))


def test_squeezenet10_equals_a_computation_by_hand(tmp_path: Path) -> None:
    tensors = dict(randomized(SqueezeNet10()).state_dict())
    assert sum(t.numel() for t in tensors.values()) == 1_248_424  # SqueezeNet 1.0, as published
    save_file(tensors, tmp_path / "net.safetensors")
    features = open_features("squeezenet10", tmp_path / "net.safetensors")
    for side in (32, 37, 64, 67):
        images = some_images(2, side)
        np.testing.assert_allclose(features(images), by_hand(tensors, images).numpy(), rtol=1e-3, atol=1e-2)
    with pytest.raises(UserError, match="32 pixels"):
        features(some_images(1, 31))
    with pytest.raises(ValueError, match="B 3 H W"):
        features(some_images(1, 32)[0])


@pytest.mark.slow
def test_the_real_squeezenet10_orders_degradations(assets: Path, own_home: Path) -> None:
    path = assets / "weights" / "squeezenet10" / "squeezenet1_0_caffe_decoded.pth"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    tensors = torch.load(path, weights_only=True, map_location="cpu")
    (own_home / "metrics").mkdir()
    save_file(tensors, own_home / "metrics" / "squeezenet10.safetensors")
    features = open_features("squeezenet10")
    images = F.interpolate(emoji_images(60), (64, 64), mode="bicubic").clamp(-1, 1)
    np.testing.assert_allclose(features(images[:2]), by_hand(tensors, images[:2]).numpy(), rtol=1e-3, atol=1e-2)
    assert_degradations_are_ordered(features, images)


@pytest.mark.slow
def test_emoji_words_ships_and_orders_degradations() -> None:
    features = open_features("emoji-words")
    assert (features.name, features.size) == ("emoji-words", 128)
    assert sum(parameter.numel() for parameter in features.network.parameters()) <= 600_000
    assert_degradations_are_ordered(features, emoji_images())


def test_emoji_words_sees_pictures_at_64_pixels() -> None:
    features = open_features("emoji-words")
    images = some_images(2, 128)
    np.testing.assert_allclose(features(images), features(F.avg_pool2d(images, 2)), rtol=1e-4, atol=1e-5)
    assert features(some_images(40, 64)).shape == (40, 128)  # more than one batch


def test_the_card_of_emoji_words_tells_the_truth() -> None:
    card = json.loads((WORDS / "card.json").read_text())
    tensors = read_tensors(WORDS / "model.safetensors")
    assert card["content_hash"] == content_hash(tensors) == open_features("emoji-words").hash
    assert (WORDS / "model.safetensors").stat().st_size <= 1_500_000
    assert len(card["words"]) == len(tensors["head.weight"])
    network, frequent = card["validation"]["network"], card["validation"]["most_frequent_words"]
    assert network["top_word"] > frequent["top_word"]
    assert network["words"] > frequent["words"]


def test_emoji_words_knows_its_words_on_the_bank() -> None:
    card = json.loads((WORDS / "card.json").read_text())
    tensors = read_tensors(WORDS / "model.safetensors")
    network = WordNetwork(len(card["words"])).eval()
    network.load_state_dict(tensors)
    bank = open_bank()
    rows = bank.rows_of("validation")
    images = torch.from_numpy(bank.pixels[rows].reshape(-1, 32, 32, 3) / 127.5 - 1).permute(0, 3, 1, 2)
    truth = train_emoji_words.labels([bank.captions[row] for row in rows], card["words"])
    known = truth.any(1)
    smooth = F.interpolate(images[known], (64, 64), mode="bicubic").clamp(-1, 1)
    with torch.no_grad():
        found = train_emoji_words.word_scores(network(smooth), truth[known])
    assert found["words"] > card["validation"]["most_frequent_words"]["words"] + 0.1


def test_the_score_counts_ranked_words() -> None:
    truth = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 0]])
    logits = torch.tensor([[5.0, 1, 3, 0], [3, 2, 1, 0]])
    assert train_emoji_words.word_scores(logits, truth) == {"top_word": 0.5, "words": 0.25}


@pytest.mark.slow
def test_words_are_trained_into_a_folder_that_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_emoji_words, "LEAST", 3)
    monkeypatch.setattr(train_emoji_words, "BATCH", 16)
    for split in ("train", "validation"):
        write_pictures(tmp_path / split)
    card = train_emoji_words.train_words(tmp_path, tmp_path / "out", steps=40)
    assert sorted(card["words"]) == ["bar", "blue", "circle", "green", "red", "square", "yellow"]
    assert card["validation"]["pictures"] == 12
    assert card["validation"]["network"]["words"] > card["validation"]["most_frequent_words"]["words"]
    features = open_features("emoji-words", tmp_path / "out" / "model.safetensors")
    assert features.hash == card["content_hash"]
    again = train_emoji_words.train_words(tmp_path, tmp_path / "again", steps=40)
    assert again["content_hash"] == card["content_hash"]
    monkeypatch.setattr(train_emoji_words, "LEAST", 50)
    with pytest.raises(UserError, match="50 pictures"):
        train_emoji_words.train_words(tmp_path, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_another_network_is_no_word_network(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no word network"):
        open_features("emoji-words", tmp_path / "other.safetensors")
