"""The login: who is known, a page to log in on, a cookie, and a wait after too many wrong tries."""

from __future__ import annotations

import html
import math
import secrets
import threading
import time
from collections import OrderedDict

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response

from latentpipe.ui.accounts import Login
from latentpipe.ui.quota import logins

MOST_TOKENS, TOKEN_S = 10_000, 7 * 86400.0
MOST_FORM = 10_000  # bytes
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>latentpipe: log in</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark; font-family: system-ui, sans-serif; }}
main {{ max-width: 20rem; margin: 15vh auto; padding: 0 1rem; }}
label, input, button {{ display: block; width: 100%; box-sizing: border-box; font-size: 1rem; }}
label {{ margin-top: 1rem; }} input, button {{ padding: .6rem; margin-top: .3rem; }} button {{ margin-top: 1.5rem; }}
</style></head><body><main><h1>latentpipe</h1><p role="alert">{words}</p><form method="post" action="{action}">
<label>User<input name="username" autocomplete="username" autofocus required></label>
<label>Password<input name="password" type="password" autocomplete="current-password" required></label>
<button>Log in</button></form></main></body></html>"""


class LoginSessions:
    """Who has logged in, by the token in their cookie.

    `root` is the path that a reverse proxy serves this at ("" for none).
    """

    def __init__(self, check: Login, root: str = "") -> None:
        self._check, self._root = check, root
        self.cookie = f"access-token-latentpipe-{secrets.token_hex(4)}"  # gradio_client keeps cookies of such a name
        self._tokens: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._lock = threading.Lock()
        self.wrong = logins()

    def user(self, request: Request) -> str | None:
        """Who sends a request; None for nobody who has logged in."""
        with self._lock:
            user, until = self._tokens.get(request.cookies.get(self.cookie, ""), (None, 0.0))
        return user if time.monotonic() < until else None

    def closed(self, request: Request) -> Response:
        """What anybody else gets: the page to log in on, or one sentence for a program."""
        if request.method in ("GET", "HEAD") and request.scope["path"] == "/":
            return self._page("", 200)
        if request.method in ("GET", "HEAD") and _reads_html(request):
            return self._page("", 401)
        return JSONResponse({"detail": "Not authenticated: log in first."}, 401)

    async def log_in(self, request: Request) -> Response:
        """Check user and password of a form (``username``, ``password``), and give a cookie."""
        client = request.client.host if request.client else "?"
        if (wait := self.wrong.wait(client, 1)) > 0:
            words = f"Too many wrong logins; wait {math.ceil(wait)} seconds, then try again."
            return self._refused(request, words, 429, {"Retry-After": str(math.ceil(wait))})
        length = request.headers.get("content-length", "")
        if not length.isdigit() or int(length) > MOST_FORM:
            return self._refused(request, "Expected a form with username and password.", 400)
        async with request.form(max_files=0, max_fields=8) as form:
            user, password = str(form.get("username") or "").strip(), str(form.get("password") or "")
        if not self._check(user, password):
            self.wrong.add(client, 1)
            return self._refused(request, "User or password is wrong.", 401)
        self.wrong.clear(client)
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._tokens[token] = (user, time.monotonic() + TOKEN_S)
            while len(self._tokens) > MOST_TOKENS:
                self._tokens.popitem(last=False)
        to_page = RedirectResponse(f"{self._root}/", 303)
        answer: Response = to_page if _reads_html(request) else JSONResponse({"success": True})
        secure = request.url.scheme == "https" or request.headers.get("x-forwarded-proto") == "https"
        answer.set_cookie(
            self.cookie, token, max_age=int(TOKEN_S), path=self._root or "/", httponly=True, samesite="lax", secure=secure
        )
        return answer

    def log_out(self, request: Request) -> Response:
        """Forget the token of a request."""
        with self._lock:
            self._tokens.pop(request.cookies.get(self.cookie, ""), None)
        answer = RedirectResponse(f"{self._root}/", 303)
        answer.delete_cookie(self.cookie, path=self._root or "/")
        return answer

    def _page(self, words: str, status: int, headers: dict[str, str] | None = None) -> Response:
        text = PAGE.format(words=html.escape(words), action=html.escape(f"{self._root}/login"))
        return HTMLResponse(text, status, headers={"Cache-Control": "no-store", **(headers or {})})

    def _refused(self, request: Request, words: str, status: int, headers: dict[str, str] | None = None) -> Response:
        return self._page(words, status, headers) if _reads_html(request) else PlainTextResponse(words, status, headers)


def _reads_html(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")
