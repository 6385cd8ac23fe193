"""Stop a network in the middle of a forward pass: a job's cancel token is looked at before each of its blocks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from latentpipe.utils.errors import Cancelled


class PassStopped(Cancelled):
    """A network was left in the middle of a forward pass."""


_job: ContextVar[threading.Event | None] = ContextVar("cancel token of the job in work", default=None)
_keeps: ContextVar[bool] = ContextVar("whether that job keeps what its last whole step made", default=False)
_pass: ContextVar[threading.Event | None] = ContextVar("the same, inside of a pass that may be given up", default=None)


@contextmanager
def job(cancel: threading.Event, keeps: bool = False) -> Iterator[None]:
    """Passes inside may be given up once `cancel` is set; `keeps`: what the last whole step made is wanted all the same."""
    before, kept = _job.set(cancel), _keeps.set(keeps)
    try:
        yield
    finally:
        _job.reset(before)
        _keeps.reset(kept)


def keeps() -> bool:
    """Whether the job in work keeps partial pictures."""
    return _keeps.get()


@contextmanager
def interruptible(network: Any) -> Iterator[None]:
    """`PassStopped` is raised before the network's next block once the job's token is set.

    Nothing changes outside of a job, and where the token is set already: what is still computed then, as the partial pictures of
    a stopped job are, is wanted.
    """
    cancel = _job.get()
    if cancel is None or cancel.is_set():
        yield
        return
    before = _pass.set(cancel)
    hooks = [block.register_forward_pre_hook(_look) for block in _blocks(network)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        _pass.reset(before)


def look() -> None:
    """`PassStopped` inside of a pass that may be given up, once its job's token is set."""
    cancel = _pass.get()
    if cancel is not None and cancel.is_set():
        raise PassStopped("stopped in the middle of a step")


def _look(module: Any, inputs: Any) -> None:
    look()


def _blocks(network: Any) -> list[Any]:
    """The parts of every list of blocks: some dozens a network, each a small part of its time."""
    from torch.nn import ModuleList, Sequential

    lists = [module for module in network.modules() if isinstance(module, (ModuleList, Sequential))]
    blocks = dict.fromkeys(block for each in lists for block in each if block is not None)
    return [block for block in blocks if any(True for _ in block.children())]
