"""Every block of the README and of docs/ is run, from a user's empty folder.

`make test` runs the lines of the README and of the how-to pages in this process, the long ones with fewer steps and pictures
(SHORTER). `make test-docs` runs the blocks of all pages as they stand, each in a shell or interpreter of its own, on all cores.
A line that stands on several pages runs once, on the first.
"""

import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

import latentpipe
from latentpipe.cli.app import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
# later pages use the files of earlier ones
HOWTO = [ROOT / f"docs/howto/{name}.md" for name in ["draw", "swap", "train-vae", "train-denoiser", "measure", "lora", "explore"]]
TUTORIALS = [ROOT / f"docs/tutorials/{name}.md" for name in ["draw-and-swap", "train-and-measure", "program"]]
LIGHT = [README, *HOWTO]
ALL = [README, *TUTORIALS, *HOWTO]
PAGES = [README, *sorted(path for path in ROOT.glob("docs/**/*.md") if "_build" not in path.parts)]
FENCE = re.compile(r"^```(bash|python)\n(.*?)^```", re.S | re.M)
SETUP = ("make ", "pip install")  # what made this environment; CI runs it before the tests
SHORTER = (  # words of a page; what follows them there; what follows them in `make test`
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


@dataclass(frozen=True)
class Block:
    """A block of a page: what is new in it."""

    page: str
    language: str
    text: str


def blocks_of(pages):
    """In the order of the pages; without the lines (shell) and blocks (Python) that stand on an earlier one."""
    blocks, seen = [], set()
    for page in pages:
        for language, text in FENCE.findall(page.read_text()):
            if any(word in text for word in SETUP):
                continue
            parts = text.splitlines(keepends=True) if language == "bash" else [text]
            new = [part for part in parts if part not in seen]
            seen.update(new)
            if new:
                blocks.append(Block(str(page.relative_to(ROOT)), language, "".join(new)))
    return blocks


def name_of(block):
    """For pytest."""
    return f"{block.page}: {block.text[:40]!r}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all blocks, in the order of the pages, as a reader would have it."""
    return tmp_path_factory.mktemp("reader")


def test_the_first_commands_are_demo_and_test():
    first = FENCE.findall(README.read_text())[0][1].split("\n")
    assert first[0].startswith("make demo")
    assert first[1].startswith("make test")


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= 1500


def test_blocks_stand_on_pages_that_are_run():
    for page in PAGES:
        runnable = [text for _, text in FENCE.findall(page.read_text()) if not any(word in text for word in SETUP)]
        assert page in ALL or not runnable, page


@pytest.mark.docs
@pytest.mark.parametrize("block", blocks_of(ALL), ids=name_of)
def test_block_runs_as_it_stands(block, folder):
    command = ["bash", "-euo", "pipefail", "-c", block.text] if block.language == "bash" else [sys.executable, "-c", block.text]
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": tools, "LATENTPIPE_HOME": str(folder / "home")}
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):  # the tests' own; a reader has all cores
        environment.pop(name, None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_shortened_stands_on_the_pages_once():
    runnable = "".join(block.text for block in blocks_of(LIGHT))
    for words, here, _ in SHORTER:
        assert runnable.count(words + here) == 1, words


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # as for a reader
@pytest.mark.parametrize("block", blocks_of(LIGHT), ids=name_of)
def test_block_runs(block, folder, monkeypatch, capfd):
    """In the order of the pages: later blocks use the files of earlier ones."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LATENTPIPE_HOME", str(folder / "home"))
    text = block.text
    for words, here, fewer in SHORTER:
        text = text.replace(words + here, words + fewer)
    if block.language == "python":
        exec(compile(text, block.page, "exec"), {"__name__": "__main__"})
    else:
        for line in text.splitlines():
            run_line(line, monkeypatch)
    assert "Traceback" not in capfd.readouterr().err


def run_line(line, monkeypatch):
    """A simple command of a page (no pipe, no variable), in this process."""
    first, *words = shlex.split(line, comments=True)
    if first == "latentpipe":
        assert main(words) == 0, line
        return
    assert (first, words[0]) == ("python", "-m"), f"{line}: expected latentpipe or python -m"
    monkeypatch.setattr(sys, "argv", words[1:])
    runpy.run_module(words[1], run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    """Pictures and pages, as they are read in the repository; `make docs` checks them once more, with their headings."""
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).is_file(), f"{page}: {target}"


def test_figures_of_prompts_are_the_measured_ones():
    """The table is copied from results.json, which `latentpipe evaluate prompts --json` wrote."""
    results = json.loads((ROOT / "weights" / "emoji" / "results.json").read_text())
    page = (ROOT / "docs" / "benchmarks" / "index.md").read_text()
    for value in (
        results["seen"]["top1"],
        results["seen"]["top5"],
        results["held_out"]["top1"],
        results["held_out"]["role"],
        results["held_out"]["gender"],
        results["held_out"]["tone"],
    ):
        assert f"{100 * value:.1f} %" in page
    for value in (results["seen"]["top1"], results["held_out"]["top1"]):
        assert f"{100 * value:.1f} %" in README.read_text()


def test_every_public_name_has_its_place_in_the_api_reference():
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    described = re.findall(r"^\.\. auto\w+:: latentpipe\.(\w+)$", page, re.M)
    assert sorted(described) == sorted(latentpipe.__all__)


def test_every_verb_has_its_row():
    from latentpipe.cli.app import GROUPS

    page = (ROOT / "docs" / "reference" / "command-line.md").read_text()
    for group, verbs in GROUPS.items():
        rows = "\n".join(f"| `{name}` | {verb.summary} |" for name, verb in verbs.items())
        assert f"## {group}\n\n| verb | does |\n|---|---|\n{rows}\n" in page


def test_every_dependency_has_its_row():
    page = (ROOT / "docs" / "dependencies.md").read_text()
    rows = {name.strip(" *") for cell in re.findall(r"^\| ([^|]+) \|", page, re.M) for name in cell.split(",")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in (*project["dependencies"], *itertools.chain.from_iterable(project["optional-dependencies"].values())):
        name = re.split(r"[\[<>=]", wanted)[0]
        assert name in rows or (name.startswith("types-") and "types-" in rows), name


def test_pages_speak_of_no_private_path():
    for path in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("dev/*.md")):
        assert not re.search(r"(?<![\w.])/(work|tmp|root|home)/", path.read_text()), path
