"""A small share of dev/fuzz.py: damaged files of every kind are read with finite values, or refused in a sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "dev"))

import fuzz

SHARE = {"model": 4, "single-file": 8, "vae-folder": 6, "vae-file": 8, "config": 10}


@pytest.mark.parametrize("name", list(fuzz.READERS))
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    tally = fuzz.run(name, range(SHARE.get(name, 30)), tmp_path, longest_s=120)
    assert not tally.failed, "\n".join(f"{name} {seed}: {text}" for seed, text in tally.failed.items())
    assert tally.refused
    assert tally.accepted + tally.refused == SHARE.get(name, 30)


def test_a_failure_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share above can fail: a reader that lets anything else through is counted."""

    def read(at: Path) -> float:
        return 1 / len((at / "y.yaml").read_bytes().partition(b"a: 1")[1])

    monkeypatch.setitem(fuzz.READERS, "yaml", fuzz.Reader(fuzz.READERS["yaml"].make, read))
    tally = fuzz.run("yaml", range(40), tmp_path, longest_s=120)
    assert any("ZeroDivisionError" in text for text in tally.failed.values())
    monkeypatch.setitem(fuzz.READERS, "yaml", fuzz.Reader(fuzz.READERS["yaml"].make, lambda at: float("nan")))
    (tmp_path / "again").mkdir()
    assert "not finite" in fuzz.run("yaml", range(1), tmp_path / "again", longest_s=120).failed[0]
