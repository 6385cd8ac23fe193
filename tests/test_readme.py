"""Every block of the README is run, from a user's empty folder.

`make test` runs the README's own lines in this process, the long ones with fewer steps and pictures (SHORTER).
`make test-docs` runs the blocks as they stand, each in a shell or interpreter of its own, on all cores.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from latentpipe.cli.app import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.S | re.M)
SETUP = ("make ", "pip install")  # what made this environment; CI runs it before the tests
RUN = [block for block in BLOCKS if not any(word in block[1] for word in SETUP)]
SHORTER = (  # words of the README that stand in one place; what follows them there; what follows them in `make test`
    ("train-vae small-vae --data.train my-pictures", "", " --optim.steps 24"),
    ("train-denoiser small-denoiser", "", " --optim.steps 24"),
    ("--data.validation my-pictures --optim.steps", " 20", " 2"),
    ("health decoder --images my-pictures --size 64 --most", " 16", " 8"),
    ("evaluate vae decoder --images my-pictures --size 64 --most", " 16", " 4"),
    ("compare emoji decoder --images my-pictures --size 64 --most", " 16", " 4"),
    ("train-lora small-lora --data.train my-pictures --optim.steps", " 20", " 2"),
    ("sample --measured", " 100", " 20"),
    ("evaluate prompts --seen", " 32 --held-out 16", " 3 --held-out 3"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all blocks, in the order of the README, as a reader would have it."""
    return tmp_path_factory.mktemp("reader")


def test_the_first_commands_are_demo_and_test():
    first = BLOCKS[0][1].split("\n")
    assert first[0].startswith("make demo")
    assert first[1].startswith("make test")


@pytest.mark.docs
@pytest.mark.parametrize(("language", "text"), RUN)
def test_block_runs_as_it_stands(language, text, folder):
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": tools, "LATENTPIPE_HOME": str(folder / "home")}
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):  # the tests' own; a reader has all cores
        environment.pop(name)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_shortened_stands_in_the_readme_once():
    runnable = "".join(text for _, text in RUN)
    for words, here, _ in SHORTER:
        assert runnable.count(words + here) == 1, words


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # as for a reader
@pytest.mark.parametrize(("language", "text"), RUN)
def test_block_runs(language, text, folder, monkeypatch, capfd):
    """In the order of the README: later blocks use the files of earlier ones."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LATENTPIPE_HOME", str(folder / "home"))
    for words, here, fewer in SHORTER:
        text = text.replace(words + here, words + fewer)
    if language == "python":
        exec(compile(text, "README.md", "exec"), {"__name__": "__main__"})
    else:
        for line in text.splitlines():
            run_line(line, monkeypatch)
    assert "Traceback" not in capfd.readouterr().err


def run_line(line, monkeypatch):
    """A simple command of the README (no pipe, no variable), in this process."""
    first, *words = shlex.split(line, comments=True)
    if first == "latentpipe":
        assert main(words) == 0, line
        return
    assert (first, words[0]) == ("python", "-m"), f"{line}: expected latentpipe or python -m"
    monkeypatch.setattr(sys, "argv", words[1:])
    runpy.run_module(words[1], run_name="__main__")


def test_pictures_in_the_readme_exist():
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_readme_figures_are_the_measured_ones():
    """The table is copied from results.json, which `latentpipe evaluate prompts --json` wrote."""
    results = json.loads((ROOT / "weights" / "emoji" / "results.json").read_text())
    for value in (
        results["seen"]["top1"],
        results["seen"]["top5"],
        results["held_out"]["top1"],
        results["held_out"]["role"],
        results["held_out"]["gender"],
        results["held_out"]["tone"],
    ):
        assert f"{100 * value:.1f} %" in README


def test_readme_speaks_of_no_private_path():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("dev/*.md")):
        assert not re.search(r"(?<![\w.])/(work|tmp|root|home)/", path.read_text()), path
