"""Probabilities of rounded latents as integer counts: the same on every machine.

A latent is coded relative to a predicted mean, in eighths of a step, with one of `SCALES` widths. The counts are those of a
logistic distribution over integers; they are computed in decimal arithmetic, whose every operation is specified to the last digit
(General Decimal Arithmetic, IEEE 854), so nothing of a processor's or a library's floating point reaches the coder.
"""

from __future__ import annotations

from decimal import Context, Decimal, localcontext
from functools import cache
from itertools import pairwise

import numpy as np

FRACTIONS = 8  # of a step, in which means are given
SCALES = 44  # widths: 2^(-5 + k / 4)
ONE = 20  # the scale of width 1
SYMBOLS = 64  # the outermost two stand for what lies further out
CENTRE = 32  # the symbol of a latent that equals its mean's floor
TOTAL = 2**16  # of the counts of a distribution
DIGITS = 30


@cache
def counts() -> np.ndarray:
    """The counts, uint16, FRACTIONS SCALES SYMBOLS: at least 1 each, and TOTAL in every row.

    Row (f, k) holds ``F(j + 1/2 - f / 8) - F(j - 1/2 - f / 8)`` for j = -32 .. 31,
    F logistic of width 2^((k - 20) / 4), the tails in the outermost two.
    """
    found = np.empty((FRACTIONS, SCALES, SYMBOLS), np.uint16)
    with localcontext(Context(prec=DIGITS)):
        for scale in range(SCALES):
            below = _distribution(scale)
            for fraction in range(FRACTIONS):
                # edges in sixteenths of a step: (j - 1/2) * 16 - 2 f for j = -31 .. 31
                edges = [below(16 * (symbol - CENTRE) - 8 - 2 * fraction) for symbol in range(1, SYMBOLS)]
                found[fraction, scale] = _rounded([Decimal(0), *edges, Decimal(1)])
    return found


def _distribution(scale: int):
    """F(n / 16) for integers n, by powers of one number."""
    # square roots, sums, quotients and exp are rounded correctly by every implementation; a power of a fraction is not
    width = (Decimal(2) ** (scale - ONE)).sqrt().sqrt()
    ratio = (-1 / (16 * width)).exp()
    powers = [Decimal(1)]
    for _ in range(16 * SYMBOLS):
        powers.append(powers[-1] * ratio)

    def below(n: int) -> Decimal:
        tail = powers[abs(n)] / (1 + powers[abs(n)])
        return tail if n < 0 else 1 - tail

    return below


def _rounded(edges: list[Decimal]) -> list[int]:
    free = TOTAL - SYMBOLS
    row = [1 + int((high - low) * free) for low, high in pairwise(edges)]
    row[max(range(SYMBOLS), key=row.__getitem__)] += TOTAL - sum(row)
    return row


@cache
def cost() -> np.ndarray:
    """Bits of every symbol, float64, in the shape of `counts`."""
    return -np.log2(counts().astype(np.float64) / TOTAL)
