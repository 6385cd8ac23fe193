"""Every block of the README is run as it stands, from a user's empty folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.S | re.M)
SETUP = ("make ", "pip install")  # what made this environment; CI runs it before the tests


def run(command, folder, **named):
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": tools, "LATENTPIPE_HOME": str(folder / "home")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, **named)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all blocks, in the order of the README, as a reader would have it."""
    return tmp_path_factory.mktemp("reader")


def test_the_first_commands_are_demo_and_test():
    first = BLOCKS[0][1].split("\n")
    assert first[0].startswith("make demo")
    assert first[1].startswith("make test")


@pytest.mark.parametrize(("language", "text"), [b for b in BLOCKS if not any(word in b[1] for word in SETUP)])
def test_block_runs(language, text, folder):
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
    done = run(command, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


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
