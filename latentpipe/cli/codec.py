"""compress, decompress and fit-codec: pictures as small files through a VAE."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from latentpipe.utils.errors import UserError
from latentpipe.utils.reading import read_bytes


def compress(
    picture: Path,
    out: Path,
    /,
    vae: str = "emoji-codec",
    step: float | None = None,
) -> None:
    """Store a picture as the rounded latents of a VAE, in an .lpz file.

    Args:
        picture: A PNG, JPEG, WebP, GIF, BMP or TIFF file; transparency is laid on white.
        out: The .lpz file to write.
        vae: Name or folder of the VAE; emoji-tiny makes larger and better files.
        step: Width of rounding in units of the latents: larger makes smaller files. Left out: what fit-codec learnt, else 0.5.
    """
    import warnings

    from latentpipe.explore.codec import codec as files
    from latentpipe.utils.errors import LatentpipeWarning
    from latentpipe.utils.images import dropped, open_picture
    from latentpipe.utils.io import atomic_file

    if out.suffix.lower() != ".lpz":
        raise UserError(f"{out}: expected the name of a file that ends in .lpz.")
    opened = open_picture(picture)
    for what in dropped(picture):
        warnings.warn(LatentpipeWarning(f"{picture} {what}"), stacklevel=2)
    codec = files.open_codec(vae)
    data = files.compress(opened, codec, step, progress=_bar)
    with atomic_file(out) as part:
        part.write_bytes(data)
    width, height = opened.size
    print(f"{out}: {len(data):,} bytes, {8 * len(data) / (width * height):.3f} bits for each of {width} x {height} pixels")


def decompress(file: Path, out: Path, /, vae: str | None = None) -> None:
    """Write the picture in an .lpz file.

    Args:
        file: A file that compress wrote.
        out: The picture to write; its suffix names the format.
        vae: Name or folder of the VAE, where it is not an installed one.
    """
    from PIL import Image

    from latentpipe.explore.codec import codec as files
    from latentpipe.explore.codec import container
    from latentpipe.utils.io import atomic_file

    Image.init()
    if Image.EXTENSION.get(out.suffix.lower()) not in Image.SAVE:
        raise UserError(f"{out}: '{out.suffix}' is no kind of picture that is written here; expected .png, .webp, .jpg ...")
    content = container.unpack(read_lpz(file), str(file))
    codec = files.find_codec(content.identity) if vae is None else files.open_codec(vae)
    picture = files.decompress(read_lpz(file), codec, str(file), progress=_bar)
    with atomic_file(out) as part:
        picture.save(part, Image.EXTENSION[out.suffix.lower()])
    print(f"{out}: {picture.width} x {picture.height} pixels")


def fit_codec(
    vae: str, folder: Path, /, step: float = 1.0, size: tuple[int, ...] = (64, 128), steps: int = 2000, out: Path | None = None
) -> None:
    """Learn how probable a VAE's rounded latents are, from a folder of pictures, and store it in the VAE's folder.

    compress then makes smaller files with this VAE, and files that were made before open no more.

    Args:
        vae: Name or folder of the VAE.
        folder: Pictures to learn from.
        step: The usual width of rounding in units of the latents; a factor of 2.4 below to 2.8 above it is learnt.
        size: Sides in pixels at which they are seen.
        steps: Optimizer steps.
        out: Another folder for codec.safetensors; left out: the VAE's own.
    """
    from tqdm import tqdm

    from latentpipe.checkpoints.registry import find_model
    from latentpipe.explore.codec import codec as files
    from latentpipe.explore.codec import fit

    if not 2**-5 <= step <= 2**5:
        raise UserError(f"--step is {step}; expected 0.03 to 32, in units of the latents.")
    codec = files.open_codec(vae)
    print(f"Latents of {folder} at {', '.join(map(str, size))} pixels ...")
    sets = [fit.latents_of_folder(codec.stage, folder, side) for side in size]
    net = fit.learn(sets, step, steps, progress=lambda parts: tqdm(parts, unit="step"))
    print(fit.write_codec(fit.integers(net, step), out or find_model(vae, "vae")))


def lpz_facts(file: Path) -> dict[str, object]:
    """What an .lpz file says about itself."""
    from latentpipe.explore.codec import container

    content = container.unpack(read_lpz(file), str(file))
    return {
        "kind": "compressed picture (.lpz)",
        "version": container.VERSION,
        "vae_identity": content.identity.hex(),
        "width": content.width,
        "height": content.height,
        "step": content.size,
        "bytes": file.stat().st_size,
        "bits_per_pixel": round(8 * file.stat().st_size / (content.width * content.height), 4),
    }


def is_lpz(file: Path) -> bool:
    """Whether a file begins as an .lpz file does."""
    from latentpipe.explore.codec.container import is_container

    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return is_container(stream.read(4))


def read_lpz(file: Path) -> bytes:
    """A file's bytes; UserError where there is none, or where it is larger than any that compress writes."""
    from latentpipe.explore.codec.container import LARGEST_FILE

    return read_bytes(file, LARGEST_FILE, "an .lpz file")


def _bar(parts: list[Any]) -> Iterable[Any]:
    """A progress bar for what takes longer than a second."""
    from tqdm import tqdm

    return tqdm(parts, unit="wave", delay=1.0, leave=False)
