"""LPIPS and DISTS, differentiable: images B 3 H W in [-1, 1] -> distances (B); 0 for equal pictures, lower is nearer.

The backbones are torchvision's alexnet, vgg16 and squeezenet1_1, written out so that its keys `features.N.*` load
strictly. Backbone and heads come from one file; `weights` says which tensors it holds and how to make it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from latentpipe.evaluate.metrics.weights import fill, metric_file
from latentpipe.utils.errors import UserError

Net = Literal["alex", "vgg", "squeeze"]

LEAST_PX = 32  # below, a backbone has no position left
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29), "squeeze": (1, 4, 7, 9, 10, 11, 12)}
VGG = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
DISTS_CHANNELS = (3, *(widths[-1] for widths in VGG))


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, version 0.1, linear heads (Zhang et al., CVPR 2018, eq. 1).

    `open_lpips` fills it; the weights of the paper are per backbone, so the name says which: "LPIPS (alex)".
    """

    hash = ""  # of the weights
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.name = f"LPIPS ({net})"
        self.taps = TAPS[net]
        self.features, widths = {"alex": _alexnet, "vgg": _vgg16, "squeeze": _squeezenet}[net]()
        for index, width in enumerate(widths):
            # The published heads have a dropout at 0, so their convolution is `linK.model.1`.
            head = nn.ModuleDict({"model": nn.ModuleDict({"1": nn.Conv2d(width, 1, 1, bias=False)})})
            self.add_module(f"lin{index}", head)
        mean, std = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Distances (B) of two batches in [-1, 1]; UserError for sides below 32."""
        _check(self.name, first, second)
        n = len(first)
        both = (torch.cat([first, second]) - self.mean) / self.std
        total = first.new_zeros(n)
        for index, features in enumerate(_tap(self.features, both, self.taps)):
            unit = _unit(features)
            head = self.get_submodule(f"lin{index}.model.1")
            total = total + head((unit[:n] - unit[n:]) ** 2).mean((1, 2, 3))
        return total


class DISTS(nn.Module):
    """Deep image structure and texture similarity (Ding, Ma, Wang, Simoncelli, TPAMI 2020, eq. 5 to 7): 1 - similarity.

    vgg16 with L2 pooling in place of its maxima, the picture itself as the first stage. `open_dists` fills it.
    """

    hash = ""  # of the weights
    name = "DISTS"
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features, _ = _vgg16(L2Pooling)
        self.alpha = nn.Parameter(torch.zeros(1, sum(DISTS_CHANNELS), 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, sum(DISTS_CHANNELS), 1, 1))
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Distances (B) of two batches in [-1, 1]; UserError for sides below 32."""
        _check(self.name, first, second)
        both = (torch.cat([first, second]) + 1) / 2
        stages = [both, *_tap(self.features, (both - self.mean) / self.std, TAPS["vgg"])]
        weight = self.alpha.sum() + self.beta.sum()
        alphas, betas = (part.split(DISTS_CHANNELS, 1) for part in (self.alpha / weight, self.beta / weight))
        similarity = first.new_zeros(len(first))
        for stage, alpha, beta in zip(stages, alphas, betas, strict=True):
            texture, structure = _texture_and_structure(*stage.chunk(2))
            similarity = similarity + (alpha * texture + beta * structure).sum((1, 2, 3))
        return 1 - similarity


def open_lpips(net: Net = "alex", path: Path | None = None) -> LPIPS:
    """LPIPS with the weights of `path`, else the installed lpips-NET.safetensors; UserError where there are none."""
    if net not in TAPS:
        raise UserError(f"LPIPS has the networks {', '.join(TAPS)}; given '{net}'.")
    file = metric_file(f"lpips-{net}", path)
    metric = LPIPS(net)
    metric.hash = fill(metric, file)
    return metric


def open_dists(path: Path | None = None) -> DISTS:
    """DISTS with the weights of `path`, else the installed dists.safetensors; UserError where there are none."""
    file = metric_file("dists", path)
    metric = DISTS()
    metric.hash = fill(metric, file)
    return metric


class L2Pooling(nn.Module):
    """sqrt(blur(x^2)) at every second position: a pooling without aliases (DISTS, eq. 2; Hann window of 3 x 3)."""

    window: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        window = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("window", torch.outer(window, window)[None, None] / 16, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """B C H W -> B C ceil(H/2) ceil(W/2)."""
        channels = x.shape[1]
        blurred = F.conv2d(x**2, self.window.expand(channels, 1, 3, 3), stride=2, padding=1, groups=channels)
        return (blurred + 1e-12).sqrt()


class Fire(nn.Module):
    """SqueezeNet's block: 1 x 1 down to `squeeze` channels, then 1 x 1 and 3 x 3 up to `expand` each, side by side."""

    def __init__(self, width: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """B width H W -> B 2*expand H W."""
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


def _alexnet() -> tuple[nn.Sequential, Sequence[int]]:
    """torchvision's alexnet.features up to its last ReLU, and the channels at the taps."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    for width, out in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers), (64, 192, 384, 256, 256)


def _vgg16(pooling: type[nn.Module] | None = None) -> tuple[nn.Sequential, Sequence[int]]:
    """torchvision's vgg16.features up to its last ReLU, with another pooling where given, and the channels at the taps."""
    layers: list[nn.Module] = []
    width = 3
    for block, widths in enumerate(VGG):
        if block:
            layers.append(nn.MaxPool2d(2) if pooling is None else pooling())
        for out in widths:
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
            width = out
    return nn.Sequential(*layers), DISTS_CHANNELS[1:]


def _squeezenet() -> tuple[nn.Sequential, Sequence[int]]:
    """torchvision's squeezenet1_1.features, and the channels at the taps."""

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool(), Fire(64, 16, 64), Fire(128, 16, 64), pool()]
    layers += [Fire(128, 32, 128), Fire(256, 32, 128), pool()]
    layers += [Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256)]
    return nn.Sequential(*layers), (64, 128, 256, 384, 384, 512, 512)


def _tap(layers: nn.Sequential, x: torch.Tensor, taps: Sequence[int]) -> list[torch.Tensor]:
    """What leaves the layers numbered `taps`."""
    found = []
    for index, layer in enumerate(layers):
        x = layer(x)
        if index in taps:
            found.append(x)
    return found


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Features of length 1 at each position; the clamp keeps the gradient finite where all are 0."""
    length = (features**2).sum(1, keepdim=True).clamp(min=1e-20).sqrt()
    return features / (length + 1e-10)


def _texture_and_structure(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """DISTS eq. 5 and 6 of a stage's features: two (B, C, 1, 1)."""
    at = (2, 3)
    mean_a, mean_b = first.mean(at, keepdim=True), second.mean(at, keepdim=True)
    texture = (2 * mean_a * mean_b + 1e-6) / (mean_a**2 + mean_b**2 + 1e-6)
    variances = ((first - mean_a) ** 2).mean(at, keepdim=True) + ((second - mean_b) ** 2).mean(at, keepdim=True)
    covariance = ((first - mean_a) * (second - mean_b)).mean(at, keepdim=True)
    return texture, (2 * covariance + 1e-6) / (variances + 1e-6)


def _check(name: str, first: torch.Tensor, second: torch.Tensor) -> None:
    if first.ndim != 4 or first.shape[1] != 3 or first.shape != second.shape:
        raise ValueError(f"Expected two batches B 3 H W of one shape; given {tuple(first.shape)} and {tuple(second.shape)}.")
    if min(first.shape[-2:]) < LEAST_PX:
        raise UserError(f"{name} needs sides of {LEAST_PX} pixels and more; given {tuple(first.shape[-2:])}.")
