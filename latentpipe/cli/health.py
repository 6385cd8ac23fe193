"""The verb `latentpipe health`: is this VAE collapsed, blurred, unbounded, or well?"""

from __future__ import annotations

from pathlib import Path

BATCH = 8  # pictures at once


def health(
    vae: str,
    /,
    images: Path,
    size: int | None = None,
    most: int = 256,
    json: bool = False,
) -> None:
    """Measure how much each latent channel says; tell in plain words what is wrong. Exit status 1 where something is.

    Args:
        vae: Name, folder or file of the VAE.
        images: Folder of pictures to measure on.
        size: Side in pixels that the pictures are measured at; left out: 128, or the next multiple that the VAE takes.
        most: Use at most so many pictures of the folder.
        json: Print one JSON object only.
    """
    from json import dumps

    from latentpipe.checkpoints.vae_io import find_model, open_vae
    from latentpipe.cli.vae import pictures_of
    from latentpipe.evaluate.diagnosis import alarms, notes
    from latentpipe.evaluate.health import measure
    from latentpipe.utils.errors import UserError
    from latentpipe.vae.stage import VAEStage

    path = find_model(vae, "vae")
    file = open_vae(path)
    unit = file.space.downscale
    side = -(-128 // unit) * unit if size is None else size
    if side % unit or side < 1 or most < 1:
        raise UserError(
            f"Given --size {side}, --most {most}; expected a size that is a multiple of {unit} (this VAE's "
            f"downscale), and at least one picture."
        )
    found = measure(VAEStage(file.build(), file.space), pictures_of(images, side, most).split(BATCH))
    training = _training(path)
    wrong, worth = alarms(found, training), notes(found, training)
    if json:
        print(dumps(found.as_dict() | {"size_px": side, "alarms": wrong, "notes": worth}, indent=2))
    else:
        print(f"{found}\nmeasured at {side} px")
        for head, sentences in (("note", worth), ("ALARM", wrong)):
            for sentence in sentences:
                print(f"{head}: {sentence}")
    if wrong:
        raise SystemExit(1)


def _training(path: Path) -> dict[str, float]:
    """The loss weights that a VAE's card names, by their config keys; empty where there is no card."""
    from latentpipe.checkpoints.vae_io import CARD_FILE
    from latentpipe.utils.io import read_json

    card = path / CARD_FILE
    if not card.is_file():
        return {}
    weights = read_json(card).get("loss")
    known = weights.items() if isinstance(weights, dict) else ()
    return {f"loss.{name}": value for name, value in known if isinstance(value, int | float)}
