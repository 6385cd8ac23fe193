"""latentpipe fit-adapter: from one VAE's latents to another's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from latentpipe.cli.argument_parser import arg
from latentpipe.cli.common import pictures_of
from latentpipe.utils.errors import UserError

if TYPE_CHECKING:
    from latentpipe.train.latent_adapter import FitReport
    from latentpipe.utils.progress import ProgressCallback


def fit_adapter(
    *,
    source: Annotated[str, arg(name="from")],
    to: str,
    images: Path,
    out: Path | None = None,
    size: int | None = None,
    json: bool = False,
) -> None:
    """Fit an adapter from the latents of one VAE to those of another, and score every size that was tried.

    Args:
        source: Name, folder or file of the VAE that a denoiser was trained on.
        to: Name, folder or file of the VAE that shall decode.
        images: Folder of pictures, at least ten; every fifth is held out.
        out: The adapter file (.safetensors); left out: in your adapters folder, FROM-to-TO-HASH.
        size: Side in pixels that pictures are resized to; left out: 64, or more where the VAEs need it.
        json: Print one JSON object only.
    """
    from json import dumps

    from latentpipe.compatibility.measure import probe_side
    from latentpipe.pipelines.swap import stage_of
    from latentpipe.utils.io import refuse_name

    if out is not None:
        refuse_name(out)
    if out is not None and (out.suffix != ".safetensors" or out.is_dir()):
        raise UserError(f"--out {out}: an adapter is a safetensors file; give it that ending.")
    side = size or probe_side(stage_of(source).space.downscale, stage_of(to).space.downscale)
    ladder, path = fit_and_save(source, to, pictures_of(images, side), images.resolve().name, out)
    print(dumps(ladder.as_dict() | {"adapter": str(path)}, indent=2) if json else f"{ladder}\n{path}")


def fit_and_save(
    source: str | Path,
    to: str | Path,
    images: Any,
    pictures: str,
    out: Path | None = None,
    report: ProgressCallback | None = None,
) -> tuple[FitReport, Path]:
    """Fit an adapter on images (N 3 H W, [-1, 1]) and write it; the scores of its ladder, and the file.

    pictures  what they are, in words, for the card
    out       the file; None: in the user's adapters folder, under a name that says from where to where
    """
    from latentpipe.checkpoints.registry import find_model, name_of
    from latentpipe.compatibility.latent_adapter import AdapterCard, save_adapter
    from latentpipe.pipelines.swap import stage_of
    from latentpipe.train.latent_adapter import fit_adapter as run
    from latentpipe.utils.io import own_home

    folder = None if out is not None else own_home() / "adapters"  # said now where there is none, not after the work
    first, second = stage_of(source), stage_of(to)
    adapter, ladder = run(first, second, images, pictures, report=report)
    names = [name_of(find_model(name, "vae"), "vae").replace("/", "-") for name in (source, to)]
    assert first.digest is not None
    assert second.digest is not None
    path = out or _free((folder or own_home()) / f"{names[0]}-to-{names[1]}-{second.digest[:8]}.safetensors")
    card = AdapterCard(first.digest, second.digest, adapter.source, adapter.target, adapter.rung, ladder.as_dict())
    save_adapter(adapter, card, path)
    return ladder, path


def _free(path: Path) -> Path:
    """A path beside those that exist: pictures name the adapter that drew them."""
    count, free = 1, path
    while free.exists():
        count += 1
        free = path.with_stem(f"{path.stem}-{count}")
    return free
