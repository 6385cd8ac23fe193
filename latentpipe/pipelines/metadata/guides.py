"""What a recipe keeps of the pictures that a drawing followed, and of its second pass."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Unit = Annotated[float, Field(ge=0, le=1)]


class Controlled(BaseModel):
    """A picture that the drawing followed, by a network beside the denoiser."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    name: str = Field(max_length=200)
    """Of the network; its hash is that of `control:` and its place among the controls."""
    kind: Literal["controlnet", "t2i-adapter", "ip-adapter"]
    sha256: str = Field(max_length=64)
    """Hash of the picture's pixels (RGB)."""
    weight: float = Field(ge=-10, le=10)
    steps: tuple[Unit, Unit] = (0.0, 1.0)
    """Shares of the steps between which it acted."""


class SecondPass(BaseModel):
    """What drew on after the first pass: hires (scale, strength), or a refiner (name, at)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    scale: float | None = Field(None, gt=1, le=8)
    strength: Unit | None = None
    refiner: str | None = Field(None, max_length=200)
    """Name of the model."""
    at: Unit | None = None
    """Share of the steps after which it drew."""
