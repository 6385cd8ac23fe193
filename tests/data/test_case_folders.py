"""Folders as people have them: captions beside pictures, links, hidden files, columns of other names, splits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers import draw_shape

from latentpipe import UserError
from latentpipe.data.image_folder import read_index, read_pictures
from latentpipe.data.latent_cache import encode_folder
from latentpipe.data.streaming import PictureStream
from latentpipe.utils.errors import LatentpipeWarning


def draw(*paths: Path) -> None:
    """A picture under each path."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_shape("red", "circle", 16).save(path)


def rows(folder: Path, key: str, n: int = 3) -> None:
    """Pictures s0.png ... with metadata.jsonl, captions under `key`."""
    draw(*(folder / f"s{k}.png" for k in range(n)))
    lines = [json.dumps({"file_name": f"s{k}.png", key: f"red apple {k}"}) for k in range(n)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def found(folder: Path, **named: Any) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Names and captions of the index, and the notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LatentpipeWarning)
        items = read_index(folder, **named)
    return {item.path.relative_to(folder).as_posix(): item.captions for item in items}, [str(note.message) for note in caught]


def test_case_22_a_text_file_beside_a_picture_is_its_caption(tmp_path: Path, vae_folder: Path, capsys: Any) -> None:
    draw(*(tmp_path / "set" / name for name in ("p0.png", "sub/p1.jpg", "p2.png", "p3.png")))
    (tmp_path / "set" / "p0.txt").write_text("\ufeffblue diamond, 1girl, (masterpiece:1.2)\n", encoding="utf-8")
    (tmp_path / "set" / "sub" / "p1.caption").write_text("two\nlines\n")
    (tmp_path / "set" / "p2.txt").write_text("\n")
    (tmp_path / "set" / "readme.txt").write_text("of no picture")
    captions, notes = found(tmp_path / "set")
    assert captions == {
        "p0.png": ("blue diamond, 1girl, (masterpiece:1.2)",), "p2.png": (), "p3.png": (), "sub/p1.jpg": ("two lines",)
    }  # fmt: skip
    assert not notes
    cache = encode_folder(tmp_path / "set", vae_folder, tmp_path / "cache.safetensors", 16)
    assert cache.captions == [captions[name] for name in ("p0.png", "p2.png", "p3.png", "sub/p1.jpg")]
    assert "1 caption from .txt files, 1 caption from .caption files" in capsys.readouterr().out


def test_case_22_a_caption_that_is_no_text_is_named(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt.*UTF-8"):
        read_index(tmp_path)
    assert found(tmp_path, captions=False)[0] == {"a.png": ()}  # whoever wants no captions is not stopped by them


def test_case_23_linked_folders_are_followed_once(tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere/q0.png", tmp_path / "elsewhere/deep/q1.png", tmp_path / "set/own.png")
    (tmp_path / "set" / "a-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "b-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "up").symlink_to(tmp_path)
    (tmp_path / "set" / "gone").symlink_to(tmp_path / "nowhere")
    captions, notes = found(tmp_path / "set")
    assert list(captions) == ["a-link/deep/q1.png", "a-link/q0.png", "own.png"]
    assert len(notes) == 1
    assert "left out: a-link/circle, b-link, up" in notes[0]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "linked").symlink_to(tmp_path / "elsewhere")
    assert read_pictures(tmp_path / "only", 16).names == ["linked/deep/q1.png", "linked/q0.png"]
    assert len(PictureStream(tmp_path / "only", 16)) == 2


def test_case_24_hidden_files_and_resource_forks_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "set"  # a folder that is named is not hidden
    draw(*(folder / name for name in ("r0.png", "r1.png", ".ipynb_checkpoints/r0-checkpoint.png", "sub/.git/a/b.png")))
    for name in ("._r0.png", "__MACOSX/._r0.png", "__MACOSX/sub/._r1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X")
    captions, notes = found(folder)
    assert list(captions) == ["r0.png", "r1.png"]
    assert len(notes) == 1
    assert "5 pictures are hidden" in notes[0]
    assert read_pictures(folder, 16).skipped == {}
    (folder / "r0.png").unlink()
    (folder / "r1.png").unlink()
    with pytest.raises(UserError, match=r"holds no picture.*5 pictures are hidden"):
        read_index(folder)


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_case_25a_the_usual_names_of_a_caption_are_read(tmp_path: Path, key: str) -> None:
    rows(tmp_path, key)
    captions, notes = found(tmp_path)
    assert captions == {f"s{k}.png": (f"red apple {k}",) for k in range(3)}
    assert not notes
    assert f"3 captions from {key} in metadata.jsonl" in read_pictures(tmp_path, 16).report()


def test_case_25a_another_column_is_named_and_can_be_asked_for(tmp_path: Path) -> None:
    rows(tmp_path, "beschreibung")
    captions, notes = found(tmp_path)
    assert set(captions.values()) == {()}
    assert len(notes) == 1
    assert "'beschreibung'" in notes[0]
    assert "--data.caption-column" in notes[0]
    captions, notes = found(tmp_path, column="beschreibung")
    assert captions["s1.png"] == ("red apple 1",)
    assert not notes
    with pytest.raises(UserError, match="'beschriebung'"):
        read_index(tmp_path, "beschriebung")


def test_case_25a_the_column_reaches_both_verbs_that_train_on_captions(tmp_path: Path, vae_folder: Path) -> None:
    from latentpipe.cli.data import encode
    from latentpipe.train.config import TrainLora
    from latentpipe.train.lora.data import open_pictures

    rows(tmp_path / "set", "beschreibung")
    encode(tmp_path / "set", str(vae_folder), 16, tmp_path / "c.safetensors", caption_column="beschreibung")
    assert TrainLora.model_fields["data"].annotation.model_fields["caption_column"].default is None  # type: ignore[union-attr]
    given = open_pictures(tmp_path / "set", vae_folder, 16, tmp_path, held_out=frozenset(), column="beschreibung")
    assert given.captions == [("red apple 0",), ("red apple 1",), ("red apple 2",)]


def test_case_25d_metadata_of_a_split_is_read_with_it(tmp_path: Path) -> None:
    rows(tmp_path / "train", "text")
    draw(tmp_path / "train" / "unlisted.png", tmp_path / "cover.png")
    captions, notes = found(tmp_path)
    assert captions == {"cover.png": (), **{f"train/s{k}.png": (f"red apple {k}",) for k in range(3)}}
    assert not notes
    rows(tmp_path / "test", "caption", 1)
    captions, notes = found(tmp_path)
    assert captions["test/s0.png"] == ("red apple 0",)
    assert "the splits test, train" in notes[0]
    (tmp_path / "test" / "metadata.jsonl").write_text(json.dumps({"file_name": "../train/s0.png", "text": "x"}))
    with pytest.raises(UserError, match="outside the folder"):
        read_index(tmp_path)
