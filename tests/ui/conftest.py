"""A server of its own in another process, and a headless Chromium that looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_vae
from served import CHROMIUM, FLAGS, opened, start


@pytest.fixture(scope="session")
def ui_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with one more VAE, of another shape than the embedded model's."""
    from latentpipe.checkpoints.vae_io import save_vae

    home = tmp_path_factory.mktemp("ui-home")
    save_vae(tiny_vae(), home / "vae" / "odd", {})
    return home


@pytest.fixture(scope="session")
def server(ui_home: Path) -> Iterator[tuple[str, int]]:
    """Address and process number of a server that is ready."""
    pytest.importorskip("gradio")
    process, address = start("--out", "kept", home=ui_home)
    yield address, process.pid
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="session")
def address(server: tuple[str, int]) -> str:
    """Where the server is."""
    return server[0]


@pytest.fixture
def client(address: str) -> Any:
    """A gradio_client of the server."""
    from gradio_client import Client

    return Client(address, verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("install chromium (Debian) to run the browser tests")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, ready; a script error in it, or a request to anywhere else, fails the test."""
    yield from opened(browser, address, {"width": 1280, "height": 900})
