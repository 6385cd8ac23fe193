"""``<lora:name:0.7>`` in a prompt: the way other tools write it."""

from __future__ import annotations

import re

from latentpipe.errors import UserError

_TAG = re.compile(r"<\s*lora\s*:([^<>]*)>", re.IGNORECASE)


def split_tags(prompt: str) -> tuple[str, dict[str, float]]:
    """The prompt without its tags, and the weights that they give (1 where a tag gives none).

    UserError for a tag without a name, with a weight that is no number, or a name twice.
    """
    found: dict[str, float] = {}
    for match in _TAG.finditer(prompt):
        name, _, weight = (part.strip() for part in match[1].partition(":"))
        if not name:
            raise UserError(f"'{match[0]}' in the prompt names no LoRA; expected <lora:NAME:WEIGHT>.")
        if name in found:
            raise UserError(f"The prompt names the LoRA '{name}' twice; give it one weight.")
        try:
            found[name] = float(weight) if weight else 1.0
        except ValueError:
            raise UserError(f"'{match[0]}' in the prompt: '{weight}' is no number; expected <lora:NAME:WEIGHT>.") from None
    text = prompt
    while _TAG.search(text):  # what is left when a tag is taken out may read as another one
        text = _TAG.sub(" ", text)
    return (re.sub(r"\s+([,.;])", r"\1", " ".join(text.split())) if found else prompt), found
