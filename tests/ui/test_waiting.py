"""What is answered before the interface is there, over real sockets; and how the command ends in that time."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import free_port, heed_interrupts

from latentpipe.ui.allowed_hosts import AllowedHosts, names_for
from latentpipe.ui.sockets import sockets_for
from latentpipe.ui.waiting import MOST_HEAD, WaitingPage, read_head

BROWSER = {"Accept": "text/html,*/*;q=0.8"}


@pytest.fixture
def port() -> Iterator[int]:
    """Of a page that waits."""
    (bound,) = sockets_for("127.0.0.1", free_port())
    with bound, WaitingPage([bound], AllowedHosts(names_for(["127.0.0.1"], ["draw.example"]), ["draw.example"])):
        yield bound.getsockname()[1]


def asked(
    port: int, method: str = "GET", path: str = "/", body: bytes | None = None, **headers: str
) -> tuple[int, http.client.HTTPMessage, str]:
    """Status, headers and words of an answer."""
    there = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        there.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = there.getresponse()
        return answer.status, answer.headers, answer.read().decode()
    finally:
        there.close()


def raw(port: int, sent: bytes) -> bytes:
    """Everything that comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as there:
        there.sendall(sent)
        there.shutdown(socket.SHUT_WR)
        found = b""
        while part := there.recv(4096):
            found += part
    return found


@pytest.mark.parametrize("path", ["/", "/?view=api", "/draw/"])
def test_a_browser_gets_a_page_that_calls_itself_again(port: int, path: str) -> None:
    status, headers, words = asked(port, "GET", path, **BROWSER)
    assert (status, headers["Retry-After"], headers["Cache-Control"]) == (503, "1", "no-store")
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert '<meta http-equiv="refresh" content="1">' in words
    assert "Starting ..." in words
    assert "http://" not in words
    assert "https://" not in words
    assert "<script" not in words
    assert "default-src 'none'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize(("method", "path"), [("GET", "/config"), ("POST", "/gradio_api/call/txt2img"), ("GET", "/")])
def test_a_program_is_told_to_come_back(port: int, method: str, path: str) -> None:
    status, headers, words = asked(port, method, path, b'{"data": []}' if method == "POST" else None)
    assert (status, headers["Retry-After"]) == (503, "1")
    assert words == '{"detail": "Starting ...", "error": "Starting ..."}'


def test_the_head_alone(port: int) -> None:
    status, headers, words = asked(port, "HEAD", **BROWSER)
    assert (status, words) == (503, "")
    assert int(headers["Content-Length"]) > 100


def test_a_large_body_is_taken_before_the_answer_is_lost(port: int) -> None:
    status, _, words = asked(port, "POST", "/gradio_api/upload", bytes(5_000_000))
    assert (status, "Starting" in words) == (503, True)


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"Host": "evil.example"}, "does not answer to the name 'evil.example'"),
        ({"Host": ""}, "does not answer to the name ''"),
        ({"X_Forwarded_Host": "evil.example"}, "does not answer to the name 'evil.example'"),
        ({"X_Gradio_Server": "http://evil.example/x"}, "does not answer to the name 'evil.example'"),
        ({"Origin": "http://evil.example"}, "comes from another web page"),
        ({"Origin": "null"}, "comes from another web page"),
        ({"Sec_Fetch_Site": "cross-site"}, "comes from another web page"),
    ],
)
def test_strangers_are_refused_as_they_are_by_the_server(port: int, headers: dict[str, str], said: str) -> None:
    status, _, words = asked(port, **BROWSER, **headers)
    assert status == 403
    assert said in words
    assert "Starting" not in words


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "localhost:1"},
        {"Host": "[::1]"},
        {"Host": "draw.example"},
        {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"},
    ],
)
def test_names_that_are_known(port: int, headers: dict[str, str]) -> None:
    assert asked(port, **headers)[0] == 503


