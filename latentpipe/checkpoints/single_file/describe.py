"""What `latentpipe inspect` tells of a model's single file: what it is, and what is assumed when it is opened."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from latentpipe.checkpoints.single_file.families import FAMILIES
from latentpipe.checkpoints.single_file.gather import Stated, open_file
from latentpipe.checkpoints.single_file.identify import identify
from latentpipe.checkpoints.single_file.parts import Part
from latentpipe.utils.errors import UserError


def describe_file(path: Path, stated: Stated | None = None) -> dict[str, Any] | None:
    """Facts on a file that holds a denoiser or text encoders; None for any other (a folder, a VAE, an adapter)."""
    stated = stated or Stated()
    if not path.is_file():
        return None
    found = identify(path, stated.family, stated.config is not None)
    if "denoiser" not in found.parts and found.role not in ("text encoder", "text encoders", "embedding"):
        return None
    facts = found.facts()
    if found.family:
        facts["title"] = FAMILIES[found.family].title
    facts["parameters"] = {slot: sum(map(math.prod, part.shapes.values())) for slot, part in found.parts.items()}
    try:
        opened = open_file(path, stated)
    except UserError as error:
        return facts | {"refused": str(error)}
    if opened.identity.prediction is not None:
        predicts = opened.identity.prediction
        facts |= {"prediction": predicts.kind, "zero_terminal_snr": predicts.zero, "known_from": predicts.source}
    sources = {name: str(source.path if isinstance(source, Part) else source) for name, source in opened.sources.items()}
    return facts | {
        "opens_as": opened.configs.pipeline,
        "configs": str(
            opened.configs.folder or f"shipped ({FAMILIES[found.family].configs})" if found.family else opened.configs.folder
        ),
        "scheduler": opened.configs.scheduler["_class_name"],
        "components": sources,
        **({"without": list(opened.without)} if opened.without else {}),
    }
