"""Where the server listens: the sockets of an address or a name, at a port that is free. Needs the standard library alone."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from typing import Any

from latentpipe.ui.allowed_hosts import EVERY
from latentpipe.utils.errors import UserError

PORTS = range(7860, 7960)
BACKLOG = 128
SILENT_MS = 30_000  # a peer that confirms nothing for so long has left without a word


def sockets_for(host: str, port: int | None) -> list[socket.socket]:
    """A listening socket for each address of `host`, all at one port: the one asked for, or the first free one from 7860 on.

    host  an address, or a name with one or more of them; ``::`` and ``0.0.0.0``: every address, with IPv6 where there is any
    UserError where the name leads nowhere, or no port is free.
    """
    if port is not None and not 1 <= port <= 65535:
        raise UserError(f"--port is {port}; expected 1 to 65535.")
    addresses = _addresses(host)
    why = ""
    for candidate in [port] if port is not None else PORTS:
        with contextlib.ExitStack() as opened:
            found = []
            try:
                for family, address in addresses:
                    try:
                        found.append(opened.enter_context(_bound(family, address, candidate)))
                    except OSError:
                        if not (host in EVERY and family == socket.AF_INET6 and not _has_ipv6()):
                            raise
                opened.pop_all()
                return found
            except OSError as error:
                why = (error.strerror or "").lower()
                if "assign" in why:
                    raise UserError(f"--host {host}: this machine has no such address.") from None
    raise UserError(
        f"--port {port} is taken or not allowed ({why}); choose another one."
        if port
        else f"No port from {PORTS.start} to {PORTS.stop - 1} is free."
    )


def _addresses(host: str) -> list[tuple[Any, str]]:
    if host in EVERY:
        return [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")]
    with contextlib.suppress(ValueError):
        return [(socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET, host)]
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise UserError(f"--host {host}: no such address or name is known here; give an address of this machine.") from None
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


def _bound(family: Any, address: str, port: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_MS)
        made.bind((address, port))
        made.listen(BACKLOG)  # two servers that start at once could both bind, but only one listens
    except BaseException:
        made.close()
        raise
    return made


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
        return True
    except OSError:
        return False


def address_of(host: str, port: int) -> str:
    """A link to the server that can be clicked on."""
    name = "localhost" if host in EVERY else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"
