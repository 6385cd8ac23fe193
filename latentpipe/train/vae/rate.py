"""The rate term of a codec's VAE: bits of the latents under a context model that learns beside it.

Rounding has no gradient, so a step adds uniform noise of the quantizer's width in its place (Balle, Laparra and Simoncelli,
arXiv:1611.01704, section 3); the model of each latent sees the latents that a decoder has before it (Minnen, Balle and Toderici,
arXiv:1809.02736; in groups of channels at each place as in Minnen and Singh, arXiv:2007.08739).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from latentpipe.train.checkpoint import optimizer_tensors, restore_optimizer

HIDDEN = 128
GROUPS = 4  # of channels: a group is coded with those before it known at the same place
REACH = 2  # latents that the context reaches to each side and upwards
LEARNING_RATE = 2e-3


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


class RateModel:
    """A context model with its own optimizer: it gives the VAE its rate term and learns from the same gradient."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.net = ContextModel(channels).to(device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), LEARNING_RATE, weight_decay=0.0)

    def __call__(self, noisy: torch.Tensor) -> torch.Tensor:
        """Bits of each picture's latents (B C h w, in steps, with their noise): the mean over pictures."""
        with torch.autocast(noisy.device.type, enabled=False):
            noisy = noisy.float()
            return bits(noisy, *self.net(noisy)).sum((1, 2, 3)).mean()

    def update(self, mean: Callable[[torch.Tensor], torch.Tensor] = lambda values: values) -> None:
        """One step on the gradients that the VAE's backward pass left here; none where one is not finite.

        `mean` averages a tensor over processes. AdamW takes the same step whatever weight the rate has in the loss.
        """
        parameters = [parameter for parameter in self.net.parameters() if parameter.grad is not None]
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad = mean(parameter.grad)
        if parameters and all(parameter.grad.isfinite().all() for parameter in parameters if parameter.grad is not None):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """A copy of everything that a resumed run needs."""
        parts = {f"net.{name}": value for name, value in self.net.state_dict().items()} | optimizer_tensors(self.optimizer)
        return {f"bits.{name}": value.detach().clone() for name, value in parts.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`; other entries are left alone."""
        own = {name.removeprefix("bits."): value.clone() for name, value in tensors.items() if name.startswith("bits.")}
        self.net.load_state_dict({name.removeprefix("net."): own[name] for name in own if name.startswith("net.")})
        restore_optimizer(self.optimizer, own)
