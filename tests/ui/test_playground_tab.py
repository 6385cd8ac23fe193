"""The tab Playground: pictures in, pictures out; names and files that are wrong are told; another visitor's job goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from helpers import draw_shape
from PIL import Image

from latentpipe.engine.pipeline_cache import PipelineCache
from latentpipe.explore import playground as play
from latentpipe.ui import playground, playground_inputs
from latentpipe.ui.state import App

VISITOR = SimpleNamespace(session_hash="one")


@pytest.fixture(scope="module")
def models(model_folder: Path) -> PipelineCache:
    """Open models for all tests here: what is learned of them is kept."""
    return PipelineCache(device="cpu")


@pytest.fixture
def app(installed: str, models: PipelineCache, monkeypatch: pytest.MonkeyPatch) -> Iterator[App]:
    monkeypatch.setattr(play, "PICTURES", 20)
    app = App(model=installed, models=models)
    yield app
    app.close()


@pytest.fixture
def page(app: App) -> Any:
    """The tab alone."""
    with gr.Blocks() as page:
        playground.build(app)
    return page


@pytest.fixture
def paths(tmp_path: Path) -> tuple[str, str]:
    """Two pictures as files that a visitor has sent."""
    for colour in ("red", "blue"):
        draw_shape(colour, "circle", 64).save(tmp_path / f"{colour}.png")
    return str(tmp_path / "red.png"), str(tmp_path / "blue.png")


def handler(page: Any, elem_id: str, event: str = "click") -> Any:
    """The handler of a component's event, with the fields that it reads and writes."""
    for each in page.fns.values():
        for block, name in each.targets:
            if name == event and page.blocks[block].elem_id == elem_id:
                return each
    raise AssertionError(f"no handler for {event} of {elem_id}")


def values(fields: Any, **changes: Any) -> list[Any]:
    """What stands in fields, with changes by elem_id (its part after lp-play-) or label."""
    found = []
    for field in fields:
        key = (field.elem_id or "").removeprefix("lp-play-")
        found.append(changes.get(key, changes.get(field.label, field.value)))
    return found


def call(page: Any, elem_id: str, event: str = "click", **changes: Any) -> list[dict[str, Any]]:
    """What an event sends to the browser, by elem_id."""
    each = handler(page, elem_id, event)
    given = values(each.inputs, **changes)
    if each.inputs_as_dict:
        sent = each.fn(dict(zip(each.inputs, given, strict=True)), VISITOR)
        return [{block.elem_id: value for block, value in update.items()} for update in sent]
    return [dict(zip((block.elem_id for block in each.outputs), update, strict=True)) for update in each.fn(*given, VISITOR)]


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and first.tobytes() == second.tobytes()


def test_an_edit_is_decoded_live(app: App, page: Any, paths: tuple[str, str]) -> None:
    *_, last = call(page, "lp-play-share", "change", first=paths[0], second=paths[1], share=0.25, noise=0.5)
    pictures = [Image.open(path) for path in paths]
    wanted = play.edited_picture(app.pipe().stage, *pictures, play.Edit(share=0.25, noise=0.5))
    assert same(last["lp-play-live"]["value"], wanted)
    assert last["lp-play-live"]["alt_text"] == (
        "The first picture, decoded from its latents, with 25% of the second picture, noise 0.5."
    )
    assert handler(page, "lp-play-share", "change").trigger_mode == "always_last"


def test_without_a_picture_it_says_what_to_do(page: Any) -> None:
    (only,) = call(page, "lp-play-share", "change", share=0.5)
    assert playground.EMPTY in only["lp-play-status"]
    with pytest.raises(gr.Error, match="No picture was given"):
        call(page, "lp-play-traverse")
    with pytest.raises(gr.Error, match="No picture was given"):
        call(page, "lp-play-interpolate")


def test_directions_are_found_and_moved_along(app: App, page: Any, paths: tuple[str, str]) -> None:
    *before, last = call(page, "lp-play-learn")
    assert any("<progress" in str(update) for update in before)
    names = last["lp-play-one"]["choices"]
    assert names == ["none", *play.directions(app.pipe().stage)]
    assert last["lp-play-one"]["value"] == names[1]
    *_, moved = call(page, "lp-play-share", "change", first=paths[0], one=names[1], **{"Move along one": 1.5})
    wanted = play.edited_picture(app.pipe().stage, Image.open(paths[0]), None, play.Edit(moves={names[1]: 1.5}))
    assert same(moved["lp-play-live"]["value"], wanted)
    twice = {"one": names[1], "other": names[1], "Move along one": 1.0, "Move along other": 0.5}
    *_, moved = call(page, "lp-play-share", "change", first=paths[0], **twice)
    assert same(moved["lp-play-live"]["value"], wanted)  # the same direction in both places: the sum
    with pytest.raises(gr.Error, match="No direction 'warmth'"):
        call(page, "lp-play-share", "change", first=paths[0], one="warmth", **{"Move along one": 1.5})


