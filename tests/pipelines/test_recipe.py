"""Recipes: written into a PNG, read back, and readable by A1111's own rule."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import draw_shape
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from latentpipe import Recipe, UserError
from latentpipe.pipelines.metadata import recipe
from latentpipe.pipelines.metadata.recipe import Machine, Source, StatedModel

MACHINE = Machine(device="cpu", dtype="float32", threads=1, processor="x", versions={"torch": "2"})
TEXT = st.text(max_size=60)  # any unicode but surrogates, which no encoding holds


def some_recipe(**changes: Any) -> Recipe:
    """A recipe with everything in it."""
    plain: dict[str, Any] = {
        "prompt": "red circle", "negative": "bar", "seed": 7, "steps": 20, "guidance": 3.5, "guidance_interval": (0.1, 0.9),
        "scheduler": "ddim", "width": 64, "height": 48, "batch_index": 1, "batch_size": 3, "model": "emoji", "vae": "other",
        "source": Source(sha256="ab" * 32, strength=0.4), "stopped_after": 4,
        "hashes": {"unet": "12" * 32, "vae": "34" * 32, "text_encoder": "56" * 32}, "machine": MACHINE,
    }  # fmt: skip
    return Recipe(**(plain | changes))


def a1111(text: str) -> tuple[str, str, dict[str, str]]:
    """A1111's own reader (modules/infotext_utils.py, parse_generation_parameters): prompt, negative, settings."""
    pattern = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    assert len(pattern.findall(last)) >= 3
    prompt = negative = ""
    done_with_prompt = False
    for line in lines:
        line = line.strip()
        if line.startswith("Negative prompt:"):
            done_with_prompt = True
            line = line[16:].strip()
        if done_with_prompt:
            negative += ("" if negative == "" else "\n") + line
        else:
            prompt += ("" if prompt == "" else "\n") + line
    pairs = {key: json.loads(value) if value[:1] == value[-1:] == '"' else value for key, value in pattern.findall(last)}
    return prompt, negative, pairs


