"""Every shipped config loads, says how to launch it, and launches."""

import json
from pathlib import Path

import pytest

from latentpipe.checkpoints.registry import configs_folder
from latentpipe.cli import app
from latentpipe.data.shapes import write
from latentpipe.train.config import TrainDenoiser, TrainLora, TrainVAE, dump, load, parse

pytestmark = pytest.mark.slow

CONFIGS = sorted(configs_folder().glob("*.yaml"))
SCHEMAS = {"train-vae": TrainVAE, "train-denoiser": TrainDenoiser, "train-lora": TrainLora}


def verb_of(path: Path):
    return path.read_text().split()[2]


def schema_of(path: Path):
    return SCHEMAS[verb_of(path)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_loads_and_names_its_command(path):
    config = load(path, schema_of(path))
    assert path.read_text().splitlines()[0] == f"# latentpipe {verb_of(path)} configs/{path.name}"
    import yaml

    assert parse(yaml.safe_load(dump(config)), schema_of(path), "dumped") == config


VAES = [path.stem for path in CONFIGS if verb_of(path) == "train-vae" and path.stem[-4:] != "-vae"]


@pytest.mark.parametrize("name", [name for name in VAES if not name.endswith("-tuned")])
def test_the_other_vaes_launch(name, tmp_path, monkeypatch):
    """Two steps of each on pictures made by code; what it begins with ships."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pictures")
    arguments = ["--data.train", "pictures", "--data.validation", "pictures", "--run.out", "v", "--run.work", "w"]
    arguments += ["--optim.batch-size", "2", "--optim.steps", "2", "--optim.warmup-steps", "1"]
    assert app.main(["train-vae", name, *arguments]) == 0
    assert app.main(["inspect", "v"]) == 0


def test_the_enlarging_decoder_is_tuned_on_what_a_denoiser_predicts(tmp_path, monkeypatch):
    """Two steps from the decoder of one step, on the predictions of the embedded denoiser."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pictures")
    arguments = [
        "--data.train",
        "pictures",
        "--data.validation",
        "pictures",
        "--optim.batch-size",
        "2",
        "--optim.warmup-steps",
        "1",
    ]
    first = ["--run.out", "v", "--run.work", "w", "--optim.steps", "1"]
    assert app.main(["train-vae", "emoji-hands-decoder", *arguments, *first]) == 0
    second = ["--run.out", "t", "--run.work", "u", "--optim.steps", "2", "--run.warm-start", "v", "--predicted.model", "emoji"]
    second += ["--adversarial.start-step", "1"]
    assert app.main(["train-vae", "emoji-hands-decoder-tuned", *arguments, *second]) == 0
    assert app.main(["inspect", "t"]) == 0


@pytest.mark.parametrize("name", ["emoji", "small"])
def test_launches(name, tmp_path, monkeypatch):
    """Two steps of each, by the name of the config, on pictures made by code."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pictures")
    run = ["--optim.batch-size", "2", "--optim.steps", "2", "--optim.warmup-steps", "1"]
    validation = ["--data.validation", "pictures"] if name == "emoji" else []
    vae = ["train-vae", f"{name}-vae", "--data.train", "pictures", *validation, "--run.out", "v", "--run.work", "wv", *run]
    assert app.main(vae) == 0
    assert app.main(["encode", "pictures", "--vae", "v", "--size", "64", "--out", "c.safetensors"]) == 0
    denoiser = ["train-denoiser", f"{name}-denoiser", "--data.cache", "c.safetensors", "--data.vae", "v"]
    assert app.main([*denoiser, "--run.out", "m", "--run.work", "wd", *run]) == 0
    assert app.main(["generate", "red circle", "--model", "m", "--steps", "2", "--out", "o"]) == 0
    assert list(Path("o").glob("red-circle-*.png"))


def test_the_denoiser_of_several_hands_launches(tmp_path, monkeypatch, capsys):
    """Two steps from the embedded model, with a new vocabulary and pictures of the kinds that the config weighs."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pictures")
    lines = [json.loads(line) for line in Path("pictures/metadata.jsonl").read_text().splitlines()]
    kinds = ["tone", "flag", "object"]
    rows = [{**line, "kind": kinds[index % 3], "text": f"{line['text']}, flat style"} for index, line in enumerate(lines)]
    Path("pictures/metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert app.main(["encode", "pictures", "--vae", "emoji", "--size", "64", "--out", "c.safetensors"]) == 0
    denoiser = ["train-denoiser", "emoji-hands-denoiser", "--data.cache", "c.safetensors", "--data.vae", "emoji"]
    denoiser += ["--run.out", "m", "--run.work", "w", "--run.warm-start", "emoji"]
    assert app.main([*denoiser, "--optim.batch-size", "2", "--optim.steps", "2", "--optim.warmup-steps", "1"]) == 0
    assert "slow_ema_loss" in capsys.readouterr().out
    assert app.main(["generate", "red circle, flat style", "--model", "m", "--steps", "1", "--out", "o"]) == 0


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS if verb_of(path) == "train-lora"])
def test_the_loras_launch(name, tmp_path, monkeypatch, capsys):
    """Two steps of each on the embedded model and pictures made by code; the result draws."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pictures")
    run = [
        "--optim.batch-size",
        "2",
        "--optim.steps",
        "2",
        "--optim.warmup-steps",
        "1",
        "--run.out",
        "l.safetensors",
        "--run.work",
        "w",
    ]
    assert app.main(["train-lora", name, "--data.train", "pictures", *run]) == 0
    assert app.main(["generate", "red circle", "--lora", "l.safetensors=0.8", "--steps", "2", "--out", "o"]) == 0
    assert "l: " in capsys.readouterr().err
    assert list(Path("o").glob("red-circle-*.png"))
