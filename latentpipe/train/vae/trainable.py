"""What trains: named stages of an autoencoder, and the table that says so before the first step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from latentpipe.utils.errors import UserError

# Parameter names of diffusers' autoencoders -> stages, in the order of the data
STAGES = (
    (r"encoder\.conv_in\.", "encoder.in"),
    (r"encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1"),
    (r"encoder\.mid_block\.", "encoder.mid"),
    (r"(encoder\.(conv_norm_out|conv_out|norm_out)|quant_conv)\.", "encoder.head"),
    (r"(post_quant_conv|decoder\.conv_in)\.", "decoder.head"),
    (r"decoder\.mid_block\.", "decoder.mid"),
    (r"decoder\.up_blocks\.(\d+)\.", r"decoder.up.\1"),
    (r"decoder\.(conv_norm_out|conv_out|norm_out)\.", "decoder.out"),
    (r"(encoder|decoder)\.layers\.(\d+)\.", r"\1.\2"),
)
MODES = {
    "all": ("*",),
    "decoder": ("decoder.*",),
    "encoder-head": ("encoder.head", "decoder.*"),
    "distil": ("*",),
}


def block_of(name: str) -> str:
    """The stage that a parameter belongs to: encoder.in, encoder.down.0, ..., encoder.head, decoder.head, ..., decoder.out."""
    for pattern, stage in STAGES:
        found = re.match(pattern, name)
        if found:
            return found.expand(stage)
    return ".".join(name.split(".")[:2])


def choose_stages(vae: nn.Module, mode: str, parts: Sequence[str] = ()) -> None:
    """Let exactly the parameters train that `parts` (stages or parameter names, with * and ?) name, else those of the mode.

    UserError for a pattern that names nothing.
    """
    patterns = tuple(parts) or MODES[mode]
    stages = {name: block_of(name) for name, _ in vae.named_parameters()}
    for pattern in patterns:
        if not any(_matches(pattern, name, stage) for name, stage in stages.items()):
            known = ", ".join(dict.fromkeys(stages.values()))
            raise UserError(f"parts: '{pattern}' names no stage and no parameter of this VAE. Its stages: {known}.")
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(any(_matches(pattern, name, stages[name]) for pattern in patterns))


def _matches(pattern: str, name: str, stage: str) -> bool:
    return fnmatchcase(stage, pattern) or fnmatchcase(name, pattern)


def moves_the_latents(vae: nn.Module) -> bool:
    """Whether a parameter that decides the latents trains, so that the space becomes another one."""
    return any(parameter.requires_grad for name, parameter in vae.named_parameters() if block_of(name).startswith("encoder"))


def _place(stage: str) -> int:
    """Where a stage stands on the way of the data; those of one kind keep their order."""
    kinds = [pattern.replace("\\1", "").replace("\\2", "").rstrip(".") for _, pattern in STAGES[:-1]]
    return next((index for index, kind in enumerate(kinds) if stage.startswith(kind)), len(kinds) * stage.startswith("decoder"))


def table(vae: Any) -> str:
    """Stages, their parameters, and which of them train."""
    counts: dict[str, list[int]] = {}
    for name, parameter in vae.named_parameters():
        row = counts.setdefault(block_of(name), [0, 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() * parameter.requires_grad
    order = sorted(counts, key=_place)
    lines = [f"{'stage':18}{'parameters':>12}{'train':>12}"]
    for stage in order:
        total, training = counts[stage]
        lines.append(f"{stage:18}{total:12,}{f'{training:,}' if training else 'frozen':>12}")
    total, training = (sum(row[index] for row in counts.values()) for index in range(2))
    return "\n".join([*lines, f"{'in all':18}{total:12,}{training:12,}"])
