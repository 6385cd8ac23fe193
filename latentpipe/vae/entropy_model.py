"""The context model of a codec's latents: how many bits each takes, given those that a decoder has before it.

Minnen, Balle and Toderici, arXiv:1809.02736; in groups of channels at each place as in Minnen and Singh, arXiv:2007.08739.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN = 128
GROUPS = 4  # of channels: a group is coded with those before it known at the same place
REACH = 2  # latents that the context reaches to each side and upwards


class ContextModel(nn.Module):
    """Logistic mean and scale of each latent from those that are coded before it: two masked convolutions.

    Coded in rows, in each row from the left, at each place group after group. The hidden units are split in as many groups,
    and see of their own place only the channels of the groups before theirs (Germain et al., arXiv:1502.03509).
    """

    def __init__(self, channels: int, hidden: int = HIDDEN, groups: int = GROUPS) -> None:
        super().__init__()
        side = 2 * REACH + 1
        self.gather = nn.Conv2d(channels, hidden, side, padding=REACH)
        self.state = nn.Conv2d(hidden, 2 * channels, 1)
        self.octave = nn.Parameter(torch.zeros(hidden))
        with torch.no_grad():
            for parameter in self.state.parameters():
                parameter.zero_()
        mine, theirs = group_of(channels, groups), group_of(hidden, groups)
        seen = torch.zeros(hidden, channels, side, side)
        seen[:, :, :REACH] = 1
        seen[:, :, REACH, :REACH] = 1
        seen[:, :, REACH, REACH] = (mine[None] < theirs[:, None]).float()
        self.register_buffer("seen", seen, persistent=False)
        known = (theirs[None] <= mine[:, None]).float()
        self.register_buffer("known", torch.cat([known, known])[:, :, None, None], persistent=False)

    def forward(self, latents: torch.Tensor, octaves: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents in steps (B C h w) to mean and natural logarithm of the scale, B C h w each.

        octaves  B: the steps' sizes as powers of two, where they are not 1
        """
        assert isinstance(self.seen, torch.Tensor)
        assert isinstance(self.known, torch.Tensor)
        hidden = F.conv2d(latents, self.gather.weight * self.seen, self.gather.bias, padding=REACH)
        if octaves is not None:
            hidden = hidden + (octaves[:, None] * self.octave)[:, :, None, None]
        mean, log_scale = F.conv2d(hidden.relu(), self.state.weight * self.known, self.state.bias).chunk(2, 1)
        return mean, log_scale.clamp(-3.5, 6.0)


def group_of(count: int, groups: int) -> torch.Tensor:
    """The group (0 .. groups - 1) of each of `count` channels: runs of nearly equal length, in order."""
    return torch.arange(count) * groups // count


def bits(latents: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """``-log2 (F(y + 1/2) - F(y - 1/2))`` of a logistic F, for each latent in steps; finite far out in the tails too."""
    away = (latents - mean).abs()
    narrow = (-log_scale).exp()
    near, far = F.logsigmoid((0.5 - away) * narrow), F.logsigmoid((-0.5 - away) * narrow)
    return -(near + torch.log(-torch.expm1((far - near).clamp_max(-1e-6)))) / math.log(2)
