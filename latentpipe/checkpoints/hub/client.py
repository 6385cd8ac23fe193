"""What the hub says: a repository's commit, files, sizes, hashes and licence; and its errors, each in a sentence.

The session is huggingface_hub's own: proxies and HF_HUB_OFFLINE count as they do there.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from latentpipe.checkpoints.places.hub_cache import COMMIT, HubId
from latentpipe.utils.errors import UserError
from latentpipe.utils.reading import MOST_JSON, parse_json
from latentpipe.version import VERSION

DEFAULT_ENDPOINT = "https://huggingface.co"
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
TIMEOUT_S = 30.0  # without a byte
TRIES = 5  # in a row without a new byte
WAIT_S = 1.0  # before the second try; doubled for each that follows
MOST_PAGES = 1000  # of a listing
BUSY = (408, 500, 502, 503, 504)  # what may pass by itself
SHA256 = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A file of a repository: its size in bytes, and the hash of its content: sha256 of large ones, else git's."""

    size: int
    git: str
    sha256: str | None = None

    @property
    def blob(self) -> str:
        """The name of its content in a cache."""
        return self.sha256 or self.git


@dataclass(frozen=True)
class Listing:
    """A repository at one commit."""

    commit: str
    licence: str
    files: dict[str, Entry]


@dataclass(frozen=True)
class Hub:
    """Where to ask, and with which token (None: without)."""

    endpoint: str
    token: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What every request says. Contents must come as they are: their length is counted."""
        own = {"user-agent": f"latentpipe/{VERSION}", "accept-encoding": "identity"}
        return own | ({"authorization": f"Bearer {self.token}"} if self.token else {})


def open_hub(variable: str | None = None) -> Hub:
    """The hub of $HF_ENDPOINT with the token of the environment; UserError where the libraries are told to stay offline.

    variable  the environment variable that holds the token; None: HF_TOKEN
    """
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            raise UserError(f"{name} is set, so that nothing is fetched; unset it to pull.")
    if variable is not None and variable not in os.environ:
        if not re.fullmatch(r"[A-Za-z_]\w*", variable, re.ASCII) or variable.startswith("hf_"):
            raise UserError(
                "--token takes the name of an environment variable, not the token itself, which others could read in the list of "
                "processes; put it into HF_TOKEN."
            )
        raise UserError(f"--token {variable}: there is no such environment variable; set it, or put the token into HF_TOKEN.")
    names = TOKENS if variable is None else (variable,)
    token = next((os.environ[name].strip() for name in names if os.environ.get(name, "").strip()), None)
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise UserError(f"The token in ${variable or TOKENS[0]} holds characters that no token has; set it anew.")
    endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", endpoint):
        raise UserError(f"HF_ENDPOINT is '{endpoint}'; expected an address such as {DEFAULT_ENDPOINT}.")
    return Hub(endpoint, token)


# --- asking -------------------------------------------------------------------------------------------------


def listing(hub: Hub, wanted: HubId) -> Listing:
    """Commit, licence and files of a repository; UserError in a sentence for whatever the hub answers instead."""
    revision = wanted.revision or "main"
    info = _object(hub, f"{hub.endpoint}/api/models/{wanted.repo}/revision/{quote(revision, safe='')}", wanted)
    commit = info.get("sha")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise UserError(f"{hub.endpoint} gave no commit of {wanted.repo}; is HF_ENDPOINT the address of a hub?")
    url: str | None = f"{hub.endpoint}/api/models/{wanted.repo}/tree/{commit}?recursive=true&expand=false"
    files: dict[str, Entry] = {}
    for _ in range(MOST_PAGES):
        rows, url = _page(hub, str(url), wanted)
        if not isinstance(rows, list):
            raise UserError(f"{hub.endpoint} gave no list of the files of {wanted.repo}; is HF_ENDPOINT the address of a hub?")
        files |= dict(_entry(row, wanted) for row in rows if isinstance(row, dict) and row.get("type") == "file")
        if url is None:
            break
    return Listing(commit, _licence(info), files)


def read_object(hub: Hub, wanted: HubId, commit: str, path: str) -> dict[str, Any]:
    """The content of a small JSON file."""
    return _object(hub, address(hub, wanted.repo, commit, path), wanted)


def address(hub: Hub, repo: str, commit: str, path: str) -> str:
    """Where a file's content is."""
    return f"{hub.endpoint}/{repo}/resolve/{commit}/{quote(path)}"


def _entry(row: Mapping[str, Any], wanted: HubId) -> tuple[str, Entry]:
    """UserError for a path that would lie elsewhere, and for a hash that is none."""
    path, lfs = row.get("path"), row.get("lfs")
    large = isinstance(lfs, dict)
    size = lfs.get("size", row.get("size")) if isinstance(lfs, dict) else row.get("size")
    sha256 = str(lfs.get("oid", lfs.get("sha256"))) if isinstance(lfs, dict) else None
    git = str(row.get("oid"))
    fits = isinstance(path, str) and not any(part in ("", ".", "..") for part in path.split("/"))
    if not (fits and isinstance(path, str) and path.isprintable() and "\\" not in path and ":" not in path):
        raise UserError(f"{wanted.repo} lists a file named {str(path)[:80]!r}, which no folder takes; nothing was fetched.")
    whole = type(size) is int and 0 <= size < 2**50
    hashed = SHA256.fullmatch(sha256 or "") if large else COMMIT.fullmatch(git)
    if not whole or not hashed:
        raise UserError(
            f"{wanted.repo} lists {path} without a size and a hash; nothing was fetched, for it could not be checked."
        )
    return path, Entry(int(str(size)), git, sha256)


