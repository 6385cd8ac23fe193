"""The fence around these tests holds."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest


def test_nothing_beyond_loopback_can_be_reached() -> None:
    with pytest.raises(OSError, match="offline"):
        socket.create_connection(("example.org", 80), timeout=1)
    with pytest.raises(OSError, match="offline"), socket.socket() as plain:
        plain.connect(("192.0.2.1", 80))
    with pytest.raises(OSError, match="offline"):
        socket.getaddrinfo("huggingface.co", 443)


def test_loopback_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5) as client:
        assert client.getpeername() == server.getsockname()


def test_libraries_are_told_to_stay_offline(own_home: Path) -> None:
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    assert os.environ["LATENTPIPE_HOME"] == str(own_home)
    assert not list(own_home.iterdir())
