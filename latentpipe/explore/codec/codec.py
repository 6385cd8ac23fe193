"""Pictures to .lpz files and back, through any VAE: its latents, rounded, behind the range coder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from latentpipe.checkpoints.registry import available, find_model
from latentpipe.checkpoints.vae_io import load_vae, open_vae, vae_hash
from latentpipe.explore.codec import static_model, wavefront
from latentpipe.explore.codec.adaptive_model import Adaptive
from latentpipe.explore.codec.container import IDENTITY, LARGEST_FILE, SIXTEENTHS, Container, check_size, pack, unpack
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.images import to_images, to_pixels
from latentpipe.utils.reading import read_bytes
from latentpipe.vae.stage import VAEStage

DEFAULT = "emoji-codec"
COARSE = 0.5  # the step of a VAE without learnt probabilities, whose latents have a standard deviation of about 1


@dataclass(frozen=True)
class Codec:
    """A VAE with the probabilities of its rounded latents.

    identity  4 bytes of the hash of both: files name it
    weights   the learnt model; None: one that adapts
    """

    name: str
    stage: VAEStage
    identity: bytes
    weights: static_model.Weights | None

    def model(self, shape: tuple[int, int, int], sixteenths: int) -> wavefront.Model:
        """A fresh model of latents C h w, at a step size in sixteenths of an octave."""
        return Adaptive(*shape) if self.weights is None else static_model.Context(self.weights, sixteenths)

    @property
    def step(self) -> float:
        """The usual step size, in units of the latents."""
        return COARSE if self.weights is None else 2.0 ** (int(self.weights.usual[0]) / SIXTEENTHS)

    def sixteenths(self, step: float | None) -> int:
        """A step size (None: the usual one), as a file holds it: the nearest of 16 to the octave; UserError out of its range."""
        step = self.step if step is None else step
        if not 2**-7 <= step <= 2**7:
            raise UserError(
                f"--step is {step}; expected 0.0078 (large and good) to 128 (small and coarse), usually {self.step:.2g}."
            )
        return round(SIXTEENTHS * float(np.log2(step)))


def open_codec(name: str | Path = DEFAULT) -> Codec:
    """The VAE of a name, folder or file as a codec: with what `fit-codec` has learnt where its folder holds that."""
    path = find_model(name, "vae")
    file = path / static_model.FILE
    weights = static_model.read(file) if path.is_dir() and file.is_file() else None
    stage = VAEStage(load_vae(path), open_vae(path).space)
    if not stage.decodes:
        raise UserError(f"VAE {name} is an encoder alone; a codec needs both halves.")
    if weights is not None and weights.here.shape[0] != stage.space.channels:
        raise UserError(
            f"{file} is for {counted(weights.here.shape[0], 'channel')}, its VAE has {stage.space.channels}; "
            f"run 'latentpipe fit-codec'."
        )
    return Codec(str(name), stage, identity_of(path), weights)


def identity_of(path: Path) -> bytes:
    """What names a VAE and its probabilities in a file: 4 bytes of a hash of its content hash and of its codec.safetensors."""
    file = path / static_model.FILE
    learnt = (
        hashlib.sha256(read_bytes(file, LARGEST_FILE, static_model.FILE)).hexdigest()
        if path.is_dir() and file.is_file()
        else "adaptive"
    )
    return hashlib.sha256(f"{vae_hash(path)} {learnt}".encode()).digest()[:IDENTITY]


def find_codec(identity: bytes) -> Codec:
    """The installed VAE that a file was made with; UserError where there is none."""
    found = available("models").values()
    known = {**available("vae"), **{path.name: path / "vae" for path in found}}
    shown = []
    for name, path in known.items():
        try:
            if identity_of(path) == identity:
                return open_codec(path)
        except UserError:
            continue
        shown.append(name)
    raise UserError(
        f"No installed VAE made this file (identity {identity.hex()}); known: {', '.join(shown) or 'none'}. Give it with --vae."
    )


@torch.no_grad()
def rounded(picture: Image.Image, codec: Codec, sixteenths: int) -> np.ndarray:
    """The latents of an RGB picture in steps, rounded: C h w, int64. Where sides do not divide, right and bottom edges repeat."""
    unit = codec.stage.space.downscale
    pixels = np.asarray(picture)
    pad = [(0, -side % unit) for side in pixels.shape[:2]]
    images = to_images(np.pad(pixels, [*pad, (0, 0)], mode="edge"))
    latents = codec.stage.encode(images.to(codec.stage.device))[0].double().cpu().numpy()
    return steps(latents, sixteenths)


def steps(latents: np.ndarray, sixteenths: int) -> np.ndarray:
    """Latents in whole steps, int64; UserError where they are not finite."""
    if not np.isfinite(latents).all():
        raise UserError("The VAE's latents of this picture are not finite; another VAE (--vae) may do.")
    return np.rint(latents / 2.0 ** (sixteenths / SIXTEENTHS)).clip(-wavefront.LARGEST, wavefront.LARGEST).astype(np.int64)


@torch.no_grad()
def rebuilt(latents: np.ndarray, codec: Codec, sixteenths: int, width: int, height: int) -> Image.Image:
    """The picture of rounded latents (C h w), cut to its size."""
    values = torch.from_numpy(latents * 2.0 ** (sixteenths / SIXTEENTHS)).to(codec.stage.device, codec.stage.dtype)
    return to_pixels(codec.stage.decode(values[None]))[0].crop((0, 0, width, height))


def compress(picture: Image.Image, codec: Codec, step: float | None = None, progress: wavefront.WaveProgress = iter) -> bytes:
    """An RGB picture of any size as the bytes of an .lpz file; UserError where it is too large for one."""
    check_size(*picture.size)
    sixteenths = codec.sixteenths(step)
    latents = rounded(picture, codec, sixteenths)
    data = wavefront.encode(latents, codec.model(_shape(latents), sixteenths), progress)
    return pack(Container(codec.identity, sixteenths, *picture.size, data))


def decompress(
    data: bytes, codec: Codec | None = None, name: str = "The file", progress: wavefront.WaveProgress = iter
) -> Image.Image:
    """The picture in the bytes of an .lpz file; the VAE is found by the file's identity where none is given.

    The latents are those that were compressed, on every machine; the pixels follow from them in floating point, within one grey
    level. UserError where the bytes are damaged, or of another VAE.
    """
    content = unpack(data, name)
    if codec is None:
        codec = find_codec(content.identity)
    if codec.identity != content.identity:
        raise UserError(
            f"{name} was not made with VAE {codec.name} (identity {codec.identity.hex()}, it says {content.identity.hex()})."
        )
    unit = codec.stage.space.downscale
    height, width = (-(-side // unit) * unit for side in (content.height, content.width))
    shape = codec.stage.space.shape(1, height, width)[1:]
    codec.stage.check_memory(1, height, width)
    latents = wavefront.decode(content.latents, shape, codec.model(shape, content.step), progress)
    return rebuilt(latents, codec, content.step, content.width, content.height)


def _shape(latents: np.ndarray) -> tuple[int, int, int]:
    c, h, w = latents.shape
    return c, h, w
