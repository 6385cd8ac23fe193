"""Errors and notes of the library in the page's words: files by their names, and no advice of the command line."""

from __future__ import annotations

import re

from gradio.utils import get_upload_folder

from latentpipe.checkpoints.registry import bundled_weights_dir
from latentpipe.compatibility.verdict import FIT
from latentpipe.lora.matching import PARTLY
from latentpipe.utils.io import home
from latentpipe.utils.setting_names import with_short_names

INSTEAD = {
    "Put its file into $LATENTPIPE_HOME/lora, or give it with --lora.": (
        "Put its file into the server's LoRA folder, and press '↻ Look for new files'."
    ),
    "Put its file into $LATENTPIPE_HOME/embeddings, or give it with --embedding.": (
        "Put its file into the server's folder of embeddings, and press '↻ Look for new files'."
    ),
    "give its file with --adapter": "install it on the server first",
    "Give the right ones with --lora NAME=FILE": "The server needs the LoRA file that it was drawn with",
    f"allow it: {PARTLY}": "tick 'Take LoRA that fit in part'",
    "use 'latentpipe inpaint PICTURE --mask MASK'": "choose another one",
    "Give the right ones with --model": "The server needs the model that it was drawn with",
    "give it with --image": "put that one into the field 'That picture'",
    f"fit an adapter that changes channels and scale ({FIT})": "fit an adapter in the VAE lab",
    f"fit an adapter ({FIT})": "fit an adapter in the VAE lab",
    "Fit an adapter ('latentpipe fit-adapter')": "Fit an adapter in the VAE lab",
    "make one with 'latentpipe fit-adapter'": "fit one in the VAE lab",
    "fit one for this pair with 'latentpipe fit-adapter'": "fit one for this pair in the VAE lab",
    "expected a PNG that 'latentpipe grid' wrote": "expected a PNG that was drawn in the tab Grid",
    "; to use it all the same, force the swap": "",
}
"""Advice of the command line, and what to do on a page in its place."""
TYPED = r"--[a-z]|'latentpipe |\blatentpipe [a-z-]+ [^ ]*[/.-]|\bulimit\b|\$?LATENTPIPE_"
_PATH = re.compile(r"(?<![\w:/.])~?/(?:[^\s'\":;,()/]+/)+(?=[^\s'\":;,()/])")
_ASIDE = re.compile(rf" ?\((?=[^()]*(?:{TYPED}))[^()]*\)")
_CLAUSE = re.compile(r"(?<=[.;,:])\s+")


def in_words_of_the_page(sentence: str) -> str:
    """A sentence without folders of the server, a verdict's figures (they stand in the VAE lab) and what one would type.

    Whatever `INSTEAD` has no words for is left out: asides in brackets, else the clause.
    """
    sentence = with_short_names(sentence.split("\nmeasured on")[0])
    for typed, place in INSTEAD.items():
        sentence = sentence.replace(typed, place)
    for folder in (str(get_upload_folder()), str(home()), str(bundled_weights_dir())):
        sentence = re.sub(rf"{re.escape(folder)}/(?:[\w.-]+/)*", "", sentence)
    sentence = _ASIDE.sub("", _PATH.sub("", sentence))
    lines = [line for line in sentence.replace("\nnext: ", "\nNext: ").split("\n") if line.strip()]
    return "\n".join(_without_typed(line) for line in lines).strip()


def _without_typed(line: str) -> str:
    """A line without the clauses that say what to type; the line's first clause stays in any case."""
    parts = _CLAUSE.split(line)
    kept = [part for index, part in enumerate(parts) if index == 0 or not re.search(TYPED, part)]
    kept[0] = re.sub(r"--(?=[a-z])", "", kept[0])  # "--size 0: expected more": the field has the option's name
    text = " ".join(kept)
    return text if len(kept) == len(parts) else f"{text.rstrip(',;:. ')}."
