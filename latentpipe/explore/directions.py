"""Directions in a space of latents: channels, principal components, and what labels tell.

Every direction is scaled so that 1 is one standard deviation of the latents along it; amounts are in those units.

latents  N C h w, normalized: the modes of N pictures' posteriors (`image_set.encode`)
report   called with (done, total, what) as the work goes on
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from latentpipe.utils.errors import UserError
from latentpipe.utils.progress import ProgressCallback


@dataclass(frozen=True)
class Direction:
    """Where latents can be moved to.

    name    "channel 3", "component 1", or the label's name
    vector  C h w: added to latents, it moves them by one standard deviation of all latents along the direction
    score   channels, components: share of the latents' variance along it; labels: squared correlation with the label
    gap     labels: standard deviations from the lowest to the highest label (for yes and no: between the two means); else 0
    """

    name: str
    vector: torch.Tensor
    score: float
    gap: float = 0.0


def channels(latents: torch.Tensor, report: ProgressCallback | None = None) -> list[Direction]:
    """One direction for each channel, at every position alike; a channel that never varies is left out.

    Spatial latents: the spread is that of the channel's mean over a picture. UserError below 2 pictures.
    """
    values = _checked(latents)
    shape = values.shape[1:]
    total = values.var(0).sum()
    found = []
    for channel in range(shape[0]):
        means = values[:, channel].mean((1, 2))
        spread = means.std()
        if spread > 1e-6:
            vector = torch.zeros(shape)
            vector[channel] = spread
            score = (means.var() * shape[1] * shape[2] / total).item()
            found.append(Direction(f"channel {channel}", vector, score))
        _tell(report, channel + 1, shape[0], "channels")
    return found


def principal(latents: torch.Tensor, k: int = 8, report: ProgressCallback | None = None) -> list[Direction]:
    """The first `k` principal components, by falling variance (Pearson 1901); fewer where the latents span no more.

    A component's sign is such that its largest value is positive. UserError: fewer than 2 pictures, k below 1, or latents
    that do not vary.
    """
    if k < 1:
        raise UserError(f"{k} principal components were asked for; expected 1 or more.")
    values = _checked(latents)
    basis, variances = components(values.flatten(1))
    total = variances.sum()
    kept = variances[:k] > 1e-9 * total
    found = []
    for index, (axis, variance) in enumerate(zip(basis[:k][kept], variances[:k][kept], strict=True)):
        vector = (axis * variance.sqrt()).view(values.shape[1:]).float()
        found.append(Direction(f"component {index + 1}", vector, (variance / total).item()))
        _tell(report, index + 1, int(kept.sum()), "principal components")
    if not found:
        raise UserError("The latents of these pictures are all the same; give pictures that differ.")
    return found


def supervised(
    latents: torch.Tensor, labels: Mapping[str, Sequence[float] | np.ndarray], report: ProgressCallback | None = None
) -> list[Direction]:
    """One direction for each label: that of the covariance of latents and label, towards the higher label.

    labels  name -> N numbers, yes and no as 1 and 0; NaN: a picture that has no say

    For yes and no it is the difference of the two means, the one of "Deep Feature Interpolation" (Upchurch et al.,
    arXiv:1611.05507); for numbers the first direction of partial least squares. UserError: a label that does not vary, or of
    another length.
    """
    values = _checked(latents)
    flat = values.flatten(1)
    found = []
    for done, (name, given) in enumerate(labels.items(), 1):
        label = torch.as_tensor(np.asarray(given, np.float64))
        if label.shape != (len(flat),):
            raise UserError(f"Label '{name}' is of {len(label)} pictures; expected one number for each of the {len(flat)}.")
        has = ~label.isnan()
        rows, label = flat[has], label[has]
        if len(label) < 2 or label.std() == 0:
            raise UserError(f"Label '{name}' is the same for all {len(label)} pictures that have one; expected both kinds.")
        covariance = (label - label.mean()) @ (rows - rows.mean(0))
        if covariance.norm() < 1e-9:
            raise UserError(f"The latents do not vary with label '{name}'.")
        axis = covariance / covariance.norm()
        along = rows @ axis
        slope = (label - label.mean()) @ (along - along.mean()) / (label - label.mean()).square().sum()
        spread = (flat @ axis).std()
        score = torch.corrcoef(torch.stack([along, label]))[0, 1].square().item()
        vector = (axis * spread).view(values.shape[1:]).float()
        found.append(Direction(name, vector, score, (slope * (label.max() - label.min()) / spread).item()))
        _tell(report, done, len(labels), "labels")
    return found


def components(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Principal axes (R D, orthonormal) and variances (R, falling) of rows N D in float64; R = min(N - 1, D).

    From the smaller of the covariance (D D) and the Gram matrix (N N): both have the same eigenvalues above 0.
    """
    n, size = rows.shape
    centred = rows - rows.mean(0)
    if size < n:
        variances, vectors = torch.linalg.eigh(centred.T @ centred / (n - 1))
        axes = vectors.T
    else:
        variances, vectors = torch.linalg.eigh(centred @ centred.T / (n - 1))
        axes = vectors.T @ centred
        axes = axes / axes.norm(dim=1, keepdim=True).clamp_min(1e-30)
    kept = min(n - 1, size)
    axes, variances = axes.flip(0)[:kept], variances.flip(0)[:kept].clamp_min(0)
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return axes * largest.sign(), variances


def _checked(latents: torch.Tensor) -> torch.Tensor:
    """Latents N C h w in float64; UserError where they are too few or not finite."""
    if latents.ndim != 4:
        raise ValueError(f"Expected latents N C h w; given shape {tuple(latents.shape)}.")
    if len(latents) < 2:
        raise UserError(f"Directions are of the latents of several pictures; given {len(latents)}.")
    if not latents.isfinite().all():
        raise UserError("The latents hold values that are not finite; 'latentpipe health' says more about the VAE.")
    return latents.detach().cpu().double()


def _tell(report: ProgressCallback | None, done: int, total: int, what: str) -> None:
    if report is not None:
        report(done, total, what)
