"""What a replay needs, looked at before torch is imported: files that stand in, what is installed, what a single file lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentpipe.checkpoints.registry import available, find_model, is_installed, lookup
from latentpipe.cli import argument_checks
from latentpipe.utils.errors import UserError


def check(values: dict[str, Any]) -> None:
    """UserError for the first thing that a replay's recipe needs and that is neither installed nor given."""
    from latentpipe.pipelines.metadata import recipe, stated

    loras, embeddings = (_stand_ins(f"--{option}", values[option]) for option in ("lora", "embedding"))
    old = recipe.read(values["picture"])
    if old.source is not None and values["image"] is None:
        raise UserError("This picture began from another one; give it with --image.")
    for lora in set(old.loras) - loras:
        argument_checks.named_lora(lora)
    for embedding in set(old.embeddings) - embeddings if not old.loras else ():  # which may bring it along
        argument_checks.named_embedding(embedding)
    for kind, option, name in (("models", "model", old.model), ("vae", "vae", old.vae)):
        if name and values[option] is None and lookup(name, available(kind), option) is None and not is_installed(name, kind):
            raise UserError(
                f"The recipe names the {option} '{name}', which is not installed ('latentpipe ls' lists what is); "
                f"give its folder with --{option}."
            )
    if find_model(values["model"] or old.model).is_file():
        stated.check_completed(values["picture"], old.stated, values["config"], values["parts"])


def _stand_ins(option: str, values: tuple[str, ...]) -> set[str]:
    """The names that files are given for, as NAME=FILE."""
    for text in values:
        name, _, file = text.partition("=")
        if not name or not file:
            raise UserError(
                f"{option} {text}: expected NAME=FILE, with the name that the recipe gives it ('latentpipe inspect')."
            )
        argument_checks.file(option, Path(file))
    return {text.partition("=")[0] for text in values}
