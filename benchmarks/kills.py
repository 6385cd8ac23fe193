"""kill -9 at random moments: a resumed training is the undisturbed one, and nothing half-written has a final name.

python benchmarks/kills.py --trainers 100 --others 50 [--seed 0]

One process imports everything; every run is a fork of it, killed after a random share of the time that an undisturbed run
takes. After each kill: every file that has its final name is whole. After the run was done again (a training: resumed), every
file is, byte for byte, that of an undisturbed run, and nothing else lies there. Wall times, logged as "seconds", are left out.
POSIX only.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has no copies of threads
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import yaml
from PIL import Image
from safetensors.numpy import load as load_numpy

from latentpipe.cli import app
from latentpipe.data import shapes
from latentpipe.utils.atomic import LEFTOVER
from latentpipe.utils.io import read_header

OURS = (".lock",)  # stays in run.work
TRAINERS = ("train-vae", "train-denoiser", "train-lora")


@dataclass(frozen=True)
class Case:
    """A verb with its arguments; `places` are the files and folders it writes, `again` is added when it is run once more."""

    verb: str
    arguments: tuple[str, ...]
    places: tuple[Path, ...]
    again: tuple[str, ...] = ()
    once: bool = False  # it goes on to another name, or refuses, where there is a result

    def __str__(self) -> str:
        return self.verb


# --- runs ---------------------------------------------------------------------------------------------------


def fork(arguments: tuple[str, ...], log: Path) -> int:
    """The process number of a fork that runs one verb; what it says goes to `log`."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
            try:
                status = app.main(list(arguments))
            except BaseException:
                traceback.print_exc(file=file)
        log.with_suffix(".modules").write_text("\n".join(sys.modules))
    finally:
        os._exit(status)


def whole_run(case: Case, log: Path, again: bool = False) -> float:
    """Run a case to its end; the seconds that it took."""
    begin = time.monotonic()
    pid = fork(case.arguments + (case.again if again else ()), log)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise AssertionError(f"{case}: ended with {status}:\n{log.read_text()[-2000:]}")
    seconds = time.monotonic() - begin
    for name in log.with_suffix(".modules").read_text().split():
        if name not in sys.modules and name != "__mp_main__":
            with suppress(Exception):  # the next fork has it already
                importlib.import_module(name)
    return seconds


def killed_run(case: Case, log: Path, after_s: float) -> bool:
    """Run a case and kill it; False where it had ended before."""
    pid = fork(case.arguments, log)
    time.sleep(after_s)
    os.kill(pid, signal.SIGKILL)  # an ended child stays a zombie until it is waited for
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def trial(
    case: Case, wanted: dict[str, str], after_s: float, log: Path, before: dict[str, str] | None = None
) -> tuple[bool, list[str]]:
    """Kill one run and do it again: whether it was killed in time, and what is wrong.

    wanted  what an undisturbed run leaves (`content`)
    before  what lay there before, which a killed run may leave
    """
    killed = killed_run(case, log, after_s)
    wrong = [f"killed: {problem}" for problem in half_written(case)]
    found = content(case)
    if case.verb not in TRAINERS:
        allowed = [wanted] if before is None else [wanted, before]
        wrong += [
            f"killed: {name} is neither old nor new" for name in found if all(found[name] != each.get(name) for each in allowed)
        ]
    if case.once:
        clean(case)
    whole_run(case, log, again=True)
    return killed, wrong + [f"again: {problem}" for problem in differences(content(case), wanted)] + left(case)


# --- what lies there ----------------------------------------------------------------------------------------


def files(case: Case) -> list[Path]:
    """Every file below the places of a case, without what is being written."""
    found = [path for place in case.places for path in ([place] if place.is_file() else sorted(place.rglob("*")))]
    return [path for path in found if path.is_file() and not hidden(path)]


def hidden(path: Path) -> bool:
    """Whether a path lies in something that a writer has not given its name yet, or is the lock of a run."""
    return any(LEFTOVER.fullmatch(part) for part in path.parts) or path.name in (*OURS, ".running.json")


