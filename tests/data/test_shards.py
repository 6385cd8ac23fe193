"""Latents in shards: their bytes, whatever the workers; what a killed run leaves; what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import opened_in_threads, tiny_vae
from PIL import Image

from latentpipe import UserError, VAEStage, encode_shards
from latentpipe.checkpoints.vae_io import load_vae, save_vae
from latentpipe.cli.app import main
from latentpipe.data import shard_worker, shards
from latentpipe.data.shard_manifest import Manifest, read_manifest, shard_path
from latentpipe.data.sources import Entry, Reader, as_line, entries, from_line
from latentpipe.utils import cluster, worker_process, workers
from latentpipe.utils.errors import LatentpipeWarning
from latentpipe.utils.images import to_images
from latentpipe.utils.io import file_hash, read_tensors


def noise_pictures(folder: Path, count: int, side: int = 16) -> Path:
    """Pictures of noise, each with its own caption."""
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"noise {number}")
    return folder


def bytes_of(folder: Path) -> dict[str, str]:
    """The hashes of the shards in a folder."""
    return {path.name: file_hash(path) for path in sorted(folder.glob("shard-*"))}


@pytest.fixture(scope="module", autouse=True)
def in_threads() -> Iterator[pytest.MonkeyPatch]:
    """Workers are threads, but in the tests of processes."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "opened_on", opened_in_threads)
        yield patch


@pytest.fixture
def in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are what they are for people."""
    monkeypatch.setattr(shards, "opened_on", cluster.opened_on)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures; not to be written to."""
    return noise_pictures(tmp_path_factory.mktemp("noise") / "set", 20)


@pytest.fixture(scope="module")
def one(noise: Path, vae_folder: Path, tmp_path_factory: pytest.TempPathFactory, in_threads: object) -> Path:
    """Their shards of six by one worker; not to be written to."""
    out = tmp_path_factory.mktemp("one") / "shards"
    encode_shards(noise, vae_folder, out, 16, per_shard=6)
    return out


@pytest.mark.slow
def test_shards_hold_the_posterior_of_every_picture(noise: Path, vae_folder: Path, one: Path) -> None:
    manifest = read_manifest(one)
    assert [shard.rows for shard in manifest.shards] == [6, 6, 6, 2]
    assert (manifest.pictures, manifest.rows, manifest.missing, manifest.threads) == (20, 20, 0, 1)
    pictures = [Image.open(path) for path in sorted(noise.glob("*.png"))]
    with torch.no_grad():
        mean, std = VAEStage(load_vae(vae_folder)).posterior(to_images(pictures))
    found = [read_tensors(shard_path(one, number)) for number in range(4)]
    assert torch.allclose(torch.cat([part["mean"] for part in found]).float(), mean, atol=2e-3)
    assert torch.allclose(torch.cat([part["std"] for part in found]).float(), std, atol=2e-3)
    assert {shard.sha256 for shard in manifest.shards} == set(bytes_of(one).values())
    ends = found[3]["caption_ends"].tolist()
    assert [json.loads(found[3]["captions"].numpy().tobytes()[a:b]) for a, b in zip([0, *ends], ends, strict=False)] == [
        ["noise 18"],
        ["noise 19"],
    ]


