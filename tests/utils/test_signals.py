"""Ctrl-C and SIGTERM: a sentence and a status for every verb, nothing half-written, and no signal that is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latentpipe.cli.app import VERBS, main
from latentpipe.utils import signals
from latentpipe.utils.io import atomic_file
from latentpipe.utils.signals import Terminated, status_of, terminable

ROOT = Path(__file__).parents[2]
SIGNALS = [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """Ctrl-C means what it means in a terminal, however the tests were started; handlers are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status", "cause"), SIGNALS)
def test_every_verb_says_that_it_was_stopped(
    number: int, status: int, cause: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(name: str, arguments: list[str]) -> None:
        with atomic_file(tmp_path / "out.bin") as path:
            path.write_bytes(b"half")
            signal.raise_signal(number)

    for name in VERBS:
        monkeypatch.setitem(VERBS, name, interrupted)
        assert main(name.split()) == status, name
        assert f"stopped by {cause}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_who_tidies_up_after_ctrl_c_does_so_after_sigterm() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, terminable():
        signal.raise_signal(signal.SIGTERM)
    assert isinstance(caught.value, Terminated)
    assert (status_of(caught.value), status_of(KeyboardInterrupt())) == (143, 130)


def test_a_signal_that_a_callback_swallowed_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "AGAIN_S", 0.01)
    heard = 0
    with pytest.raises(Terminated), terminable():  # noqa: PT012 (the wait belongs to it)
        try:
            signal.raise_signal(signal.SIGTERM)
        except Terminated:
            heard += 1
        time.sleep(60)
    assert heard == 1


def test_an_ignored_interrupt_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with terminable():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def process(code: str, **named: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, **named)


@pytest.mark.parametrize(("number", "status", "cause"), SIGNALS)
def test_while_it_imports(number: int, status: int, cause: str) -> None:
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name == 'latentpipe.cli.app': os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Finder())\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from latentpipe.__main__ import main\n"
        "raise SystemExit(main())"
    )
    result = process(code)
    assert result.returncode == status, result.stderr
    assert f"stopped by {cause}" in result.stderr
    assert "Traceback" not in result.stderr


def test_leaving_runs_what_was_registered_and_waits_for_no_thread() -> None:
    code = (
        "import atexit, threading, time\n"
        "from latentpipe.utils.signals import leave\n"
        "atexit.register(print, 'removed')\n"
        "threading.Thread(target=time.sleep, args=(1000,)).start()\n"
        "leave(143)"
    )
    result = process(code)
    assert (result.returncode, result.stdout) == (143, "removed\n")
