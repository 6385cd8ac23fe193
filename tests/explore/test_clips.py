"""Frames: what was written is read back, there and back; what cannot be written is told before, and leaves nothing."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentpipe import UserError
from latentpipe.explore import clips

SHOWN = [Image.new("RGB", (7, 9), (value, 0, 255 - value)) for value in (0, 100, 200)]


def test_a_strip_is_the_frames_themselves(tmp_path: Path) -> None:
    clips.write_clip(SHOWN, tmp_path / "strip.PNG")
    with Image.open(tmp_path / "strip.PNG") as strip:
        assert strip.size == (3 * 7 + 6, 9)
        for index, frame in enumerate(SHOWN):
            assert strip.crop((10 * index, 0, 10 * index + 7, 9)).tobytes() == frame.tobytes()


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("size", [(7, 9), (51, 301), (16, 16)])
def test_a_video_is_read_back(tmp_path: Path, suffix: str, size: tuple[int, int]) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / f"clip{suffix}"
    given = [frame.resize(size) for frame in SHOWN]
    clips.write_clip(given, path, fps=10)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 10
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    wanted = clips.there_and_back(given)
    assert len(found) == len(wanted) == 4
    for one, frame in zip(found, wanted, strict=True):
        assert one.shape[:2] == (frame.height + frame.height % 2, frame.width + frame.width % 2)
        assert np.abs(one.astype(int) - np.asarray(frame)[0, 0]).mean() < 12  # the padding too; lossy
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_there_and_back_shows_the_ends_once() -> None:
    reds = [frame.getpixel((0, 0))[0] for frame in clips.there_and_back(SHOWN)]
    assert reds == [0, 100, 200, 100]
    assert clips.there_and_back(SHOWN)[0].size == (7 * 28, 9 * 28)
    assert len(clips.there_and_back(SHOWN[:2])) == 2


@pytest.mark.parametrize(
    ("given", "name", "fps", "message"),
    [
        (SHOWN, "clip.avi", 12, "ends in one of .png, .gif, .mp4, .webm"),
        (SHOWN, "clip", 12, "ends in one of"),
        (SHOWN, "clip.gif", 0, "expected 1 to 60"),
        ([], "clip.gif", 12, "0 frames"),
        ([SHOWN[0], Image.new("RGB", (3, 3))], "clip.png", 12, "of 2 sizes"),
    ],
)
def test_what_cannot_be_written_is_told(tmp_path: Path, given: list[Image.Image], name: str, fps: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        clips.write_clip(given, tmp_path / name, fps)
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install av"):
        clips.write_clip(SHOWN, tmp_path / "clip.mp4")
    clips.write_clip(SHOWN, tmp_path / "clip.gif")
    assert [each.name for each in tmp_path.iterdir()] == ["clip.gif"]
