"""What pictures hold, whoever drew them: energy of fine detail, and the variance of their patches. Images are B 3 H W."""

from __future__ import annotations

import torch
from torch.nn import functional

PATCH_LIMIT = 1024  # values of a patch whose covariance is worth solving: seconds at 16 pixels, minutes at 64


def high_energy(images: torch.Tensor) -> torch.Tensor:
    """Energy above half the Nyquist frequency (0.25 cycles per pixel, radially): a scalar, fp64, summed over the batch.

    Each channel less its mean, under a Hann window (the edges of a picture are no detail), divided by HW: for white noise
    of variance v it is ``v HW`` times the share of frequencies and the window's mean square.
    """
    values = images.double()
    height, width = values.shape[-2:]
    window = torch.outer(*(torch.hann_window(side, periodic=False, dtype=values.dtype) for side in (height, width)))
    power = torch.fft.fft2((values - values.mean((2, 3), keepdim=True)) * window).abs().square() / (height * width)
    rows, columns = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
    radius = (rows[:, None].square() + columns.square()).sqrt()
    return power[..., radius > 0.25].sum()


class Patches:
    """Streamed covariance of the `side` x `side` patches of images, side by side (3 side^2 values each)."""

    def __init__(self, side: int) -> None:
        self.side, self.count = side, 0
        self.first, self.second = torch.zeros(()), torch.zeros(())

    def add(self, images: torch.Tensor) -> None:
        """Take in images, B 3 H W."""
        if 3 * self.side**2 > PATCH_LIMIT:
            return
        rows = functional.unfold(images.double(), self.side, stride=self.side).transpose(1, 2).flatten(0, 1)
        self.first, self.second = self.first + rows.sum(0), self.second + rows.T @ rows
        self.count += len(rows)

    def largest(self, n: int) -> tuple[float, ...] | None:
        """The `n` largest eigenvalues (or all), falling; None where patches are larger than PATCH_LIMIT values."""
        if not self.count:
            return None
        mean = self.first / self.count
        values = torch.linalg.eigvalsh(self.second / self.count - torch.outer(mean, mean))
        return tuple(values.flip(0)[:n].clamp_min(0).tolist())
