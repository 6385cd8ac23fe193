"""latentpipe fit-adapter: from one VAE's latents to another's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from latentpipe.errors import UserError
from latentpipe.vae_verbs import pictures_of


def fit_adapter(
    *,
    source: Annotated[str, arg(name="from")],
    to: str,
    images: Path,
    out: Path | None = None,
    size: int | None = None,
    json: bool = False,
) -> None:
    """Fit an adapter from the latents of one VAE to those of another, and score every rung of the ladder.

    Args:
        source: Name, folder or file of the VAE that a denoiser was trained on.
        to: Name, folder or file of the VAE that shall decode.
        images: Folder of pictures, at least ten; every fifth is held out.
        out: The adapter file (.safetensors); left out: in your adapters folder, FROM-to-TO-HASH.
        size: Side in pixels that pictures are resized to; left out: 64, or more where the VAEs need it.
        json: Print one JSON object only.
    """
    from json import dumps

    from latentpipe.adapters import AdapterCard, save_adapter
    from latentpipe.swap import stage_of
    from latentpipe.train.adapter import fit_adapter as run
    from latentpipe.verdict import probe_side
    from latentpipe.weights import find_model, home, name_of

    if out is not None and (out.suffix != ".safetensors" or out.is_dir()):
        raise UserError(f"--out {out}: an adapter is a safetensors file; give it that ending.")
    first, second = stage_of(source), stage_of(to)
    side = size or probe_side(first.space.downscale, second.space.downscale)
    adapter, ladder = run(first, second, pictures_of(images, side), images.resolve().name)
    names = [name_of(find_model(name, "vae"), "vae") for name in (source, to)]
    assert first.digest is not None
    assert second.digest is not None
    path = out or home() / "adapters" / f"{names[0]}-to-{names[1]}-{second.digest[:8]}.safetensors"
    card = AdapterCard(first.digest, second.digest, adapter.source, adapter.target, adapter.rung, ladder.as_dict())
    save_adapter(adapter, card, path)
    print(dumps(ladder.as_dict() | {"adapter": str(path)}, indent=2) if json else f"{ladder}\n{path}")
