"""Calls: what is wrong is said in one sentence, before torch is imported; what is right arrives as it is meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from PIL import Image
from tyro.conf import Positional, arg

from latentpipe.cli import argument_parser
from latentpipe.utils.errors import UserError

ROOT = Path(__file__).parents[2]

# Calls of every verb, and a word that the answer must hold.
WRONG = """
generat apple | 'generate'
lora merg a b | 'lora merge'
lora | second word
evaluate vea emoji | 'evaluate vae'
--seed 3 | before a verb
generate | PROMPT is missing
generate red apple | in quotes: "red apple"
generate x --stpes 3 | '--steps'
generate x -seed 3 | '--seed'
generate x --steps many | a whole number
generate x --steps 0 | 1 to 1000
generate x --seed -2 | -1 for a random one
generate x --seed 4294967296 | 4294967295
generate x --n 0 | 1 to 256
generate x --scheduler eulr | 'euler'
generate x --guidance nan | 0 to 100
generate x --guidance-interval 0.9 0.1 | low <= high
generate x --guidance-interval 0.9 | needs 2 values
generate x --size big | such as 64
generate x --size 20 | multiples of 16
generate x --device cdua | 'cuda'
generate x --dtype fp8 | bf16
generate x --model emjoi | 'emoji'
generate x --model pics | model_index.json
generate x --vae emoji-tinny | 'emoji-tiny'
generate x --vae pics | config.json
generate x --lora flta | 'flat'
generate x --lora flat=much | no number
generate x --adapter y | --vae
generate x --image none.png | no such file
generate x --image words.png | cannot be read as a picture
generate x --strength 0.5 | only with --image
generate x --image plain.png --strength 2 | at most 1
generate x --out file | is a file
generate x --out file/x.jpg | is a file
replay none.png | no such file
replay plain.png | no latentpipe recipe
grid x | --x is missing
grid x --x seeds=1,2 | no axis 'seeds'
grid x --x seed=1,2 --out grid.txt | .png
grid x --x vae=emjoi | 'emoji'
grid x --x seed=1:60 --y steps=1:60 | at most 100
train-vae --optim.steps 3 | the config comes first
train-vae emoji-vea | 'emoji-vae'
train-vae emoji-vae --optim.stepz 3 | '--optim.steps'
train-vae emoji-vae --steps 3 | '--optim.steps'
train-vae emoji-vae --optim.steps 0 | optim.steps
train-vae emoji-vae --loss.warps haf | 'half'
train-vae emoji-vae --data.train nothere | no such folder
train-denoiser emoji-denoiser --data.cache none.safetensors | no such file
train-lora lora-flat --data.train nothere | no such folder
train-lora lora-flat --data.train pics --model emjoi | 'emoji'
encode pics | --vae is missing
encode pics --vae emoij | 'emoji'
encode pics --vae emoji --size 63 | Try 64
encode pics --vae emoji --out x.bin | .safetensors
lora inspect flta | 'flat'
lora convert flat --out x.bin | .safetensors
lora convert flat --out x.safetensors --rank 4 | only with --plain
lora merge flat pencil --out x.safetensors --weights 1 | one for each
lora merge flat pencil | --out is missing
lora extract emoji nothere --out x.safetensors | No model or VAE
emoji --size 500 | 8 to 136
evaluate prompts --model emjoi | 'emoji'
evaluate vae emoji --images nothere | no such folder
evaluate vae emoji --images pics --protocol latentpip | 'latentpipe'
evaluate vae emoji --images pics --csv x.txt | .csv
evaluate vae emoji --images pics --features inception | needs its own weights
compare emoji --images pics | two VAEs
compare emoji emoji-tiyn --images pics | 'emoji-tiny'
health emoji | --images is missing
health emoji --images pics --size 33 | Try 32
sample --n 0 | 1 to 1024
sample --prior gm | 'gmm'
sample --out x.jpg | .png
traverse --rows 0 | 1 or more
interpolate plain.png "a prompt" | two pictures or two prompts
interpolate a b --out x.bmp | .gif
edit plain.png --share 3 --mix plain.png | 0 to 1
edit plain.png --amount 3 | only with --along
inpaint plain.png --mask none.png | no such file
anomaly | PICTURES is missing
anomaly pics --normal nothere | no such folder
make-fp16-safe emoij | 'emoji'
convert none.ckpt --out x | No VAE
convert emoji --out x --to ldm | safetensors
swap | --vae is missing
swap --vae emoji --images nothere | no such folder
compress plain.png x.png | .lpz
compress plain.png x.lpz --step 0 | more than 0
decompress none.lpz x.png | no such file
fit-codec emoji nothere | no such folder
fit-adapter --from emoji --to emoij --images pics | 'emoji'
ls everthing | expected one of all
ls --fits emoji | ls vae --fits
inspect nothing | No model
ui --port 99999999 | 65535
ui --no-no-auth | '--no-auth'
env now | one word too many
generate x --out file/deep/er | is a file
generate x --out LONG.png | at most 255 bytes
generate x --out link | leads nowhere
replay plain.png --out pics | ends in .png
replay plain.png --out file/x.png | is a file
grid x --x seed=1,2 --out file/x.png | is a file
encode pics --vae emoji --out file/x.safetensors | is a file
lora convert flat --out taken.safetensors | exists already
lora merge flat pencil --out taken.safetensors | exists already
lora extract emoji emoji --out taken.safetensors | exists already
emoji --out pics | not empty
emoji --out file | is a file
evaluate prompts --grid file/x.png | is a file
evaluate vae emoji --images pics --sheet file/x.png | is a file
evaluate vae emoji --images pics --csv file/x.csv | is a file
compare emoji emoji-tiny --images pics --out file/x.html | is a file
sample --out file/x.png | is a file
traverse --out link/x.png | leads nowhere
interpolate a b --out file/x.gif | is a file
edit plain.png --out file/x.png | is a file
inpaint plain.png --out file/x.png | is a file
anomaly pics --out file/x.png | is a file
anomaly pics --save pics | is a folder
anomaly pics --csv file/x.csv | is a file
make-fp16-safe emoji --out pics | not empty
make-fp16-safe emoji --out file | is a file
convert emoji --out pics | exists already
convert emoji --out file/x | is a file
swap --vae emoji --out pics | exists already
swap --vae emoji --out link | exists already
swap --vae emoji --model ./m --out m/new | lies within the model
compress plain.png file/x.lpz | is a file
decompress words.png pics | is a folder
fit-codec emoji pics --out nothere | no such folder
fit-codec emoji pics --out file | a single file
fit-adapter --from emoji --to emoji --images pics --out file/x.safetensors | is a file
ui --out file | is a file
train-vae emoji-vae --run.work file/x | is a file
train-denoiser emoji-denoiser --run.out link/x | leads nowhere
train-lora lora-flat --run.out file/x.safetensors | is a file
""".replace("LONG", "n" * 256)

HARNESS = """
import contextlib, io, json, shlex, sys
from latentpipe.cli.app import main
told = []
for line in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(shlex.split(line))
    heavy = sorted({"torch", "diffusers", "transformers"} & set(sys.modules))
    told.append([status, out.getvalue(), err.getvalue(), heavy])