@pytest.mark.parametrize(
    "head",
    [
        b"", b"\r\n\r\n", b"GET /\r\n\r\n", b"GET / HTTP/2\r\n\r\n", b"G\xc3T / HTTP/1.1\r\nHost localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n more\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    ],
)  # fmt: skip
def test_heads_that_are_none(head: bytes) -> None:
    assert read_head(head) == ("", {})


def test_a_head_in_full() -> None:
    head = b"GET / HTTP/1.1\r\nHOST: localhost\r\nAccept: a:b\r\n\r\n"
    assert read_head(head) == ("GET", {"host": "localhost", "accept": "a:b"})


def test_what_is_no_request(port: int) -> None:
    assert raw(port, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert raw(port, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + bytes(2 * MOST_HEAD)).startswith(b"HTTP/1.1 400 ")
    assert raw(port, b"GET / HTTP/1.1\r\n") == b""  # ends in the middle
    assert asked(port)[0] == 503


def test_one_that_says_nothing_holds_up_nobody(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)):
        assert asked(port)[0] == 503


def test_whoever_comes_between_two_servers_waits_for_the_second() -> None:
    (bound,) = sockets_for("127.0.0.1", free_port())
    names = AllowedHosts(names_for(["127.0.0.1"]))
    port, found = bound.getsockname()[1], []
    with bound:
        with WaitingPage([bound], names) as first:
            assert asked(port)[0] == 503
            first.close()
            asking = threading.Thread(target=lambda: found.append(asked(port)[0]))
            asking.start()
            asking.join(0.2)
            assert found == []
        with WaitingPage([bound], names):
            asking.join(10)
            assert found == [503]
    with pytest.raises(ConnectionRefusedError):
        asked(port)


# --- the command --------------------------------------------------------------------------------------------

STALLS = """import time
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
"""


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[object]:
    """Starts `latentpipe ui` with a gradio whose import does what is given; the process and its port."""
    begun: list[subprocess.Popen[str]] = []

    def start(code: str, **environment: str) -> tuple[subprocess.Popen[str], int]:
        (tmp_path / "gradio").mkdir()
        (tmp_path / "gradio" / "__init__.py").write_text(code)
        port = free_port()
        known = {**os.environ, "LATENTPIPE_HOME": str(tmp_path), "PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "", **environment}
        command = [sys.executable, "-m", "latentpipe", "ui", "--no-save", "--port", str(port)]
        process = subprocess.Popen(command, env=known, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)
        begun.append(process)
        return process, port

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.readline()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_signal_while_it_imports(launch: object, number: signal.Signals, status: int, name: str) -> None:
    process, port = launch(STALLS, LATENTPIPE_UI_LOGIN="anna:secret")  # type: ignore[operator]
    assert first_line(process) == f"Starting the interface at http://127.0.0.1:{port} ...\n"
    code, _, words = asked(port, **BROWSER)
    assert code == 503
    assert "anna" not in words
    begin = time.monotonic()
    process.send_signal(number)
    assert process.wait(20) == status
    assert time.monotonic() - begin < 10  # 0.1 s on a quiet machine; an exception that is swallowed would be repeated after 10
    assert process.stderr.read() == f"latentpipe: stopped by {name}; no file was left half-written.\n"
    (again,) = sockets_for("127.0.0.1", port)
    again.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        (
            "import missing_from_here",
            2,
            "The interface does not start (No module named 'missing_from_here'); install it anew",
        ),
        ("raise RuntimeError('broken')", 1, "RuntimeError: broken"),
    ],
)
def test_an_import_that_fails(launch: object, code: str, status: int, said: str) -> None:
    process, port = launch(code)  # type: ignore[operator]
    assert "Starting" in first_line(process)
    assert process.wait(20) == status
    told = process.stderr.read()
    assert said in told
    assert ("Traceback" in told) == (status == 1)
    with pytest.raises(ConnectionRefusedError):
        asked(port)
