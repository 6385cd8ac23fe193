"""latentpipe ui: the interface in a browser."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff

from latentpipe.utils.errors import UserError
from latentpipe.utils.signals import ended_at_once


def ui(
    model: str = "emoji",
    port: int | None = None,
    listen: bool = False,
    auth_file: Path | None = None,
    no_auth: Annotated[bool, FlagCreatePairsOff] = False,
    out: Path = Path("out"),
    save: bool = True,
    device: str | None = None,
    dtype: Literal["fp32", "bf16", "fp16", "stored", "auto"] = "fp32",
    mcp: bool = False,
    host: str | None = None,
    allow_host: tuple[str, ...] = (),
    root_path: str = "",
    max_work: float = 300,
    family: str | None = None,
    prediction: Literal["epsilon", "v", "v-zsnr"] | None = None,
    config: Path | None = None,
    parts: tuple[Path, ...] = (),
    workers: int | None = None,
    cluster: str | None = None,
) -> None:
    """Open the interface in a browser: generate, VAE lab, playground, grid, PNG info; and its HTTP endpoints.

    Args:
        model: Name of the model that is chosen at first ('latentpipe ls models').
        port: Left out: the first free one from 7860 on.
        listen: For other machines too, at every address; needs a login, or --no-auth.
        auth_file: Lines of user:password; the variable LATENTPIPE_UI_LOGIN holds one such line.
        no_auth: Let everybody in who reaches the machine.
        out: Folder where pictures are kept, by date.
        save: Keep pictures; --no-save leaves them in the browser only.
        device: cpu, cuda or mps.
        dtype: Precision of the weights, as for 'latentpipe generate'.
        mcp: Offer the endpoints to language models as tools (Model Context Protocol); needs latentpipe[mcp].
        host: Address or name of this machine to listen at, such as :: or 192.168.1.5; other machines need a login, as --listen.
        allow_host: Further names that the server answers to, such as that of a reverse proxy or of this machine.
        root_path: Path that a reverse proxy serves the interface at, such as /draw (ui/API.md has an example).
        max_work: The most that one request may ask for: pixels x steps x pictures, in millions.
        family: Of the single file that --model names, as for 'latentpipe generate'; so are the next three.
        prediction: Likewise.
        config: Likewise.
        parts: Likewise.
        workers: Processes that draw, one for each GPU (or that share the processor); left out: the page's own process draws.
        cluster: Address of a Ray cluster that the workers run on, or auto (needs latentpipe[cluster]).
    """
    entrance = _entrance(port, listen, auth_file, no_auth, mcp, host, allow_host, root_path)
    page = {"model": model, "out": out if save else None, "device": device, "dtype": dtype, "mcp": mcp, "max_work": max_work}
    _answer(entrance, {**page, "workers": workers, "cluster": cluster}, (family, prediction, config, parts))


def _entrance(*given: Any) -> Any:
    """Sockets that listen, and who may come in; UserError where the page cannot be served."""
    _require_gradio()
    from latentpipe.ui.entrance import entrance_for

    return entrance_for(*given)


def _answer(entrance: Any, page: dict[str, Any], stated: tuple[Any, ...]) -> None:
    """Answer at the entrance's sockets at once, by the page as soon as it is made, until it is told to end."""
    from latentpipe.ui.waiting import WaitingPage

    print(f"Starting the interface at {entrance.address} ...", file=sys.stderr, flush=True)
    with contextlib.closing(entrance):
        with WaitingPage(entrance.sockets, entrance.names) as waiting:
            with ended_at_once(), _complete_packages():
                from latentpipe.ui.server import serve
            from latentpipe.checkpoints.single_file.gather import Stated

            served = serve(entrance, **page, stated=Stated(*stated), takes_over=waiting.close)
        print(f"latentpipe is at {served.address}  (Ctrl-C ends it)", flush=True)
        served.until_told()


def _require_gradio() -> None:
    if importlib.util.find_spec("gradio") is None:
        raise UserError("The interface needs gradio, which is not installed: pip install 'latentpipe[ui]'.")


@contextlib.contextmanager
def _complete_packages() -> Iterator[None]:
    """UserError where something of other packages cannot be imported."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").split(".")[0] == "latentpipe":
            raise
        raise UserError(f"The interface does not start ({error}); install it anew: pip install 'latentpipe[ui]'.") from error