print(json.dumps(told))
"""


def test_wrong_calls_are_refused_in_a_sentence_before_torch(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "plain.png")
    (tmp_path / "pics").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "pics" / "a.png")
    for name in ("words.png", "file", "taken.safetensors"):
        (tmp_path / name).write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model_index.json").write_text("{}")
    rows = [row.rpartition(" | ") for row in WRONG.strip().splitlines()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LATENTPIPE_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", HARNESS],
        input=json.dumps([row[0] for row in rows]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    wrong = []
    for (call, _, word), (status, out, err, heavy) in zip(rows, json.loads(done.stdout), strict=True):
        fine = status == 2 and not out and not heavy and err.startswith("latentpipe: ") and err.count("\n") == 1
        if not fine or word not in err or "│" in err:
            wrong.append((call, word, status, out, err, heavy))
    assert not wrong
    assert len(rows) >= 43
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "file",
        "link",
        "m",
        "pics",
        "plain.png",
        "taken.safetensors",
        "words.png",
    ]


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be written in is refused before the work; nothing is made to find out."""
    from latentpipe.cli import output_paths

    def refused(dir: Path) -> None:  # as tempfile has it; a superuser may write everywhere
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    for rule, value in (
        (output_paths.ending(".png"), "a/b.png"),
        (output_paths.empty, "x"),
        (output_paths.new, "x"),
        (output_paths.drawing, "x"),
    ):
        with pytest.raises(UserError, match="nothing can be written in"):
            rule("--out", tmp_path / value)
    with pytest.raises(UserError, match=r"FOLDER .*nothing can be written in"):
        output_paths.cached({"out": None, "folder": tmp_path, "shards": None})
    output_paths.kept({"save": False, "out": tmp_path})
    assert not list(tmp_path.iterdir())