@pytest.mark.parametrize("what", ["Rows", "Plane"])
@pytest.mark.slow
def test_sheets(app: App, page: Any, paths: tuple[str, str], what: str) -> None:
    *_, last = call(page, "lp-play-traverse", first=paths[0], what=what, **{"Pictures in a row": 3, "As far as": 2.0})
    stage = app.pipe().stage
    names = play.directions(stage)
    with Image.open(last["lp-play-sheet"]["value"]) as sheet, Image.open(paths[0]) as picture:
        wanted = (
            play.traversal(stage, picture, names[: playground.ROWS], 3, 2.0)
            if what == "Rows"
            else play.plane(stage, picture, (names[0], names[1]), 3, 2.0)
        )
        assert same(sheet, wanted)
    assert last["lp-play-sheet-download"]["value"] == last["lp-play-sheet"]["value"]
    assert last["lp-play-sheet"]["alt_text"]


@pytest.mark.parametrize("form", ["Strip", "Grid", "Clip"])
@pytest.mark.parametrize("ends", ["Pictures", "Prompts"])
@pytest.mark.slow
def test_paths(app: App, page: Any, paths: tuple[str, str], form: str, ends: str) -> None:
    given = {"first": paths[0], "second": paths[1], "ends": ends, "form": form, "count": 3, "Steps": 2, "way": "lerp"}
    *_, last = call(page, "lp-play-interpolate", **given)
    path = last["lp-play-between"]["value"]
    assert path.endswith("clip.gif" if form == "Clip" else "sheet.png")
    with Image.open(path) as shown:
        rows = 1 if form == "Strip" else 2 if ends == "Pictures" else 3
        unit = 64 if ends == "Pictures" else 16
        if form == "Clip":
            assert shown.n_frames == 4
        else:
            assert shown.size == (112 + 3 * (unit + 3), 18 + rows * (unit + 3))
    assert last["lp-play-between"]["alt_text"].startswith("3 pictures from ")


def test_names_are_installed_ones_and_files_are_pictures(page: Any, paths: tuple[str, str], tmp_path: Path) -> None:
    for elem_id, event in (("lp-play-share", "change"), ("lp-play-traverse", "click"), ("lp-play-interpolate", "click")):
        with pytest.raises(gr.Error, match="is installed"):
            call(page, elem_id, event, first=paths[0], second=paths[1], vae="../../etc")
        (tmp_path / "text.png").write_text("no picture")
        with pytest.raises(gr.Error, match="cannot be read as a picture"):
            call(page, elem_id, event, first=str(tmp_path / "text.png"), second=paths[1])


def test_values_that_no_slider_sends_are_told(page: Any, paths: tuple[str, str]) -> None:
    both = {"first": paths[0], "second": paths[1]}
    for elem_id, event, changes in (
        ("lp-play-share", "change", {"share": 7.0}),
        ("lp-play-share", "change", {"noise": float("nan")}),
        ("lp-play-traverse", "click", {"Pictures in a row": 500}),
        ("lp-play-interpolate", "click", {"count": 10_000}),
        ("lp-play-interpolate", "click", {"way": "../x"}),
        ("lp-play-interpolate", "click", {"ends": "Prompts", "Steps": 10**9}),
        ("lp-play-interpolate", "click", {"form": "Grid", "count": 48}),
    ):
        with pytest.raises(gr.Error, match=r"expected|at most"):
            call(page, elem_id, event, **(both | changes))


def test_stop_ends_ones_own_job_only(app: App, page: Any, paths: tuple[str, str]) -> None:
    each = handler(page, "lp-play-interpolate")
    given = values(each.inputs, ends="Prompts", count=20, Steps=30)
    last: dict[str, Any] = {}
    for update in each.fn(dict(zip(each.inputs, given, strict=True)), VISITOR):
        last = {block.elem_id: value for block, value in update.items()}
        assert app.jobs.stop(SimpleNamespace(session_hash="another")) == 0
        app.jobs.stop(VISITOR)
    assert "No path yet" in last["lp-play-between-status"]
    assert not app.jobs._tokens


def test_what_takes_long_has_a_stop_beside_it(
    app: App, page: Any, paths: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(gr, "Info", lambda sentence, **_: told.append(sentence))
    events = handler(page, "lp-play-learn").fn("Built-in", VISITOR)
    next(events)
    handler(page, "lp-play-stop").fn(VISITOR)
    assert "No directions" in list(events)[-1][0]
    assert told == ["Stopping ...", "Stopped."]


def test_examples_are_pictures_of_the_bank(app: App) -> None:
    for pair in playground_inputs.PAIRS:
        for path, caption in zip(playground_inputs._pair(app, pair), pair, strict=True):
            with Image.open(path) as picture:
                assert same(picture, play.bank_picture(caption))


def test_another_vae_may_be_one_that_fits_no_model(app: App, page: Any, paths: tuple[str, str], own_home: Path) -> None:
    from helpers import tiny_vae

    from latentpipe.checkpoints.vae_io import save_vae

    save_vae(tiny_vae(seed=9), own_home / "vae" / "alien", {"data": "none"})
    *_, last = call(page, "lp-play-share", "change", first=paths[0], vae="alien")
    assert last["lp-play-live"]["visible"]
    assert app.models.stage("alien") is app.models.stage("alien")  # opened once


def test_events_are_private_and_pictures_lossless(page: Any) -> None:
    assert {each.api_visibility for each in page.fns.values()} == {"private"}
    assert {block.format for block in page.blocks.values() if hasattr(block, "format")} == {"png"}
