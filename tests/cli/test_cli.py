"""The command line: exit statuses, one-line messages, and no torch for --help."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import denoiser_run, draw_shape, vae_run
from PIL import Image

from latentpipe.cli.app import VERBS, main

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Work in an empty folder; the command line's warning filters end with the test."""
    import warnings

    monkeypatch.chdir(tmp_path)
    show = warnings.showwarning
    with warnings.catch_warnings():
        yield
    warnings.showwarning = show


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a call in this process."""
    try:
        status = main(list(arguments))
    except SystemExit as end:
        status = int(end.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a mistaken call says; it ends with 2, prints nothing on stdout and no traceback."""
    status, out, err = call(capsys, *arguments)
    assert status == 2, err
    assert "Traceback" not in err
    assert out == ""
    return err


def run(*arguments: str, code: str | None = None, **named: Any) -> subprocess.CompletedProcess[str]:
    """`python -m latentpipe ...`, or python with some code, in another process."""
    start = [sys.executable, "-c", code] if code else [sys.executable, "-m", "latentpipe"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*start, *arguments], capture_output=True, text=True, timeout=120, env=environment, **named)


# --- help ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    status, out, err = call(capsys, *arguments)
    assert status == 0
    assert all(f"  {name} " in out for name in VERBS)
    assert err == ""


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_explains_itself(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    status, out, _ = call(capsys, *verb.split(), "--help")
    assert status == 0
    assert "usage" in out.lower()


@pytest.mark.parametrize("config", ["vae", "denoiser"])
def test_a_config_explains_every_key(capsys: pytest.CaptureFixture[str], config: str) -> None:
    path = write_config(config)
    status, out, _ = call(capsys, f"train-{config}", str(path), "--help")
    assert status == 0
    assert "--optim.learning-rate" in out or "--optim.learning_rate" in out
    assert "Peak learning rate" in " ".join(out.split())


def write_config(kind: str) -> Path:
    """A YAML file in the current folder."""
    from latentpipe.train.config import dump

    build = vae_run(Path("r"), Path("p")) if kind == "vae" else denoiser_run(Path("r"), Path("c"), Path("v"))
    Path(f"{kind}.yaml").write_text(dump(build))
    return Path(f"{kind}.yaml")


@pytest.mark.parametrize(
    "arguments", [[], ["generate", "--help"], ["train-vae", "--help"], ["--version"], ["evaluate", "prompts", "-h"]]
)
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom latentpipe.cli.app import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'gradio'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = run(*arguments, code=code)
    assert result.returncode == 0, result.stderr


def test_the_package_imports_no_torch() -> None:
    code = "import sys, latentpipe\nassert latentpipe.UserError\nassert 'torch' not in sys.modules"
    result = run(code=code)
    assert result.returncode == 0, result.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from latentpipe.version import VERSION

    assert call(capsys, "--version") == (0, f"{VERSION}\n", "")


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("generat", "generate"),
        ("trian-vae", "train-vae"),
        ("relpay", "replay"),
        ("evaluaet", "evaluate vae"),
    ],
)
def test_a_misspelt_verb_suggests(capsys: pytest.CaptureFixture[str], typed: str, meant: str) -> None:
    assert f"unknown verb '{typed}'. Did you mean '{meant}'?" in refused(capsys, typed)


def test_an_unknown_verb_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Verbs: generate, replay" in refused(capsys, "zzzzzz")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--lora", "y"], "No LoRA 'y'"),
        (["generate", "x", "--adapter", "y"], "--adapter does something only with --vae"),
        (["generate", "x", "--size", "big"], "--size is 'big'"),
        (["generate", "x", "--size", "64x"], "--size"),
        (["generate", "x", "--image", "none.png"], "no such file"),
        (["generate", "x", "--model", "nothing"], "No model 'nothing'"),
        (["generate", "x", "--model", "."], "model_index.json"),
        (["generate", "x", "--steps", "many"], "steps"),
        (["generate", "x", "--stpes", "3"], "steps"),
        (["generate", "x", "--scheduler", "heun"], "heun"),
        (["generate"], "PROMPT is missing"),
        (["generate", "red <lora:nope:1>"], "No LoRA 'nope' is installed"),
        (["generate", "red <lora:flat:much>"], "'much' is no number"),
        (["generate", "red", "--lora", "nope"], "No LoRA 'nope'"),
        (["generate", "red", "--model", "nope.safetensors"], "No model 'nope.safetensors'"),
        (["grid", "red <lora:nope:1>", "--x", "seed=1,2"], "No LoRA 'nope' is installed"),
        (["replay", "none.png"], "no such file"),
        (["replay", "."], "is a folder"),
        (["inspect", "nothing"], "nothing"),
        (["inspect", "."], "neither model_index.json"),
        (["encode", ".", "--vae", "nothing"], "No VAE 'nothing'"),
        (["emoji", "--size", "500"], "--size is 500"),
        (["emoji", "--font", "none.ttf"], "none.ttf"),
        (["train-vae", "none.yaml"], "no such config file"),
        (["train-vae", "."], "not a file"),
        (["ls", "everything"], "everything"),
    ],
)
def test_mistakes_end_with_2_and_a_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert words in " ".join(refused(capsys, *arguments).split())


