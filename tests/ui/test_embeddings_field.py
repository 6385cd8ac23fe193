"""The field of embeddings: what is installed can be chosen, and is handed to the job."""

from __future__ import annotations

from pathlib import Path

import pytest

gr = pytest.importorskip("gradio")

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from latentpipe.ui.form import build_form, build_prompt  # noqa: E402
from latentpipe.ui.state import App  # noqa: E402


def test_the_field_lists_what_is_installed_and_its_choice_reaches_the_job(own_home: Path) -> None:
    (own_home / "embeddings").mkdir()
    save_file({"emb_params": torch.ones(1, 4)}, own_home / "embeddings" / "easy.safetensors")
    app = App()
    with gr.Blocks():
        form = build_form(app, *build_prompt())
    assert form.embeddings.choices == [("easy", "easy")]
    assert form.embeddings in form.inputs
    values = {field: field.value for field in form.inputs}
    assert form.settings(values)["embeddings"] == []
    assert form.settings({**values, form.embeddings: ["easy"]})["embeddings"] == ["easy"]
    app.close()
