"""A job that is stopped leaves a network between two of its blocks, and keeps what the step before it made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import grey_levels, tiny_vae

from latentpipe import Engine, Finished, LatentPipeline, VAEStage
from latentpipe.engine.jobs import run_job
from latentpipe.utils import cancellation
from latentpipe.utils.errors import Cancelled

PROMPT = "red circle"


@contextmanager
def watched(network: Any, act: Callable[[int], None]) -> Iterator[list[int]]:
    """act(n) at the n-th call (from 0) of the network's first convolution; yields how often its last one was reached."""
    calls, ends = [0], [0]

    def first(module: Any, inputs: Any) -> None:
        act(calls[0])
        calls[0] += 1

    def last(module: Any, inputs: Any) -> None:
        ends[0] += 1

    hooks = [network.conv_in.register_forward_pre_hook(first), network.conv_out.register_forward_pre_hook(last)]
    try:
        yield ends
    finally:
        for hook in hooks:
            hook.remove()


def test_a_step_is_left_and_the_one_before_it_kept(pipe: LatentPipeline) -> None:
    cancel = threading.Event()
    with watched(pipe.host.unet, lambda call: cancel.set() if call == 2 else None) as ends:
        *_, last = Engine(pipe).run(PROMPT, cancel=cancel, seed=3, num_inference_steps=50)
    assert ends == [2]  # the third pass was given up
    assert isinstance(last, Finished)
    assert last.pictures[0].recipe.stopped_after == 2
    after_two = pipe(PROMPT, seed=3, num_inference_steps=50, on_step=lambda step: step.step == 2)
    assert grey_levels(last.pictures[0].image, after_two[0].image) == 0


def test_nothing_is_kept_of_a_first_step(pipe: LatentPipeline) -> None:
    cancel = threading.Event()
    with watched(pipe.host.unet, lambda call: cancel.set()) as ends, pytest.raises(Cancelled):
        list(Engine(pipe).run(PROMPT, cancel=cancel, seed=3, num_inference_steps=5))
    assert ends == [0]


def test_decoding_is_left(pipe: LatentPipeline) -> None:
    cancel = threading.Event()
    with watched(pipe.host.vae.decoder, lambda call: cancel.set()) as ends, pytest.raises(Cancelled):
        list(Engine(pipe).run(PROMPT, cancel=cancel, seed=3, num_inference_steps=2))
    assert ends == [0]
    drawn = pipe(PROMPT, seed=3, num_inference_steps=2)  # and nothing of it is left behind
    assert all(not block._forward_pre_hooks for block in [*pipe.host.vae.modules(), *pipe.host.unet.modules()])
    assert drawn[0].recipe.stopped_after is None


def test_bands_are_left_in_any_job(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, cancel, looks, done = VAEStage(tiny_vae(), tile=8), threading.Event(), [0], []
    latents = torch.randn(1, stage.space.channels, 16, 16, generator=torch.Generator().manual_seed(0))
    original = cancellation.look

    def look() -> None:
        looks[0] += 1
        if looks[0] == 3:
            cancel.set()
        original()

    monkeypatch.setattr(cancellation, "look", look)
    with torch.no_grad(), pytest.raises(Cancelled):
        list(run_job(lambda report: done.append(stage.decode(latents)), cancel))
    assert (looks, done) == ([3], [])
    with torch.no_grad():
        list(run_job(lambda report: done.append(stage.decode(latents)), threading.Event()))
    assert looks[0] > 10
    assert torch.equal(done[0], VAEStage(stage.vae, tile=8).decode(latents).detach())


def test_outside_of_a_job_nothing_looks(pipe: LatentPipeline) -> None:
    with cancellation.interruptible(pipe.host.unet):
        assert all(not block._forward_pre_hooks for block in pipe.host.unet.modules())
    cancellation.look()
