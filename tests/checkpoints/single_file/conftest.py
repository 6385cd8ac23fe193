"""Tiny pipelines as folders and single files, made once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from written import PIPELINES, write


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder, folder without weights and single file of a tiny pipeline by its name; not to be written to."""
    known: dict[str, tuple[Path, Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path, Path]:
        if name not in known:
            place = tmp_path_factory.mktemp(name)
            build, names = PIPELINES[name]
            pipe = build()
            pipe.save_pretrained(place / "folder")
            shutil.copytree(place / "folder", place / "config", ignore=shutil.ignore_patterns("*.safetensors"))
            known[name] = place / "folder", place / "config", write(names(pipe), place / "model.safetensors")
        return known[name]

    return make
