"""Where LoRA files live: the shipped ones and people's own, by name."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from latentpipe.errors import UserError
from latentpipe.weights import available, lookup


def find_lora(name: str | Path) -> Path:
    """The file that a name ('latentpipe ls lora') or a path means; UserError lists the names there are."""
    if not str(name).strip():
        raise UserError("The LoRA has an empty name; give a name ('latentpipe ls lora') or a file.")
    known = available("lora")
    if str(name) in known:
        return known[str(name)]
    with suppress(OSError):  # a name too long for a file
        if Path(name).exists():
            return Path(name)
    if (place := lookup(str(name), known, "LoRA")) is not None:
        return place
    raise UserError(f"No LoRA '{name}': neither a file nor one of {', '.join(known) or 'none installed'}.")


def named_lora(name: str) -> Path:
    """The file of an installed name; a path is none (names in prompts and pictures never open files elsewhere)."""
    known = available("lora")
    place = lookup(name, known, "LoRA")
    if place is None:
        raise UserError(
            f"No LoRA '{name}' is installed; there are: {', '.join(known) or 'none'}. "
            "Put its file into $LATENTPIPE_HOME/lora, or give it with --lora."
        )
    return place
