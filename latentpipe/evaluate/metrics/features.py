"""Named feature networks: what a Frechet or a kernel distance is measured on. Only "inception" makes an FID or a KID.

inception     2048 features of the FID network (needs its weights: inception.safetensors)
squeezenet10  512 features: the mean over positions of SqueezeNet 1.0's last block (needs squeezenet10.safetensors)
emoji-words   128 features of a small network that ships; it knows emoji, and photographs only as colours and edges
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from latentpipe.checkpoints.registry import bundled_weights_dir
from latentpipe.evaluate.metrics import emoji_words, inception
from latentpipe.evaluate.metrics.emoji_words import WordNetwork
from latentpipe.evaluate.metrics.inception import Inception
from latentpipe.evaluate.metrics.weights import fill, metric_file
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import content_hash, load_strictly, read_tensors

NAMES = ("inception", "squeezenet10", "emoji-words")
BATCH = 32
LEAST_PX = 32
FIRES = {2: (96, 16, 64), 3: (128, 16, 64), 4: (128, 32, 128), 5: (256, 32, 128)} | {
    6: (256, 48, 192), 7: (384, 48, 192), 8: (384, 64, 256), 9: (512, 64, 256)  # channels in, squeezed, of each expansion
}  # fmt: skip


@dataclass(frozen=True)
class Features:
    """A named network: images B 3 H W in [-1, 1] -> features (B, size), float64. `hash` is of its weights."""

    name: str
    size: int
    network: nn.Module
    hash: str

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> np.ndarray:
        """Features (B, size), each picture alone; pictures of different sizes have different features."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"Expected images B 3 H W in [-1, 1]; given {tuple(images.shape)}.")
        if min(images.shape[-2:]) < LEAST_PX:
            raise UserError(f"{self.name} needs sides of {LEAST_PX} pixels and more; given {tuple(images.shape[-2:])}.")
        device = next(self.network.parameters()).device
        parts = [self.network(part.to(device, torch.float32)).double().cpu() for part in images.split(BATCH)]
        return torch.cat(parts).numpy()


def open_features(name: str, path: Path | None = None) -> Features:
    """The network of a name, with the weights of `path` where given; UserError for other names and missing weights."""
    if name == "emoji-words":
        return _open_words(path)
    if name == "inception":
        network: nn.Module = Inception()
        size = inception.FEATURES
    elif name == "squeezenet10":
        network, size = SqueezeNet10(), 2 * FIRES[9][2]
    else:
        raise UserError(f"No features '{name}'; expected one of {', '.join(NAMES)}.")
    return Features(name, size, network, fill(network, metric_file(name, path)))


def metric_names(features: str) -> tuple[str, str]:
    """What the Frechet and the kernel distance on these features are called."""
    if features == "inception":
        return "FID", "KID"
    return f"Frechet distance on {features}", f"kernel distance on {features}"


class SqueezeNet10(nn.Module):
    """Images B 3 H W in [-1, 1] -> (B, 512): SqueezeNet 1.0 (Iandola et al. 2016), mean over positions after fire9.

    Pictures keep their size; the network sees B G R in 0..255 less the means, and its pools round up, as Caffe's do.
    The classifier `conv_final` is in the file and is not used.
    """

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 7, 2)
        for number, (width, squeezed, expanded) in FIRES.items():
            self.add_module(f"fire{number}/conv1x1_1", nn.Conv2d(width, squeezed, 1))
            self.add_module(f"fire{number}/conv1x1_2", nn.Conv2d(squeezed, expanded, 1))
            self.add_module(f"fire{number}/conv3x3_2", nn.Conv2d(squeezed, expanded, 3, padding=1))
        self.conv_final = nn.Conv2d(512, 1000, 1)
        self.register_buffer("mean", torch.tensor([104.0, 117.0, 123.0]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, 512) of images B 3 H W in [-1, 1]."""
        x = F.relu(self.conv1((images.flip(1) + 1) * 127.5 - self.mean))
        for number in FIRES:
            if number in (2, 5, 9):
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            x = self._fire(number, x)
        return x.mean((2, 3))

    def _fire(self, number: int, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.get_submodule(f"fire{number}/conv1x1_1")(x))
        sides = [self.get_submodule(f"fire{number}/{part}")(x) for part in ("conv1x1_2", "conv3x3_2")]
        return F.relu(torch.cat(sides, 1))


class _Penultimate(nn.Module):
    """A word network's features as its output."""

    def __init__(self, words: WordNetwork) -> None:
        super().__init__()
        self.words = words

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.words.features(images)


def _open_words(path: Path | None) -> Features:
    """The word network that ships, or another file of it; the number of its words is in the file."""
    path = bundled_weights_dir() / "features" / "emoji-words" / "model.safetensors" if path is None else Path(path)
    tensors = read_tensors(path)
    if "head.weight" not in tensors:
        raise UserError(
            f"{path} is no word network: it has no 'head.weight'. "
            "'python -m latentpipe.evaluate.metrics.train_emoji_words' makes one."
        )
    network = WordNetwork(len(tensors["head.weight"]))
    load_strictly(network, tensors, path)
    network.requires_grad_(False).eval()
    return Features("emoji-words", emoji_words.FEATURES, _Penultimate(network).eval(), content_hash(tensors))
