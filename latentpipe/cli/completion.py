"""latentpipe --print-completion SHELL: a script by which a shell completes verbs, options and choices. tyro writes it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Union

from latentpipe.utils.errors import UserError, near

SHELLS = ("bash", "zsh", "fish")
FLAGS = ("--print-completion", "--tyro-print-completion")
CONFIGS = {"train-vae": "TrainVAE", "train-denoiser": "TrainDenoiser", "train-lora": "TrainLora"}


def script(shell: str, targets: Mapping[str, Any]) -> str:
    """The completion script for a shell.

    targets  what each verb takes by its name, such as "ls" or "lora merge": a function or a dataclass

    UserError for another shell than those of SHELLS.
    """
    if shell not in SHELLS:
        raise UserError(f"--print-completion '{shell[:40]}'; expected one of {', '.join(SHELLS)}.{near(shell, SHELLS)}")
    import tyro

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(_union(targets), prog="latentpipe", args=["--tyro-print-completion", shell])
    return text.getvalue()


def _union(targets: Mapping[str, Any]) -> Any:
    """Verbs as tyro's subcommands; those of two words below their first one."""
    import tyro

    found: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for name, target in targets.items():
        first, _, second = name.partition(" ")
        if second:
            groups.setdefault(first, {})[second] = target
        elif name in CONFIGS:
            found[name] = Annotated[Any, tyro.conf.subcommand(name, constructor=_of_config(CONFIGS[name]))]
        else:
            found[name] = Annotated[Any, tyro.conf.subcommand(name, constructor=target)]
    found |= {first: Annotated[_union(inner), tyro.conf.subcommand(first)] for first, inner in groups.items()}
    return Union[tuple(found.values())]  # noqa: UP007  # made at run time


def _of_config(schema_name: str) -> Callable[..., None]:
    """What a verb of a config takes, as a signature: the file, then the keys."""
    import tyro

    from latentpipe.train import config as configs

    schema = getattr(configs, schema_name)

    def takes(config: Path, /, keys: Any) -> None:
        """Read the config, with keys overridden."""

    takes.__annotations__ = {"config": Path, "keys": Annotated[schema, tyro.conf.arg(name="")], "return": None}
    return takes
