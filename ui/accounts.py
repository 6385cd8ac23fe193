"""Who may log in: users and passwords of a file or the environment. Needs the standard library alone."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from latentpipe.utils.errors import UserError

LOGIN = "LATENTPIPE_UI_LOGIN"
Login = Callable[[str, str], bool]


def login_of(auth_file: Path | None) -> Login | None:
    """A check of user and password, from a file or the environment; None where neither is given."""
    lines = _lines(auth_file) if auth_file is not None else [os.environ[LOGIN]] if os.environ.get(LOGIN) else []
    where = f"{auth_file}" if auth_file is not None else LOGIN
    known: dict[str, str] = {}
    for line in lines:
        user, mark, password = line.partition(":")
        if not (mark and user and password):
            raise UserError(f"{where}: expected lines of user:password, with neither of them empty.")
        if user in known:
            raise UserError(f"{where} names the user '{user}' twice; keep one line for each.")
        known[user] = password
    if auth_file is not None and not known:
        raise UserError(f"{where} names no user; expected lines of user:password.")
    if not known:
        return None
    none = secrets.token_hex(32)

    def check(user: str, password: str) -> bool:
        right = known.get(user, none)  # an unknown user takes as long
        return secrets.compare_digest(right.encode(), password.encode()) and user in known

    return check


def _lines(path: Path) -> list[str]:
    try:
        if os.name == "posix" and path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
            raise UserError(f"{path} can be read or written by everybody on this machine; run: chmod 600 {path}")
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip() and not line.startswith("#")]
    except OSError as error:
        raise UserError(f"--auth-file {path}: {(error.strerror or 'cannot be read').lower()}.") from None
    except UnicodeDecodeError:
        raise UserError(f"--auth-file {path} is no text; expected lines of user:password.") from None
