"""``<lora:name:0.7>`` in a prompt: the way other tools write it."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterator

from latentpipe.utils.errors import LatentpipeWarning, UserError

KINDS = ("lora", "lyco")  # A1111's former extension for LoHa and LoKr wrote lyco; both attach in the same way
PARTIAL = "partial"
FORM = "<lora:NAME:WEIGHT>"
_TAG = re.compile(rf"<\s*(?:{'|'.join(KINDS)})\s*:([^<>]*)>", re.IGNORECASE)
_OPEN = re.compile(rf"<\s*(?:{'|'.join(KINDS)})\s*:[^<>]*(?:$|<)", re.IGNORECASE)
_OTHER = re.compile(r"<([A-Za-z]\w*):[^<>:\s][^<>:]*(?::[^<>]*)?>")


def split_tags(prompt: str) -> tuple[str, dict[str, float]]:
    """The prompt without its tags, and the weights that they give (1 where a tag gives none).

    UserError for a tag without a name, with a weight that is no number, of a kind that is not supported, or a name twice.
    """
    found: dict[str, float] = {}
    if unclosed := _OPEN.search(prompt):
        raise UserError(f"'{unclosed[0].rstrip('<').strip()[:80]}' in the prompt is not closed; expected {FORM}.")
    for tag, name, weight, _ in _tags(prompt):
        if not name:
            raise UserError(f"'{tag}' in the prompt names no LoRA; expected {FORM}.")
        if name in found:
            raise UserError(f"The prompt names the LoRA '{name}' twice; give it one weight.")
        try:
            found[name] = float(weight) if weight else 1.0
        except ValueError:
            raise UserError(f"'{tag}' in the prompt: '{weight}' is no number; expected {FORM}.") from None
    text = prompt
    while _TAG.search(text):  # what is left when a tag is taken out may read as another one
        text = _TAG.sub(" ", text)
    _refuse_others(text)
    return (re.sub(r"\s+([,.;])", r"\1", " ".join(text.split())) if found else prompt), found


def without_tags(prompt: str) -> str:
    """The words of a prompt beside its tags of any kind, also of those that are refused (old recipes drew them as words)."""
    return _OTHER.sub(" ", _TAG.sub(" ", prompt))


def partial_tags(prompt: str) -> frozenset[str]:
    """The names whose tags end in ``:partial``, as in ``<lora:name:0.7:partial>``: they may fit the model in part."""
    return frozenset(name for _, name, _, partial in _tags(prompt) if partial)


def note_negative(negative: str) -> None:
    """A warning where a negative prompt holds a tag: it stays as it is there, in other programs too."""
    if found := _TAG.search(negative):
        warnings.warn(
            LatentpipeWarning(f"'{found[0]}' stands in the negative prompt, where it switches nothing on"), stacklevel=3
        )


def refuse_tags(prompt: str, where: str) -> None:
    """UserError for a tag where none is followed; `where` says where that is."""
    if found := _TAG.search(prompt):
        raise UserError(f"'{found[0]}': {where} takes no LoRA from a prompt; leave the tag out.")
    _refuse_others(prompt)


def _tags(prompt: str) -> Iterator[tuple[str, str, str, bool]]:
    """Each tag: as written, its name, its weight as text, and whether it says partial."""
    for match in _TAG.finditer(prompt):
        name, *rest = (part.strip() for part in match[1].split(":"))
        partial = bool(rest) and rest[-1].lower() == PARTIAL
        yield match[0], name, ":".join(rest[:-1] if partial else rest), partial


def _refuse_others(text: str) -> None:
    for match in _OTHER.finditer(text):
        near = difflib.get_close_matches(match[1].lower(), KINDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"the kinds that are: {', '.join(KINDS)}; leave the tag out."
        what = "hypernetworks are" if match[1].lower() in ("hypernet", "hypernetwork") else f"'{match[1]}' is"
        raise UserError(f"'{match[0]}' in the prompt: {what} not supported; {hint}")
