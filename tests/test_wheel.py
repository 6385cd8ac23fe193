"""A wheel, unpacked anywhere, finds its weights, configs and bank from any folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("latentpipe", "configs", "ui", "weights"):  # a copy: build/ of the checkout keeps files that are gone
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        source,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PIP_NO_INDEX": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_draws_from_any_folder(site, tmp_path):
    code = (
        "import latentpipe.checkpoints.registry as v, latentpipe.cli.app as c;"
        "print(v.bundled_weights_dir(), v.configs_folder());"
        "raise SystemExit(c.main(['generate', 'red apple', '--steps', '2', '--seed', '1']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(site / "latentpipe" / "embedded") in done.stdout
    assert str(site / "latentpipe" / "configs") in done.stdout
    assert (tmp_path / "out" / "red-apple-1.png").is_file()


@pytest.mark.parametrize(
    "name",
    [
        "py.typed",
        "data/emoji_bank.png",
        "data/emoji_bank.json",
        "data/emoji_split.json",
        "checkpoints/single_file/data/clip_merges.txt",
    ],
)
def test_data_files_are_inside(site, name):
    assert (site / "latentpipe" / name).is_file()


def test_nothing_else_is_inside(site):
    assert {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")} == {"latentpipe"}


def test_types_are_found_in_an_editable_installation(tmp_path):
    """A path entry, which type checkers read; not a hook that finds modules when the program runs, which they cannot."""
    from mypy.modulefinder import FindModuleCache, SearchPaths
    from mypy.options import Options

    for name in ("latentpipe", "configs", "ui", "weights"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "out").mkdir()
    code = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, "out"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (link,) = [name for name in archive.namelist() if name.endswith(".pth")]
        assert archive.read(link).decode().strip() == str(tmp_path)
    paths = SearchPaths(python_path=(), mypy_path=(), package_path=(str(tmp_path),), typeshed_path=())
    found = FindModuleCache(paths, None, Options())
    for module in (
        "latentpipe",
        "latentpipe.pipelines.latent_pipeline",
        "latentpipe.ui",
        "latentpipe.ui.html",
        "latentpipe.configs",
    ):
        assert isinstance(found.find_module(module), str), module
