"""The hashes of a pipeline that was opened elsewhere: of its weights in memory, as a file of them would have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from latentpipe.checkpoints.model_files import tokenizer_hash
from latentpipe.checkpoints.single_file.gguf_tensors import as_stored
from latentpipe.checkpoints.text_names import as_hashed
from latentpipe.checkpoints.vae_io import refuse_wrapped
from latentpipe.utils.io import content_hash


class Computed(Mapping[str, str]):
    """A mapping that is computed when it is first looked into."""

    def __init__(self, compute: Callable[[], dict[str, str]]) -> None:
        self._compute = compute

    @cached_property
    def _found(self) -> dict[str, str]:
        return self._compute()

    def __getitem__(self, name: str) -> str:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        return repr(self._found)


def hashes_in_memory(pipe: Any, stage: Any) -> dict[str, str]:
    """`hashes` of a pipeline that was opened elsewhere, and of the stage around its VAE.

    Weights whose values all fit into fp16 are taken to come from a file in fp16, so that the hashes are those of the file.
    """
    found = {"vae": stage.digest or content_hash(_as_in_file(stage.vae), stage.space)}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and name != "vae":
            found[name] = content_hash(as_hashed(_as_in_file(part), type(part).__name__))
        elif name.startswith("tokenizer") and part is not None:
            found[name] = (
                tokenizer_hash(Path(part.name_or_path))
                or hashlib.sha256(repr(sorted(part.get_vocab().items())).encode()).hexdigest()
            )
    config = {key: value for key, value in dict(pipe.scheduler.config).items() if key != "_diffusers_version"}
    return found | {"scheduler": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()}


def _as_in_file(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    refuse_wrapped(network, "The pipeline")
    state = as_stored(network.state_dict())
    if all(torch.equal(value.half().to(value.dtype), value) for value in state.values() if value.is_floating_point()):
        return {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    return state
