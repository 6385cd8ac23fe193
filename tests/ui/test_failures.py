"""What the page says of a job that came to nothing, and of fields that cannot be right: which, and why, in a line that stays."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

gr = pytest.importorskip("gradio")

from PIL import Image  # noqa: E402

from latentpipe import UserError  # noqa: E402
from latentpipe.ui import generate  # noqa: E402
from latentpipe.ui.failures import remembered, said_why  # noqa: E402
from latentpipe.ui.form import OWN, build_form, build_prompt  # noqa: E402
from latentpipe.ui.request_checks import beyond  # noqa: E402
from latentpipe.ui.state import App, toast_errors  # noqa: E402
from latentpipe.ui.uploads import MOST_TOLD, readable  # noqa: E402


def visitor(session: str) -> Any:
    return SimpleNamespace(session_hash=session)


def test_the_reason_stays_and_is_the_visitors_own() -> None:
    app, said = App(), None
    with pytest.raises(gr.Error), remembered(app, visitor("a")), toast_errors():
        raise UserError("No LoRA 'nope' is installed.")
    said = said_why(app, "Nothing was drawn.")
    assert "Nothing was drawn.<" in said(visitor("b"))
    assert "Nothing was drawn. No LoRA &#x27;nope&#x27; is installed." in said(visitor("a"))
    assert "nope" not in said(visitor("a"))  # said once
    with remembered(app, visitor("a")):
        pass
    assert app.reasons == {}


@pytest.mark.parametrize(
    ("value", "words"),
    [(-8, "Width is -8; expected 0 to 4096."), (1e6, "Width is 1000000; expected 0 to 4096."), (64, ""), (None, ""), ("x", "")],
)
def test_a_number_beyond_its_limits_names_its_field(value: Any, words: str) -> None:
    fields = [gr.Textbox(label="Prompt"), gr.Number(label="Width", minimum=0, maximum=4096)]
    assert beyond(SimpleNamespace(inputs=fields), ["red", value]) == words


def test_limits_of_one_side() -> None:
    fields = [gr.Number(label="Seed", minimum=-1), gr.Slider(1, 100, label="Steps"), gr.Number(label="Any", maximum=9)]
    assert beyond(SimpleNamespace(inputs=fields), [0, 5, 10]) == "Any is 10; expected up to 9."
    assert beyond(SimpleNamespace(inputs=fields), [-7, 5, 9]) == "Seed is -7; expected -1 or more."
    assert beyond(SimpleNamespace(inputs=fields), [0, 500, 0]) == "Steps is 500; expected 1 to 100."


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"width": 100}, "Width is 100 and Height 0"),
        ({"height": 64}, "Width is 0 and Height 64"),
        ({"low": 0.9, "high": 0.2}, "Guidance from is 0.9 and Guidance to 0.2"),
    ],
)
def test_fields_that_do_not_go_together_are_refused_by_their_names(changed: dict[str, float], words: str) -> None:
    with gr.Blocks():
        form = build_form(App(), *build_prompt())
    values = {field: field.value for field in form.inputs}
    assert values[form.scheduler] == OWN
    assert form.settings(values)["size"] is None
    with pytest.raises(UserError, match=words):
        form.settings({**values, **{getattr(form, name): value for name, value in changed.items()}})


def test_a_row_whose_lora_or_weight_is_touched_is_on() -> None:
    with gr.Blocks() as page:
        rows = generate.build(App(), gr.HTML()).form.rows
    for on, name, weight in rows:
        for field in (name, weight):
            (each,) = [one for one in page.fns.values() if (field._id, "input") in one.targets]
            assert each.outputs == [on]
            assert each.fn() is True


def test_files_that_are_no_pictures_are_told_when_they_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(gr, "Warning", lambda sentence, **_: told.append(sentence))
    good, bad = tmp_path / "good.png", [tmp_path / f"bad{index}.png" for index in range(MOST_TOLD + 2)]
    Image.new("RGB", (8, 8)).save(good)
    for path in bad:
        path.write_text("words")
    assert readable([str(good), *map(str, bad)]) == [str(good)]
    assert "bad0.png cannot be read as a picture" in told[0]
    assert "And 2 more." in told[0]
    assert str(tmp_path) not in told[0]
    assert readable([str(bad[0])]) is None
    assert readable([str(good)]) == readable(None) == gr.skip()
    assert len(told) == 2
