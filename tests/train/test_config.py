"""Configs: strict, every problem at once, and the same after a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from latentpipe import UserError
from latentpipe.train import config
from latentpipe.train.config import TrainDenoiser, TrainVAE

VAE: dict[str, Any] = {"data": {"train": "a"}, "run": {"out": "b", "work": "c"}, "optim": {"steps": 10}}
DENOISER: dict[str, Any] = {"data": {"cache": "a", "vae": "b"}, "run": {"out": "b", "work": "c"}, "optim": {"steps": 10}}


def changed(base: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """A copy of `base` with one dotted key set."""
    *path, last = place.split(".")
    copy = yaml.safe_load(yaml.safe_dump(base))
    inner = copy
    for name in path:
        inner = inner.setdefault(name, {})
    inner[last] = value
    return copy


def problems(raw: Any, schema: Any = TrainVAE) -> list[str]:
    """The lines of the refusal."""
    with pytest.raises(UserError) as error:
        config.parse(raw, schema, "x.yaml")
    lines = str(error.value).splitlines()
    assert all(line.startswith("x.yaml: ") for line in lines)
    return [line.removeprefix("x.yaml: ") for line in lines]


@pytest.mark.parametrize(("raw", "schema"), [(VAE, TrainVAE), (DENOISER, TrainDenoiser)])
def test_a_config_survives_dump_and_load(tmp_path: Path, raw: dict[str, Any], schema: Any) -> None:
    first = config.parse(raw, schema, "x")
    (tmp_path / "x.yaml").write_text(config.dump(first))
    assert config.load(tmp_path / "x.yaml", schema) == first


@st.composite
def raw_configs(draw: Any) -> dict[str, Any]:
    """A train-vae config with arbitrary values."""
    widths = st.lists(st.integers(1, 9).map(lambda k: 8 * k), min_size=1, max_size=4)
    raw = changed(VAE, "model.blocks", draw(widths))
    raw["optim"] = {"steps": draw(st.integers(1, 10**9)), "learning_rate": draw(st.floats(1e-12, 1e3))}
    raw["crops"] = {"flip": draw(st.booleans()), "whole": draw(st.floats(0, 1))}
    raw["run"]["seed"] = draw(st.integers(0, 2**63 - 1))
    raw["data"]["train"] = draw(st.text("abc/: #é-", min_size=1, max_size=8))
    return raw


@given(raw_configs())
def test_any_config_survives_dump_and_load(raw: dict[str, Any]) -> None:
    first = config.parse(raw, TrainVAE, "x")
    assert config.parse(yaml.safe_load(config.dump(first)), TrainVAE, "x") == first


def test_an_unknown_key_is_named_with_the_nearest() -> None:
    assert problems(changed(VAE, "optim.learing_rate", 1)) == [
        "unknown key 'optim.learing_rate'. Did you mean 'optim.learning_rate'?"
    ]
    assert problems(changed(VAE, "los", {})) == ["unknown key 'los'. Did you mean 'loss'?"]
    assert "Known keys: data, data.train" in problems(changed(VAE, "zzzzzz", 1))[0]


def test_every_problem_is_reported_at_once() -> None:
    raw = changed(changed(changed(VAE, "optim", {"batch_size": 0, "clip": 1}), "crops.whole", 2), "run", {"out": "b"})
    found = problems(raw)
    assert len(found) == 5
    text = "\n".join(found)
    words_of_each = ["missing key 'optim.steps'", "optim.batch_size", "unknown key 'optim.clip'", "missing key 'run.work'"]
    for words in [*words_of_each, "crops.whole"]:
        assert words in text


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("optim.steps", "many"), ("optim.steps", 0), ("optim.steps", 1.5), ("optim.learning_rate", 0),
        ("optim.learning_rate", "fast"),
        ("optim.learning_rate", float("nan")), ("optim.ema_decay", 1.0), ("run.seed", -1), ("run.precision", "fp64"),
        ("run.resume", "perhaps"), ("data.train", 3), ("loss.kl", -1), ("loss.equivariance", 1.1), ("model.blocks", [8, -8]),
        ("model.blocks", "wide"), ("model.norm_groups", 5), ("crops", [1]), ("data", None),
    ],
)  # fmt: skip
def test_wrong_values_name_their_key(place: str, value: Any) -> None:
    found = problems(changed(VAE, place, value))
    assert any(place.split(".")[0] in line for line in found)
    assert all("Traceback" not in line for line in found)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("unet.attention", [True], "attention names 1 levels, blocks 3"),
        ("unet.norm_groups", 7, "norm_groups 7 or heads_dim 32 does not divide"),
        ("text.heads", 5, "heads 5 does not divide width 192"),
        ("diffusion.caption_dropout", 1.0, "caption_dropout"),
    ],
)
def test_shapes_have_to_agree(place: str, value: Any, words: str) -> None:
    assert words in problems(changed(DENOISER, place, value), TrainDenoiser)[0]


def test_no_blocks_are_refused() -> None:
    assert "blocks" in problems(changed(VAE, "model.blocks", []))[0]


@pytest.mark.parametrize("raw", [None, [], 3, "text"])
def test_other_yaml_is_refused(raw: Any) -> None:
    assert "expected a mapping" in problems(raw)[0]


def test_keys_that_are_no_text_are_refused() -> None:
    assert problems({**VAE, 3: 4})


@pytest.mark.parametrize("content", ["a: [", "\t- x: 1", "a: b: c", "!!python/object:os.system {}", "a: 2024-13-45", "&a [*b]"])
def test_broken_yaml_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(UserError, match=r"x\.yaml"):
        config.load(tmp_path / "x.yaml", TrainVAE)


def test_missing_files_folders_and_bytes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        config.load(tmp_path / "x.yaml", TrainVAE)
    with pytest.raises(UserError, match="not a file; expected a config"):
        config.load(tmp_path, TrainVAE)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UserError, match=r"x\.yaml"):
        config.load(tmp_path / "x.yaml", TrainVAE)


def test_every_key_is_explained() -> None:
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(config))
    for item in tree.body:
        if isinstance(item, ast.ClassDef):
            for field, after in zip(item.body, [*item.body[1:], None], strict=True):
                plain = isinstance(field, ast.AnnAssign) and item.name not in ("TrainVAE", "TrainDenoiser")
                if plain:
                    told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    assert told, f"{item.name}: a key without an explanation, line {field.lineno}"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("model: {channels: 2147483648}", "model.channels"),
        ("model: {layers_per_block: 1000000}", "model.layers_per_block"),
        ("model: {blocks: [8, 1000000000]}", "model.blocks.1"),
        (f"model: {{blocks: [{', '.join(['8'] * 40)}]}}", "model.blocks"),
        ("crops: {size_px: 1000000}", "crops.size_px"),
        ("data: {train: x, read_size_px: 1000000}", "data.read_size_px"),
        ("optim: {steps: 1000000000000000000000000000000}", "optim.steps"),
        ("optim: {steps: 1, learning_rate: .nan}", "optim.learning_rate"),
        ("optim: {steps: 1, learning_rate: .inf}", "optim.learning_rate"),
        ("optim: {steps: 1, batch_size: 1.5}", "optim.batch_size"),
        ("run: {out: a, work: b, seed: 9223372036854775808}", "run.seed"),
    ],
)
def test_numbers_that_no_machine_computes_are_refused(tmp_path: Path, text: str, place: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"x\.yaml: {place}: (Input|Tuple) should"):
        config.load(tmp_path / "x.yaml", TrainVAE)


def test_a_model_that_does_not_fit_into_memory_is_refused_before_it_is_built() -> None:
    from latentpipe.checkpoints.components import TooLarge, built_to_train
    from latentpipe.train.config import VAEShape
    from latentpipe.train.vae.model import new_vae

    shape = VAEShape(blocks=(65536, 65536), layers_per_block=128)
    with pytest.raises(TooLarge, match=r"too large to train here.*1,024 MB are free"):
        built_to_train(lambda: new_vae(shape, 64), 2**30)
    assert built_to_train(lambda: new_vae(VAEShape(blocks=(8, 8)), 16), 2**30)
