"""Feature maps that are computed a band of rows at a time, with the statistics of the whole map.

A `LazyFeatureMap` gives rows [a, b) on demand: from a tensor, or by computing them from the rows of another map. Convolutions ask
for the neighbouring rows that they need, and pad with zeros only at the true border; normalizations first stream over
their whole input. So the band height never changes the result beyond rounding. Bands are channels_last: then a band is
one piece of memory, and the CPU's convolutions need no copies of their input and output in another layout.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from latentpipe.utils import cancellation

CL = torch.channels_last
Rows = Callable[[int, int], torch.Tensor]


@dataclass
class LazyFeatureMap:
    """A feature map 1 C H W.

    rows    (a, b) -> 1 C (b - a) W, the rows [a, b)
    like    any tensor of its dtype and device
    reach   a band depends on stored rows up to this many rows above and below it
    tensor  the whole map, where it is stored
    """

    channels: int
    height: int
    width: int
    rows: Rows
    like: torch.Tensor
    reach: int = 0
    tensor: torch.Tensor | None = None
    moments: GroupMoments | None = None

    @property
    def size(self) -> int:
        """Number of values."""
        return self.channels * self.height * self.width


class GroupMoments:
    """Per channel, of all bands so far: mean and sum of squared deviations, in float64.

    Bands are merged as in Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for computing
    sample variances". Within a band the values are centred first, so a large mean costs no digits.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean: torch.Tensor | float = 0.0
        self.square: torch.Tensor | float = 0.0

    def add(self, band: torch.Tensor) -> None:
        """Merge a band, 1 C R W."""
        values = _wide(band[0].permute(1, 2, 0))  # R W C
        n = values.shape[0] * values.shape[1]
        centre = (_total(values) / n).to(values.dtype)
        rest = values - centre
        first, second = _total(rest), _total(rest.square_())
        mean, square = centre + first / n, second - first.square() / n
        delta = mean - self.mean
        both = self.n + n
        self.square = self.square + square + delta.square() * (self.n * n / both)
        self.mean = self.mean + delta * (n / both)
        self.n = both

    def affine(self, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift, 1 C 1 1 each, that do what `norm` does to the whole map (Wu and He, arXiv:1803.08494)."""
        assert isinstance(self.mean, torch.Tensor)
        assert isinstance(self.square, torch.Tensor)
        groups = (norm.num_groups, -1)
        means = self.mean.view(groups)
        mean = means.mean(1, keepdim=True)
        variance = (self.square.view(groups) / self.n + (means - mean).square()).mean(1, keepdim=True)
        scale = (variance + norm.eps).rsqrt().expand_as(means).reshape(-1)
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -mean.expand_as(means).reshape(-1) * scale
        shift = shift if norm.bias is None else shift + norm.bias
        return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)


def _wide(values: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return values if values.dtype == torch.float64 else values.float()


def _total(values: torch.Tensor) -> torch.Tensor:
    """R W C summed over R and W, to float64. As a product on a CPU, where reductions over leading axes are slow."""
    if values.device.type not in ("cpu", "meta"):
        sums = values.sum(1)
    else:
        sums = torch.matmul(values.new_ones(1, values.shape[1]), values)[:, 0]
    return sums.sum(0) if values.device.type == "mps" else sums.double().sum(0)  # MPS has no float64


def _empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty((1, *shape), dtype=like.dtype, device=like.device, memory_format=CL)


def bands(m: LazyFeatureMap, rows: int) -> Iterator[tuple[int, int]]:
    """The bands of a map, top to bottom. Of a meta tensor only some: the others need the same memory."""
    cuts = [(a, min(a + rows, m.height)) for a in range(0, m.height, rows)]
    for cut in [*cuts[:3], cuts[-1]] if m.like.device.type == "meta" and len(cuts) > 4 else cuts:
        cancellation.look()
        yield cut


def source(tensor: torch.Tensor) -> LazyFeatureMap:
    """A tensor 1 C H W of somebody else: it is read and never written."""
    _, channels, height, width = tensor.shape
    return LazyFeatureMap(channels, height, width, lambda a, b: tensor[:, :, a:b].contiguous(memory_format=CL), tensor)


def stored(tensor: torch.Tensor, moments: GroupMoments | None = None) -> LazyFeatureMap:
    """A tensor 1 C H W of our own, which may be written over."""
    _, channels, height, width = tensor.shape
    return LazyFeatureMap(channels, height, width, lambda a, b: tensor[:, :, a:b], tensor, 0, tensor, moments)


def store(m: LazyFeatureMap, rows: int, over: torch.Tensor | None = None, into: torch.Tensor | None = None) -> LazyFeatureMap:
    """Compute a map band by band into a new tensor, `into` another one, or `over` the one that it is computed from.

    When it writes over its own source, a finished band waits until no later band reads the rows below it.
    """
    out = over if over is not None else into
    if out is None:
        out = _empty(m.like, m.channels, m.height, m.width)
    reach = m.reach if over is not None else 0
    moments = GroupMoments()
    waiting: deque[tuple[int, int, torch.Tensor]] = deque()
    for a, b in bands(m, rows):
        band = m.rows(a, b)
        if into is None:
            moments.add(band)
        waiting.append((a, b, band))
        del band
        while waiting and (waiting[0][1] <= b - reach or b == m.height):
            first, last, done = waiting.popleft()
            out[:, :, first:last] = done
            del done
    return stored(out, moments if into is None else None)


def remember(make: Rows, keep: int = 2) -> Rows:
    """Keep the last rows, so that those which consecutive bands share are computed once; `keep` -1: the whole band."""
    begin, end, tail = 0, 0, None

    def rows(a: int, b: int) -> torch.Tensor:
        nonlocal begin, end, tail
        if tail is not None and begin <= a and b <= end:
            return tail[:, :, a - begin : b - begin]
        if tail is not None and begin <= a < end < b:
            band = torch.cat([tail[:, :, a - begin :], make(end, b)], 2)
        else:
            tail = None
            band = make(a, b)
        begin, end = (a, b) if keep < 0 else (max(a, b - keep), b)
        tail = band if keep < 0 else band[:, :, begin - a :].clone()
        return band

    return rows


def shared(m: LazyFeatureMap) -> LazyFeatureMap:
    """The same map, for several readers of about the same rows: the last band is kept. Ask for the larger band first."""
    return LazyFeatureMap(m.channels, m.height, m.width, remember(m.rows, -1), m.like, m.reach)


def padded(m: LazyFeatureMap, a: int, b: int) -> torch.Tensor:
    """Rows [a, b) with zeros beyond the border."""
    top, bottom = max(0, -a), max(0, b - m.height)
    band = m.rows(a + top, b - bottom)
    return F.pad(band, (0, 0, top, bottom)) if top or bottom else band


def conv(m: LazyFeatureMap, module: nn.Conv2d, border: tuple[int, int, int, int] | None = None) -> LazyFeatureMap:
    """A convolution; `border`: zeros at the left, right, top and bottom, else the module's own padding."""
    up, side = int(module.padding[0]), int(module.padding[1])
    left, right, top, bottom = border or (side, side, up, up)
    (kernel, across), (step, stride) = module.kernel_size, module.stride
    height = (m.height + top + bottom - kernel) // step + 1
    width = (m.width + left + right - across) // stride + 1
    weight = module.weight.contiguous(memory_format=CL)
    even = left == right

    def make(a: int, b: int) -> torch.Tensor:
        band = padded(m, a * step - top, (b - 1) * step + kernel - top)
        band = band if even else F.pad(band, (left, right, 0, 0))
        return F.conv2d(band, weight, module.bias, module.stride, (0, left if even else 0), 1, module.groups)

    reach = m.reach + max(top, kernel - 1 - top)
    return LazyFeatureMap(module.out_channels, height, width, remember(make), m.like, reach)


def upsample_conv(m: LazyFeatureMap, module: nn.Conv2d) -> LazyFeatureMap:
    """Nearest neighbour x2, then a 3x3 convolution, without the large map between them.

    Of the nine values under the kernel only four differ, so each of the four output parities is a 2x2 convolution of
    the small map with sums of taps: 4/9 of the work (the sub-pixel form of Shi et al., arXiv:1609.05158, section 3).
    """
    taps = _wide(module.weight)
    halves = [
        torch.stack([taps[:, :, 0], taps[:, :, 1] + taps[:, :, 2]], 2),
        torch.stack([taps[:, :, 0] + taps[:, :, 1], taps[:, :, 2]], 2),
    ]
    weights = [
        [torch.stack([h[..., 0], h[..., 1] + h[..., 2]], 3), torch.stack([h[..., 0] + h[..., 1], h[..., 2]], 3)] for h in halves
    ]
    weights = [[w.to(module.weight.dtype).contiguous(memory_format=CL) for w in pair] for pair in weights]
    channels, width = module.out_channels, m.width

    def make(a: int, b: int) -> torch.Tensor:
        low, high = a // 2, (b + 1) // 2
        band = padded(m, low - 1, high + 1)
        out = _empty(band, channels, 2 * (high - low), 2 * width)
        grid = out[0].permute(1, 2, 0).view(high - low, 2, width, 2, channels)
        for y in (0, 1):
            for x in (0, 1):
                part = F.conv2d(band[:, :, y : y + high - low + 1], weights[y][x], module.bias, padding=(0, 1))
                grid[:, y, :, x] = part[0, :, :, x : x + width].permute(1, 2, 0)
        return out[:, :, a - 2 * low : b - 2 * low]

    return LazyFeatureMap(channels, 2 * m.height, 2 * width, remember(make), m.like, m.reach)


def norm(m: LazyFeatureMap, module: nn.GroupNorm, act: Any, rows: int) -> LazyFeatureMap:
    """A group normalization with the statistics of the whole map, then an activation (or None)."""
    if m.moments is None:
        m.moments = GroupMoments()
        for a, b in bands(m, rows):
            m.moments.add(m.rows(a, b))
    scale, shift = (factor.to(_wide(m.like[:0]).dtype) for factor in m.moments.affine(module))

    def make(a: int, b: int) -> torch.Tensor:
        given = m.rows(a, b)
        wide = _wide(given)
        fresh = torch.addcmul(shift, given, scale) if wide is given else wide.mul_(scale).add_(shift)
        return activate(fresh, act).to(given.dtype)

    return LazyFeatureMap(m.channels, m.height, m.width, make, m.like, m.reach)


def activate(band: torch.Tensor, act: Any) -> torch.Tensor:
    """An activation of a band that nobody else holds; in place where that is possible."""
    if isinstance(act, nn.SiLU):
        return F.silu(band, inplace=True)
    if isinstance(act, nn.ReLU):
        return F.relu(band, inplace=True)
    return band if act is None else act(band)


def point(m: LazyFeatureMap, change: Callable[[torch.Tensor], torch.Tensor]) -> LazyFeatureMap:
    """A function of each value alone."""
    return LazyFeatureMap(m.channels, m.height, m.width, lambda a, b: change(m.rows(a, b)), m.like, m.reach)


def add(
    first: LazyFeatureMap, second: LazyFeatureMap, change: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> LazyFeatureMap:
    """The sum of two maps, then a function of each value. `second` is asked first."""

    def make(a: int, b: int) -> torch.Tensor:
        other = second.rows(a, b)
        both = first.rows(a, b) + other
        return both if change is None else change(both)

    return LazyFeatureMap(second.channels, second.height, second.width, make, second.like, max(first.reach, second.reach))
