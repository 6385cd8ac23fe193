"""Files that are no safetensors file (nor GGUF): what they are, told by their first bytes."""

from __future__ import annotations

from pathlib import Path

from latentpipe.utils.errors import UserError
from latentpipe.utils.io import is_gguf, is_safetensors
from latentpipe.utils.reading import file_size

HEAD = 512  # bytes that are looked at


def check_kind(path: Path) -> None:
    """UserError that says what a file is, where it is neither a safetensors file nor GGUF."""
    size = file_size(path, "a model in safetensors format")
    if not size:
        raise UserError(f"{path} is empty (0 bytes); fetch it again.")
    if is_safetensors(path) or is_gguf(path):
        return
    refuse_unreadable(path)
    raise UserError(
        f"{path} is not a safetensors file ({size:,} bytes, which begin with {_shown(_head(path))}); fetch or export it again."
    )


def refuse_unreadable(path: Path) -> None:
    """UserError where a file is what no verb reads as it is: nothing, a pointer, a page, a text of a server, a pickle."""
    size, head = path.stat().st_size, _head(path)
    if not size:
        raise UserError(f"{path} is empty (0 bytes); fetch it again.")
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise UserError(
            f"{path} is a git LFS pointer of {size} bytes and not the model; run 'git lfs pull', or download the file."
        )
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path} is a web page and no model; the download gave an error or a login page. Fetch it again.")
    if start.startswith((b"{", b"access", b"invalid", b"entry", b"repository")) and size < 2**16:
        raise UserError(f"{path} is a text of {size} bytes and no model ({_shown(head)}); fetch it again.")
    if head.startswith(b"PK\3\4") or head.startswith(b"\x80") or path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise UserError(
            f"{path} is a pickle (or an archive of one), which can run code when it is opened; turn it into safetensors once: "
            f"latentpipe convert {path} --out FILE.safetensors."
        )


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD)


def _shown(head: bytes) -> str:
    return repr(head[:24].decode("utf-8", "replace"))
