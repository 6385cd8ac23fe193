"""A tiny model to put adapters on."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentpipe import LatentPipeline


@pytest.fixture
def pipe(model_folder: Path) -> LatentPipeline:
    """A tiny model, fresh for each test."""
    return LatentPipeline.from_pretrained(model_folder)
