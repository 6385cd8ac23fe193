"""The learnt model of a codec VAE's latents: `vae.entropy_model.ContextModel` with integer weights.

Its sums are of integers below 2^53, held in float64, where addition is exact in any order and on any number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from latentpipe.explore.codec.frequency_tables import FRACTIONS, ONE, SCALES
from latentpipe.explore.codec.wavefront import NEAR
from latentpipe.utils.errors import UserError

FILE = "codec.safetensors"
WEIGHT, HIDDEN = 10, 6  # bits behind the point
INPUT, MOST_HIDDEN = 2**10, 2**20  # larger values are cut off
OCTAVE = 16  # parts of an octave in which a step is given
FURTHEST = 112  # sixteenths of an octave from a step of 1
WIDEST = 4096  # channels or hidden units


@dataclass(frozen=True)
class Weights:
    """Integer tensors, as they are stored.

    before  12 C hidden, int16: weights of the places before, in 1/1024
    here    C hidden, int16: weights of the place's own channels (0 where a channel is coded later)
    bias    hidden, int32: in 1/1024
    octave  hidden, int32: in 1/1024, for each 1/16 octave of the step
    state   hidden 2C, int16: to means in steps and scales in quarters of an octave, in 1/1024
    offset  2C, int32: in 1/65536
    groups  2 G, int16: channels and hidden units of each group
    usual   1, int16: the step size that it was learnt around, in sixteenths of an octave
    """

    before: np.ndarray
    here: np.ndarray
    bias: np.ndarray
    octave: np.ndarray
    state: np.ndarray
    offset: np.ndarray
    groups: np.ndarray
    usual: np.ndarray


class Context:
    """Means and scales from the coded latents around, for one step size."""

    def __init__(self, weights: Weights, sixteenths: int) -> None:
        self.channels, hidden = weights.here.shape
        self.before = weights.before.reshape(-1, hidden).astype(np.float64)
        self.here, self.state = weights.here.astype(np.float64), weights.state.astype(np.float64)
        self.bias = weights.bias.astype(np.float64) + weights.octave.astype(np.float64) * sixteenths
        self.offset = weights.offset.astype(np.float64)
        ends = weights.groups.astype(int).cumsum(1).tolist()
        self.groups = [slice(a, b) for a, b in zip([0, *ends[0]], ends[0], strict=False)]
        self.units = dict(zip([group.start for group in self.groups], ends[1], strict=True))

    def look(self, near: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The hidden units' sums over the places before: n hidden."""
        return near.clip(-INPUT, INPUT).reshape(len(near), -1).astype(np.float64) @ self.before + self.bias

    def predict(self, state: Any, here: np.ndarray, group: slice) -> tuple[np.ndarray, np.ndarray]:
        """Means in eighths of a step and scales (n G each)."""
        c, units = self.channels, self.units[group.start]
        total = state[:, :units]
        if group.start:
            total = total + here[:, : group.start].clip(-INPUT, INPUT).astype(np.float64) @ self.here[: group.start, :units]
        hidden = (total.clip(0, MOST_HIDDEN << (WEIGHT - HIDDEN)).astype(np.int64) >> (WEIGHT - HIDDEN)).astype(np.float64)
        wanted = np.r_[group, c + group.start : c + group.stop]
        out = (hidden @ self.state[:units, wanted] + self.offset[wanted]).astype(np.int64)
        g = group.stop - group.start
        unit = WEIGHT + HIDDEN
        mean = (out[:, :g] * FRACTIONS + (1 << (unit - 1))) >> unit
        scale = ((out[:, g:] + (1 << (unit - 1))) >> unit) + ONE
        return mean, scale.clip(0, SCALES - 1)

    def learn(self, state: Any, here: np.ndarray) -> None:
        """It has learnt."""


def read(path: Path) -> Weights:
    """The weights of a codec.safetensors; UserError where they do not belong together."""
    from latentpipe.utils.io import read_tensors

    stored = read_tensors(path)
    names = [field.name for field in fields(Weights)]
    if set(stored) != set(names):
        raise UserError(f"{path}: expected the tensors {', '.join(names)}; given {', '.join(sorted(stored))[:200] or 'none'}.")
    if any(value.is_floating_point() or value.is_complex() for value in stored.values()):
        raise UserError(f"{path}: its tensors are no whole numbers; 'latentpipe fit-codec' writes it anew.")
    tensors = {name: value.numpy() for name, value in stored.items()}
    found = Weights(**tensors)
    if found.here.ndim == 2 and found.groups.ndim == 2 and max(found.here.shape) <= WIDEST:
        c, hidden = found.here.shape
        shapes = [
            (len(NEAR), c, hidden),
            (c, hidden),
            (hidden,),
            (hidden,),
            (hidden, 2 * c),
            (2 * c,),
            (2, found.groups.shape[-1]),
            (1,),
        ]
        fits = [getattr(found, name).shape for name in names] == shapes
        sizes = found.groups.astype(int)
        whole = fits and (sizes > 0).all() and sizes.sum(1).tolist() == [c, hidden]
        if whole and _integers(found) and abs(int(found.usual[0])) <= FURTHEST:
            return found
    raise UserError(f"{path}: its tensors do not belong together; 'latentpipe fit-codec' writes it anew.")


def _integers(weights: Weights) -> bool:
    kinds = {"bias": np.int32, "octave": np.int32, "offset": np.int32}
    return all(getattr(weights, field.name).dtype == kinds.get(field.name, np.int16) for field in fields(Weights))
