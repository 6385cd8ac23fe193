"""LPIPS and DISTS against torchmetrics' own networks on random backbones of the true shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchmetrics
from helpers import some_images
from safetensors.torch import save_file
from torch import nn
from torchmetrics.functional.image import dists as their_dists
from torchmetrics.functional.image import lpips as their_lpips

from latentpipe.evaluate.metrics.lpips import DISTS, LPIPS, TAPS, open_dists, open_lpips
from latentpipe.utils.errors import UserError

NETS = tuple(TAPS)
PARAMETERS = {"alex": 2_469_696, "vgg": 14_714_688, "squeeze": 722_496}  # of torchvision's `features`
HEADS = Path(torchmetrics.__file__).parent / "functional" / "image"


class TheirFire(nn.Module):
    """torchvision's Fire, with its names."""

    def __init__(self, width: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, squeeze, kernel_size=1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, kernel_size=1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, kernel_size=3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.squeeze(x).relu()
        return torch.cat((self.expand1x1(x).relu(), self.expand3x3(x).relu()), dim=1)


def backbone(net: str) -> nn.Sequential:
    """torchvision's `features` by its published tables, with weights that keep the scale of their input."""
    torch.manual_seed(0)
    if net == "squeeze":
        pool = [nn.MaxPool2d(3, 2, ceil_mode=True) for _ in range(3)]
        fires = [TheirFire(*row) for row in ((64, 16, 64), (128, 16, 64), (128, 32, 128), (256, 32, 128))]
        fires += [TheirFire(*row) for row in ((256, 48, 192), (384, 48, 192), (384, 64, 256), (512, 64, 256))]
        layers = [nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool[0], *fires[:2], pool[1], *fires[2:4], pool[2], *fires[4:]]
    elif net == "alex":
        layers = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU()]
        layers += [nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU()]
        layers += [nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2)]
    else:
        layers, width = [], 3
        for entry in [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]:
            layers += [nn.MaxPool2d(2, 2)] if entry == "M" else [nn.Conv2d(width, int(entry), 3, 1, 1), nn.ReLU()]
            width = width if entry == "M" else int(entry)
    for module in (part for layer in layers for part in layer.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.normal_(module.bias, std=0.1)
    return nn.Sequential(*layers)


def heads_of(name: str) -> dict[str, torch.Tensor]:
    """The published heads, as torchmetrics ships them."""
    return torch.load(HEADS / name, weights_only=True, map_location="cpu")


def write(path: Path, net: str, heads: dict[str, torch.Tensor]) -> Path:
    """One file of a random backbone, a classifier that is not read, and heads."""
    features = {f"features.{name}": tensor for name, tensor in backbone(net).state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in {**features, **heads, "classifier.1.bias": torch.zeros(3)}.items()}, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of all four metrics."""
    root = tmp_path_factory.mktemp("metrics")
    made = {net: write(root / f"lpips-{net}.safetensors", net, heads_of(f"lpips_models/{net}.pth")) for net in NETS}
    return made | {"dists": write(root / "dists.safetensors", "vgg", heads_of("dists_models/weights.pt"))}


@pytest.fixture(scope="module")
def metrics(files: dict[str, Path]) -> dict[str, Any]:
    """All four metrics, opened."""
    return {net: open_lpips(net, files[net]) for net in NETS} | {"dists": open_dists(files["dists"])}  # type: ignore[arg-type]


def theirs(net: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """torchmetrics' network on the same backbone and the published heads."""
    patch = pytest.MonkeyPatch()
    if net == "dists":
        patch.setattr(their_dists, "_TORCHVISION_AVAILABLE", True)
        patch.setattr(their_dists, "VGG16_Weights", SimpleNamespace(DEFAULT=None), raising=False)
        patch.setattr(their_dists, "vgg16", lambda weights: SimpleNamespace(features=backbone("vgg")), raising=False)
        network = their_dists.DISTSNetwork()
        patch.undo()
        return lambda a, b: network((a + 1) / 2, (b + 1) / 2)
    patch.setattr(their_lpips, "_get_tv_model_features", lambda name, pretrained=False: backbone(net))
    network = their_lpips._LPIPS(pretrained=True, net=net)  # type: ignore[arg-type]
    patch.undo()
    return lambda a, b: network(a, b).flatten()


@pytest.mark.parametrize("net", [*NETS, "dists"])
def test_it_equals_torchmetrics_on_the_same_weights(net: str, metrics: dict[str, Any]) -> None:
    first, second = some_images(3, 67), (some_images(3, 67) * 0.7 + some_images(3, 67, 1) * 0.3)
    with torch.no_grad():
        ours, expected = metrics[net](first, second), theirs(net)(first, second)
    assert ours.shape == (3,)
    assert ours.min() > 1e-3
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("net", [*NETS, "dists"])
def test_it_is_zero_for_equal_pictures_and_symmetric(net: str, metrics: dict[str, Any]) -> None:
    first, second = some_images(2, 33), some_images(2, 33, 1)
    with torch.no_grad():
        torch.testing.assert_close(metrics[net](first, first), torch.zeros(2), atol=2e-6, rtol=0)
        torch.testing.assert_close(metrics[net](first, second), metrics[net](second, first), atol=1e-6, rtol=1e-5)
        alone = torch.cat([metrics[net](first[i : i + 1], second[i : i + 1]) for i in range(2)])
        torch.testing.assert_close(metrics[net](first, second), alone, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("net", [*NETS, "dists"])
def test_its_gradient_reaches_the_picture_alone(net: str, metrics: dict[str, Any]) -> None:
    metric = metrics[net]
    picture = some_images(1, 48)
    for other, moved in ((some_images(1, 48, 1), True), (picture.clone(), False), (torch.full_like(picture, -1), True)):
        other = other.requires_grad_(True)
        metric(other, picture).sum().backward()
        assert other.grad.isfinite().all()
        assert (other.grad.abs().max() > 1e-6) == moved
    assert not any(parameter.requires_grad for parameter in metric.parameters())
    other = some_images(1, 48, 1).requires_grad_(True)
    before = metric(other, picture)
    (gradient,) = torch.autograd.grad(before.sum(), other)
    assert metric(other - 1e-3 * gradient / gradient.abs().max(), picture) < before


@pytest.mark.parametrize("net", NETS)
def test_the_backbones_have_torchvisions_names_and_sizes(net: str) -> None:
    ours = {name: t.shape for name, t in LPIPS(net).features.state_dict().items()}  # type: ignore[arg-type]
    assert ours == {name: t.shape for name, t in backbone(net).state_dict().items()}
    assert sum(shape.numel() for shape in ours.values()) == PARAMETERS[net]


@pytest.mark.parametrize(("net", "wanted"), [*((net, f"lpips-{net}") for net in NETS), ("dists", "dists")])
def test_without_its_own_weights_it_refuses(net: str, wanted: str, own_home: Path) -> None:
    with pytest.raises(UserError, match="needs its own weights") as error:
        open_dists() if net == "dists" else open_lpips(net)  # type: ignore[arg-type]
    text = str(error.value)
    assert str(own_home / "metrics" / f"{wanted}.safetensors") in text
    assert "latentpipe convert" in text
    assert "--to tensors" in text
    with pytest.raises(UserError, match="elsewhere"):
        open_lpips("alex", Path("elsewhere.safetensors"))


def test_installed_weights_are_found(files: dict[str, Path], own_home: Path) -> None:
    (own_home / "metrics").mkdir()
    (own_home / "metrics" / "lpips-squeeze.safetensors").write_bytes(files["squeeze"].read_bytes())
    metric = open_lpips("squeeze")
    assert (metric.name, len(metric.hash)) == ("LPIPS (squeeze)", 64)
    assert metric.hash == open_lpips("squeeze", files["squeeze"]).hash
    assert not metric.training


def test_a_file_of_another_metric_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not fit LPIPS"):
        open_lpips("alex", files["squeeze"])
    with pytest.raises(UserError, match="missing alpha"):
        open_dists(files["vgg"])
    bare = write(tmp_path / "bare.safetensors", "alex", {})
    with pytest.raises(UserError, match="lin0"):
        open_lpips("alex", bare)
    with pytest.raises(UserError, match="alex, vgg, squeeze"):
        open_lpips("resnet")  # type: ignore[arg-type]


def test_pictures_too_small_are_refused(metrics: dict[str, Any]) -> None:
    for metric in metrics.values():
        assert metric(some_images(1, 32), some_images(1, 32, 1)).isfinite().all()
        with pytest.raises(UserError, match="32 pixels"):
            metric(some_images(1, 31), some_images(1, 31))
        with pytest.raises(ValueError, match="one shape"):
            metric(some_images(1, 32), some_images(1, 40))


@pytest.mark.parametrize("net", NETS)
def test_the_published_heads_fit(net: str, assets: Path) -> None:
    path = assets / "weights" / "lpips_heads" / "v0.1" / f"{net}.pth"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    heads = torch.load(path, weights_only=True, map_location="cpu")
    wanted = {name: t.shape for name, t in LPIPS(net).state_dict().items() if name.startswith("lin")}  # type: ignore[arg-type]
    assert {name: t.shape for name, t in heads.items()} == wanted
    assert all(bool((tensor >= 0).all()) for tensor in heads.values())


def test_the_published_weights_of_dists_fit(assets: Path) -> None:
    path = assets / "weights" / "dists" / "weights.pt"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    weights = torch.load(path, weights_only=True, map_location="cpu")
    shapes = {name: t.shape for name, t in DISTS().state_dict().items() if not name.startswith("features.")}
    assert {name: t.shape for name, t in weights.items()} == shapes