@pytest.mark.slow
def test_two_processes_one_of_which_dies_write_the_bytes_of_one(
    noise: Path, vae_folder: Path, one: Path, tmp_path: Path, in_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    original = workers.LocalWorker.ask

    def ask(self: workers.LocalWorker, task: int, on_event: object = None) -> dict[str, Any]:
        if not killed and task == 1:
            killed.append(self.pid)
            os.kill(self.pid, signal.SIGKILL)
        return original(self, task)

    monkeypatch.setattr(workers.LocalWorker, "ask", ask)
    with pytest.warns(LatentpipeWarning, match=r"shard 1 died .SIGKILL"):
        done = encode_shards(noise, vae_folder, tmp_path / "two", 16, workers=2, per_shard=6)
    assert (done.pictures, done.rows, done.shards, done.made, done.skipped, done.deaths) == (20, 20, 4, 4, {}, 1)
    assert bytes_of(tmp_path / "two") == bytes_of(one)
    assert (tmp_path / "two" / "manifest.json").read_bytes() == (one / "manifest.json").read_bytes()


@pytest.mark.slow
def test_a_run_makes_what_is_missing_or_cut_short(noise: Path, vae_folder: Path, one: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(one, tmp_path / "out"))
    shard_path(out, 1).unlink()
    shard_path(out, 2).write_bytes(shard_path(one, 2).read_bytes()[:-10])
    with pytest.warns(LatentpipeWarning, match="shard-000002.safetensors is damaged"):
        done = encode_shards(noise, vae_folder, out, 16, per_shard=6)
    assert done.made == 2
    assert bytes_of(out) == bytes_of(one)
    assert encode_shards(noise, vae_folder, out, 16, per_shard=6).made == 0


@pytest.mark.slow
def test_a_shard_that_ends_every_worker_ends_the_run(noise: Path, vae_folder: Path, tmp_path: Path) -> None:
    def opened(number: int) -> workers.LocalWorker:
        worker = workers.LocalWorker("latentpipe.data.shard_worker:open_shards", {}, "cpu", 1)
        os.kill(worker.pid, signal.SIGKILL)
        return worker

    with pytest.raises(UserError, match="Shard 3: 5 workers died of it, the last one by SIGKILL, as where memory runs out"):
        list(workers.Pool(2, opened, lambda number: f"Shard {number}").run([3]))


@pytest.mark.slow
def test_killed_drivers_leave_what_the_next_one_needs(noise: Path, vae_folder: Path, one: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "latentpipe", "encode", str(noise), "--vae", str(vae_folder), "--size", "16"]
    command += ["--shards", str(out), "--per-shard", "6"]
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not list(out.glob("shard-*")) and time.monotonic() < until and driver.poll() is None:
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    kept = {name: (out / name).stat().st_mtime_ns for name in bytes_of(out)}
    assert kept
    done = encode_shards(noise, vae_folder, out, 16, per_shard=6)
    assert done.made <= 4 - len(kept) + 1
    assert bytes_of(out) == bytes_of(one)
    assert read_manifest(out).missing == 0
    assert not list(out.glob("*.part"))


@pytest.mark.slow
def test_broken_pictures_are_listed(noise: Path, vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(noise, tmp_path / "set"))
    for number in (3, 4, 5):
        (folder / f"{number:03d}.png").write_bytes(b"no picture")
    words = [
        "encode",
        str(folder),
        "--vae",
        str(vae_folder),
        "--size",
        "16",
        "--shards",
        str(tmp_path / "out"),
        "--per-shard",
        "3",
    ]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "17 pictures in 7 shards (7 made now), 3 skipped" in told
    assert "skipped 003.png: expected PNG" in told
    assert [shard.rows for shard in read_manifest(tmp_path / "out").shards][:3] == [3, 0, 3]
    assert list(shard_worker.skipped_in(shard_path(tmp_path / "out", 1))) == ["003.png", "004.png", "005.png"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size_px": 32}, "size_px 16, and this run has 32"),
        ({"per_shard": 7}, "per_shard 6, and this run has 7"),
        ({"threads": 2}, "threads 1, and this run has 2"),
    ],
)
def test_shards_of_another_run_are_refused(noise: Path, vae_folder: Path, one: Path, changes: dict, words: str) -> None:
    before = bytes_of(one)
    with pytest.raises(UserError, match=words):
        encode_shards(noise, vae_folder, one, **({"size_px": 16, "per_shard": 6} | changes))
    assert bytes_of(one) == before


