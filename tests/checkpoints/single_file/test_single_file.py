"""Tiny pipelines as single files in their authors' names: the same picture as from the folder, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from written import PIPELINES

from latentpipe.checkpoints.pipeline_io import load_pipeline
from latentpipe.checkpoints.single_file.gather import Stated


def draw(pipe: Any) -> np.ndarray:
    """Two steps of a pipeline, as floats."""
    given: dict[str, Any] = {"prompt": "red apple", "num_inference_steps": 2, "generator": torch.Generator().manual_seed(3)}
    picture = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    if "Inpaint" in type(pipe).__name__:
        given |= {"image": picture, "mask_image": picture.convert("L"), "strength": 1.0}
    if "Img2Img" in type(pipe).__name__:
        given |= {"image": picture, "strength": 1.0}
    else:
        given |= {"height": 32, "width": 32}
    pipe.set_progress_bar_config(disable=True)
    return pipe(**given, output_type="np").images


@pytest.mark.parametrize("name", PIPELINES)
def test_the_same_picture_as_from_the_folder(name: str, made: Any) -> None:
    folder, config, file = made(name)
    whole = load_pipeline(folder)
    single = load_pipeline(file, stated=Stated(config=config))
    assert type(single) is type(whole)
    assert dict(single.scheduler.config) == dict(whole.scheduler.config)
    for part, network in whole.components.items():
        if isinstance(network, torch.nn.Module):
            mine = getattr(single, part).state_dict()
            theirs = network.state_dict()
            assert mine.keys() == theirs.keys(), part
            assert all(torch.equal(mine[key], theirs[key]) for key in mine), part
    assert np.array_equal(draw(single), draw(whole))