def left(case: Case) -> list[str]:
    """Temporary names that are still there after a run has ended."""
    folders = {place.parent for place in case.places} | {place for place in case.places if place.is_dir()}
    found = {path for folder in folders for path in folder.rglob("*") if LEFTOVER.fullmatch(path.name)}
    return [f"left behind: {path}" for path in sorted(found)]


def half_written(case: Case) -> list[str]:
    """What is wrong with the files that have their final names; logs, which grow line by line, may end in the middle of one."""
    problems = []
    for path in files(case):
        if path.name == "log.jsonl" or "tfevents" in path.name:
            continue
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                load_file(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".yaml":
                assert isinstance(yaml.safe_load(path.read_text()), dict)
            elif path.suffix == ".html":
                assert path.read_text().rstrip().endswith("</html>"), "it ends early"
            elif path.suffix in (".png", ".gif"):
                Image.open(path).load()
        except Exception as error:
            problems.append(f"{path}: {type(error).__name__}: {error}")
    return problems


def content(case: Case) -> dict[str, str]:
    """A digest of every file by its path; of logs and TensorBoard files what they say, without times."""
    found: dict[str, str] = {}
    boards: set[Path] = set()
    for path in files(case):
        if "tfevents" in path.name:
            boards.add(path.parent)
            continue
        found[str(path)] = hashlib.sha256(_said(path)).hexdigest()[:16]
    for board in boards:
        found[str(board)] = hashlib.sha256(repr(scalars(board)).encode()).hexdigest()[:16]
    return found


def _said(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name == "log.jsonl":
        rows = [json.loads(line) for line in data.splitlines()[:-1]] + [_last(data)]
        return json.dumps([{key: value for key, value in row.items() if key != "seconds"} for row in rows]).encode()
    if path.name == "config.yaml" and path.parent.name == "work":  # of a run that was resumed it says so
        config = yaml.safe_load(data)
        config["run"]["resume"] = False
        return json.dumps(config).encode()
    if path.suffix == ".safetensors":  # metadata come in no fixed order
        with suppress(Exception):  # half a file is compared as it is
            header = read_header(path)
            tensors = [(name, value.tobytes()) for name, value in sorted(load_numpy(data).items())]
            return repr(
                (sorted(header.dtypes.items()), sorted(header.shapes.items()), sorted(header.metadata.items()), tensors)
            ).encode()
    if path.suffix == ".html":  # it tells how long the measurement took
        return b""
    if path.suffix == ".json":
        return data.replace(b'"resume": true', b'"resume": false')
    return data


def _last(data: bytes) -> dict[str, Any]:
    try:
        return json.loads(data.splitlines()[-1])
    except (ValueError, IndexError):
        return {}


def scalars(board: Path) -> dict[str, list[tuple[int, Any]]]:
    """What TensorBoard shows of a folder: step and value, of pictures their digest."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    found: dict[str, list[tuple[int, Any]]] = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in sorted(events.Tags()["scalars"])
        if tag != "seconds"
    }
    for tag in sorted(events.Tags()["images"]):
        found[tag] = [(event.step, hashlib.sha256(event.encoded_image_string).hexdigest()) for event in events.Images(tag)]
    return found


def differences(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """Paths that are missing, too many, or of other content."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is there as well" for name in found if name not in wanted]
    return problems + [f"{name} differs" for name in wanted if name in found and found[name] != wanted[name]]


# --- cases --------------------------------------------------------------------------------------------------


def write_yaml(path: Path, value: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(value))
    return str(path)


def trainers(root: Path, pictures: Path, vae: Path, cache: Path, model: Path) -> list[Case]:
    """The three trainers, tiny, with everything that they can write."""
    often = {"save_every_steps": 2, "sample_every_steps": 4, "precision": "fp32"}
    optim = {"steps": 6, "batch_size": 4, "warmup_steps": 2, "ema_decay": 0.9}
    tiny = {"channels": 4, "blocks": [8, 16], "norm_groups": 4}
    cases = []
    for name in TRAINERS:
        at = root / name
        at.mkdir()
        out = at / ("style.safetensors" if name == "train-lora" else "out")
        run = {"out": str(out), "work": str(at / "work"), "tensorboard": True, **often}
        config: dict[str, Any] = {"run": run, "optim": optim}
        if name == "train-vae":
            config |= {"data": {"train": str(pictures), "validation": str(pictures), "read_size_px": 24}, "model": tiny}
            config |= {"crops": {"size_px": 16}, "loss": {"equivariance": 0.3, "target_bits": 1.0, "kl": 0.01}}
            config |= {"adversarial": {"weight": 0.1, "width": 8, "layers": 1, "start_step": 2}}
            run["patience"] = 3
        elif name == "train-denoiser":
            config |= {"data": {"cache": str(cache), "vae": str(vae)}, "sample_prompts": ["red circle"]}
            config |= {"unet": {"blocks": [32, 64], "attention": [False, True], "norm_groups": 16, "heads_dim": 32}}
            config |= {"text": {"width": 32, "layers": 1, "heads": 2, "vocabulary": 600, "length": 16}}
        else:
            config |= {"model": str(model), "data": {"train": str(pictures)}, "sample_prompts": ["red circle"]}
            config |= {"adapter": {"sites": ["unet.attention", "text", "vae.decoder"], "rank": 2, "kind": "dora"}}
        path = write_yaml(at / "config.yaml", config)
        cases.append(Case(name, (name, path), (out, at / "work"), ("--run.resume",)))
    return cases


def prepare(root: Path) -> tuple[Path, Path, Path, Path]:
    """Pictures, a tiny VAE, their latents and a tiny model, made in forks."""
    pictures, at = root / "pictures", root / "base"
    shapes.write(pictures)
    for path in sorted(pictures.glob("*.png"))[12:]:
        path.unlink()
    lines = [
        line
        for line in (pictures / "metadata.jsonl").read_text().splitlines()
        if (pictures / json.loads(line)["file_name"]).is_file()
    ]
    (pictures / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    at.mkdir()
    optim = {"steps": 2, "batch_size": 4, "warmup_steps": 1, "ema_decay": 0.9}
    vae: dict[str, Any] = {
        "data": {"train": str(pictures), "read_size_px": 24},
        "model": {"channels": 4, "blocks": [8, 16], "norm_groups": 4},
    }
    vae |= {
        "run": {"out": str(at / "vae"), "work": str(at / "work-vae"), "precision": "fp32"},
        "optim": optim,
        "crops": {"size_px": 16},
    }
    cache = at / "latents.safetensors"
    unet = {"blocks": [32, 64], "attention": [False, True], "norm_groups": 16, "heads_dim": 32}
    model = {
        "data": {"cache": str(cache), "vae": str(at / "vae")},
        "unet": unet,
        "optim": optim,
        "sample_prompts": ["red circle"],
    }
    model |= {"run": {"out": str(at / "model"), "work": str(at / "work-model"), "precision": "fp32"}}
    model |= {"text": {"width": 32, "layers": 1, "heads": 2, "vocabulary": 600, "length": 16}}
    log = root / "log.txt"
    for arguments in (
        ("train-vae", write_yaml(at / "vae.yaml", vae)),
        ("encode", str(pictures), "--vae", str(at / "vae"), "--out", str(cache), "--size", "16"),
        ("train-denoiser", write_yaml(at / "model.yaml", model)),
    ):
        whole_run(Case(arguments[0], arguments, ()), log)
    return pictures, at / "vae", cache, at / "model"


def others(root: Path, pictures: Path, vae: Path, model: Path) -> list[Case]:
    """Verbs that write, each a few seconds at most."""
    at = root / "others"
    at.mkdir()
    picture = next(pictures.glob("*.png"))
    tiny, faces = ["--vae", str(vae)], ["--images", str(pictures)]
    rows: list[tuple[str, list[str], str]] = [
        ("generate", ["red circle", "--model", str(model), "--seed", "7", "--steps", "4", "-n", "2", "--out"], "drawn/"),
        ("encode", [str(pictures), *tiny, "--size", "16", "--out"], "c.safetensors"),
        ("convert", [str(vae), "--out"], "vae"),
        ("convert", [str(vae), "--out"], "one.safetensors"),
        ("lora convert", ["flat", "--to", "kohya", "--out"], "k.safetensors"),
        ("lora merge", ["flat", "pencil", "--out"], "m.safetensors"),
        ("fit-adapter", ["--from", str(vae), "--to", str(vae), *faces, "--size", "16", "--out"], "a.safetensors"),
        ("swap", [*tiny, "--model", str(model), "--force", "--out"], "swapped/"),
        ("compare", [str(vae), "emoji-tiny", *faces, "--size", "32", "--out"], "page.html"),
        ("evaluate vae", [str(vae), *faces, "--size", "32", "--sheet"], "sheet.png"),
        (
            "grid",
            ["red circle", "--model", str(model), "--x", "guidance=1,2", "--seed", "7", "--steps", "2", "--out"],
            "grid.png",
        ),
        ("interpolate", [str(picture), str(next(pictures.glob("*square.png"))), *tiny, "--n", "3", "--out"], "strip.png"),
        ("traverse", [*tiny, *faces, "--out"], "traverse.png"),
        ("make-fp16-safe", [str(vae), *faces, "--out"], "safe/"),
        ("compress", [str(picture)], "p.lpz"),
    ]
    return [
        Case(
            verb,
            (*verb.split(), *arguments, str(at / name)),
            (at / name.rstrip("/"),),
            once=name.endswith("/") or verb in ("convert", "lora convert", "lora merge"),
        )
        for verb, arguments, name in rows
    ]


# --- the whole ----------------------------------------------------------------------------------------------


def clean(case: Case) -> None:
    for place in case.places:
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)


def rounds(cases: list[Case], count: int, seed: int, log: Path, say: Callable[[str], None] = print) -> tuple[int, int]:
    """Kill `count` runs, the cases in turn; how many were killed before they ended, and in how many something was wrong."""
    draws, killed, bad = random.Random(seed), 0, 0
    known: dict[Case, tuple[dict[str, str], float]] = {}
    for number in range(count):
        case = cases[number % len(cases)]
        clean(case)
        if case not in known:
            whole_run(case, log)  # imports what it needs
            clean(case)
            seconds = whole_run(case, log)
            known[case] = content(case), seconds
            clean(case)
            say(f"{case}: {seconds:.1f} s, {len(known[case][0])} files")
        wanted, seconds = known[case]
        before = None
        if case.verb not in TRAINERS and not case.once and draws.random() < 0.5:  # over an earlier result
            whole_run(case, log)
            before = content(case)
        after = draws.uniform(0, seconds)
        ended, problems = trial(case, wanted, after, log, before)
        killed += ended
        if number % 10 == 9:
            say(f"{number + 1} runs, {killed} killed before they ended, {bad + bool(problems)} with something wrong")
        bad += bool(problems)
        for problem in problems[:4]:
            say(f"{number}: {case} killed after {after:.2f} s: {problem}")
    return killed, bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainers", type=int, default=100)
    parser.add_argument("--others", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["LATENTPIPE_HOME"] = str(root / "home")
        log = root / "log.txt"
        pictures, vae, cache, model = prepare(root)
        for name, cases, count in (
            ("trainers", trainers(root, pictures, vae, cache, model), given.trainers),
            ("other verbs", others(root, pictures, vae, model), given.others),
        ):
            if count:
                begin = time.monotonic()
                killed, bad = rounds(cases, count, given.seed, log)
                took = time.monotonic() - begin
                print(f"{name}: {count} runs, {killed} killed before they ended, {bad} with something wrong, {took:.0f} s")


if __name__ == "__main__":
    main()
