"""What a recipe keeps of what was stated on a model's single file, and what a replay needs again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from latentpipe.utils.errors import UserError

Name = Annotated[str, Field(max_length=200)]


class StatedModel(BaseModel):
    """What was stated when the model's single file was opened; of files and folders the names: paths mean nothing elsewhere."""

    model_config = ConfigDict(extra="forbid")
    family: str | None = Field(None, max_length=32)
    """Family of the model."""
    prediction: Literal["epsilon", "v", "v-zsnr"] | None = None
    """What its denoiser predicts."""
    config: Name | None = None
    """Name of the folder that the configs are from."""
    parts: dict[Annotated[str, Field(max_length=32)], Name] = Field(default_factory=dict, max_length=8)
    """Components that another file or folder completes, and its name."""


def check_completed(path: Path, stated: StatedModel | None, config: Path | None, parts: Sequence[Path]) -> None:
    """UserError where a picture's model was opened with a config folder or parts that are not given now."""
    stated = stated or StatedModel()
    wanted = []
    if stated.config is not None and config is None:
        wanted.append(f"the configs of the folder '{stated.config}' (--config)")
    if stated.parts and not parts:
        from_files = ", ".join(f"its {name} from '{file}'" for name, file in stated.parts.items())
        wanted.append(f"{from_files} (--parts)")
    if wanted:
        raise UserError(f"{path}: its model was opened with {' and '.join(wanted)}; give replay the same.")
