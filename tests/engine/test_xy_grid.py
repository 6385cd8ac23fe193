"""X/Y plots: each picture is the one drawn alone, the dear axis runs outermost, a sheet is drawn again from its own file."""

from __future__ import annotations

import json
import threading
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_vae
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latentpipe import LatentPipeline, UserError
from latentpipe.checkpoints.vae_io import save_vae
from latentpipe.cli.app import main
from latentpipe.engine.jobs import Cancelled, Done, run_job
from latentpipe.engine.pipeline_cache import PipelineCache
from latentpipe.engine.xy_grid.axes import KINDS, MAX_CELLS, Axis, make_axis, read_axis
from latentpipe.engine.xy_grid.plot import CHUNK, GridRecipe, plot, read_grid, redraw
from latentpipe.engine.xy_grid.sheet import EMPTY, enlarged
from latentpipe.lora.adapter import Lora, LoraLayer
from latentpipe.lora.state_dict.io import card, write_lora
from latentpipe.pipelines.lora_manager import LoraManager
from latentpipe.pipelines.metadata import recipe

FAST: dict[str, Any] = {"num_inference_steps": 2, "seed": 5}


def same(first: Image.Image, second: Image.Image) -> bool:
    """Whether two pictures have the same pixels."""
    return first.size == second.size and first.tobytes() == second.tobytes()


def opener(pipe: LatentPipeline) -> Any:
    """An `open_pipe` that knows the model's own VAE alone."""

    def open_pipe(vae: str | None) -> LatentPipeline:
        assert vae is None
        return pipe

    return open_pipe


@pytest.fixture
def adapter(own_home: Path, pipe: LatentPipeline) -> str:
    """The name of an installed LoRA that changes the tiny denoiser's pictures."""
    weight = pipe.host.unet.conv_in.weight
    noise = torch.Generator().manual_seed(0)
    down = torch.randn(2, *weight.shape[1:], generator=noise) * 0.2
    up = torch.randn(len(weight), 2, 1, 1, generator=noise) * 0.2
    lora = Lora({"unet": {"conv_in": LoraLayer("lora", {"lora_A": down, "lora_B": up}, 2, 2.0)}}, "bright")
    (own_home / "lora").mkdir()
    write_lora(lora, own_home / "lora" / "bright.safetensors", metadata=card(lora, title="bright", base_hashes=pipe.base))
    return "bright"


@pytest.fixture
def models(installed: str, own_home: Path) -> PipelineCache:
    """The installed model, with two VAEs of its space (their decoders differ) and one of another space beside it."""
    for name, factor in (("soft", 0.97), ("hard", 1.03)):
        vae = tiny_vae()
        with torch.no_grad():
            vae.decoder.conv_out.weight *= factor
        save_vae(vae, own_home / "vae" / name, {"data": "none"})
    save_vae(tiny_vae(seed=9), own_home / "vae" / "alien", {"data": "none"})
    return PipelineCache(device="cpu")


# --- values ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20, unique=True))
def test_whole_numbers_are_read_as_written(numbers: list[int]) -> None:
    axis = make_axis("seed", " , ".join(map(str, numbers)))
    assert list(axis.values) == numbers
    assert axis.labels == [str(number) for number in numbers]
    assert read_axis(f"seed={','.join(axis.labels)}") == axis


@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(1, 300))
def test_a_range_of_whole_numbers_is_pythons_with_its_end(first: int, last: int, step: int) -> None:
    step = step if last >= first else -step
    wanted = list(range(first, last + (1 if step > 0 else -1), step))
    if len(wanted) > MAX_CELLS:
        with pytest.raises(UserError, match="at most 100"):
            make_axis("steps", f"{first}:{last}:{step}")
        return
    assert list(make_axis("steps", f"{first}:{last}:{step}").values) == wanted


@given(st.integers(0, 300), st.integers(0, 50), st.integers(1, 100))
def test_a_range_of_numbers_has_no_rounding_in_it(first: int, count: int, step: int) -> None:
    """In hundredths: each value is the float nearest to the exact sum, as 0.1 + 0.2 is not."""
    text = ":".join(str(Decimal(number) / 100) for number in (first, first + count * step, step))
    values = make_axis("guidance", text).values
    assert [Fraction(f"{value:.6f}") for value in values] == [Fraction(first + index * step, 100) for index in range(count + 1)]
    assert list(values) == [float(f"{value:.6f}") for value in values]


