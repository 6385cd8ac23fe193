"""A file of prompts: what its lines mean, the first mistake told by its line, and many pictures drawn in batches."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentpipe import Engine, LatentPipeline, UserError
from latentpipe.cli.app import main
from latentpipe.cli.prompt_file import Line, prompted_pictures, read_prompts
from latentpipe.engine.engine import Finished
from latentpipe.pipelines import batches
from latentpipe.pipelines.metadata import recipe as recipes
from latentpipe.utils.defaults import MAX_SEED


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts.txt"


def test_lines_are_prompts_with_or_without_a_seed(file: Path) -> None:
    file.write_bytes(b"red apple\n\n  7\tgreen apple \r\n12 monkeys\n   \n0\tblue\tbird\n")
    lines = read_prompts(file)
    assert lines == [Line(1, "red apple"), Line(3, "green apple", 7), Line(4, "12 monkeys"), Line(6, "blue\tbird", 0)]
    assert prompted_pictures(lines, 1, 100) == [("red apple", 100), ("green apple", 7), ("12 monkeys", 102), ("blue\tbird", 0)]
    assert prompted_pictures(lines[:3], 2, 5) == [
        ("red apple", 5), ("red apple", 6), ("green apple", 7), ("green apple", 8), ("12 monkeys", 9), ("12 monkeys", 10),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("one\ntwo\nx7\tthree", "line 3: 'x7' stands before the tab"),
        ("one\n-1\ttwo", "line 2: the seed is -1"),
        (f"one\n{MAX_SEED}\ttwo", f"line 2: the seed is {MAX_SEED}; expected 0 to {MAX_SEED - 1}"),
        ("one\n7\t  ", "line 2: no prompt stands behind the seed"),
        ("one\n\n" + "x" * 20_001, "line 3: the prompt has 20,001 characters"),
        ("one <lora:flat:high>", "line 1: '<lora:flat:high>' in the prompt: 'high' is no number"),
        ("\n \n", "holds no prompt"),
        ("a\n" * 10_001, "has 10,001 prompts; at most 10,000"),
    ],
)
def test_the_first_mistake_is_told_by_its_line(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(UserError, match=r"prompts\.txt") as raised:
        read_prompts(file, 2)
    assert said in str(raised.value)


def test_seeds_that_count_on_too_far() -> None:
    with pytest.raises(UserError, match=f"line 2 comes to the seed {MAX_SEED + 1}"):
        prompted_pictures([Line(1, "one"), Line(2, "two")], 1, MAX_SEED)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["red apple", "--prompts", "prompts.txt"], "PROMPT and --prompts are both given"),
        (["--prompts", "prompts.txt", "--out", "one.png"], "--out one.png: expected a folder"),
        (["--prompts", "not-there.txt"], "--prompts not-there.txt: no such file"),
        (["--prompts", "tags.txt"], "tags.txt, line 2: No LoRA 'not-there'"),
        ([], "PROMPT is missing"),
    ],
)
def test_what_a_call_cannot_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("red apple\n")
    (tmp_path / "tags.txt").write_text("one\ntwo <lora:not-there:1>\n")
    assert main(["generate", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", "tags.txt"]


def test_batches_are_bounded_and_of_the_same_adapters() -> None:
    sizes = {64: 16, 256: 16, 512: 4, 1024: 1, 4096: 1}
    assert {side: batches.batch_size((side, side)) for side in sizes} == sizes
    apples = [("apple", seed) for seed in range(5)]
    assert list(batches.batches(apples, (725, 725))) == [[apples[i]] for i in range(5)]
    assert [len(part) for part in batches.batches(apples * 7, (64, 64))] == [16, 16, 3]
    mixed = [("a", 1), ("b", 2), ("c <lora:flat:1>", 3), ("<lora:flat> d", 4), ("e <lora:flat:0.5>", 5), ("f", 6)]
    assert [[seed for _, seed in part] for part in batches.batches(mixed, (64, 64))] == [[1, 2], [3, 4], [5], [6]]


def test_pictures_of_a_file_are_those_of_single_calls(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over a batch's end, and each with the recipe of a picture that was drawn alone."""
    monkeypatch.setattr(batches, "MOST_PICTURES", 2)
    file.write_text("red (apple:1.2)\n7\tblue heart\ngreen tree <lora:flat:0.8>\n")
    assert main(["generate", "--prompts", str(file), "--seed", "3", "--steps", "2", "--out", str(tmp_path)]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.split()]
    assert [path.name for path in paths] == ["red-apple-1-2-3.png", "blue-heart-7.png", "green-tree-5.png"]
    pipe = LatentPipeline.from_pretrained("emoji")
    for path, prompt, seed in zip(paths, ["red (apple:1.2)", "blue heart", "green tree <lora:flat:0.8>"], [3, 7, 5], strict=True):
        alone = pipe(prompt, seed=seed, num_inference_steps=2)[0]
        assert recipes.read(path).model_dump(mode="json") == alone.recipe.model_dump(mode="json")
        with Image.open(path) as drawn:
            difference = np.asarray(drawn.convert("RGB"), np.int16) - np.asarray(alone.image, np.int16)
        assert np.abs(difference).max() <= 1


def test_a_mistake_that_only_the_model_tells_is_told_before_anything_is_drawn(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("red apple\ngreen apple\n(blue:9) apple\n")
    assert main(["generate", "--prompts", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "prompts.txt, line 3: '(blue:9)' in the prompt comes to a weight of 9" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_many_pictures_of_a_prompt_are_drawn_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their recipes say which batch, so that each is drawn again as it was."""
    monkeypatch.setattr(batches, "MOST_PICTURES", 2)
    assert main(["generate", "heart", "-n", "3", "--seed", "4", "--steps", "2", "--out", str(tmp_path)]) == 0
    found = [recipes.read(Path(line)) for line in capsys.readouterr().out.split()]
    assert [(one.seed, one.batch_size, one.batch_index) for one in found] == [(4, 2, 0), (5, 2, 1), (6, 1, 0)]
    assert {one.stopped_after for one in found} == {None}


def test_a_stop_keeps_the_unfinished_pictures_of_a_batch() -> None:
    pipe, cancel = LatentPipeline.from_pretrained("emoji"), threading.Event()
    events = Engine(pipe).run([("heart", 1), ("apple", 2)], cancel=cancel, num_inference_steps=8)
    next(events)
    cancel.set()
    event = list(events)[-1]
    assert isinstance(event, Finished)
    kept = [(one.recipe.prompt, one.recipe.seed, one.recipe.batch_size) for one in event.pictures]
    assert kept == [("heart", 1, 1), ("apple", 2, 1)]
    assert all(one.recipe.stopped_after in range(1, 8) for one in event.pictures)
