"""latentpipe fit-adapter: from one VAE's latents to another's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from latentpipe.cli.argument_parser import arg
from latentpipe.cli.common import pictures_of
from latentpipe.utils.errors import UserError

if TYPE_CHECKING:
    pass


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
    from latentpipe.train.latent_adapter import fit_and_save
    from latentpipe.utils.io import refuse_name

    if out is not None:
        refuse_name(out)
    if out is not None and (out.suffix != ".safetensors" or out.is_dir()):
        raise UserError(f"--out {out}: an adapter is a safetensors file; give it that ending.")
    side = size or probe_side(stage_of(source).space.downscale, stage_of(to).space.downscale)
    ladder, path = fit_and_save(source, to, pictures_of(images, side), images.resolve().name, out)
    print(dumps(ladder.as_dict() | {"adapter": str(path)}, indent=2) if json else f"{ladder}\n{path}")