def write_chunk(path: Path, text: str) -> Path:
    """A picture that carries `text` for a recipe."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(recipe.CHUNK, text)
    draw_shape("red", "bar").save(path, pnginfo=info)
    return path


@given(prompt=TEXT, negative=TEXT, seed=st.integers(3, recipe.MAX_SEED), guidance=st.floats(0, 100), steps=st.integers(1, 1000))
def test_a_recipe_survives_the_png(tmp_path_factory: pytest.TempPathFactory, **values: Any) -> None:
    path = tmp_path_factory.mktemp("recipe") / "x.png"
    picture, written = draw_shape("green", "circle"), some_recipe(**values)
    recipe.save_png(picture, path, written)
    assert recipe.read(path) == written
    with Image.open(path) as stored:
        assert np.array_equal(np.asarray(stored), np.asarray(picture))
        assert stored.info["parameters"] == recipe.a1111_text(written)


def test_the_defaults_survive_the_png(tmp_path: Path) -> None:
    written = some_recipe(negative="", vae=None, source=None, stopped_after=None, batch_index=0, batch_size=1)
    recipe.save_png(draw_shape("green", "circle"), tmp_path / "x.png", written)
    assert recipe.read(tmp_path / "x.png") == written


@given(prompt=TEXT, negative=TEXT, model=st.text(min_size=1, max_size=20))
def test_a1111_reads_the_parameters(prompt: str, negative: str, model: str) -> None:
    lines = [line.strip() for line in f"{prompt}\n{negative}".split("\n")]
    assume(not any(line.startswith("Negative prompt:") for line in lines))  # no reader can tell these
    assume(prompt.strip())
    assume("\n" not in prompt and "\n" not in negative)
    assume(not any(char in model for char in '"\\') and model.strip() == model)
    found = a1111(recipe.a1111_text(some_recipe(prompt=prompt, negative=negative, model=model)))
    assert found[0] == prompt.strip()
    assert found[1] == negative.strip()
    pairs = found[2]
    assert (pairs["Steps"], pairs["CFG scale"], pairs["Seed"], pairs["Size"]) == ("20", "3.5", "7", "64x48")
    assert pairs["Sampler"] == "ddim"
    assert pairs["Model hash"] == "12" * 5
    assert pairs["Model"] == model
    assert pairs["Denoising strength"] == "0.4"


def test_a_prompt_of_several_lines_stays_readable() -> None:
    found = a1111(recipe.a1111_text(some_recipe(prompt="one: 1,\ntwo", negative="three\nfour")))
    assert found[:2] == ("one: 1,\ntwo", "three\nfour")


def test_a_picture_without_a_recipe_can_be_saved(tmp_path: Path) -> None:
    recipe.save_png(draw_shape("red", "bar"), tmp_path / "x.png")
    with pytest.raises(UserError, match="carries no latentpipe recipe"):
        recipe.read(tmp_path / "x.png")


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as a picture"):
        recipe.read(tmp_path / "x.png")


def test_missing_folders_and_truncated_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such picture"):
        recipe.read(tmp_path / "x.png")
    with pytest.raises(UserError, match="is a folder"):
        recipe.read(tmp_path)
    recipe.save_png(draw_shape("red", "bar", 64), tmp_path / "x.png", some_recipe())
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(whole[:-60])
    with pytest.raises(UserError, match="cannot be read"):
        recipe.read(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"steps": 0}, "steps"),
        ({"steps": 10**9}, "steps"),
        ({"guidance": 1e9}, "guidance"),
        ({"width": 0}, "width"),
        ({"height": 10**6}, "height"),
        ({"guidance_interval": [0.0, 2.0]}, "guidance_interval"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "x" * 30_000}, "prompt"),
        ({"surplus": 1}, "surplus"),
        ({"machine": {}}, "machine"),
        ({"hashes": None}, "hashes"),
        ({"batch_index": 5, "batch_size": 2}, "batch_index|recipe"),
        ({"seed": 0, "batch_index": 1, "batch_size": 2}, "seed|recipe"),
        ({"batch_size": 10**6}, "batch_size"),
        ({"stopped_after": -1}, "stopped_after"),
        ({"source": {"sha256": "a", "strength": 3}}, "source.strength"),
    ],
)
def test_a_damaged_recipe_is_refused(tmp_path: Path, change: dict[str, Any], place: str) -> None:
    raw = json.loads(some_recipe().model_dump_json()) | change
    with pytest.raises(UserError, match=rf"its recipe is damaged in: .*({place})"):
        recipe.read(write_chunk(tmp_path / "x.png", json.dumps(raw)))


def test_a_guidance_that_is_no_number_is_refused(tmp_path: Path) -> None:
    text = some_recipe().model_dump_json().replace('"guidance":3.5', '"guidance":NaN')
    assert "NaN" in text
    with pytest.raises(UserError, match=r"guidance|JSON"):
        recipe.read(write_chunk(tmp_path / "x.png", text))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(tmp_path: Path, version: Any) -> None:
    raw = json.loads(some_recipe().model_dump_json()) | {"version": version}
    with pytest.raises(UserError, match="reads version 1"):
        recipe.read(write_chunk(tmp_path / "x.png", json.dumps(raw)))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000, '"' + "x" * 1000, '{"version": 1}'])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError):
        recipe.read(write_chunk(tmp_path / "x.png", text))


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    recipe.save_png(draw_shape("red", "bar"), path, some_recipe())
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        recipe.save_png(draw_shape("blue", "bar"), path, some_recipe(seed=9))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.png"]


def test_this_machine_names_the_versions() -> None:
    import torch

    machine = recipe.this_machine("cpu", "float32", 3)
    assert machine.threads == 3
    assert machine.versions["torch"] == torch.__version__
    assert set(machine.versions) == {"latentpipe", "torch", "diffusers", "transformers"}
    assert machine.processor


@pytest.mark.parametrize("ending", ["jpg", "webp", "png"])
@pytest.mark.parametrize("prompt", ["red circle", '\N{RED APPLE} кот, "x": <b>\n2'])
def test_every_kind_of_file_carries_the_recipe(tmp_path: Path, ending: str, prompt: str) -> None:
    from latentpipe.pipelines.metadata.reader import read_info

    picture, made, path = draw_shape("red", "bar"), some_recipe(prompt=prompt), tmp_path / f"x.{ending}"
    recipe.save(picture, path, made)
    assert recipe.read(path) == made
    info = read_info(path)
    assert (info.source, info.recipe, info.prompt) == ("latentpipe", made, made.prompt)
    with Image.open(path) as stored:
        pixels = np.asarray(stored.convert("RGB"))
    assert np.array_equal(pixels, np.asarray(recipe.as_stored(picture, {"jpg": "JPEG"}.get(ending))))
    assert np.array_equal(pixels, np.asarray(picture)) == (ending != "jpg")  # a JPEG loses some of it
    if ending != "png":  # as A1111 writes it, for whoever reads that
        from latentpipe.pipelines.metadata.third_party import user_comment

        with Image.open(path) as stored:
            assert user_comment(stored.info["exif"]) == recipe.a1111_text(made)


def test_a_recipe_too_long_for_a_jpeg_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"write a \.png or a \.webp"):
        recipe.save(draw_shape("red", "bar"), tmp_path / "x.jpg", some_recipe(prompt="\N{RED APPLE}" * 19_000))
    assert not list(tmp_path.iterdir())
    recipe.save(draw_shape("red", "bar"), tmp_path / "x.webp", some_recipe(prompt="\N{RED APPLE}" * 19_000))
    assert len(recipe.read(tmp_path / "x.webp").prompt) == 19_000


def test_other_programs_descriptions_are_no_recipes(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[recipe.DESCRIPTION] = '{"prompt": "theirs"}'
    draw_shape("red", "bar").save(tmp_path / "x.jpg", exif=tags.tobytes())
    with pytest.raises(UserError, match="carries no latentpipe recipe"):
        recipe.read(tmp_path / "x.jpg")


# --- what was stated on a single file -----------------------------------------------------------------------

AS_EVER = (
    '{"version":1,"prompt":"red circle","negative":"bar","seed":7,"steps":20,"guidance":3.5,"guidance_interval":[0.1,0.9],'
    '"scheduler":"ddim","width":64,"height":48,"batch_index":1,"batch_size":3,"model":"emoji","vae":"other","adapter":null,'
    '"loras":{},"lora_method":"sum","lora_fused":true,"source":{"sha256":"SOURCE","strength":0.4},"stopped_after":4,'
    '"hashes":{"unet":"UNET","vae":"VAE","text_encoder":"TEXT"},'
    '"machine":{"device":"cpu","dtype":"float32","threads":1,"processor":"x","versions":{"torch":"2"}}}'
)


def test_the_json_without_a_statement_is_as_ever_to_the_byte() -> None:
    text = AS_EVER
    for word, byte in (("SOURCE", "ab"), ("UNET", "12"), ("VAE", "34"), ("TEXT", "56")):
        text = text.replace(word, byte * 32)
    plain = some_recipe()
    assert plain.model_dump_json() == text
    assert json.dumps(plain.model_dump(mode="json"), separators=(",", ":")) == text
    assert Recipe.model_validate_json(text) == plain


def test_a_statement_is_written_and_read(tmp_path: Path) -> None:
    stated = StatedModel(family="flux-dev", prediction="v", config="odd", parts={"vae": "ae.safetensors"})
    for name in ("x.png", "x.jpg", "x.webp"):
        recipe.save(draw_shape("red", "bar"), tmp_path / name, some_recipe(stated=stated))
        assert recipe.read(tmp_path / name).stated == stated
