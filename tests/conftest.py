"""Offline, tiny and real: every component here is made by code; nothing is downloaded and nothing is mocked."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # exact resume and exact pictures are promised for a CPU
os.environ.setdefault("COLUMNS", "200")  # messages of the command line are not broken into lines
# read when torch is imported, here and in every process that a test starts: two workers share two cores, and threads that
# spin while they wait for each other take the other worker's time
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # nor do the threads of the few tests that ask for two

import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import denoiser_run, tiny_vae, write_pictures
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("tests", deadline=None, max_examples=40, suppress_health_check=list(HealthCheck), database=None)
settings.load_profile("tests")

LOOPBACK = {"127.0.0.1", "::1", "localhost", None, ""}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first, so that no worker is left alone with one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def offline() -> Iterator[None]:
    """Every address beyond loopback is an error."""
    patch = pytest.MonkeyPatch()
    resolve, connect = socket.getaddrinfo, socket.socket.connect

    def lookup(host: Any, *rest: Any, **named: Any) -> Any:
        if host not in LOOPBACK:
            raise OSError(f"the tests run offline; something looked up {host!r}")
        return resolve(host, *rest, **named)

    def dial(self: socket.socket, address: Any) -> Any:
        if self.family != getattr(socket, "AF_UNIX", None) and address[0] not in LOOPBACK:
            raise OSError(f"the tests run offline; something connected to {address!r}")
        return connect(self, address)

    patch.setattr(socket, "getaddrinfo", lookup)
    patch.setattr(socket.socket, "connect", dial)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for people's own models."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("LATENTPIPE_HOME", str(folder))
    return folder


@pytest.fixture
def assets() -> Path:
    """Large files that do not live in the repository."""
    if not os.environ.get("LATENTPIPE_ASSETS"):
        pytest.skip("set LATENTPIPE_ASSETS to the folder of real pictures and weights to run this")
    return Path(os.environ["LATENTPIPE_ASSETS"])


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve captioned pictures; not to be written to."""
    return write_pictures(tmp_path_factory.mktemp("pictures") / "shapes")


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny VAE folder, 4 channels at 1/2 size; not to be written to."""
    from latentpipe.checkpoints.vae_io import save_vae

    folder = tmp_path_factory.mktemp("vaes") / "tiny-vae"
    preview = {"factors": [[0.2, 0.0, 0.1], [0.0, 0.2, 0.0], [0.1, 0.0, 0.2], [0.0, 0.1, 0.0]], "bias": [0.1, 0.0, -0.1]}
    save_vae(tiny_vae(), folder, {"data": "none"}, preview)
    return folder


@pytest.fixture(scope="session")
def cache_file(tmp_path_factory: pytest.TempPathFactory, pictures: Path, vae_folder: Path) -> Path:
    """The latents of `pictures` by `vae_folder` at 16 pixels; not to be written to."""
    from latentpipe.data.latent_cache import encode_folder

    path = tmp_path_factory.mktemp("caches") / "latents.safetensors"
    encode_folder(pictures, vae_folder, path, 16)
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, cache_file: Path, vae_folder: Path) -> Path:
    """A complete model after two steps of training; not to be written to."""
    from latentpipe.train.denoiser import train_denoiser

    return train_denoiser(denoiser_run(tmp_path_factory.mktemp("run"), cache_file, vae_folder))


@pytest.fixture
def model_copy(model_folder: Path, tmp_path: Path) -> Path:
    """The model in a folder that a test may damage."""
    return Path(shutil.copytree(model_folder, tmp_path / "model-copy"))


@pytest.fixture
def vae_copy(vae_folder: Path, tmp_path: Path) -> Path:
    """The VAE in a folder that a test may damage."""
    return Path(shutil.copytree(vae_folder, tmp_path / "vae-copy"))


@pytest.fixture
def installed(model_folder: Path, own_home: Path) -> str:
    """The name of the model, installed among the user's own."""
    shutil.copytree(model_folder, own_home / "models" / "tiny")
    return "tiny"


@pytest.fixture(scope="session")
def pipe(model_folder: Path) -> Any:
    """The model, opened once; tests leave it as it is."""
    from latentpipe import LatentPipeline

    return LatentPipeline.from_pretrained(model_folder, device="cpu")
