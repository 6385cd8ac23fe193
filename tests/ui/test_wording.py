"""What the page says of errors: no folder of the server, no advice of the command line, whatever the library raises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytest.importorskip("gradio")

from gradio.utils import get_upload_folder

import latentpipe
from latentpipe.compatibility.verdict import FIT
from latentpipe.lora.matching import PARTLY
from latentpipe.ui.wording import INSTEAD, in_words_of_the_page

PACKAGE = Path(latentpipe.__file__).parent
SENT = f"{get_upload_folder()}/0123abcd/my apple.png"
TYPED = re.compile(r"--[a-z]|'latentpipe |/tmp|ulimit|LATENTPIPE_|" + re.escape(str(get_upload_folder())))


def sentences() -> list[str]:
    """Every sentence that a UserError or a warning of the library is made with, a file in place of each value."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        library = ("generate.py", "fit_adapter.py", "output_paths.py")  # of cli/: what the page calls too
        if path.parent.name == "ui" or (path.parent.name == "cli" and path.name not in library):
            continue  # of the command line alone, or of the page itself
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UserError", "LatentpipeWarning") and node.args:
                found.append(_text(node.args[0]))
    return [text for text in found if text]


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else SENT for part in node.values)
    return ""


def test_no_sentence_of_the_library_tells_a_visitor_to_type() -> None:
    every = sentences()
    assert len(every) > 200
    assert sum(TYPED.search(one) is not None for one in every) > 50
    said = {one: in_words_of_the_page(one) for one in every}
    assert {one: words for one, words in said.items() if TYPED.search(words) or not words} == {}


def test_the_browser_tests_go_through_all_tabs() -> None:
    from test_browser import TABS

    tree = ast.parse((Path(latentpipe.__file__).parent / "ui" / "app.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "gr.Tab"]
    assert tuple(ast.literal_eval(call.args[0]) for call in calls) == TABS


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (f"{SENT} carries no grid; expected a PNG that 'latentpipe grid' wrote.",
         "my apple.png carries no grid; expected a PNG that was drawn in the tab Grid."),
        (f"VAE odd was not put in.\nother shape: 4 channels at 1/2.\nnext: fit an adapter ({FIT}), or train.\nmeasured on 12",
         "VAE odd was not put in.\nother shape: 4 channels at 1/2.\nNext: fit an adapter in the VAE lab, or train."),
        ("No VAE was chosen; choose one or more ('latentpipe ls vae' lists them).", "No VAE was chosen; choose one or more."),
        ("This VAE takes multiples of 8. Give --size 64.", "This VAE takes multiples of 8."),
        ("no file: ~/models/a.bin, 1/4 of 3/4 and/or http://host/a/b", "no file: a.bin, 1/4 of 3/4 and/or http://host/a/b"),
    ],
)  # fmt: skip
def test_sentences_keep_what_helps(raised: str, said: str) -> None:
    assert in_words_of_the_page(raised) == said


def test_each_advice_that_is_replaced_is_given_somewhere() -> None:
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    given = "".join(re.findall(r'"(.*)"', source))
    every = given.replace("{options}", "--lora NAME=FILE") + given.replace("{options}", "--model")
    for option in INSTEAD:
        assert option.replace(FIT, "{FIT}").replace(PARTLY, "{PARTLY}").split(".")[0] in every, option
