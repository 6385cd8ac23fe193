"""The order in which latents are coded, and coding them: what is coded in one wave depends on the waves before it alone.

Places whose ``column + 3 row`` is equal make a wave. The context of a place reaches two places to the left and, in the two rows
above, two to each side, so all places of a wave are predicted at once, by encoder and decoder alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from latentpipe.explore.codec.frequency_tables import CENTRE, FRACTIONS, SYMBOLS, counts
from latentpipe.utils.errors import UserError

REACH = 2
NEAR = [(i, j) for i in (-2, -1, 0) for j in range(-REACH, REACH + 1) if (i, j) < (0, 0)]  # rows and columns of a context
LARGEST = 2**20  # of a rounded latent: what is further out is no latent
LONGEST = 21  # bits of what an outermost symbol adds

State = object
Wave = tuple[np.ndarray, np.ndarray]


class Model(Protocol):
    """Predicts latents, in integers: no floating-point rounding may reach what it returns.

    groups  runs of channels that are coded one after the other at every place
    """

    groups: list[slice]

    def look(self, near: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> State:
        """What a wave of n places has before it: `near` is n 12 C, int64."""

    def predict(self, state: State, here: np.ndarray, group: slice) -> tuple[np.ndarray, np.ndarray]:
        """Means in eighths of a step and scales of a group (n G each), from what is known of the places themselves (n C)."""

    def learn(self, state: State, here: np.ndarray) -> None:
        """A wave has been coded (n C)."""


WaveProgress = Callable[[list[Wave]], Iterable[Wave]]
Code = Callable[[np.ndarray, np.ndarray, "np.ndarray | None"], np.ndarray]


def walk_waves(
    shape: tuple[int, int, int], model: Model, code: Code, latents: np.ndarray | None = None, progress: WaveProgress = iter
) -> np.ndarray:
    """Go over latents of `shape` (C h w) in their order; returns them, int64.

    code     gets means, scales and the values where they are known (n G each), and returns the values
    latents  C h w, to encode; None: they come from `code`
    progress takes the list of waves, and gives them one by one
    """
    c, h, w = shape
    padded = np.zeros((h + REACH, w + 2 * REACH, c), np.int64)
    down, right = (np.array([place[axis] for place in NEAR]) for axis in (0, 1))
    for rows, columns in progress(list(waves(h, w))):
        near = padded[rows[:, None] + REACH + down, columns[:, None] + REACH + right]
        state = model.look(near, rows, columns)
        here = np.zeros((len(rows), c), np.int64)
        known = None if latents is None else latents[:, rows, columns].T
        for group in model.groups:
            mean, scale = model.predict(state, here, group)
            here[:, group] = code(mean, scale, None if known is None else known[:, group])
        padded[rows + REACH, columns + REACH] = here
        model.learn(state, here)
    return padded[REACH:, REACH : REACH + w].transpose(2, 0, 1)


def waves(h: int, w: int) -> Iterator[Wave]:
    """Rows and columns of the places of every wave, in order."""
    step = REACH + 1
    for time in range(w + step * (h - 1)):
        rows = np.arange(max(0, -(-(time - w + 1) // step)), min(h - 1, time // step) + 1)
        if len(rows):
            yield rows, time - step * rows


def encode(latents: np.ndarray, model: Model, progress: WaveProgress = iter) -> bytes:
    """Rounded latents (C h w, integers) as the bytes of a range coder; UserError for values beyond 2^20."""
    if np.abs(latents).max(initial=0) >= LARGEST:
        raise UserError(f"The latents reach {np.abs(latents).max()} steps; expected less than {LARGEST}. Give a larger --step.")
    coder, family, bit = _coder("RangeEncoder")
    encoder = coder()

    def code(mean: np.ndarray, scale: np.ndarray, values: np.ndarray | None) -> np.ndarray:
        assert values is not None
        away = (values - (mean >> 3) + CENTRE).ravel()
        symbols = away.clip(0, SYMBOLS - 1).astype(np.int32)
        encoder.encode(symbols, family, _rows(mean, scale))
        outermost = (symbols == 0) | (symbols == SYMBOLS - 1)
        for symbol, place in zip(symbols[outermost].tolist(), away[outermost].tolist(), strict=True):
            text = f"{abs(place - symbol) + 1:b}"
            encoder.encode(np.array([int(digit) for digit in "0" * (len(text) - 1) + text], np.int32), bit)
        return values

    walk_waves(latents.shape, model, code, latents.astype(np.int64), progress)
    return _shortest(encoder)


def decode(data: bytes, shape: tuple[int, int, int], model: Model, progress: WaveProgress = iter) -> np.ndarray:
    """The inverse of `encode`: C h w, int64; UserError where the bytes are none of its."""
    coder, family, bit = _coder("RangeDecoder")
    decoder = coder(np.frombuffer(data + bytes(-len(data) % 4), ">u4").astype(np.uint32))

    def code(mean: np.ndarray, scale: np.ndarray, values: np.ndarray | None) -> np.ndarray:
        try:
            symbols = decoder.decode(family, _rows(mean, scale)).astype(np.int64)
            for place in ((symbols == 0) | (symbols == SYMBOLS - 1)).nonzero()[0]:
                further = _golomb(lambda: int(decoder.decode(bit)))
                symbols[place] += further if symbols[place] else -further
        except (AssertionError, ValueError):
            raise UserError("The latents in this file cannot be decoded: its data are not those of its header.") from None
        return symbols.reshape(mean.shape) - CENTRE + (mean >> 3)

    return walk_waves(shape, model, code, progress=progress)


def _golomb(draw: Callable[[], int]) -> int:
    """A number of at least 0 in Elias' gamma code, from bits."""
    length = 0
    while not draw():
        length += 1
        if length > LONGEST:
            raise ValueError("a latent that is too far out")
    value = 1
    for _ in range(length):
        value = 2 * value + draw()
    return value - 1


def _rows(mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    # counts up to 2^16 and their sums are exact in float32, so the coder's own integers follow from them without rounding of ours
    return counts()[mean % FRACTIONS, scale].reshape(-1, SYMBOLS).astype(np.float32)


def _coder(name: str):
    """A coder of constriction (Bamler, arXiv:2201.01741), its family of models by counts, and a fair bit."""
    from constriction import stream

    model = stream.model.Categorical
    return getattr(stream.queue, name), model(perfect=False), model(np.ones(2, np.float32), perfect=False)


def _shortest(encoder: Any) -> bytes:
    """The bytes of an encoder, as few as say the same: after them a decoder reads zeros, any number of the interval will do."""
    sealed = encoder.get_compressed().astype(">u4").tobytes()
    done, (low, width) = encoder.pos()
    length = 4 * done + 8
    # the words before the state, with the carry that the sealed number may have made
    first = ((int.from_bytes(sealed.ljust(length, b"\0")) - low >> 64) << 64) + low
    for kept in range(4 * done, length):
        unit = 1 << 8 * (length - kept)
        number = -(-first // unit) * unit
        if number < first + width:
            return number.to_bytes(length)[:kept].rstrip(b"\0")
    return sealed.rstrip(b"\0")
