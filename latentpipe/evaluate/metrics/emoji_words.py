"""emoji-words: a small network that ships, for feature distances between pictures where no other weights are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

SIDE = 64
WIDTHS = ((3, 32, 2), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 128, 1))  # channels in, out, stride
FEATURES = WIDTHS[-1][1]


class WordNetwork(nn.Module):
    """Images B 3 H W in [-1, 1] -> one logit (B, words) for each word that a caption may hold; 0.4 M parameters."""

    def __init__(self, words: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, out, stride in WIDTHS:
            layers += [nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, words)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 128): the mean over positions before the last layer; other sizes are area-resized to 64 x 64."""
        return self.body(resize(images)).mean((2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, words) of images B 3 H W."""
        return self.head(self.features(images))


def resize(images: torch.Tensor) -> torch.Tensor:
    """Images at 64 x 64: means over areas (an average over each output pixel's box)."""
    return images if images.shape[-2:] == (SIDE, SIDE) else F.interpolate(images, (SIDE, SIDE), mode="area")