def test_a_picture_without_a_recipe_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    draw_shape("red", "bar").save("x.png")
    for verb, said in (("replay", "carries no latentpipe recipe"), ("inspect", "without settings")):
        assert said in refused(capsys, verb, "x.png")
    assert "cannot be read as a picture" in refused(capsys, "generate", "x", "--image", str(write_config("vae")))


def test_an_output_that_is_a_file_is_found_out_before_the_work(capsys: pytest.CaptureFixture[str], installed: str) -> None:
    Path("file").write_text("x")
    assert "--out file" in refused(capsys, "generate", "x", "--model", installed, "--out", "file")
    assert "--out file/deeper" in refused(capsys, "generate", "x", "--model", installed, "--out", "file/deeper")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], "steps is 0"),
        (["--size", "20"], "multiples of 8"),
        (["--seed", "-2"], "seed"),
        (["--n", "0"], "n is 0"),
        (["--guidance", "nan"], "guidance"),
        (["--guidance-interval", "0.9", "0.1"], "--guidance-interval"),
        (["--device", "abacus"], "abacus"),
        (["--vae", "nothing"], "No VAE 'nothing'"),
    ],
)
def test_impossible_settings_end_with_2(
    capsys: pytest.CaptureFixture[str], installed: str, options: list[str], words: str
) -> None:
    assert words in refused(capsys, "generate", "x", "--model", installed, *options)


