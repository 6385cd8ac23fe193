"""Who is let in, where the server listens, what it refuses, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from served import free_port, start

pytest.importorskip("gradio")

from latentpipe import UserError
from latentpipe.cli.app import main
from latentpipe.ui import server as ui_server
from latentpipe.ui import sockets as listening
from latentpipe.ui.accounts import LOGIN, login_of
from latentpipe.ui.entrance import entrance_for

pytestmark = pytest.mark.slow

SECRET = "anna:one:two ü"  # a password with a colon and more than ASCII
DEAD = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LOGIN, raising=False)


def written(path: Path, content: str | bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def test_a_byte_order_mark_belongs_to_no_name(tmp_path: Path) -> None:
    check = login_of(written(tmp_path / "users", b"\xef\xbb\xbfanna:x\n"))
    assert check is not None
    assert check("anna", "x")


def test_no_login_at_all() -> None:
    assert login_of(None) is None


def test_a_login_from_a_file(tmp_path: Path) -> None:
    check = login_of(written(tmp_path / "users", f"# people\n{SECRET}\n\n bert:x \n"))
    assert check is not None
    assert check("anna", "one:two ü")
    assert check("bert", "x")
    for user, password in (
        ("anna", "one"),
        ("anna", ""),
        ("anna", "x"),
        ("carl", "x"),
        ("", ""),
        ("# people", ""),
        ("Anna", "x"),
    ):
        assert not check(user, password)


def test_a_login_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(LOGIN, SECRET)
    check = login_of(None)
    assert check is not None
    assert check("anna", "one:two ü")
    assert not check("anna", "one:two u")
    from_file = login_of(written(tmp_path / "users", "bert:x"))  # the file is what counts where both are given
    assert from_file is not None
    assert from_file("bert", "x")
    assert not from_file("anna", "one:two ü")


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o666])
def test_a_file_that_everybody_can_read(tmp_path: Path, mode: int) -> None:
    with pytest.raises(UserError, match="chmod 600"):
        login_of(written(tmp_path / "users", SECRET, mode))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "names no user"),
        ("# nobody\n", "names no user"),
        ("anna\n", "expected lines of user:password"),
        (":password\n", "neither of them empty"),
        ("anna:\n", "neither of them empty"),
        (b"\xff\xfe\x00\x01", "is no text"),
        ("anna:a\nbert:b\nanna:c\n", "'anna' twice"),
    ],
)
def test_files_that_are_no_logins(tmp_path: Path, content: str | bytes, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        login_of(written(tmp_path / "users", content))
    assert "password\n" not in str(caught.value)


def test_a_missing_file_and_a_wrong_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such file"):
        login_of(tmp_path / "nowhere")
    monkeypatch.setenv(LOGIN, "hunter2")
    with pytest.raises(UserError, match=LOGIN) as caught:
        login_of(None)
    assert "hunter2" not in str(caught.value)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What would be served: the addresses, the guard, and gradio's options; nothing is."""
    found: list[dict[str, Any]] = []
    opened: list[socket.socket] = []

    class Page:
        _queue = SimpleNamespace(event_ids_to_events={})

        def queue(self, **_: Any) -> Page:
            return self

    def running(guard: Any, sockets: list[socket.socket], behind_proxy: bool) -> None:
        opened.extend(sockets)
        places = [(one.getsockname()[0], one.getsockname()[1]) for one in sockets]
        found[-1] |= {"guard": guard, "places": places, "behind_proxy": behind_proxy}

    monkeypatch.setattr(ui_server.pages, "build", lambda _: Page())
    monkeypatch.setattr(ui_server, "collect_notes", lambda: None)
    monkeypatch.setattr(ui_server.serving, "mounted", lambda page, **named: found.append(named))
    monkeypatch.setattr(ui_server.serving, "Running", running)
    yield found
    for one in opened:
        one.close()


def serve(**options: Any) -> ui_server.Served:
    entrance = entrance_for(**options)
    try:
        return ui_server.serve(entrance)
    except UserError:
        entrance.close()
        raise


def hosts(launch: dict[str, Any]) -> set[str]:
    return {host for host, _ in launch["places"]}


