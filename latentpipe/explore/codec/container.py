"""The bytes of an .lpz file.

    LPZ  version  identity (4)  step  width  height  latents ...  CRC-32 (4)

identity  which VAE and which probabilities: of both hashes
step      one byte: 2^((byte - 128) / 16) in units of the latents
width     and height of the picture in pixels, in groups of 7 bits, the last with its high bit clear (LEB128)
CRC-32    of every byte before it (ISO 3309, zlib's), highest byte first

15 bytes beside the latents up to 127 x 127 pixels, 17 up to 16,383 x 16,383. The whole file is checked before anything is
allocated.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from latentpipe.utils.errors import UserError

MAGIC, VERSION = b"LPZ", 1
IDENTITY = 4
WIDEST, MOST = 16_383, 2**26  # pixels of a side, and of a picture
LARGEST_FILE = 2**28  # bytes
SIXTEENTHS = 16


@dataclass(frozen=True)
class Container:
    """What a file says: `step` in sixteenths of an octave, -128 .. 127; sizes in pixels."""

    identity: bytes
    step: int
    width: int
    height: int
    latents: bytes

    @property
    def size(self) -> float:
        """The step in units of the latents."""
        return 2.0 ** (self.step / SIXTEENTHS)


def is_container(data: bytes) -> bool:
    """Whether these are the first bytes of such a file."""
    return data[: len(MAGIC)] == MAGIC


def pack(content: Container) -> bytes:
    """The bytes of a file; UserError where the picture is too large for one."""
    check_size(content.width, content.height)
    head = MAGIC + bytes([VERSION]) + content.identity + bytes([content.step + 128])
    body = head + _number(content.width) + _number(content.height) + content.latents
    return body + zlib.crc32(body).to_bytes(4)


def unpack(data: bytes, name: str) -> Container:
    """What a file's bytes hold; UserError where they are no such file, or damaged. `name` is for the message."""
    if not is_container(data):
        raise UserError(f"{name} is no .lpz file: expected one that 'latentpipe compress' wrote.")
    if len(data) > 3 and data[3] != VERSION:
        raise UserError(f"{name} has version {data[3]}; this latentpipe reads version {VERSION}. Upgrade latentpipe.")
    if len(data) < 15 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:]):
        raise UserError(f"{name} is damaged or incomplete (its checksum does not match); fetch or compress it again.")
    identity, step = data[4:8], data[8] - 128
    width, at = _read(data, 9)
    height, at = _read(data, at)
    if at > len(data) - 4:
        raise UserError(f"{name} is damaged: it ends within its header.")
    check_size(width, height)
    return Container(identity, step, width, height, data[at:-4])


def check_size(width: int, height: int) -> None:
    """UserError for a picture that a file does not hold."""
    if not (0 < width <= WIDEST and 0 < height <= WIDEST and width * height <= MOST):
        raise UserError(
            f"A picture of {width} x {height} pixels does not go into an .lpz file; "
            f"expected at most {WIDEST:,} to a side and {MOST:,} in all."
        )


def _number(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([128 | value & 127]) + _number(value >> 7)


def _read(data: bytes, at: int) -> tuple[int, int]:
    """A number of up to three bytes, and where the next begins."""
    value = 0
    for place in range(3):
        byte = data[at + place] if at + place < len(data) else 0
        value |= (byte & 127) << (7 * place)
        if byte < 128:
            return value, at + place + 1
    return value, at + 3