def test_config_mistakes_are_all_reported(capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config("vae")
    raw = yaml.safe_load(path.read_text())
    raw["optim"]["learing_rate"] = raw["optim"].pop("learning_rate")
    raw["crops"]["whole"] = 7
    path.write_text(yaml.safe_dump(raw))
    err = refused(capsys, "train-vae", str(path))
    assert "latentpipe: vae.yaml: unknown key 'optim.learing_rate'. Did you mean 'optim.learning_rate'?" in err
    assert "latentpipe: vae.yaml: crops.whole" in err
    assert all(line.startswith("latentpipe: ") for line in err.splitlines())


@pytest.mark.parametrize(
    "override", [["--optim.steps", "0"], ["--optim.steps", "x"], ["--optim.stepz", "3"], ["--model.norm-groups", "5"]]
)
def test_overrides_are_checked_too(capsys: pytest.CaptureFixture[str], override: list[str]) -> None:
    text = refused(capsys, "train-vae", str(write_config("vae")), *override)
    assert override[0].removeprefix("--").split(".")[0] in text


def test_damaged_weights_end_with_2(capsys: pytest.CaptureFixture[str], installed: str, own_home: Path) -> None:
    weights = own_home / "models" / "tiny" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for arguments in (["generate", "x", "--model", installed], ["inspect", installed]):
        assert "not a complete safetensors file" in refused(capsys, *arguments)


# --- a full disk, Ctrl-C and broken pipes -------------------------------------------------------------------


def test_a_full_disk_is_said_in_a_sentence(
    capsys: pytest.CaptureFixture[str], installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    status, _, err = call(capsys, "generate", "x", "--model", installed, "--steps", "1", "--out", "out")
    assert status == 2
    assert "the disk is full" in err
    assert "Traceback" not in err
    assert not list(Path("out").iterdir())


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_disk_that_is_full_while_a_cache_is_written(
    capsys: pytest.CaptureFixture[str], pictures: Path, vae_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from safetensors import SafetensorError

    from latentpipe.data import latent_cache

    def full(tensors: Any, path: Path, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half")
        text = "Error while serializing: I/O error: No space left on device (os error 28)"  # as these libraries put it
        raise SafetensorError(text) if kind == "safetensors" else RuntimeError(text)

    monkeypatch.setattr(latent_cache, "save_file", full)
    status, _, err = call(capsys, "encode", str(pictures), "--vae", str(vae_folder), "--size", "16", "--out", "x.safetensors")
    assert status == 2
    assert "disk is full" in err or "No space left" in err
    assert "Traceback" not in err
    assert not list(Path().glob("*x.safetensors*"))
    assert not list(Path().glob(".x.safetensors*"))


def test_ctrl_c_in_training_ends_with_130(
    capsys: pytest.CaptureFixture[str], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentpipe.train import losses
    from latentpipe.train.config import dump

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    Path("x.yaml").write_text(dump(vae_run(Path("r"), pictures)))
    monkeypatch.setattr(losses, "l1", interrupted)
    status, _, err = call(capsys, "train-vae", "x.yaml")
    assert status == 130
    assert "go on with --run.resume" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_in_generate_keeps_the_partial_picture(model_folder: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom latentpipe.cli import app as cli\n"
        "from latentpipe.pipelines import latent_pipeline as pipeline\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs begin with it ignored
        "draw = pipeline.LatentPipeline.draw\n"
        "def watched(self, prompts, seeds, settings, on_step=None):\n"
        "    def hook(step):\n"
        "        if step.step == 3:\n            os.kill(os.getpid(), signal.SIGINT)\n"
        "        import time; time.sleep(0.05)\n"
        "        return on_step(step)\n"
        "    return draw(self, prompts, seeds, settings, hook)\n"
        "pipeline.LatentPipeline.draw = watched\n"
        "raise SystemExit(cli.main(sys.argv[1:]))"
    )
    result = run(
        "generate",
        "red bar",
        "--model",
        str(model_folder),
        "--steps",
        "900",
        "--device",
        "cpu",
        "--seed",
        "4",
        code=code,
        cwd=tmp_path,
    )
    assert result.returncode == 130, result.stderr
    assert "Traceback" not in result.stderr
    path = tmp_path / result.stdout.strip()
    with Image.open(path) as picture:
        assert json.loads(picture.info["latentpipe"])["stopped_after"] in range(3, 20)


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once(model_folder: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time\nfrom latentpipe.cli import app as cli\n"
        "from latentpipe.pipelines import latent_pipeline as pipeline\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "draw = pipeline.LatentPipeline.draw\n"
        "def watched(self, prompts, seeds, settings, on_step=None):\n"
        "    def hook(step):\n"
        "        if step.step == 3:\n"
        "            for _ in range(2):\n                os.kill(os.getpid(), signal.SIGINT)\n                time.sleep(0.3)\n"
        "        return on_step(step)\n"
        "    return draw(self, prompts, seeds, settings, hook)\n"
        "pipeline.LatentPipeline.draw = watched\n"
        "raise SystemExit(cli.main(sys.argv[1:]))"
    )
    result = run(
        "generate", "red bar", "--model", str(model_folder), "--steps", "900", "--device", "cpu", code=code, cwd=tmp_path
    )
    assert result.returncode == 130, result.stderr
    assert "Traceback" not in result.stderr


def test_a_killed_reader_is_no_error(model_folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "latentpipe", "ls"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
        process.wait(60)
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


# --- verbs --------------------------------------------------------------------------------------------------


def test_generate_replay_inspect(capsys: pytest.CaptureFixture[str], installed: str) -> None:
    options = ["--model", installed, "--seed", "5", "--steps", "2", "-n", "2", "--device", "cpu"]
    status, out, err = call(capsys, "generate", "Red, circle!", *options)
    assert (status, out) == (0, "out/red-circle-5.png\nout/red-circle-6.png\n"), err
    again = call(capsys, "generate", "Red, circle!", *options)
    assert again[1] == "out/red-circle-5-2.png\nout/red-circle-6-2.png\n"  # nothing is overwritten
    for name in ("out/red-circle-5.png", "out/red-circle-6.png"):
        status, out, _ = call(capsys, "replay", name, "--device", "cpu", "--out", "again.png")
        assert status == 0
        assert out == "again.png\nidentical: every pixel is the same\n"
    status, out, _ = call(capsys, "inspect", "out/red-circle-6.png")
    assert json.loads(out)["prompt"] == "Red, circle!"
    status, out, _ = call(capsys, "inspect", installed)
    assert json.loads(out)["space"]["channels"] == 4


@pytest.mark.filterwarnings("default:the model was trained at")
def test_img2img_and_every_option(capsys: pytest.CaptureFixture[str], installed: str) -> None:
    draw_shape("blue", "bar").save("in.png")
    options = "--image in.png --strength 0.9 --steps 3 --scheduler euler --guidance 2 --guidance-interval 0.2 0.8 --size 16x24"
    status, out, err = call(
        capsys, "generate", "-5 °C", "--model", installed, *options.split(), "--negative", "x", "--device", "cpu"
    )
    assert status == 0, err
    assert "note: the model was trained at 16 x 16" in err
    with Image.open(out.strip()) as picture:
        assert picture.size == (16, 24)
        assert json.loads(picture.info["latentpipe"])["guidance_interval"] == [0.2, 0.8]
    assert "--image" in refused(capsys, "replay", out.strip())
    status, out, _ = call(capsys, "replay", out.strip(), "--image", "in.png", "--device", "cpu")
    assert out == "identical: every pixel is the same\n"


def test_replay_says_how_large_the_difference_is(capsys: pytest.CaptureFixture[str], installed: str) -> None:
    from PIL import PngImagePlugin

    call(capsys, "generate", "x", "--model", installed, "--seed", "5", "--steps", "1", "--device", "cpu")
    with Image.open("out/x-5.png") as picture:
        picture.load()
    info = PngImagePlugin.PngInfo()
    info.add_itxt("latentpipe", picture.info["latentpipe"])
    Image.new("RGB", picture.size).save("black.png", pnginfo=info)
    status, out, _ = call(capsys, "replay", "black.png", "--device", "cpu")
    assert status == 0
    assert "of 255 grey levels" in out


@pytest.mark.slow
def test_the_whole_road_from_pictures_to_a_model(capsys: pytest.CaptureFixture[str], pictures: Path) -> None:
    from latentpipe.train.config import dump

    Path("vae.yaml").write_text(dump(vae_run(Path("v"), pictures)))
    status, _, err = call(capsys, "train-vae", "vae.yaml", "--optim.steps", "2", "--run.seed", "9")
    assert status == 0, err
    assert yaml.safe_load(Path("v/work/config.yaml").read_text())["optim"]["steps"] == 2
    status, out, err = call(capsys, "encode", str(pictures), "--vae", "v/vae", "--size", "16", "--out", "x.safetensors")
    assert status == 0, err
    assert out.splitlines()[-1] == "x.safetensors"
    Path("denoiser.yaml").write_text(dump(denoiser_run(Path("d"), Path("x.safetensors"), Path("v/vae"))))
    status, _, err = call(capsys, "train-denoiser", "denoiser.yaml", "--optim.steps", "1")
    assert status == 0, err
    status, out, err = call(capsys, "generate", "red bar", "--model", "d/model", "--steps", "1", "--device", "cpu")
    assert status == 0, err
    assert Path(out.strip()).is_file()
    assert "--run.resume" in refused_after_start(capsys, "train-vae", "vae.yaml")


def refused_after_start(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """As `refused`, for verbs that may print before they refuse."""
    status, _, err = call(capsys, *arguments)
    assert status == 2
    assert "Traceback" not in err
    return err


def test_ls_and_env(capsys: pytest.CaptureFixture[str], installed: str) -> None:
    status, out, _ = call(capsys, "ls")
    assert status == 0
    assert [line.split()[:2] for line in out.splitlines() if line.split()[1] == "tiny"] == [["model", "tiny"], ["vae", "tiny"]]
    status, out, _ = call(capsys, "ls", "configs")
    assert status == 0
    assert "emoji-vae" in out
    assert {line.split()[0] for line in out.splitlines()} == {"config"}
    status, out, _ = call(capsys, "env")
    assert status == 0
    assert json.loads(out)["home"] == os.environ["LATENTPIPE_HOME"]


def test_a_shipped_config_has_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert "data/emoji/train" in refused_after_start(capsys, "train-vae", "emoji-vae")


@pytest.mark.slow
def test_the_module_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    for arguments, status in (
        (["--version"], 0),
        (["nonsense"], 2),
        (["replay", "none.png"], 2),
        (["generate", "x", "--stpes", "3"], 2),
    ):
        result = run(*arguments, cwd=tmp_path)
        assert result.returncode == status, (arguments, result.stderr)
        assert "Traceback" not in result.stderr


def test_a_seed_that_is_drawn_is_told_and_recorded(installed: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", installed, "--steps", "1", "--device", "cpu"]
    seeds = set()
    for given in (["--seed", "-1"], ["--seed=-1"], []):
        status, out, err = call(capsys, "generate", "red circle", *options, *given)
        assert status == 0, err
        with Image.open(out.strip()) as picture:
            seed = json.loads(picture.info["latentpipe"])["seed"]
        assert f"latentpipe: seed {seed}\n" in err
        seeds.add(seed)
    assert len(seeds) == 3


def test_out_names_the_file(installed: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", installed, "--steps", "1", "--device", "cpu", "--seed", "3"]
    for name, kind in (("a/red.jpg", "JPEG"), ("red.webp", "WEBP"), ("red.png", "PNG")):
        status, out, err = call(capsys, "generate", "red circle", *options, "--out", name)
        assert (status, out) == (0, f"{name}\n"), err
        with Image.open(name) as picture:
            assert picture.format == kind
        assert json.loads(call(capsys, "inspect", name)[1])["seed"] == 3
        said = call(capsys, "replay", name)
        assert said[0] == 0
        assert said[1].startswith("identical: every pixel is the same")
        assert ("JPEG too" in said[1]) == (kind == "JPEG")
    assert call(capsys, "generate", "red circle", *options, "-n", "2", "--out", "two.jpg")[1] == "two-3.jpg\ntwo-4.jpg\n"
    with Image.open("two-3.jpg") as picture:
        picture.save("again.jpg", quality=20, exif=picture.info["exif"])  # by another program
    assert "another program may have stored anew" in call(capsys, "replay", "again.jpg")[1]


def test_slow_verbs_say_at_once_what_is_under_way(installed: str, capsys: pytest.CaptureFixture[str]) -> None:
    quick = {
        "ls",
        "inspect",
        "ui",
        "train-vae",
        "train-denoiser",
        "train-lora",
        "distil",
    }  # these say it themselves, or are done at once
    assert quick == {name for name, verb in VERBS.items() if not verb.begins}
    err = call(capsys, "generate", "x", "--model", installed, "--steps", "1", "--device", "cpu")[2]
    assert err.splitlines()[1] == f"latentpipe: opening the model {installed} ..."  # after the seed


def test_ls_is_sorted_by_kind_and_name(installed: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line.split()[:2] for line in call(capsys, "ls")[1].splitlines()]
    kinds = [kind for kind, _ in rows]
    assert list(dict.fromkeys(kinds)) == ["model", "vae", "lora", "config"]
    assert kinds == sorted(kinds, key=["model", "vae", "lora", "config"].index)
    for kind in set(kinds):
        names = [name for other, name in rows if other == kind]
        assert names == sorted(names)


def test_the_program_ends_when_the_work_is_done() -> None:
    """What was registered to happen at the end happens, what was printed arrives, and nothing is taken apart."""
    code = (
        "import atexit, sys, threading, time\nfrom latentpipe import __main__ as program\nfrom latentpipe.cli import app\n"
        "class Slow:\n    def __del__(self):\n        print('taken apart')\n"
        "kept = Slow()\n"
        "atexit.register(print, 'registered')\n"
        "def late():\n    time.sleep(0.2)\n    print('thread')\n"
        "def main():\n    print('work', end='')\n    threading.Thread(target=late).start()\n    return 3\n"
        "app.main = main\nprogram.main()"
    )
    result = run(code=code)
    assert (result.returncode, result.stdout, result.stderr) == (3, "workthread\nregistered\n", "")


def test_a_prompt_that_is_no_unicode_is_a_mistake(installed: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "generate", "\udcff", "--model", installed, "--steps", "1", "--device", "cpu")


def test_sigint_keeps_its_meaning(installed: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    call(capsys, "generate", "x", "--model", installed, "--steps", "1", "--device", "cpu")
    assert signal.getsignal(signal.SIGINT) is before