def test_beyond_this_machine_only_with_a_login(launched: list[dict[str, Any]], tmp_path: Path) -> None:
    for beyond in ({"listen": True}, {"host": "::"}, {"host": "0.0.0.0"}, {"host": "127.0.0.2.example"}):
        with pytest.raises(UserError, match=r"--auth-file FILE.*--no-auth"):
            serve(**beyond)
    assert launched == []
    serve()
    serve(listen=True, no_auth=True)
    serve(listen=True, auth_file=written(tmp_path / "users", SECRET))
    assert [one["guard"].door is None for one in launched] == [True, True, False]
    assert hosts(launched[0]) == {"127.0.0.1"}
    assert "0.0.0.0" in hosts(launched[1])
    for one in launched:
        assert (one["show_error"], one["enable_monitoring"], one["allowed_paths"], one["max_file_size"]) == (
            False, False, [], 20_000_000,
        )  # fmt: skip
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_pictures_shown_from_a_folder_that_is_hidden(
    launched: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTPIPE_HOME", str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "temporary"))
    with pytest.raises(UserError, match=r"would go to .*temporary, inside of .*; let GRADIO_TEMP_DIR"):
        serve()
    assert launched == []


@pytest.mark.skipif(not listening._has_ipv6(), reason="this machine has no IPv6")
def test_ipv6_and_names(launched: list[dict[str, Any]]) -> None:
    for host, places, link in (
        ("::1", {"::1"}, "http://[::1]:"),
        ("[::1]", {"::1"}, "http://[::1]:"),
        ("localhost", {"127.0.0.1", "::1"}, "http://localhost:"),
        ("::", {"0.0.0.0", "::"}, "http://localhost:"),
    ):
        served = serve(host=host, no_auth=True)
        assert hosts(launched[-1]) <= places
        assert places & hosts(launched[-1]), host
        assert served.address.startswith(link)
        assert len({port for _, port in launched[-1]["places"]}) == 1
    assert hosts(launched[-1]) == {"0.0.0.0", "::"}


def test_names_that_are_answered_to(launched: list[dict[str, Any]]) -> None:
    serve(allow_host=("draw.example",), root_path="draw/")
    guard = launched[-1]["guard"]
    assert guard.names.known == {"localhost", "127.0.0.1", "::1", "draw.example"}
    assert (guard.root, launched[-1]["root_path"], launched[-1]["behind_proxy"]) == ("/draw", "/draw", True)
    serve()
    assert not launched[-1]["behind_proxy"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--listen"], "--auth-file"),
        (["--port", "0"], "expected 1 to 65535"),
        (["--port", "70000"], "expected 1 to 65535"),
        (["--port", "seven"], "seven"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--auth-file", "nowhere"], "no such file"),
        (["--host", "no such name", "--no-auth"], "no such address or name"),
        (["--host", "203.0.113.7", "--no-auth"], "no such address"),
        (["--root-path", "https://draw.example/x"], "a path alone"),
        (["--max-work", "0"], "more than 0"),
    ],
)
def test_mistakes_are_a_sentence(launched: list[dict[str, Any]], arguments: list[str], said: str, capsys: Any) -> None:
    try:
        status = main(["ui", *arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    err = capsys.readouterr().err
    assert status == 2
    assert said in err
    assert "Traceback" not in err
    assert launched == []


def test_a_port_that_is_taken(launched: list[dict[str, Any]]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match="is taken"):
            serve(port=other.getsockname()[1])
    assert launched == []
    serve(port=(port := free_port()))
    assert launched[-1]["places"] == [("127.0.0.1", port)]


def test_a_port_that_is_taken_on_another_address(launched: list[dict[str, Any]]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.2", 0))
        other.listen()
        with pytest.raises(UserError, match="is taken"):
            serve(port=other.getsockname()[1], listen=True, no_auth=True)
    assert launched == []


def status_of(address: str) -> int:
    try:
        with urllib.request.urlopen(address, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def sockets_of(pid: int) -> list[tuple[str, str, str]]:
    """Local and remote address and state of the TCP sockets of a process, as in /proc/net/tcp."""
    links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()]
    mine = {link[8:-1] for link in links if link.startswith("socket:[")}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[9] in mine:
                found.append((words[1], words[2], words[3]))
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's table of sockets")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_server_with_a_login_and_no_network(tmp_path: Path, end: signal.Signals) -> None:
    from gradio_client import Client

    home, shown = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    shown.mkdir()
    proxies = {"HTTP_PROXY": DEAD, "https_proxy": DEAD, "ALL_PROXY": "socks5://127.0.0.1:9"}
    process, address = start("--no-save", home=home, GRADIO_TEMP_DIR=str(shown), **{LOGIN: "anna:secret"}, **proxies)
    try:
        table = sockets_of(process.pid)
        assert {local.split(":")[0] for local, _, state in table if state == "0A"} == {"0100007F"}  # listens on loopback alone
        assert {remote.split(":")[0] for _, remote, _ in table} <= {"0100007F", "00000000"}  # and is connected to nothing else
        assert status_of(f"{address}/config") == 401
        with pytest.raises(Exception, match=r"(?i)auth|login|credential"):
            Client(address, verbose=False)
        with pytest.raises(Exception, match=r"(?i)auth|login|credential"):
            Client(address, auth=("anna", "wrong"), verbose=False)
        client = Client(address, auth=("anna", "secret"), verbose=False)
        assert client.predict(api_name="/health")
        assert status_of(f"{address}/monitoring") in (401, 403, 404)
        assert list(shown.rglob("shown-*"))
        drawing = client.submit("red apple", steps=1000, n=4, api_name="/txt2img")
        while client.predict(api_name="/health")["jobs"] == 0:
            time.sleep(0.05)
        process.send_signal(end)
        assert process.wait(60) == (130 if end == signal.SIGINT else 0)  # and no abort in a thread that still computes
        if drawing.done() and drawing.exception() is None and (last := drawing.result())[1]:  # what was drawn until then, in time
            assert all(recipe["stopped_after"] < 1000 for recipe in last[1])
        assert list(shown.rglob("shown-*")) == []
        assert "Traceback" not in (home / "server.log").read_text()
    finally:
        process.kill()
        process.wait(20)


def test_a_large_upload_and_the_monitor_are_refused(address: str) -> None:
    import httpx

    with httpx.Client(base_url=address, timeout=60) as client:
        small = client.post("/gradio_api/upload", files={"files": ("a.png", b"x" * 1000)})
        large = client.post("/gradio_api/upload", files={"files": ("a.png", b"x" * 21_000_000)})
    assert small.status_code == 200
    assert large.status_code == 413
    assert status_of(f"{address}/monitoring") in (403, 404)