def test_rules_take_the_values_that_verbs_begin_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule by the name of a parameter is asked about every verb's parameter of this name, whatever its type."""
    import inspect

    from latentpipe.cli import app, argument_rules

    monkeypatch.chdir(tmp_path)
    asked = 0
    for name, verb in app.VERBS.items():
        for option in () if verb.reads_config else argument_parser.options_of(verb.target):
            rule = argument_rules.RULES.get(f"{name}.{option.name}", argument_rules.RULES.get(option.name))
            if rule is not None and option.default not in (None, inspect.Parameter.empty) and not option.required:
                rule(option.flag, option.default)
                asked += 1
    assert asked > 60


# --- what is right ------------------------------------------------------------------------------------------


def verb(
    first: Path,
    others: tuple[str, ...],
    /,
    *,
    source: Annotated[str, arg(name="from")],
    n: int = 3,
    way: Literal["up", "down"] = "up",
    pair: tuple[float, float] = (0.0, 1.0),
    lora: tuple[str, ...] = (),
    size: int | None = None,
    cost: bool = True,
    json: bool = False,
) -> dict[str, Any]:
    """A verb that returns what it was given."""
    return dict(locals())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a.png b c --from x", {"first": Path("a.png"), "others": ("b", "c"), "source": "x", "n": 3}),
        ("--from=x a b -n 7", {"n": 7}),
        ("a b --from x --way down --pair -1 .5", {"way": "down", "pair": (-1.0, 0.5)}),
        ("a b --from x --lora p=1 q --lora r", {"lora": ("p=1", "q", "r")}),
        ("a b --from x --size None --no-cost --json", {"size": None, "cost": False, "json": True}),
        ("--from x -- a -b", {"first": Path("a"), "others": ("-b",)}),
    ],
)
def test_right_calls_arrive(words: str, expected: dict[str, Any]) -> None:
    found = argument_parser.run("latentpipe verb", verb, words.split())
    assert {name: found[name] for name in expected} == expected


@dataclass(frozen=True)
class Made:
    """A dataclass as some verbs are."""

    prompt: Positional[str]
    no_auth: bool = False
    out: Path = Path("out")


def test_dataclasses_are_made_of_their_fields() -> None:
    assert argument_parser.run("latentpipe made", Made, ["red apple", "--no-auth"]) == Made("red apple", True)
    flags = argument_parser._flags(argument_parser.options_of(Made))
    assert sorted(flags) == ["--no-auth", "--out"]  # and no --no-no-auth
    with pytest.raises(UserError, match=r"made: 2 words were given as the prompt; put it in quotes: \"red apple\""):
        argument_parser.run("latentpipe made", Made, ["red", "apple"])


def test_every_option_of_every_verb_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    """What --help lists is what is read: the flags of each verb, as tyro names them."""
    import re

    from latentpipe.cli import app, explore, ui, vae
    from latentpipe.cli.generate import Generate

    for name, target in (
        ("generate", Generate), ("sample", explore.sample), ("convert", vae.convert), ("ui", ui.ui)
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            app.main([name, "--help"])
        listed = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", capsys.readouterr().out.split("options")[-1]))
        known = set(argument_parser._flags(argument_parser.options_of(target)))
        assert {flag for flag in known if not flag.startswith("--no-")} <= listed, name
