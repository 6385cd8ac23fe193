"""The tab Grid: from its fields to a sheet, its single pictures and their files; names resolve among installed ones only."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from latentpipe.engine.pipeline_cache import PipelineCache
from latentpipe.engine.xy_grid.plot import read_grid
from latentpipe.pipelines.metadata import recipe
from latentpipe.ui import grid
from latentpipe.ui.state import App

VISITOR = SimpleNamespace(session_hash="one")


@pytest.fixture
def app(installed: str, tmp_path: Path) -> Iterator[App]:
    """An interface that offers the tiny model and keeps its pictures."""
    app = App(model=installed, out=tmp_path / "out", models=PipelineCache(device="cpu"))
    yield app
    app.close()


@pytest.fixture
def page(app: App) -> Any:
    """The tab alone."""
    with gr.Blocks() as page:
        grid.build(app)
    return page


def handler(page: Any, elem_id: str, event: str = "click") -> Any:
    """The handler of a component's event, and the fields that it reads."""
    for each in page.fns.values():
        for block, name in each.targets:
            if name == event and page.blocks[block].elem_id == elem_id:
                return each
    raise AssertionError(f"no handler for {event} of {elem_id}")


def filled(page: Any, **changes: Any) -> dict[Any, Any]:
    """The fields of the form with their values, by label or by elem_id."""
    values = {field: field.value for field in handler(page, "lp-grid-run").inputs}
    for field in values:
        for key, value in changes.items():
            if field.elem_id == f"lp-grid-{key}" or field.label == key:
                values[field] = value
    return values


def drawn(page: Any, values: dict[Any, Any]) -> list[dict[str, Any]]:
    """What the handler sends to the browser, by elem_id."""
    sent = handler(page, "lp-grid-run").fn(values, VISITOR)
    return [{block.elem_id: value for block, value in update.items()} for update in sent]


def test_a_grid_with_its_single_pictures_and_a_copy_in_the_folder(app: App, page: Any, tmp_path: Path) -> None:
    changes = {"x": "Seed", "x-values": "1, 2", "y": "Guidance", "y-values": "1, 2", "Steps": 2, "Seed": 3}
    values = filled(page, prompt="red circle", **changes)
    *before, last = drawn(page, values)
    assert any("<progress" in str(update) for update in before)
    path = last["lp-grid-sheet"]["value"]
    assert "4 pictures" in last["lp-grid-status"]
    assert last["lp-grid-sheet"]["alt_text"] == (
        "Grid of 'red circle'; from left to right seed: 1, 2; from top to bottom guidance: 1, 2"
    )
    kept = read_grid(Path(path))
    assert [cell.guidance for cell in kept.cells if cell] == [1.0, 1.0, 2.0, 2.0]
    single = last["lp-grid-single"]
    assert [caption for _, caption in single] == [f"seed {s}, guidance {g}" for g in (1, 2) for s in (1, 2)]
    assert [recipe.read(Path(path)) for path, _ in single] == kept.cells
    copies = list((tmp_path / "out").rglob("*.png"))
    assert [copy.read_bytes() for copy in copies] == [Path(path).read_bytes()]
    app.close()
    assert not Path(path).exists()


def test_vae_names_are_installed_ones(app: App, page: Any, vae_folder: Path) -> None:
    for name in (str(vae_folder), "../tiny", "/etc/passwd"):
        for changes in ({"x": "VAE", "x-values": name}, {"VAE": name}):
            with pytest.raises(gr.Error, match="is installed"):
                drawn(page, filled(page, **changes))


def test_lora_and_model_names_are_installed_ones(page: Any) -> None:
    for changes in ({"x": "LoRA weight", "LoRA along X": "../flat"}, {"Model": "../tiny"}, {"x": "Colour"}):
        with pytest.raises(gr.Error, match=r"is installed|no axis 'Colour'"):
            drawn(page, filled(page, **changes))


def test_nothing_along_x_is_a_sentence(page: Any) -> None:
    with pytest.raises(gr.Error, match="Nothing varies along X"):
        drawn(page, filled(page, x="nothing"))


def test_stop_keeps_what_is_done(app: App, page: Any) -> None:
    """Stop while the third picture is drawn: two are kept, and the visitor is told."""
    sent = handler(page, "lp-grid-run").fn(filled(page, prompt="red circle", y="nothing", Steps=30), VISITOR)
    last: dict[str, Any] = {}
    for update in sent:
        last = {block.elem_id: value for block, value in update.items()}
        if "picture 3 of 3" in str(last) or "picture 2 of 3" in str(last):
            assert app.jobs.stop(SimpleNamespace(session_hash="another")) == 0  # a visitor stops one's own jobs only
            app.jobs.stop(VISITOR)
    assert last["lp-grid-status"].count("Stopped: ") == 1
    kept = read_grid(Path(last["lp-grid-sheet"]["value"]))
    assert 1 <= sum(cell is not None for cell in kept.cells) == len(last["lp-grid-single"]) < 3
    assert not app.jobs._tokens


def test_a_sheet_is_drawn_again_and_compared(page: Any, tmp_path: Path) -> None:
    values = filled(page, prompt="red circle", y="nothing", Steps=2)
    first = drawn(page, values)[-1]["lp-grid-sheet"]["value"]
    given = shutil.copy(first, tmp_path / "given.png")
    again = handler(page, "lp-grid-again").fn
    *_, last = ({block.elem_id: value for block, value in update.items()} for update in again(given, VISITOR))
    assert "Identical" in last["lp-grid-status"]
    with Image.open(first) as one, Image.open(last["lp-grid-sheet"]["value"]) as two:
        assert one.tobytes() == two.tobytes()
    Image.new("RGB", (8, 8)).save(given)
    with pytest.raises(gr.Error, match="carries no grid"):
        list(again(given, VISITOR))
    with pytest.raises(gr.Error, match="No picture was given"):
        list(again(None, VISITOR))


def test_choosing_what_varies_fills_in_values_that_work(page: Any) -> None:
    turn = handler(page, "lp-grid-x", "input").fn
    for kind in grid.NAMES:
        lora, text = turn(kind)
        assert lora["visible"] is (kind == "LoRA weight")
        assert text["value"]
        assert text["info"] == grid.HINTS[kind]
        grid.make_axis(grid.NAMES[kind], text["value"], "x" if kind == "LoRA weight" else "")
    assert turn("VAE")[1]["value"].split(", ")[0] == "built-in"


@pytest.mark.parametrize("example", grid.EXAMPLES, ids=lambda example: example[0])
def test_examples_are_axes_of_their_prompts(example: tuple[str, ...]) -> None:
    _, prompt, *sides = example
    for kind, text in zip(sides[::2], sides[1::2], strict=True):
        axis = grid.make_axis(grid.NAMES[kind], text, "flat" if kind == "LoRA weight" else "")
        assert kind != "Prompt word" or str(axis.values[0]) in prompt


def test_events_are_private_and_pictures_lossless(page: Any) -> None:
    assert {each.api_visibility for each in page.fns.values()} == {"private"}
    assert {block.format for block in page.blocks.values() if hasattr(block, "format")} == {"png"}
