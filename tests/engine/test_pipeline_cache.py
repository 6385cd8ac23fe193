"""Open models are few, shared, and never stale."""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from helpers import edit_json, tiny_vae

from latentpipe import UserError
from latentpipe.checkpoints.vae_io import save_vae
from latentpipe.engine.pipeline_cache import PipelineCache
from latentpipe.pipelines import verdict_cache


@pytest.fixture
def models(model_folder: Path, own_home: Path) -> list[str]:
    """Names of three installed models, and the VAEs "same" and "other" beside them."""
    names = ["one", "two", "three"]
    for name in names:
        shutil.copytree(model_folder, own_home / "models" / name)
    save_vae(tiny_vae(), own_home / "vae" / "same", {})
    save_vae(tiny_vae(5), own_home / "vae" / "other", {})
    return names


@pytest.fixture
def cache() -> PipelineCache:
    return PipelineCache(most=2, device="cpu")


def newer(folder: Path) -> None:
    """Give a file in the folder a later date."""
    file = next(folder.rglob("*.safetensors"))
    os.utime(file, (file.stat().st_atime, file.stat().st_mtime + 10))


def test_an_open_model_is_kept(models: list[str], cache: PipelineCache) -> None:
    assert not cache.is_open("one")
    pipe = cache.open("one")
    assert cache.is_open("one")
    assert cache.open("one") is pipe
    assert cache.open("two") is not pipe


def test_the_least_recently_used_one_leaves(models: list[str], cache: PipelineCache) -> None:
    one = cache.open("one")
    two = weakref.ref(cache.open("two"))
    assert cache.open("one") is one  # used again
    cache.open("three")
    assert [cache.is_open(name) for name in models] == [True, False, True]
    gc.collect()
    assert two() is None


def test_a_swapped_vae_shares_the_denoiser(models: list[str], cache: PipelineCache) -> None:
    base, swapped = cache.open("one"), cache.open("one", "same")
    assert swapped is not base
    assert swapped.host.unet is base.host.unet
    assert swapped.stage is not base.stage
    assert cache.open("one", "same") is swapped
    assert cache.open("one") is base


def test_a_dropped_model_does_not_live_on(models: list[str], cache: PipelineCache) -> None:
    unet = weakref.ref(cache.open("one", "same").host.unet)
    cache.open("two")
    gc.collect()
    assert unet() is not None
    cache.open("three")
    gc.collect()
    assert unet() is None


def test_so_many_swapped_ones_are_kept(models: list[str], cache: PipelineCache, own_home: Path) -> None:
    for index in range(6):
        shutil.copytree(own_home / "vae" / "same", own_home / "vae" / f"same-{index}")
    opened = [weakref.ref(cache.open("one", f"same-{index}")) for index in range(6)]
    gc.collect()
    assert [pipe() is not None for pipe in opened] == [False] * 2 + [True] * 4
    stages = [weakref.ref(cache.stage(f"same-{index}")) for index in range(6)]
    gc.collect()
    assert [stage() is not None for stage in stages] == [False] * 2 + [True] * 4


def test_a_changed_file_is_opened_again(models: list[str], cache: PipelineCache, own_home: Path) -> None:
    model, stage = cache.open("one"), cache.stage("same")
    newer(own_home / "models" / "one")
    assert not cache.is_open("one")
    assert cache.open("one") is not model
    save_vae(tiny_vae(9), own_home / "vae" / "same-new", {})
    for path in (own_home / "vae" / "same-new").iterdir():
        shutil.copy(path, own_home / "vae" / "same" / path.name)
    newer(own_home / "vae" / "same")
    again = cache.stage("same")
    assert again is not stage
    torch.testing.assert_close(
        again.vae.decoder.conv_in.weight, tiny_vae(9).decoder.conv_in.weight, atol=1e-3, rtol=1e-2
    )  # kept in fp16


def test_a_verdict_is_measured_once(
    models: list[str], cache: PipelineCache, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    check = verdict_cache.judge_stages
    monkeypatch.setattr(verdict_cache, "judge_stages", lambda host, vae: measured.append(vae.digest) or check(host, vae))
    first = cache.verdict("one", "same")
    assert cache.verdict("one", "same") is first
    assert cache.verdict("one", "other").outcome != first.outcome
    assert len(set(measured)) == len(measured) == 2
    assert not cache.is_open("one")  # the VAEs alone decide
    newer(own_home / "vae" / "same")
    assert cache.verdict("one", "same") == first  # the same weights: read again, not measured
    assert len(measured) == 2
    edit_json(own_home / "vae" / "same" / "config.json", scaling_factor=1.5)
    newer(own_home / "vae" / "same")
    assert cache.verdict("one", "same").outcome == "broken"
    assert len(measured) == 3


def test_user_errors_leave_nothing_broken(models: list[str], cache: PipelineCache) -> None:
    pipe = cache.open("one")
    for wrong in (
        lambda: cache.open("no-such-model"),
        lambda: cache.open("one", "no-such-vae"),
        lambda: cache.open("one", "other"),  # of another space
        lambda: cache.open("one", "other", "no-such-adapter"),
        lambda: cache.stage("no-such-vae"),
        lambda: cache.verdict("one", "no-such-vae"),
    ):
        with pytest.raises(UserError):
            wrong()
    assert cache.open("one") is pipe
    assert cache.open("one", "same").host.unet is pipe.host.unet
