"""Who may come in where: what `latentpipe ui` was told about addresses and logins, checked, and the sockets that listen there.

All of it is known before gradio and torch are imported. Needs the standard library alone.
"""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from latentpipe.ui.accounts import LOGIN, Login, login_of
from latentpipe.ui.allowed_hosts import AllowedHosts, is_loopback, names_for
from latentpipe.ui.sockets import address_of, sockets_for
from latentpipe.utils.errors import UserError


@dataclass(frozen=True)
class Entrance:
    """Where a server listens, whom it answers to and whom it lets in.

    names         the hosts that are answered to
    login         a check of user and password; None: everybody is let in
    root_path     path that a reverse proxy serves it at, such as /draw; "" for none
    behind_proxy  whether a proxy on this machine is believed when it names the client
    """

    host: str
    sockets: Sequence[socket.socket]
    names: AllowedHosts
    login: Login | None
    root_path: str
    behind_proxy: bool

    @property
    def address(self) -> str:
        """A link that can be clicked on."""
        return address_of(self.host, self.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Give the port free."""
        for one in self.sockets:
            one.close()


def entrance_for(
    port: int | None = None,
    listen: bool = False,
    auth_file: Path | None = None,
    no_auth: bool = False,
    mcp: bool = False,
    host: str | None = None,
    allow_host: Sequence[str] = (),
    root_path: str = "",
) -> Entrance:
    """Check these and listen; UserError for what cannot be, and where a login is missing.

    listen      for other machines too, at every address; needs a login, or `no_auth`
    host        an address or name of this machine to listen at; "::": every address
    allow_host  further names that the server answers to, such as that of a reverse proxy
    root_path   path that a reverse proxy serves it at, such as /draw
    auth_file   lines of ``user:password``; the variable LATENTPIPE_UI_LOGIN holds one such line
    mcp         whether tools for language models are offered, which needs the extra
    """
    host = (host or ("::" if listen else "127.0.0.1")).strip("[] ")
    login = login_of(auth_file)
    _refuse(not is_loopback(host) and login is None and not no_auth, mcp and importlib.util.find_spec("mcp") is None)
    root_path = _root_of(root_path)
    names = AllowedHosts(names_for([host], allow_host), allow_host)
    return Entrance(host, sockets_for(host, port), names, login, root_path, bool(root_path or allow_host))


def _root_of(path: str) -> str:
    """``draw/`` as ``/draw``, "" for none; UserError for an address."""
    if "://" in path or any(letter in path for letter in '?#\\"<> '):
        raise UserError(f"--root-path {path}: expected a path alone, such as /draw.")
    path = path.strip("/")
    return f"/{path}" if path else ""


def _refuse(open_to_all: bool, without_mcp: bool) -> None:
    if open_to_all:
        raise UserError(
            f"This opens the interface to other machines; give --auth-file FILE (lines of user:password) or the variable "
            f"{LOGIN}=user:password, or say --no-auth to let everybody in."
        )
    if without_mcp:
        raise UserError("--mcp needs a package that is not installed: pip install 'latentpipe[mcp]' (it holds pydantic back).")