@pytest.mark.slow
def test_shards_of_another_vae_version_or_folder_are_refused(noise: Path, vae_folder: Path, one: Path, tmp_path: Path) -> None:
    other = save_vae(tiny_vae(1), tmp_path / "vae", {})
    with pytest.raises(UserError, match=f"and this one is {other[:16]}"):
        encode_shards(noise, tmp_path / "vae", one, 16, per_shard=6)
    out = Path(shutil.copytree(one, tmp_path / "out"))
    (out / "manifest.json").write_text((one / "manifest.json").read_text().replace('"latentpipe":"', '"latentpipe":"9.'))
    with pytest.raises(UserError, match=r"begun with latentpipe 9\."):
        encode_shards(noise, vae_folder, out, 16, per_shard=6)
    folder = Path(shutil.copytree(noise, tmp_path / "set"))
    (folder / "007.txt").write_text("another caption")
    with pytest.raises(UserError, match=r"has changed since it was listed .007.png."):
        encode_shards(folder, vae_folder, one, 16, per_shard=6)
    (folder / "007.png").unlink()
    with pytest.raises(UserError, match="has changed since it was listed"):
        encode_shards(folder, vae_folder, one, 16, per_shard=6)
    (out / "manifest.json").write_text((one / "manifest.json").read_text().replace('"rows":6', '"rows":-6', 1))
    with pytest.raises(UserError, match=r"manifest.json: shards.0.rows: "):
        read_manifest(out)
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"has shards and no manifest.json"):
        encode_shards(noise, vae_folder, out, 16, per_shard=6)


def test_a_picture_that_changes_while_it_is_read_ends_the_run(noise: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(noise, tmp_path / "set"))
    listed = list(entries(folder))
    (folder / "005.png").write_bytes(b"another")
    with pytest.raises(UserError, match=r"has changed since it was listed .005.png"):
        Reader(folder).bytes_of(listed[5])


def test_memory_that_runs_out_ends_the_run(noise: Path, tmp_path: Path) -> None:
    class Short:
        def ask(self, task: int, on_event: object = None) -> dict:
            def work() -> None:
                torch.empty(2**60)

            return worker_process.answer(work)

        def cancel(self) -> None: ...

        def end(self) -> None: ...

    with pytest.raises(UserError, match=r"Shard 0: The memory ran out.*What is done is kept"):
        list(workers.Pool(1, lambda number: Short(), lambda number: f"Shard {number}").run([0, 1]))


