"""The verbs that look into a space of latents: what each reads, prints and writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from latentpipe.vae.protocol import Stage

from latentpipe.cli.common import check_png, open_stage, print_result, progress_bar, save_png

VECTOR = "emoji-vector"
MOST_DRAWS = 1024  # on one sheet


def sample(
    vae: str = VECTOR,
    n: int = 16,
    seed: int = 0,
    prior: Literal["normal", "gmm"] = "normal",
    images: Path | None = None,
    size: int | None = None,
    measured: int = 500,
    features: Literal["emoji-words", "squeezenet10", "inception"] = "emoji-words",
    out: Path = Path("samples.png"),
    device: str | None = None,
    json: bool = False,
) -> None:
    """Draw latents from a prior, decode them to a sheet, and measure how far such pictures are from real ones.

    Args:
        vae: Name, folder or file of the VAE.
        n: How many pictures; picture i depends on SEED + i alone.
        seed: 0 to 4294967295.
        prior: normal: N(0, I); gmm: a mixture of ten Gaussians fitted to the latents of real pictures.
        images: Folder of real pictures; left out: the emoji bank that ships (32 px, enlarged).
        size: Side in pixels; left out: 64, or the next multiple that the VAE takes.
        measured: Real pictures, and as many draws, for the Frechet distance; 0: measure nothing.
        features: Network for the distance; only inception makes an FID. All but emoji-words need weights.
        out: The PNG file to write.
        device: cpu, cuda or mps.
        json: Print one JSON object only.
    """
    import warnings

    from latentpipe.explore import sample as run
    from latentpipe.utils.errors import LatentpipeWarning, UserError

    if not 1 <= n <= MOST_DRAWS or measured < 0 or measured == 1 or not 0 <= seed < 2**32:
        raise UserError(
            f"Given --n {n}, --seed {seed}, --measured {measured}; expected n from 1 to {MOST_DRAWS:,}, a seed from 0, "
            "measured 0 or from 2."
        )
    check_png(out)
    stage, name, side = open_stage(vae, size, device)
    note = run.positions_note(stage, name, side) if prior == "normal" else None
    if note:
        warnings.warn(LatentpipeWarning(note), stacklevel=2)
    with progress_bar() as report:
        found = run.sample(stage, side, n, seed, prior, images, measured, features, report)
    save_png(found.page, out)
    facts = {"vae": name, "prior": found.prior, "seed": seed, "out": str(out), **found.figures}
    print_result(facts, found.table(), out, json)


def traverse(
    picture: Path | None = None,
    /,
    vae: str = "emoji",
    attribute: tuple[str, ...] = (),
    rows: int = 8,
    images: Path | None = None,
    most: int = 1000,
    size: int | None = None,
    out: Path = Path("traverse.png"),
    device: str | None = None,
    json: bool = False,
) -> None:
    """Move a picture's latents along directions: a sheet of what each changes, those that change most first.

    Directions: channels, principal components of many pictures' latents, and attributes that their captions name.

    Args:
        picture: The picture to begin from; left out: one of those that directions are learnt from, low in the attribute.
        vae: Name, folder or file of the VAE.
        attribute: Only these: words of captions, or skin tone, smiling, woman.
        rows: How many directions the sheet shows.
        images: Folder of pictures to learn directions from; left out: the emoji bank that ships.
        most: Use at most so many of them.
        size: Side in pixels; left out: 64, or the next multiple that the VAE takes.
        out: The PNG file to write.
        device: cpu, cuda or mps.
        json: Print one JSON object only.
    """
    from latentpipe.data import image_set
    from latentpipe.explore import traverse as run
    from latentpipe.explore.attributes import labels
    from latentpipe.utils.images import open_picture

    check_png(out)
    given = None if picture is None else open_picture(picture)
    stage, name, side = open_stage(vae, size, device)
    known = image_set.read_set(images, side, most)
    for one in attribute:
        labels(known.captions, one)  # what captions do not name is said before they are encoded
    with progress_bar() as report:
        latents = image_set.encode(stage, known.images, report)
        found = run.ranked(stage, latents[:8], run.candidates(latents, known.captions, attribute, report), 2.0, report)[:rows]
        start = latents[run.beginning(known.captions, attribute)] if given is None else _latents(stage, given, side)
        page = run.sheet(stage, start, [one for one, _ in found], report=report)
    save_png(page, out)
    table = [{"name": one.name, "change": change, "score": one.score} for one, change in found]
    facts = {"vae": name, "set": known.name, "n": len(latents), "size_px": side, "out": str(out), "directions": table}
    print_result(facts, _ranking(facts), out, json)


def _latents(stage: Stage, picture: Image.Image, side: int) -> torch.Tensor:
    """A picture's latents, of its centred square."""
    from latentpipe.data import image_set
    from latentpipe.utils.images import fit_square, to_images

    return image_set.encode(stage, to_images(fit_square(picture, side)))[0]


def _ranking(facts: dict[str, Any]) -> str:
    """The directions in lines."""
    head = "directions of {vae}, from {n} pictures of {set}, {size_px} px\n".format(**facts)
    head += "  change: grey levels (RMS) between -2 and +2 sd; score: share of the variance, of attributes r2 with the label"
    return "\n".join(
        [head, *("  {name:20}change {change:6.2f}   score {score:.3f}".format(**row) for row in facts["directions"])]
    )
