"""The scripts by which shells complete the command line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from latentpipe.cli import app, completion

TRY = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
_tyro_latentpipe
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "latentpipe.bash"
    path.write_text(completion.script("bash", {name: verb.target for name, verb in app.VERBS.items()}))
    return path


@pytest.mark.skipif(sys.platform == "win32" or shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("latentpipe gen", {"generate"}),
        ("latentpipe lora m", {"merge"}),
        ("latentpipe evaluate ", {"vae", "prompts"}),
        ("latentpipe generate x --sch", {"--scheduler"}),
        ("latentpipe generate x --scheduler ", {"dpm++", "ddim", "euler", "unipc"}),
        ("latentpipe train-vae c.yaml --optim.st", {"--optim.steps"}),
    ],
)
def test_bash_completes_verbs_options_and_choices(script: Path, words: str, offered: set[str]) -> None:
    call = ["bash", "-c", TRY, "bash", str(script), *words.split(" ")]
    found = set(subprocess.run(call, capture_output=True, text=True, check=True).stdout.split("\n"))
    assert offered <= found


def test_every_verb_is_in_the_script(script: Path) -> None:
    text = script.read_text()
    assert all(word in text for name in app.VERBS for word in name.split())


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_command_line_prints_a_script_for_each_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        app.main(["--print-completion", shell])
    assert left.value.code == 0
    assert "make-fp16-safe" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["tcsh"], []])
def test_another_shell_is_told_in_one_sentence(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--print-completion", *words]) == 2
    assert "expected one of bash, zsh, fish" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["generate", "grid"])
def test_each_scheduler_is_a_choice(verb: str) -> None:
    """The choices stand in the annotations, so that torch is not imported for them."""
    from latentpipe.cli import generate, grid
    from latentpipe.pipelines.sampling import SCHEDULERS

    given = {"generate": generate.Generate, "grid": grid.Grid}[verb]
    (choices, _) = get_args(get_type_hints(given, include_extras=True)["scheduler"])
    assert set(get_args(choices)) == set(SCHEDULERS)
