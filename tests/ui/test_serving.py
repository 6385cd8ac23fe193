"""gradio behind its guard, really served: a small page, in this process."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio")

import gradio as gr
import httpx
from gradio_client import Client, handle_file
from served import free_port

from latentpipe import UserError
from latentpipe.ui import serving
from latentpipe.ui.allowed_hosts import AllowedHosts, names_for
from latentpipe.ui.guard import RequestGuard
from latentpipe.ui.jobs import Jobs
from latentpipe.ui.login import LoginSessions
from latentpipe.ui.sockets import address_of, sockets_for
from latentpipe.ui.state import LIGHT, toast_errors, wire_stop


class Server:
    """A page with a button that only says something, and an endpoint with a field of each kind."""

    def __init__(self, door: LoginSessions | None = None, root: str = "", allowed: tuple[str, ...] = ()) -> None:
        with gr.Blocks(analytics_enabled=False) as self.page:
            wire_stop(SimpleNamespace(jobs=Jobs()), gr.Button())  # type: ignore[arg-type]
            self.saying = next(iter(self.page.fns))

            def fails() -> None:
                with toast_errors():
                    raise UserError("This picture has no settings inside.")

            gr.Button().click(fails, None, None, **LIGHT)

            def give(words: str, number: float, image: str | None, files: list[str] | None) -> str:
                return f"{words} {number:g} {Path(image or '-').name} {len(files or [])}"

            fields = [
                gr.Textbox(label="words"), gr.Number(1, label="number"), gr.Image(label="image", type="filepath"),
                gr.File(label="files", file_count="multiple"),
            ]  # fmt: skip
            gr.Button().click(give, fields, gr.Textbox(label="said"), api_name="give")
        self.page.queue()
        self.inside = serving.mounted(
            self.page, root_path=root, show_error=False, ssr_mode=False, run_history=False, enable_monitoring=False,
            mcp_server=False, max_file_size=1000,
        )  # fmt: skip
        guard = RequestGuard(self.inside, AllowedHosts(names_for(["127.0.0.1"], allowed), allowed), door, root=root)
        (bound,) = sockets_for("127.0.0.1", free_port())
        self.address = address_of("127.0.0.1", bound.getsockname()[1])
        self.running = serving.Running(guard, [bound], behind_proxy=bool(root))

    def close(self) -> None:
        self.running.close(self.page)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


@pytest.fixture(scope="module")
def closed() -> Iterator[Server]:
    """A server with a login."""
    found = Server(LoginSessions(lambda user, password: (user, password) == ("anna", "secret")))
    yield found
    found.close()


def events(address: str, fn: int) -> list[dict[str, Any]]:
    """What a page hears after it has pressed a button."""
    body = {"data": [], "fn_index": fn, "session_hash": f"session{fn}"}
    assert httpx.post(f"{address}/gradio_api/queue/join", json=body).status_code == 200
    found = []
    with httpx.stream("GET", f"{address}/gradio_api/queue/data?session_hash=session{fn}", timeout=60) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:"):
                found.append(json.loads(line[5:]))
    return found


def test_what_a_light_handler_says_reaches_the_page(server: Server) -> None:
    said = events(server.address, server.saying)
    assert [(one["log"], one["level"]) for one in said if one["msg"] == "log"] == [("Nothing is running.", "info")]
    failed = events(server.address, server.saying + 1)
    (output,) = [one["output"] for one in failed if one["msg"] == "process_completed"]
    assert output["error"] == "This picture has no settings inside."


def test_the_client_sends_files_and_gets_words(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    client = Client(server.address, verbose=False)
    file = handle_file(str(tmp_path / "a.png"))
    assert client.predict("red", 2, None, [file, file], api_name="/give") == "red 2 - 2"
    for arguments, said in (
        (("red", "two", None, None), "number is 'two'; expected a number"),
        ((7, 2, None, None), "words is 7; expected text"),
        (("red", 2, "x.png", None), "image is 'x.png'; expected an uploaded file"),
        (("red", 2, None, [3]), r"files is \[3\]; expected a list of uploaded files"),
        (("red", float("1e999"), None, None), "number is"),
        (("red", 2, {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}, None), "hostname was not uploaded here"),
        (("red", 2, {"path": "/etc/hostname"}, None), "expected an uploaded file"),
        (("red", 2, {"path": "http://127.0.0.1:1/x", "meta": {"_type": "gradio.FileData"}}, None), "was not uploaded here"),
    ):
        with pytest.raises(Exception, match=said):
            call(server.address, list(arguments))


def call(address: str, data: list[Any]) -> Any:
    """As curl does it; RuntimeError with the sentence of an error."""
    answer = httpx.post(
        f"{address}/gradio_api/call/give", content=json.dumps({"data": data}), headers={"Content-Type": "application/json"}
    )
    if answer.status_code != 200:
        raise RuntimeError(answer.json()["detail"])
    text = httpx.get(f"{address}/gradio_api/call/give/{answer.json()['event_id']}", timeout=60).text
    result = json.loads(text.split("data: ")[-1])
    if "event: error" in text:
        raise RuntimeError(result["error"])
    return result


def test_too_few_arguments(server: Server) -> None:
    with pytest.raises(RuntimeError, match=r"/give takes 4 arguments \(words, number, image, files\); given 1"):
        call(server.address, ["red"])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("call/give", '{"data": "x"}'), ("call/give", "{"), ("call/give", "[1]"), ("call/nothing", '{"data": []}'),
        ("call/v2/nothing", "{}"), ("call/v2/give", '{"foo": 1}'), ("run/nothing", '{"data": []}'),
        ("queue/join", '{"data": [], "fn_index": 9999, "session_hash": "x"}'), ("queue/join", '{"data": [], "fn_index": "x"}'),
        ("cancel", "{}"),
    ],
)  # fmt: skip
def test_no_request_is_answered_with_a_bare_error(server: Server, path: str, body: str) -> None:
    answer = httpx.post(f"{server.address}/gradio_api/{path}", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404, 422)
    assert isinstance(answer.json()["detail"], str)
    assert len(answer.json()["detail"]) > 15


def paths_of(app: Any) -> set[str]:
    """Every path that an application answers at, those of its routers included."""
    found = set()
    for route in app.routes:
        if hasattr(route, "path"):
            found.add(route.path.replace("{path:path}", "x"))
        elif hasattr(route, "original_router"):
            found |= paths_of(route.original_router)
    return found


def test_every_route_of_gradio_needs_the_login(closed: Server) -> None:
    paths = paths_of(closed.page.app)
    assert {"/gradio_api/upload", "/gradio_api/heartbeat/{session_hash}", "/config", "/assets/x"} <= paths
    with httpx.Client(base_url=closed.address) as client:
        assert 'name="password"' in client.get("/").text
        for path in sorted(paths - {"/", "/login", "/login/"}):
            for method in ("GET", "POST"):
                assert client.request(method, path.replace("{", "").replace("}", "")).status_code == 401, (method, path)
    with pytest.raises(Exception, match=r"(?i)auth|login|credential"):
        Client(closed.address, verbose=False)
    client = Client(closed.address, auth=("anna", "secret"), verbose=False)
    assert client.predict("red", 2, None, None, api_name="/give") == "red 2 - 0"


class Proxy(BaseHTTPRequestHandler):
    """What the example of nginx in ui/API.md does: /draw/x here is /x there, with the Host that the browser asked for."""

    upstream = ""

    def _pass(self) -> None:
        if not self.path.startswith("/draw/"):
            self.send_error(404)
            return
        length = int(self.headers.get("Content-Length", 0))
        kept = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        kept |= {"Connection": "close", "X-Forwarded-For": self.client_address[0], "X-Forwarded-Proto": "http"}
        there = http.client.HTTPConnection(self.upstream.removeprefix("http://"), timeout=60)
        there.request(self.command, self.path[len("/draw") :], self.rfile.read(length) or None, kept)
        answer = there.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        self.end_headers()
        while part := answer.read1():
            self.wfile.write(part)
        there.close()

    do_GET = do_HEAD = do_POST = _pass

    def log_message(self, *_: Any) -> None:
        pass


def test_behind_a_reverse_proxy_at_a_sub_path() -> None:
    server = Server(LoginSessions(lambda user, password: password == "secret", "/draw"), root="/draw", allowed=("draw.example",))
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Proxy,), {"upstream": server.address}))
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    outside = f"http://127.0.0.1:{proxy.server_address[1]}/draw"
    try:
        client = Client(f"{outside}/", auth=("anna", "secret"), verbose=False)
        assert client.predict("red", 2, None, None, api_name="/give") == "red 2 - 0"
        assert client.config["root"] == outside
        with httpx.Client(headers={"Host": "draw.example", "Accept": "text/html"}) as browser:
            assert 'action="/draw/login"' in browser.get(f"{outside}/").text
            right = browser.post(
                f"{outside}/login", data={"username": "anna", "password": "secret"}, headers={"Origin": "http://draw.example"}
            )
            assert (right.status_code, right.headers["location"]) == (303, "/draw/")
            assert "path=/draw;" in right.headers["set-cookie"].lower()
            cookie = {"Cookie": right.headers["set-cookie"].split(";")[0]}
            assert '"root":"http://draw.example/draw"' in browser.get(f"{outside}/", headers=cookie).text.replace('": "', '":"')
        assert httpx.get(f"{outside}/", headers={"Host": "evil.example"}).status_code == 403
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.close()
