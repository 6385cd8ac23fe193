"""Controls of the command line: NET=PICTURE, with a weight and a range of steps each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentpipe.cli import argument_checks
from latentpipe.utils.errors import UserError


def split(text: str) -> tuple[Path, Path]:
    """The folder of the network and the picture of one --control."""
    net, equals, picture = text.partition("=")
    if not (net and equals and picture):
        raise UserError(f"--control is '{text}'; expected NET=PICTURE, the folder of a network and the picture that it reads.")
    return Path(net), Path(picture)


def rule(option: str, value: Iterable[str]) -> None:
    """UserError for a control whose folder or picture is not there."""
    for text in value:
        net, picture = split(text)
        argument_checks.folder(option, net)
        argument_checks.picture(option, picture)


def steps_of(text: str) -> tuple[float, float]:
    """0-0.6 as two shares."""
    low, dash, high = text.partition("-")
    try:
        return float(low), float(high if dash else "none")
    except ValueError:
        raise UserError(f"--control-steps is '{text}'; expected BEGIN-END as shares of the steps, such as 0-0.6.") from None


def counted(values: Mapping[str, Any]) -> None:
    """One weight and one range for all controls, or one for each."""
    n = len(values["control"])
    for option, given in (("--control-weight", values["control_weight"]), ("--control-steps", values["control_steps"])):
        if n and len(given) not in (0, 1, n):
            raise UserError(f"{option} was given {len(given)} times and --control {n}; expected one for all, or one for each.")
    for text in values["control_steps"]:
        low, high = steps_of(text)
        if not 0 <= low < high <= 1:
            raise UserError(f"--control-steps is '{text}'; expected two shares of the steps, 0 <= BEGIN < END <= 1.")


def opened(controls: Sequence[str], weights: Sequence[float] = (), steps: Sequence[str] = ()) -> tuple[Any, ...]:
    """The controls that --control, --control-weight and --control-steps name; a weight or range that stands alone is for all."""
    from latentpipe.pipelines.conditioning import open_control
    from latentpipe.utils.images import open_picture

    n = len(controls)
    each = [*weights] * n if len(weights) == 1 else [*weights] or [1.0] * n
    ranges = [steps_of(text) for text in steps]
    ranges = ranges * n if len(ranges) == 1 else ranges or [(0.0, 1.0)] * n
    pairs = [split(text) for text in controls]
    return tuple(
        open_control(net, open_picture(picture), weight, between)
        for (net, picture), weight, between in zip(pairs, each, ranges, strict=True)
    )