@given(st.sampled_from(KINDS), st.text(max_size=40), st.text(max_size=5))
def test_any_text_is_an_axis_or_one_sentence(kind: str, text: str, name: str) -> None:
    try:
        axis = make_axis(kind, text, name)
    except UserError:
        return  # any other exception fails the test
    assert 1 <= len(axis.values) <= MAX_CELLS
    assert len(set(axis.values)) == len(axis.values) == len(axis.labels)
    assert Axis.model_validate_json(axis.model_dump_json()) == axis


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed", "no values"),
        ("seed=", "no values"),
        ("colour=1", "no axis 'colour'"),
        ("seed=-1", "0 to 4294967295"),
        ("seed=1.5", "no whole number"),
        ("seed=1_0", "no number"),
        ("seed=99999999999", "too many digits"),
        ("guidance=1:2.00000001", "too many digits"),
        ("seed=٣", "no number"),
        ("seed=nan", "no number"),
        ("seed=1,,2", "no number"),
        ("seed=1,1", "'1' twice"),
        ("seed=1:2:0", "leads nowhere"),
        ("seed=2:1", "leads nowhere"),
        ("seed=1:4000000000", "4,000,000,000 values"),
        ("steps=0", "1 to 1000"),
        ("guidance=101", "0 to 100"),
        ("guidance=1e3", "no number"),
        ("lora=1", "expected lora:NAME"),
        ("lora:x=11", "-10 to 10"),
        ("seed:x=1", "no name elsewhere"),
        ("scheduler=heun", "no scheduler 'heun'"),
        ("prompt=red,,blue", "empty value"),
        ('prompt="red', "cannot be read"),
        ("vae=" + ",".join("abcdefghi"), "at most 8"),
        ("seed=" + "1" * 30_000, "at most 20,000"),
    ],
)
def test_wrong_axes_are_told(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_axis(text)


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=10, unique=True))
def test_quoted_values_are_taken_as_they_are(texts: list[str]) -> None:
    quoted = " , ".join('"' + text.replace('"', '""') + '"' for text in texts)
    assert list(make_axis("prompt", quoted).values) == texts


def test_values_may_hold_commas_in_quotes() -> None:
    assert read_axis('prompt=red, "blue, dark" ,green').values == ("red", "blue, dark", "green")
    assert read_axis("guidance=1:2:0.5, 7").values == (1.0, 1.5, 2.0, 7.0)


# --- pictures -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.numeric
def test_each_picture_is_the_one_drawn_alone(pipe: LatentPipeline, adapter: str) -> None:
    for x, y, alone in (
        ("seed=1,2", "guidance=1,4", lambda x, y: pipe("red circle", seed=x, guidance_scale=y, num_inference_steps=2)),
        ("steps=1,3", "scheduler=ddim,euler", lambda x, y: pipe("red circle", seed=5, num_inference_steps=x, scheduler=y)),
        ("prompt=red,blue,a (green:1.2)", None, lambda x, _: pipe(f"{x} circle", seed=5, num_inference_steps=2)),
        (
            "lora:bright=0,0.5,1",
            "prompt=red,blue",
            lambda x, y: pipe(f"{y} circle <lora:bright:{x}>", seed=5, num_inference_steps=2),
        ),
    ):
        axes = read_axis(x), read_axis(y) if y else None
        grid = plot(opener(pipe), "red circle", *axes, **FAST)
        pairs = [(one, other) for other in (axes[1].values if axes[1] else [None]) for one in axes[0].values]
        for picture, (one, other) in zip(grid.pictures, pairs, strict=True):
            (single,) = alone(one, other)
            assert picture is not None
            assert same(picture.image, single.image), (x, one, other)
            assert picture.recipe == single.recipe
    assert len({picture.image.tobytes() for picture in grid.pictures if picture}) == 6
    assert not pipe.loras.weights


