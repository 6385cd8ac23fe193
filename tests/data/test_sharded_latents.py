"""Latents in shards as training reads them: the rows of a cache, mapped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny_vae, write_shards

from latentpipe import UserError
from latentpipe.checkpoints.vae_io import save_vae, vae_hash
from latentpipe.data.latent_cache import LatentCache, open_cache
from latentpipe.data.shard_manifest import shard_path
from latentpipe.data.sharded_latents import ShardedLatents, open_latents


@pytest.fixture
def cache(cache_file: Path, vae_folder: Path) -> LatentCache:
    """Twelve rows, of which the fourth has no caption and the sixth has two, of three kinds."""
    whole = open_cache(cache_file, vae_folder)
    captions = [*whole.captions]
    captions[3], captions[5] = (), ("one", 'an "other" é')
    return LatentCache(whole.mean, whole.std, captions, 16, whole.vae_hash, ("a", "b", "") * 4)


@pytest.fixture
def sharded(cache: LatentCache, vae_folder: Path, tmp_path: Path) -> ShardedLatents:
    """The same in three shards."""
    found = open_latents(write_shards(tmp_path / "shards", cache, 5), vae_folder)
    assert isinstance(found, ShardedLatents)
    return found


def test_rows_are_those_of_a_cache(cache: LatentCache, sharded: ShardedLatents) -> None:
    assert (len(sharded), sharded.shape, sharded.size_px, sharded.vae_hash) == (12, cache.shape, 16, cache.vae_hash)
    chosen = torch.tensor([11, 0, 5, 4, 0, 7])
    first, second = (one.sample(chosen, torch.Generator().manual_seed(3)) for one in (cache, sharded))
    assert torch.equal(first, second)
    assert torch.equal(cache.means(chosen), sharded.means(chosen))
    assert list(sharded.captions) == [sharded.captions[row] for row in range(12)] == list(cache.captions)
    assert sharded.captions[3:6] == list(cache.captions[3:6])
    assert torch.equal(cache.captioned(), sharded.captioned())
    assert cache.weights({"a": 0.5}) == sharded.weights({"a": 0.5})
    with pytest.raises(UserError, match=r"'c'.*has: a, b"):
        sharded.weights({"c": 1.0})
    with pytest.raises(IndexError):
        sharded.captions[12]


def test_some_rows_get_the_noise_that_they_have_among_all(cache: LatentCache, sharded: ShardedLatents) -> None:
    chosen = torch.tensor([2, 9, 4, 6])
    for one in (cache, sharded):
        whole = one.sample(chosen, torch.Generator().manual_seed(1))
        parts = [one.sample(chosen, torch.Generator().manual_seed(1), part) for part in (slice(0, 1), slice(1, 4))]
        assert torch.equal(torch.cat(parts), whole)


def test_few_files_are_open_at_once(cache: LatentCache, sharded: ShardedLatents, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentpipe.data import sharded_latents

    before = cache.captions
    monkeypatch.setattr(sharded_latents, "MOST_OPEN", 1)
    rows = (0, 6, 11, 1, 7)
    assert [sharded.captions[row] for row in rows] == [before[row] for row in rows]
    assert len(sharded._open) == 1


def test_what_is_not_whole_is_refused(cache: LatentCache, sharded: ShardedLatents, vae_folder: Path, tmp_path: Path) -> None:
    whole = sharded.folder

    def damaged(name: str) -> Path:
        return Path(shutil.copytree(whole, tmp_path / name))

    shard_path(folder := damaged("gone"), 1).unlink()
    with pytest.raises(UserError, match=r"shard-000001.safetensors is gone"):
        open_latents(folder, vae_folder)
    shard_path(folder := damaged("cut"), 2).write_bytes(shard_path(whole, 2).read_bytes()[:-8])
    with pytest.raises(UserError, match=r"shard-000002.safetensors has [\d,]+ bytes, expected"):
        open_latents(folder, vae_folder)
    manifest = json.loads(((folder := damaged("open")) / "manifest.json").read_text())
    del manifest["shards"][0]["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not finished: 1 of 3 shards missing"):
        open_latents(folder, vae_folder)
    data = bytearray(shard_path(folder := damaged("nan"), 0).read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin = json.loads(data[8 : 8 + length])["mean"]["data_offsets"][0] + 8 + length
    data[begin : begin + 2] = b"\xff\x7f"
    shard_path(folder, 0).write_bytes(data)
    with pytest.raises(UserError, match="not finite"):
        open_latents(folder, vae_folder).means(torch.tensor([0]))
    with pytest.raises(UserError, match="without a manifest"):
        open_latents(tmp_path, vae_folder)


def test_shards_of_another_vae_are_refused(sharded: ShardedLatents, tmp_path: Path) -> None:
    digest = save_vae(tiny_vae(1), tmp_path / "other", {})
    with pytest.raises(UserError, match=f"{sharded.vae_hash[:16]}, but .* is {digest[:16]}"):
        open_latents(sharded.folder, tmp_path / "other")
    assert vae_hash(tmp_path / "other") == digest
