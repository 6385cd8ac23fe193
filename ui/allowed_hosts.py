"""Which names this server answers to, and which pages may send to it: what keeps other web pages from driving it."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress

LOOPBACK = ("localhost", "127.0.0.1", "::1")
EVERY = ("0.0.0.0", "::")
STRANGE = "This request comes from another web page, and is refused. Open this server's own page."


def name_of(host: str) -> str:
    """The name or address in a Host header (``name:port``, ``[::1]:port``), in lower case; "" for what is none."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name = host.partition(":")[0] if host.count(":") == 1 else host
    return name.rstrip(".")


def names_for(bound: Iterable[str], allowed: Iterable[str] = ()) -> frozenset[str]:
    """The names that are answered to: the loopback, what the server is bound to, and those that were allowed.

    Bound to every address, it answers to the name of the machine as well (its addresses: `AllowedHosts.answers`).
    """
    found = {*LOOPBACK, *(name_of(name) for name in allowed)}
    for host in bound:
        if host in EVERY:
            found |= {socket.gethostname().lower(), f"{socket.gethostname().lower()}.local"}
        else:
            found.add(host.lower())
    return frozenset(found - {""})


def is_loopback(host: str) -> bool:
    """Whether an address or name leads to this machine alone."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


class AllowedHosts:
    """The allow-list of one server.

    known    names and addresses that a Host header may hold
    trusted  those given by hand: a page of such a name, at whatever port, may send (it is what a reverse proxy serves)
    """

    def __init__(self, known: Iterable[str], trusted: Iterable[str] = ()) -> None:
        self.known, self.trusted = frozenset(known), frozenset(name_of(name) for name in trusted)

    def answers(self, host: str, own: str | None) -> bool:
        """Whether a Host header is one of ours; `own` is the address that this connection came to.

        A page can make its own name lead here (DNS rebinding), but not an address.
        """
        name = name_of(host)
        return bool(name) and (name in self.known or name == (own or "").lower())

    def refusal(self, given: Iterable[str], own: str | None) -> str:
        """Why a request is refused that names these hosts, in headers that gradio builds addresses of; "" where all are ours."""
        for host in given:
            host = host.split(",")[0]
            name = host.partition("://")[2].split("/")[0] if "://" in host else host
            if not self.answers(name, own):
                return (
                    f"This server does not answer to the name '{name_of(name)[:80]}', only to {', '.join(sorted(self.known))}. "
                    "Start it with --allow-host NAME to add one."
                )
        return ""

    def sends(self, headers: Mapping[str, str], method: str) -> bool:
        """Whether a request comes from a page of ours, from a program, or only follows a link.

        Browsers say where a request comes from (Origin, Sec-Fetch-Site); programs say nothing.
        """
        origin = headers.get("origin")
        if origin is not None:
            place = origin.partition("://")[2].lower()
            if not place:
                return False  # "null": a page without an origin
            ours = {_with_port(headers.get(name, ""), origin) for name in ("host", "x-forwarded-host")}
            return _with_port(place, origin) in ours or name_of(place) in self.trusted
        if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            return True
        return method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"


def _with_port(host: str, origin: str) -> str:
    """A host in lower case without the port that its scheme has anyway."""
    return host.split(",")[0].strip().lower().removesuffix(":443" if origin.startswith("https:") else ":80")
