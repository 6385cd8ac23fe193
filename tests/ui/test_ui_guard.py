"""What a request passes before gradio: Host, sender, login, quota; over a tiny application, in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("gradio")

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from latentpipe.ui import listeners, quota
from latentpipe.ui.allowed_hosts import AllowedHosts, name_of, names_for
from latentpipe.ui.guard import MAX_JSON, MAX_REQUEST, RequestGuard
from latentpipe.ui.listeners import Listeners
from latentpipe.ui.login import LoginSessions
from latentpipe.ui.quota import Window

HERE = "http://127.0.0.1:7860"
UPLOAD = "/gradio_api/upload"


async def answer(request: Request) -> JSONResponse:
    body = await request.body()
    return JSONResponse({"path": request.url.path, "bytes": len(body)}, 400 if b"refuse me" in body else 200)


def served(**options: Any) -> Callable[..., TestClient]:
    """A client of a guarded application that answers everything; `client(address)`, sharing one guard."""
    app = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST", "OPTIONS"])])
    guard = RequestGuard(app, options.pop("names", AllowedHosts(names_for(["127.0.0.1"]))), **options)

    def client(address: str = "192.0.2.1", base: str = HERE) -> TestClient:
        return TestClient(guard, base_url=base, client=(address, 50000), follow_redirects=False)

    return client


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost:7860", "localhost"), ("LOCALHOST.", "localhost"), ("[::1]:7860", "::1"), ("::1", "::1"),
        ("127.0.0.1", "127.0.0.1"), ("", ""),
    ],
)  # fmt: skip
def test_the_name_in_a_host_header(header: str, name: str) -> None:
    assert name_of(header) == name


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:7860", "[::1]:1", "draw.example:443", "DRAW.example"])
def test_known_hosts_are_answered(host: str) -> None:
    client = served(names=AllowedHosts(names_for(["127.0.0.1"], ["draw.example"]), ["draw.example"]))()
    assert client.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:7860", "localhost.evil.example", "0.0.0.0", ""])
def test_no_other_host_is(host: str) -> None:
    """A page can make its own name lead to the loopback (DNS rebinding); the Host header then still holds that name."""
    client = served()()
    for headers in ({"Host": host}, {"X-Forwarded-Host": host or "evil.example"}, {"X-Gradio-Server": f"http://{host}/x"}):
        answer = client.get("/gradio_api/info", headers=headers | {"Origin": f"http://{host}"})
        assert answer.status_code == 403
        assert not any(name.startswith("access-control") for name in answer.headers)
    said = client.post(UPLOAD, headers={"Host": host}, files={"files": b"x"})
    assert said.status_code == 403
    assert "--allow-host" in said.text


def test_an_address_of_this_machine_is_a_host_where_it_listens_there() -> None:
    client = served(names=AllowedHosts(names_for(["0.0.0.0"])))
    assert client(base="http://192.0.2.9:7860").get("/").status_code == 200  # TestClient takes this for the server's address
    assert client(base="http://192.0.2.9:7860").get("/", headers={"Host": "192.0.2.10"}).status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # curl, gradio_client
        ({"Origin": HERE, "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "http://draw.example:8080"}, 200),  # a proxy that hands on another Host
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:3000"}, 403),  # another server of this machine
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_other_pages_send_nothing(headers: dict[str, str], status: int) -> None:
    client = served(names=AllowedHosts(names_for(["127.0.0.1"], ["draw.example"]), ["draw.example"]))()
    answers = [
        client.post(UPLOAD, headers=headers, files={"files": b"x"}),
        client.post("/gradio_api/queue/join", headers=headers, json={"data": []}),
    ]
    assert [answer.status_code for answer in answers] == [status] * 2
    if status == 403:
        assert "another web page" in answers[0].text
        preflight = client.options(UPLOAD, headers=headers | {"Access-Control-Request-Method": "POST"})
        assert preflight.status_code in (200, 403)
        assert "access-control-allow-origin" not in preflight.headers


def test_other_pages_link_here_but_read_nothing() -> None:
    client = served()()
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/", headers=link).status_code == 200
    assert client.get("/", headers=link | {"Sec-Fetch-Mode": "no-cors"}).status_code == 403
    assert client.get("/gradio_api/file=x.png", headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.get("/logout", headers=link).status_code == 403


def door(root: str = "") -> LoginSessions:
    return LoginSessions(lambda user, password: (user, password) == ("anna", "secret"), root)


def test_without_a_login_there_is_the_login_alone() -> None:
    client = served(door=door())()
    for path in ("/config", UPLOAD, "/gradio_api/queue/data", "/gradio_api/heartbeat/x", "/assets/x.js", "/static/x", "/file=x"):
        assert client.get(path).status_code == 401, path
        assert client.post(path, json={}).status_code == 401, path
    page = client.get("/", headers={"Accept": "text/html"})
    assert "<form" in page.text
    assert "password" in page.text
    assert client.get("/assets/x", headers={"Accept": "text/html"}).status_code == 401


@pytest.mark.parametrize("root", ["", "/draw"])
def test_a_cookie_lets_in_until_logged_out(root: str) -> None:
    client = served(door=door(root), root=root)()
    wrong = client.post("/login", data={"username": "anna", "password": "x"})
    assert (wrong.status_code, wrong.headers.get("set-cookie")) == (401, None)
    right = client.post("/login", data={"username": "anna", "password": "secret"})
    assert right.json() == {"success": True}
    cookie = right.headers["set-cookie"].lower()
    assert cookie.startswith("access-token")
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert f"path={root or '/'};" in cookie
    assert "secure" not in cookie
    jar = {"Cookie": right.headers["set-cookie"].split(";")[0]}
    assert client.get(f"{root}/config", headers=jar).json()["path"] == "/config"
    assert client.get("/config", headers={"Cookie": jar["Cookie"] + "x"}).status_code == 401
    assert client.get("/logout", headers=jar).status_code == 303
    assert client.get("/config", headers=jar).status_code == 401


def test_a_browser_logs_in_with_the_form() -> None:
    client = served(door=door("/draw"), root="/draw")()
    html = {"Accept": "text/html,*/*"}
    wrong = client.post("/login", data={"username": "anna", "password": "<b>"}, headers=html)
    assert (wrong.status_code, "wrong" in wrong.text, 'action="/draw/login"' in wrong.text) == (401, True, True)
    right = client.post("/login", data={"username": "anna", "password": "secret"}, headers=html)
    assert (right.status_code, right.headers["location"]) == (303, "/draw/")
    secure = client.post("/login", data={"username": "anna", "password": "secret"}, headers={"X-Forwarded-Proto": "https"})
    assert "secure" in secure.headers["set-cookie"].lower()


def test_too_many_wrong_logins_have_to_wait() -> None:
    now = 0.0
    gate = door()
    gate.wrong = Window(5, 100, 60, lambda: now)
    client = served(door=gate)
    for _ in range(5):
        assert client().post("/login", data={"username": "anna", "password": "x"}).status_code == 401
    said = client().post("/login", data={"username": "anna", "password": "secret"})
    assert (said.status_code, said.headers["retry-after"]) == (429, "60")
    assert "wait 60 seconds" in said.text
    assert client("192.0.2.2").post("/login", data={"username": "anna", "password": "secret"}).status_code == 200
    now = 61.0
    assert client().post("/login", data={"username": "anna", "password": "secret"}).status_code == 200


@pytest.mark.parametrize("body", [{"content": b"x" * 20_000}, {"json": {"username": "anna"}}, {"content": b""}])
def test_what_is_no_form_is_no_login(body: dict[str, Any]) -> None:
    assert served(door=door())().post("/login", **body).status_code in (400, 401)


def test_uploads_have_a_quota_for_each_client_and_in_all() -> None:
    now = 0.0
    client = served(sent=Window(3000, 5000, 60, lambda: now))

    def send(address: str, content: bytes = b"x" * 1000) -> int:
        answer = client(address).post(UPLOAD, files={"files": content})
        assert answer.status_code != 413 or "Too much was uploaded" in answer.text
        return int(answer.status_code)

    assert [send("192.0.2.1") for _ in range(3)] == [200, 200, 413]
    assert send("192.0.2.2", b"refuse me" * 100) == 400  # what is refused counts for nothing
    assert [send("192.0.2.2") for _ in range(3)] == [200, 200, 413]
    assert send("192.0.2.3") == 413  # in all
    now = 61.0
    assert send("192.0.2.3") == 200


def test_a_window_says_how_long_to_wait() -> None:
    now = 0.0
    window = Window(10, 15, 60, lambda: now)
    window.add("a", 6)
    now = 20.0
    window.add("a", 4)
    assert (window.wait("a", 0), window.wait("a", 1), window.wait("a", 7), window.wait("a", 11)) == (0, 40, 60, float("inf"))
    assert (window.wait("b", 5), window.wait("b", 6)) == (0, 40)
    window.add("a", -4)
    assert window.wait("a", 4) == 0
    window.clear("a")
    assert window.wait("a", 10) == 0


def test_an_ipv6_household_is_one_client() -> None:
    assert quota.group_of("2001:db8::1") == quota.group_of("2001:db8::ffff") != quota.group_of("2001:db8:0:1::1")
    assert quota.group_of("192.0.2.1") == "192.0.2.1"


def test_large_requests_are_refused_before_they_are_read() -> None:
    client = served()()
    large = client.post("/gradio_api/queue/join", content=b" " * (MAX_JSON + 1), headers={"Content-Type": "application/json"})
    assert (large.status_code, "at most" in large.json()["detail"]) == (413, True)
    lied = {"Content-Length": str(MAX_REQUEST + 1), "Content-Type": "multipart/form-data; boundary=x"}
    assert client.post(UPLOAD, content=b"x", headers=lied).status_code == 413
    endless = client.post(UPLOAD, content=(part for part in [b"x"]))
    assert endless.status_code == 411


def test_web_sockets_are_closed() -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), served()().websocket_connect("/gradio_api/queue/data"):
        pass


def test_who_reads_events_is_noted_until_they_leave() -> None:
    now = 0.0
    known = Listeners(lambda: now)
    seen: list[bool] = []

    async def stream(_: Request) -> StreamingResponse:
        async def events() -> Any:
            seen.append(known.gone("visitor", -1000))
            yield b"data: {}\n\n"

        return StreamingResponse(events())

    app = Starlette(routes=[Route("/{path:path}", stream)])
    session = {"event": "visitor"}.get
    client = TestClient(
        RequestGuard(app, AllowedHosts(names_for(["127.0.0.1"])), listeners=known, session=session), base_url=HERE
    )
    for path in ("/gradio_api/queue/data?session_hash=visitor", "/gradio_api/call/txt2img/event", "/gradio_api/call/v2/x/event"):
        assert client.get(path).status_code == 200
        assert seen.pop() is False
        now += listeners.GRACE_S
        assert not known.gone("visitor", -1000)
        now += 1
        assert known.gone("visitor", -1000)
    assert not known.gone("visitor", now)  # a new job has its time until somebody reads
    assert client.get("/gradio_api/call/txt2img/other").status_code == 200
    assert seen == [True]