def _licence(info: Mapping[str, Any]) -> str:
    card, tags = info.get("cardData"), info.get("tags")
    named = card.get("license_name") or card.get("license") if isinstance(card, dict) else None
    tagged = [str(tag) for tag in tags if str(tag).startswith("license:")] if isinstance(tags, list) else []
    name = str(named or "").strip() or (tagged[0].removeprefix("license:") if tagged else "")
    return name[:80] if name.isprintable() and name else "not stated"


def _object(hub: Hub, url: str, wanted: HubId) -> dict[str, Any]:
    found, _ = _page(hub, url, wanted)
    if not isinstance(found, dict):
        raise UserError(f"{url} gave no JSON object; is HF_ENDPOINT the address of a hub?")
    return found


def _page(hub: Hub, url: str, wanted: HubId) -> tuple[Any, str | None]:
    """The JSON value at an address, and the address of what follows."""

    def ask() -> tuple[bytes, str | None]:
        with stream(hub, url) as answer:
            content = b""
            for chunk in answer.iter_bytes(2**16):
                content += chunk
                if len(content) > MOST_JSON:
                    raise UserError(f"{url} gave more than {MOST_JSON:,} bytes; expected a list of files.")
            return content, (answer.links.get("next") or {}).get("url")

    content, following = persistently(ask, hub, wanted)
    if following is not None and not following.startswith(f"{hub.endpoint}/"):
        raise UserError(f"{hub.endpoint} goes on elsewhere, at {following[:80]}; nothing was fetched.")
    try:
        return parse_json(content.decode("utf-8", "replace"), foreign=True), following
    except ValueError as error:
        raise UserError(f"{url} gave no JSON ({error}); is HF_ENDPOINT the address of a hub?") from None


@contextmanager
def stream(hub: Hub, url: str, start: int = 0) -> Iterator[Any]:
    """An answer whose content is still to be read, from byte `start` on; huggingface_hub's own errors for those of the hub."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status

    headers = hub.headers | ({"range": f"bytes={start}-"} if start else {})
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True) as answer:
        if answer.status_code >= 400:
            answer.read()
        hf_raise_for_status(answer)
        yield answer


# --- what went wrong ----------------------------------------------------------------------------------------


def persistently(work: Callable[[], T], hub: Hub, wanted: HubId, progress: Callable[[], int] = lambda: 0) -> T:
    """What `work` returns; it is called again after errors that may pass by themselves, as long as `progress()` grows.

    UserError in a sentence for those that do not pass.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    failed, before = 0, progress()
    while True:
        try:
            return work()
        except HTTPError as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            failed, before = (1, progress()) if progress() > before else (failed + 1, before)
            if (status is not None and status not in BUSY) or failed >= TRIES:
                raise UserError(_sentence(error, status, hub, wanted)) from None
            time.sleep(WAIT_S * 2 ** (failed - 1))
        except ConnectionError as error:  # huggingface_hub's for offline
            raise UserError(f"{hub.endpoint} was not asked: {str(error).splitlines()[0]}") from None


def _sentence(error: Exception, status: int | None, hub: Hub, wanted: HubId) -> str:
    again = "Run it again later: it goes on where it stopped."
    if status is None:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        return f"{hub.endpoint} cannot be reached, or broke off ({reason[:200]}). {again}"
    headers = error.response.headers  # type: ignore[attr-defined]
    code = headers.get("X-Error-Code")
    if code == "GatedRepo" or status == 403:
        how = "HF_TOKEN holds a token that may not read it" if hub.token else "set HF_TOKEN to a token that may read it"
        return f"{wanted.repo} is given only to those who accepted its terms at {hub.endpoint}/{wanted.repo}; {how}."
    if code == "RevisionNotFound":
        return f"{wanted.repo} has no revision '{wanted.revision or 'main'}'; see {hub.endpoint}/{wanted.repo} for those it has."
    if code == "EntryNotFound":
        return f"{wanted.repo}: the hub lists a file that it does not have ({status}). {again}"
    if status == 401:
        token = "and the token in HF_TOKEN was not accepted" if hub.token else "or is private: then set HF_TOKEN"
        return f"{wanted.repo} does not exist at {hub.endpoint}, {token}."
    if status == 404:
        return f"{wanted.repo} does not exist at {hub.endpoint}; check the name (a private one needs HF_TOKEN)."
    if status == 429:
        wait = str(headers.get("Retry-After", ""))
        when = f"in {wait} seconds" if wait.isdigit() else "in a few minutes"
        return f"{hub.endpoint} takes no more requests for now (429). Run it again {when}: it goes on where it stopped."
    return f"{hub.endpoint} answered {status} for {wanted.repo}. {again}"
