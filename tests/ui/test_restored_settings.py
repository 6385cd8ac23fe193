"""Settings of other people's pictures, fitted to the model and to the form."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("gradio")

from latentpipe.ui.restored_settings import fitted


@pytest.mark.parametrize(
    ("given", "same", "taken", "said"),
    [
        ({"size": (1024, 1024)}, False, {"size": (64, 64)}, ["1024 x 1024 became 64 x 64"]),
        ({"size": (832, 1216)}, False, {"size": (48, 64)}, ["832 x 1216 became 48 x 64"]),
        ({"size": (4096, 64)}, False, {"size": (64, 16)}, ["4096 x 64 became 64 x 16"]),
        ({"size": (64, 64)}, False, {"size": (64, 64)}, []),
        ({"size": (128, 64)}, True, {"size": (128, 64)}, []),  # the model has drawn it, and draws it again
        ({"num_inference_steps": 150}, False, {"num_inference_steps": 100}, ["steps 150 became 100"]),
        ({"guidance_scale": 30.0, "num_inference_steps": 0}, False, {"guidance_scale": 15.0, "num_inference_steps": 1},
         ["steps 0 became 1", "guidance 30 became 15"]),
        ({"strength": 0.01}, True, {"strength": 0.05}, ["strength 0.01 became 0.05"]),
        ({"scheduler": "heun"}, False, {}, ["'heun' became the model's own"]),
        ({"scheduler": "ddim", "num_inference_steps": 20}, False, {"scheduler": "ddim", "num_inference_steps": 20}, []),
    ],
)  # fmt: skip
def test_settings_are_fitted_and_each_change_is_said(
    given: dict[str, Any], same: bool, taken: dict[str, Any], said: list[str]
) -> None:  # fmt: skip
    changes: list[str] = []
    assert fitted(given, (64, 64), 16, same, changes) == taken
    assert len(changes) == len(said)
    for sentence, part in zip(changes, said, strict=True):
        assert part in sentence