def test_the_sheet_holds_the_pictures_pixel_by_pixel(pipe: LatentPipeline) -> None:
    grid = plot(opener(pipe), "red circle", read_axis("seed=1,2,3"), read_axis("guidance=1,3"), **FAST)
    width, height = pipe.native_size
    times = enlarged((width, height))
    sheet = grid.image.tobytes()
    stride = grid.image.width * 3
    for picture in grid.pictures:
        assert picture is not None
        rows = picture.image.resize((width * times, height * times), Image.Resampling.NEAREST)
        row = rows.crop((0, 0, rows.width, 1)).tobytes()
        places = [place for place in range(0, len(sheet), 3) if sheet.startswith(row, place)]
        assert any(
            all(
                sheet[place + stride * y : place + stride * y + len(row)] == rows.crop((0, y, rows.width, y + 1)).tobytes()
                for y in range(rows.height)
            )
            for place in places
        )
    assert grid.captions[0] == "seed 1, guidance 1"
    assert grid.captions[-1] == "seed 3, guidance 3"


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.slow
def test_the_dear_axis_runs_outermost(models: PipelineCache, adapter: str, turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever X and Y say: each VAE is opened once, LoRA weights change once for each VAE, cheap things vary within."""
    opened: list[str | None] = []
    switched: list[dict[str, float]] = []
    drawn: list[str | None] = []

    def open_pipe(vae: str | None) -> LatentPipeline:
        opened.append(vae)
        return models.open("tiny", vae)

    axes = [read_axis("vae=built-in,soft,hard"), read_axis("lora:bright=0,0.5,1")]
    axes = axes[::-1] if turned else axes
    call, switch = LatentPipeline.__call__, LoraManager.set

    def watch_call(self: LatentPipeline, *given: Any, **named: Any) -> Any:
        drawn.append(self.vae_name)
        return call(self, *given, **named)

    def watch_switch(self: LoraManager, weights: Any, *rest: Any) -> None:
        switched.append(dict(weights))
        switch(self, weights, *rest)

    monkeypatch.setattr(LatentPipeline, "__call__", watch_call)
    plot(open_pipe, "red circle", *axes, **FAST)
    assert opened == [None, "soft", "hard"]
    assert drawn == [None] * 3 + ["soft"] * 3 + ["hard"] * 3

    drawn.clear()
    monkeypatch.setattr(LoraManager, "set", watch_switch)
    x, y = read_axis("seed=1,2,3"), read_axis("lora:bright=0.5,1")
    plot(open_pipe, "red circle", *((y, x) if turned else (x, y)), **FAST)
    on = [weights["bright"] for weights in switched if weights.get("bright")]
    assert on == [0.5, 1.0]  # not once for each of the six pictures


def test_a_vae_that_does_not_fit_is_refused_before_anything_is_drawn(
    models: PipelineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LatentPipeline, "draw", lambda *_: pytest.fail("something was drawn"))
    with pytest.raises(UserError, match=r"VAE alien was not put in\.\n.*other space"):
        plot(lambda vae: models.open("tiny", vae), "x", read_axis("vae=built-in,soft,alien"), read_axis("seed=1,2"), **FAST)


@pytest.mark.parametrize(
    ("x", "y", "settings", "words"),
    [
        ("seed=1,2", "seed=3,4", {}, "Both axes are seed"),
        ("seed=1:100", "steps=1,2", {}, "200 pictures; at most 100"),
        ("prompt=blue,red", None, {}, "does not hold 'blue'"),
        ("prompt=red,(green:9)", None, {}, "weight of 9"),
        ("prompt=red,<lora:nobody>", None, {}, "No LoRA 'nobody' is installed"),
        ("prompt=r," + "x" * 19_990, None, {}, "too long"),
        ("lora:nobody=0,1", None, {}, "No LoRA 'nobody' is installed"),
        ("lora:../bright=0,1", None, {}, "No LoRA '../bright' is installed"),
        ("seed=1", None, {"size": (9, 16)}, "multiples of"),
        ("seed=1", None, {"guidance_scale": 1000.0}, "guidance_scale is 1000"),
        ("seed=1", None, {"image": None}, "takes no image"),
        ("guidance=1", None, {"seed": -1}, "seed"),
        ("guidance=1", None, {"num_inference_steps": "many"}, "num_inference_steps"),
    ],
)
def test_mistakes_are_told_before_anything_is_drawn(
    pipe: LatentPipeline, x: str, y: str | None, settings: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LatentPipeline, "draw", lambda *_: pytest.fail("something was drawn"))
    with pytest.raises(UserError, match=words):
        plot(opener(pipe), "red circle", read_axis(x), read_axis(y) if y else None, **(FAST | settings))


def test_a_stop_keeps_the_pictures_that_are_done(pipe: LatentPipeline, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []

    def report(done: int, total: int, what: str) -> None:
        calls.append((done, total, what))
        if done == 5:
            raise Cancelled("stopped")

    axes = read_axis("seed=1,2"), read_axis("guidance=1,3")
    grid = plot(opener(pipe), "red circle", *axes, report=report, **FAST)
    whole = plot(opener(pipe), "red circle", *axes, **FAST)
    assert [picture is not None for picture in grid.pictures] == [True, True, False, False]
    assert calls[1:] == [(step, 8, f"picture {(step + 1) // 2} of 4") for step in range(1, 6)]
    assert grid.image.size == whole.image.size
    areas = [{colour: n for n, colour in one.image.getcolors(2**20)}.get(EMPTY, 0) for one in (grid, whole)]
    assert areas[0] - areas[1] > 2 * 0.8 * (16 * enlarged((16, 16))) ** 2  # two empty places, but for the word in them
    half = grid.image.height // 2
    assert grid.image.crop((0, 0, 999, half)).tobytes() == whole.image.crop((0, 0, 999, half)).tobytes()
    kept = read_grid(grid.save(tmp_path / "stopped.png"))
    assert [cell is not None for cell in kept.cells] == [True, True, False, False]
    again = plot(opener(pipe), "red circle", *axes, **FAST)
    assert same(again.image, whole.image)  # nothing of the stop is left in the pipeline


def test_a_stop_before_the_first_picture_has_nothing_to_keep(pipe: LatentPipeline) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        list(run_job(lambda report: plot(opener(pipe), "x", read_axis("seed=1"), report=report, **FAST), cancel))


def test_it_runs_as_a_job(pipe: LatentPipeline) -> None:
    *_, last = run_job(lambda report: plot(opener(pipe), "x", read_axis("seed=1,2"), report=report, num_inference_steps=2))
    assert isinstance(last, Done)
    assert [picture.recipe.seed for picture in last.result.pictures] == [1, 2]
    assert last.result.recipe.base.seed <= recipe.MAX_SEED


# --- the file -------------------------------------------------------------------------------------------------


def test_a_sheet_is_drawn_again_from_its_own_file(models: PipelineCache, adapter: str, tmp_path: Path) -> None:
    grid = plot(
        lambda vae: models.open("tiny", vae), "red circle", read_axis("vae=built-in,soft"), read_axis("lora:bright=0,1"),
        negative_prompt="bar", guidance_scale=2.5, guidance_interval=(0.1, 0.8), scheduler="euler", size=(16, 16), **FAST,
    )  # fmt: skip
    path = grid.save(tmp_path / "grid.png")
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    assert read_grid(path) == grid.recipe
    again = redraw(path, PipelineCache(device="cpu").open)
    assert same(again.image, grid.image)
    assert again.recipe == grid.recipe
    with Image.open(path) as stored:
        assert same(stored.convert("RGB"), grid.image)
        assert json.loads(stored.info[CHUNK])["version"] == 1


def test_a_stopped_sheet_is_finished(models: PipelineCache, tmp_path: Path) -> None:
    def report(done: int, total: int, what: str) -> None:
        if done == 3:
            raise Cancelled

    axis = read_axis("seed=1,2,3")
    stopped = plot(lambda vae: models.open("tiny", vae), "x", axis, report=report, **FAST)
    whole = plot(lambda vae: models.open("tiny", vae), "x", axis, **FAST)
    assert same(redraw(stopped.save(tmp_path / "a.png"), models.open).image, whole.image)


def write_chunk(path: Path, text: str) -> Path:
    recipe.save_png(Image.new("RGB", (8, 8)), path, texts={CHUNK: text})
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2"),
        ({"cells": []}, "damaged"),
        ({"cells": None}, "damaged in: cells"),
        ({"extra": 1}, "damaged in: extra"),
        ({"x": {"kind": "seed", "values": ["1"], "name": ""}}, "damaged in: x"),
        ({"x": {"kind": "seed", "values": [True, False], "name": ""}}, "damaged in: x"),
        ({"x": {"kind": "seed", "values": [1, 1], "name": ""}}, "damaged in: x"),
        ({"x": {"kind": "seed", "values": list(range(101)), "name": ""}}, "damaged in: x"),
        ({"x": {"kind": "guidance", "values": [float("nan"), 1.0], "name": ""}}, "not JSON .NaN"),
        ({"model": "../../etc"}, "names the model '../../etc', which is not installed"),
        ({"model": "/"}, "which is not installed"),
    ],
)
def test_damaged_and_hostile_recipes_open_nothing(
    pipe: LatentPipeline, installed: str, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    grid = plot(opener(pipe), "x", read_axis("seed=1,2"), **FAST)
    raw = grid.recipe.model_dump(mode="json") | {"model": "tiny"} | change
    path = write_chunk(tmp_path / "grid.png", json.dumps(raw))
    with pytest.raises(UserError, match=words):
        redraw(path, lambda *_: pytest.fail("a model was opened"))


def test_a_path_in_a_recipe_is_no_vae(pipe: LatentPipeline, installed: str, vae_folder: Path, tmp_path: Path) -> None:
    raw = plot(opener(pipe), "x", read_axis("seed=1"), **FAST).recipe.model_dump(mode="json") | {"model": "tiny"}
    raw["base"]["vae"] = str(vae_folder)
    with pytest.raises(UserError, match="which is not installed"):
        redraw(write_chunk(tmp_path / "grid.png", json.dumps(raw)), lambda *_: pytest.fail("a model was opened"))


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "[" * 100_000])
def test_text_that_is_no_recipe(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError):
        read_grid(write_chunk(tmp_path / "grid.png", text))


def test_other_weights_are_told(models: PipelineCache, own_home: Path, tmp_path: Path) -> None:
    path = plot(lambda vae: models.open("tiny", vae), "x", read_axis("vae=soft"), **FAST).save(tmp_path / "grid.png")
    vae = tiny_vae()
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 0.98
    save_vae(vae, own_home / "vae" / "soft", {"data": "none"})
    with pytest.raises(UserError, match="other weights: vae differ"):
        redraw(path, models.open)


def test_a_picture_is_no_sheet_and_a_sheet_no_picture(pipe: LatentPipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="carries no grid"):
        read_grid(pipe("x", seed=1, num_inference_steps=1)[0].save(tmp_path / "one.png"))
    with pytest.raises(UserError, match="carries no latentpipe recipe"):
        recipe.read(plot(opener(pipe), "x", read_axis("seed=1"), **FAST).save(tmp_path / "grid.png"))


def test_inspect_prints_the_recipe_of_a_sheet(pipe: LatentPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = plot(opener(pipe), "red circle", read_axis("seed=1,2"), **FAST)
    assert main(["inspect", str(grid.save(tmp_path / "grid.png"))]) == 0
    assert GridRecipe.model_validate_json(capsys.readouterr().out) == grid.recipe


# --- the verb -------------------------------------------------------------------------------------------------


def test_the_verb_writes_one_file_and_prints_its_path(
    models: PipelineCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid.png"
    options = ["--x", "seed=1,2", "--y", "vae=built-in,soft", "--steps", "2", "--model", "tiny", "--device", "cpu"]
    assert main(["grid", "red circle", *options, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    assert same(redraw(out, models.open).image, Image.open(out).convert("RGB"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--x", "seed"], "has no values"),
        (["--x", "vae=../etc"], "No VAE '../etc'"),
        (["--x", "seed=1", "--out", "grid.jpg"], "ends in .png"),
        (["--x", "seed=1", "--size", "big"], "--size is 'big'"),
    ],
)
def test_the_verb_tells_mistakes_and_writes_nothing(
    installed: str, options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["grid", "x", "--model", "tiny", "--device", "cpu", *options]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
