"""Pictures from single files carry what was stated on the file, and are replayed with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sized
from PIL import Image
from safetensors.torch import load_file
from written import write

from latentpipe import LatentPipeline, UserError, replay
from latentpipe.checkpoints.single_file.gather import Stated, open_file
from latentpipe.cli.app import main
from latentpipe.pipelines.metadata import recipe as recipes
from latentpipe.pipelines.picture import stated_in_recipe


def drawn(model: Path, out: Path, stated: Stated | None) -> dict[str, Any]:
    """The JSON in a picture of a model, which is saved."""
    pipe = LatentPipeline.from_pretrained(model, device="cpu", stated=stated)
    pipe("red apple", seed=1, num_inference_steps=2, size=(32, 32))[0].save(out)
    return json.loads(recipes.text_in(out, recipes.CHUNK) or "")


@pytest.mark.parametrize("kind", ["v", "v-zsnr"])
def test_a_prediction_that_was_stated_is_replayed(made: Any, tmp_path: Path, kind: str) -> None:
    _, config, file = made("sd1")
    out = tmp_path / "x.png"
    raw = drawn(file, out, Stated("sd1", kind, config))
    assert raw["stated"] == {"family": "sd1", "prediction": kind, "config": "config", "parts": {}}
    assert replay(out, model=file, device="cpu", config=config).difference == 0
    epsilon = drawn(file, tmp_path / "y.png", Stated(config=config))
    assert epsilon["hashes"]["scheduler"] != raw["hashes"]["scheduler"]  # or nothing would have been carried


def test_an_installed_file_is_replayed_by_its_name(made: Any, own_home: Path, tmp_path: Path) -> None:
    _, config, file = made("sd1")
    (own_home / "models").mkdir(parents=True)
    shutil.copy(file, own_home / "models" / "mine.safetensors")
    drawn(own_home / "models" / "mine.safetensors", tmp_path / "x.png", Stated(None, "v", config))
    assert replay(tmp_path / "x.png", device="cpu", config=config).difference == 0


def test_parts_and_configs_are_asked_for_by_name(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, config, file = made("sd1")
    tensors = load_file(file)
    vae = {name: value for name, value in tensors.items() if name.startswith("first_stage_model.")}
    rest = write({name: value for name, value in tensors.items() if name not in vae}, tmp_path / "rest.safetensors")
    part, out = write(vae, tmp_path / "ae.safetensors"), tmp_path / "x.png"
    raw = drawn(rest, out, Stated(config=config, parts=(part, file)))
    assert raw["stated"]["parts"] == {"vae": "ae.safetensors"}  # the other file filled in nothing
    assert str(tmp_path) not in json.dumps(raw["stated"])
    verb = ["replay", str(out), "--model", str(rest), "--device", "cpu"]
    asked: list[tuple[dict[str, Any], str]] = [
        ({}, "the folder 'config' (--config) and its vae from 'ae.safetensors' (--parts)"),
        ({"config": config}, "opened with its vae from 'ae.safetensors' (--parts)"),
        ({"parts": [part]}, "opened with the configs of the folder 'config' (--config)"),
    ]
    for given, lacking in asked:
        with pytest.raises(UserError) as error:
            replay(out, rest, device="cpu", **given)
        assert lacking in str(error.value)
    assert main(verb) == 2
    assert asked[0][1] in capsys.readouterr().err
    assert main([*verb, "--config", str(config), "--parts", str(part)]) == 0
    assert "identical" in capsys.readouterr().out
    with pytest.raises(UserError, match="made with other weights"):  # a folder says all itself, and is asked for nothing
        replay(out, made("sd2")[0], device="cpu")
    assert main([*verb[:3], str(folder), "--config", str(config)]) == 2
    assert "leave family, prediction, config and parts out" in capsys.readouterr().err


def test_nothing_is_kept_where_nothing_was_stated(made: Any, tmp_path: Path) -> None:
    folder, _, _ = made("sd1")
    for stated in (None, Stated()):
        raw = drawn(folder, tmp_path / "x.png", stated)
        assert "stated" not in raw
        assert replay(tmp_path / "x.png", folder, device="cpu").difference == 0


@pytest.mark.parametrize(
    "stated",
    [{"family": "x"}, {"prediction": "x"}, {"config": 3}, {"parts": ["x"]}, {"parts": {"vae": "x" * 300}}, {"path": "/etc"}, 3],
)
def test_a_crafted_statement_is_refused(made: Any, tmp_path: Path, stated: Any) -> None:
    _, config, file = made("sd1")
    out = tmp_path / "x.png"
    pipe = LatentPipeline.from_pretrained(file, device="cpu", stated=Stated(config=config))
    picture = pipe("red apple", seed=1, num_inference_steps=1, size=(32, 32))[0]
    raw = json.loads(picture.recipe.model_dump_json()) | {"stated": stated}
    recipes.save_png(Image.new("RGB", (32, 32)), out, None, {recipes.CHUNK: json.dumps(raw)})
    with pytest.raises(UserError, match=r"damaged in: stated|'x'"):
        replay(out, file, device="cpu", config=config)


@pytest.mark.parametrize(("text", "kept"), [("parameterization: v", "v"), ("parameterization: v\n    zsnr: true", "v-zsnr")])
def test_what_a_yaml_beside_the_file_says_is_kept_as_if_it_was_stated(tmp_path: Path, text: str, kept: str) -> None:
    file = sized.hollow(sized.whole("sd1"), tmp_path / "mine.safetensors")
    assert stated_in_recipe(file, None) is None
    with_yaml = sized.hollow(sized.whole("sd1"), tmp_path / "other.safetensors")
    (tmp_path / "other.yaml").write_text(f"model:\n  params:\n    {text}\n")
    found = stated_in_recipe(with_yaml, None)
    assert found is not None
    assert found.prediction == kept
    both = ((with_yaml, None), (file, Stated(prediction=kept)))
    schedulers = [open_file(path, stated).configs.scheduler for path, stated in both]
    assert schedulers[0] == schedulers[1] != open_file(file).configs.scheduler


def test_parts_are_found_by_their_names(made: Any, own_home: Path, tmp_path: Path) -> None:
    _, config, file = made("sd1")
    tensors = load_file(file)
    vae = {name: value for name, value in tensors.items() if name.startswith("first_stage_model.")}
    rest = write({name: value for name, value in tensors.items() if name not in vae}, tmp_path / "rest.safetensors")
    (own_home / "parts").mkdir()
    write(vae, own_home / "parts" / "ae.safetensors")
    raw = drawn(rest, tmp_path / "x.png", Stated(config=config, parts=(Path("ae"),)))
    assert raw["stated"]["parts"] == {"vae": "ae.safetensors"}
    with pytest.raises(UserError, match=r"No part 'ea': neither a file nor a folder nor one of .*ae"):
        drawn(rest, tmp_path / "x.png", Stated(config=config, parts=(Path("ea"),)))