@pytest.mark.slow
def test_a_full_disk_is_one_sentence(noise: Path, vae_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reader, stage = Reader(noise), VAEStage(load_vae(vae_folder), tile=None)
    shard_worker.make_shard(tmp_path / "x.safetensors", list(entries(noise))[:2], reader, stage, 16)
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no device that is always full")

    def save(tensors: object, path: Path, metadata: object) -> None:
        with open(full, "wb", buffering=0) as file:
            file.write(b"x")

    monkeypatch.setattr(shard_worker, "save_file", save)
    entry = list(entries(noise))[:2]
    told = worker_process.answer(lambda: shard_worker.make_shard(tmp_path / "y.safetensors", entry, reader, stage, 16))
    assert told["kind"] == "user"
    assert "No space left" in told["error"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_one_run_at_a_time(noise: Path, vae_folder: Path, tmp_path: Path) -> None:
    tmp_path.mkdir(exist_ok=True)
    with shards.alone_in(tmp_path), pytest.raises(UserError, match="Another run encodes into"):
        encode_shards(noise, vae_folder, tmp_path, 16)


def test_calls_that_cannot_be_right(noise: Path, vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["encode", str(noise), "--vae", str(vae_folder)]
    for words, told in (
        (["--workers", "2"], "--workers does something only with --shards"),
        (["--shards", str(tmp_path / "s"), "--workers", "0"], "--workers is 0"),
        (["--shards", str(tmp_path / "s"), "--out", str(tmp_path / "x.safetensors")], "leave one of them out"),
        (["--shards", str(noise)], "which is no shard"),
    ):
        assert main(call + words) == 2
        assert told in capsys.readouterr().err


def test_entries_survive_their_lines() -> None:
    for entry in (
        Entry("a.png"),
        Entry("é/\udcff.png", ('x "y"',), "kind", 7),
        Entry("t.tar/1.jpg", ("a", "b"), "", 3, "t.tar", 512),
    ):
        assert from_line(as_line(entry)) == entry
        assert as_line(entry).isascii()
    with pytest.raises(ValueError, match="no entry"):
        from_line("[1]")


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    """A tar of these files."""
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def tars(noise: Path, tmp_path: Path) -> Path:
    """The same pictures in two tars, captions as text in one and as JSON in the other."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for part in range(2):
        files: dict[str, bytes] = {}
        for number in range(part * 10, part * 10 + 10):
            name = f"{number:03d}"
            files[f"{name}.png"] = (noise / f"{name}.png").read_bytes()
            text = (noise / f"{name}.txt").read_bytes()
            files[f"{name}.{'json' if part else 'txt'}"] = json.dumps({"caption": text.decode()}).encode() if part else text
            files[f"{name}.cls"] = b"3"
        tar_of(folder / f"set-{part}.tar", files)
    return folder


def test_tars_are_read_as_webdataset_reads_them(tars: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    listed, reader = list(entries(tars)), Reader(tars)
    theirs = list(webdataset.WebDataset([str(tars / f"set-{part}.tar") for part in range(2)], shardshuffle=False))
    assert [reader.bytes_of(entry) for entry in listed] == [sample["png"] for sample in theirs]
    assert [entry.captions[0] for entry in listed] == [
        sample["txt"].decode() if "txt" in sample else json.loads(sample["json"])["caption"] for sample in theirs
    ]


@pytest.mark.slow
def test_tars_give_the_latents_of_the_folder(tars: Path, vae_folder: Path, one: Path, tmp_path: Path) -> None:
    encode_shards(tars, vae_folder, tmp_path / "out", 16, per_shard=6)
    assert bytes_of(tmp_path / "out") == bytes_of(one)  # a shard keeps captions, not names


def test_a_tar_cut_short_is_refused(tars: Path) -> None:
    path = tars / "set-1.tar"
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(UserError, match=r"set-1.tar cannot be read as a tar"):
        list(entries(tars))
    (tars / "x.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="tars and tables"):
        list(entries(tars))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "arrow", "file"])
def test_tables_give_the_latents_of_the_folder(noise: Path, vae_folder: Path, one: Path, tmp_path: Path, kind: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(noise.glob("*.png"))]
    texts = [path.read_text() for path in sorted(noise.glob("*.txt"))]
    folder = tmp_path / "tables"
    folder.mkdir()
    for part in range(2):
        mine = slice(part * 10, part * 10 + 10)
        table = arrow.table({"image": rows[mine], "label": [0] * 10, "text": texts[mine]})
        if kind == "parquet":
            pyarrow.parquet.write_table(table, folder / f"{part}.parquet", row_group_size=4)
        else:
            make = arrow.ipc.new_stream if kind == "arrow" else arrow.ipc.new_file
            with make(str(folder / f"{part}.arrow"), table.schema) as writer:
                writer.write_table(table, max_chunksize=3)
    encode_shards(folder, vae_folder, tmp_path / "out", 16, per_shard=6)
    assert bytes_of(tmp_path / "out") == bytes_of(one)
    with pytest.raises(UserError, match="no column 'words'"):
        list(entries(folder, "words"))


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for name in ("x.parquet", "x.arrow"):
        folder = tmp_path / name[2:]
        folder.mkdir()
        (folder / name).write_bytes(b"PAR1 no table")
        with pytest.raises(UserError, match="cannot be read as a table"):
            list(entries(folder))


def test_a_manifest_counts_what_is_missing() -> None:
    common = {"latentpipe": "1", "torch": "2", "vae_hash": "0" * 64, "size_px": 16, "shape": (4, 8, 8), "device": "cpu"}
    done = {"pictures": 6, "begins": 0, "rows": 5, "bytes": 9, "sha256": "1" * 64}
    shown = Manifest.model_validate({**common, "threads": 1, "per_shard": 6, "shards": [done, {"pictures": 2, "begins": 7}]})
    assert (shown.pictures, shown.rows, shown.missing) == (8, 5, 1)
