"""`latentpipe pull` against a hub on the loopback: what it takes, how it goes on, and what it says of a hub that fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from loopback import LoopbackHub, Repository, etag, files_of

from latentpipe import checkpoints
from latentpipe.checkpoints.hub import client
from latentpipe.checkpoints.hub.fetch import LEFTOVER
from latentpipe.checkpoints.places.hub_cache import cached
from latentpipe.cli.app import main


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


VAE = {
    "config.json": b'{"_class_name": "AutoencoderKL"}',
    "diffusion_pytorch_model.safetensors": noise(300_000, 1),
    "diffusion_pytorch_model.bin": noise(300_000, 2),
    "vae.safetensors": noise(250_000, 3),
    "README.md": b"words",
}


def pull(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["pull", *words])
    out, err = capsys.readouterr()
    return status, out.strip(), err


def contents(folder: Path) -> dict[str, bytes]:
    """What lies in a snapshot."""
    return files_of(folder)


def leftovers(home: Path) -> list[Path]:
    """Files of a cache that belong to no snapshot and no library."""
    inside = [path for path in home.rglob("*") if path.is_file() and not path.is_symlink()]
    known = ("blobs", "refs", ".locks")
    odd = [path for path in inside if not set(path.parts) & set(known) and path.name != "CACHEDIR.TAG"]
    return odd + [path for path in inside if path.name.endswith((".incomplete", ".part", ".link"))]


def test_a_vae_without_duplicates(hub: LoopbackHub, hub_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit = hub.add("org/vae", VAE)
    status, out, err = pull(capsys, "org/vae")
    assert status == 0
    snapshot = hub_home / "hub" / "models--org--vae" / "snapshots" / commit
    assert Path(out) == snapshot
    taken = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert contents(snapshot) == {path: VAE[path] for path in taken}
    assert "licence: mit" in err
    assert "300.0 kB" in err
    assert "850.0 kB" in err
    assert not leftovers(hub_home)
    from huggingface_hub import scan_cache_dir, snapshot_download, try_to_load_from_cache

    cache = hub_home / "hub"
    assert snapshot_download("org/vae", cache_dir=cache, local_files_only=True) == str(snapshot)
    assert try_to_load_from_cache("org/vae", "config.json", cache_dir=cache) == str(snapshot / "config.json")
    scanned = scan_cache_dir(cache)
    assert not scanned.warnings
    assert [(repo.repo_id, repo.nb_files) for repo in scanned.repos] == [("org/vae", 2)]


def test_a_second_pull_asks_for_no_content_but_verifies(
    hub: LoopbackHub, hub_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/vae", VAE)
    assert pull(capsys, "org/vae")[0] == 0
    hub.asked.clear()
    status, out, _ = pull(capsys, "org/vae")
    assert status == 0
    assert not [path for _, path, _ in hub.asked if "diffusion" in path]
    weights = Path(out) / "diffusion_pytorch_model.safetensors"
    blob = weights.resolve()
    data = bytearray(blob.read_bytes())
    data[1000] ^= 1
    blob.write_bytes(data)
    assert pull(capsys, "org/vae")[0] == 0
    assert weights.read_bytes() == VAE["diffusion_pytorch_model.safetensors"]


def test_a_model_in_its_smallest_variant(hub: LoopbackHub, hub_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = {
        "_class_name": "X",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
    }
    small = {
        "model_index.json": json.dumps(index).encode(),
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.fp16.safetensors": noise(20_000, 1),
        "text_encoder/config.json": b"{}",
        "text_encoder/model.fp16-00001-of-00002.safetensors": noise(10_000, 2),
        "text_encoder/model.fp16-00002-of-00002.safetensors": noise(10_001, 3),
        "text_encoder/model.safetensors.index.fp16.json": b'{"weight_map": {"a": "model.fp16-00001-of-00002.safetensors"}}',
        "tokenizer/vocab.json": b"{}",
        "tokenizer/merges.txt": b"#",
        "scheduler/scheduler_config.json": b"{}",
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.bin": noise(9_000, 4),
    }
    large = {
        "unet/diffusion_pytorch_model.safetensors": noise(40_000, 5),
        "unet/diffusion_pytorch_model.non_ema.safetensors": noise(19_000, 6),
        "unet/diffusion_pytorch_model.fp16.bin": noise(15_000, 7),
        "unet/diffusion_flax_model.msgpack": noise(15_000, 8),
        "text_encoder/model.safetensors": noise(40_002, 9),
        "text_encoder/model-00001-of-00003.safetensors": noise(5_000, 10),
        "vae_1_0/diffusion_pytorch_model.safetensors": noise(9_000, 11),
        "whole-ema.ckpt": noise(50_000, 12),
        "whole.safetensors": noise(50_000, 13),
    }
    hub.add("org/model", small | large)
    hub.page = 5
    status, out, err = pull(capsys, "org/model")
    assert status == 0
    assert contents(Path(out)) == small
    assert "vae/diffusion_pytorch_model.bin is a pickle" in err


def test_a_part_a_file_and_a_revision(hub: LoopbackHub, hub_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside = {f"vae/{path}": data for path, data in VAE.items()} | {"loras/a.safetensors": noise(9_000), "b.safetensors": b"b"}
    old = hub.repositories.setdefault("org/x", Repository("org/x")).commit(inside, "refs/pr/1")
    hub.add("org/x", {"b.safetensors": b"new"})
    status, out, _ = pull(capsys, "org/x/vae@refs/pr/1")
    assert status == 0
    assert contents(Path(out)).keys() == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert cached("org/x/vae@refs/pr/1") == Path(out)
    assert cached(f"org/x/vae@{old}") == Path(out)
    status, out, _ = pull(capsys, "org/x/loras/a.safetensors", "--revision", old)
    assert status == 0
    assert Path(out).read_bytes() == noise(9_000)
    status, out, _ = pull(capsys, "org/x")
    assert status == 0
    assert contents(Path(out)) == {"b.safetensors": b"new"}
    assert cached("org/x") == Path(out) / "b.safetensors"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vae"], "no id of the hub"),
        (["org/../x"], "no id of the hub"),
        (["org/vae@main", "--revision", "other"], "expected one revision"),
        (["org/vae", "--revision", "../x"], "expected one revision"),
        (["org/vae@nope"], "no revision 'nope'"),
        (["org/none"], "does not exist"),
        (["org/vae/nowhere"], "has no 'nowhere'"),
        (["org/two"], "name one: org/two/a.safetensors, org/two/b.safetensors"),
        (["org/vae", "--token", "hf_abcdef"], "not the token itself"),
        (["org/vae", "--token", "MISSING_TOKEN"], "no such environment variable"),
    ],
)
def test_mistakes_in_the_call(
    hub: LoopbackHub, hub_home: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    hub.add("org/vae", VAE)
    hub.add("org/two", {"a.safetensors": b"a", "b.safetensors": b"bb", "b.bin": b"b"})
    status, out, err = pull(capsys, *words)
    assert status == 2
    assert said in err
    assert not out
    assert not hub_home.exists()


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_asks_nothing(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv(name, "1")
    status, _, err = pull(capsys, "org/vae")
    assert status == 2
    assert f"{name} is set" in err
    assert not hub.asked


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (401, {}, "set HF_TOKEN"),
        (403, {"X-Error-Code": "GatedRepo"}, "accepted its terms"),
        (404, {}, "does not exist"),
        (429, {"Retry-After": "7"}, "Run it again in 7 seconds"),
        (500, {}, "answered 500"),
        (503, {}, "answered 503"),
        (416, {}, "answered 416"),
    ],
)
@pytest.mark.parametrize("where", ["/api/models/org/vae/revision", "/tree/", "/resolve/"])
def test_a_hub_that_refuses(
    hub: LoopbackHub,
    hub_home: Path,
    capsys: pytest.CaptureFixture[str],
    where: str,
    status: int,
    headers: dict[str, str],
    said: str,
) -> None:
    hub.add("org/vae", VAE)
    hub.status[where], hub.headers = [status] * 20, headers
    code, out, err = pull(capsys, "org/vae")
    assert code == 2
    assert said in err.splitlines()[-1]
    assert not out
    assert not list(hub_home.glob("hub/*/snapshots/*/*"))
    assert not [path for path in hub_home.glob("hub/*/blobs/*") if not path.name.endswith(LEFTOVER)]
    hub.status.clear()
    assert pull(capsys, "org/vae")[0] == 0


def test_errors_that_pass_are_waited_for(hub: LoopbackHub, hub_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add("org/vae", VAE)
    hub.status = {"/revision/": [500, 502], "/tree/": [503], "/resolve/": [504, 500, 500]}
    assert pull(capsys, "org/vae")[0] == 0


def test_streams_that_are_cut_go_on(hub: LoopbackHub, hub_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit = hub.add("org/vae", VAE)
    hub.cut = [50_000] * 5 + [0, 0] + [10_000] * 3
    status, out, _ = pull(capsys, "org/vae")
    assert status == 0
    assert contents(Path(out))["diffusion_pytorch_model.safetensors"] == VAE["diffusion_pytorch_model.safetensors"]
    starts = [begin for _, path, begin in hub.asked if path.endswith(f"{commit}/diffusion_pytorch_model.safetensors")]
    assert starts == sorted(starts, key=lambda text: int(text[6:-1] or 0))
    assert starts[:3] == ["", "bytes=50000-", "bytes=100000-"]


def test_a_stream_that_brings_nothing_ends_in_a_sentence_and_goes_on_later(
    hub: LoopbackHub, hub_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/vae", VAE)
    hub.cut = [70_000] + [0] * 40
    status, _, err = pull(capsys, "org/vae")
    assert status == 2
    assert "it goes on where it stopped" in err.splitlines()[-1]
    hub.cut.clear()
    hub.asked.clear()
    assert pull(capsys, "org/vae")[0] == 0
    assert [begin for _, _, begin in hub.asked if begin] == ["bytes=70000-"]


def test_a_hub_without_ranges_begins_anew(hub: LoopbackHub, hub_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add("org/vae", VAE)
    hub.ranges, hub.cut = False, [100_000, 200_000]
    status, out, _ = pull(capsys, "org/vae")
    assert status == 0
    assert contents(Path(out))["diffusion_pytorch_model.safetensors"] == VAE["diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("path", ["config.json", "diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("how", ["flip", "longer"])
def test_content_that_is_not_what_the_hub_lists(
    hub: LoopbackHub, hub_home: Path, capsys: pytest.CaptureFixture[str], path: str, how: str
) -> None:
    hub.add("org/vae", VAE)
    getattr(hub, how).add(path)
    status, _, err = pull(capsys, "org/vae")
    assert status == 2
    assert path in err.splitlines()[-1]
    assert ("damaged" if how == "flip" else "longer") in err
    assert not list(hub_home.glob("hub/*/snapshots/*/*"))
    assert not list(hub_home.rglob(f"*{LEFTOVER}"))
    assert not list(hub_home.rglob(etag(VAE[path])))


def test_a_damaged_leftover_is_fetched_anew(hub: LoopbackHub, hub_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add("org/vae", VAE)
    data = VAE["diffusion_pytorch_model.safetensors"]
    blobs = hub_home / "hub" / "models--org--vae" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{etag(data)}{LEFTOVER}").write_bytes(bytes(100_000))
    (blobs / f"{'0' * 64}{LEFTOVER}").write_bytes(b"of another commit")
    (blobs / "1.23456789.incomplete").write_bytes(b"huggingface_hub's own")
    status, out, _ = pull(capsys, "org/vae")
    assert status == 0
    assert contents(Path(out))["diffusion_pytorch_model.safetensors"] == data
    assert [path.name for path in blobs.glob("*.incomplete")] == ["1.23456789.incomplete"]


@pytest.mark.parametrize("path", ["../evil.json", "/etc/x.json", "a//b.json", "a\\b.json", "C:x.json", "a/\n.json"])
def test_paths_that_lead_elsewhere_are_refused(
    hub: LoopbackHub, hub_home: Path, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    hub.add("org/vae", VAE | {path: b"{}"})
    status, _, err = pull(capsys, "org/vae")
    assert status == 2
    assert "which no folder takes" in err
    assert not hub_home.exists()


def test_an_address_that_is_no_hub(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hub.status["/api/"] = [200]
    status, _, err = pull(capsys, "org/vae")
    assert status == 2
    assert "gave no JSON" in err
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    assert "expected an address" in pull(capsys, "org/vae")[2]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in pull(capsys, "org/vae")[2]


def test_the_token_comes_from_the_environment(
    hub: LoopbackHub, hub_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/vae", VAE)
    (hub_home).mkdir()
    (hub_home / "token").write_text("hf_of_a_login")
    assert pull(capsys, "org/vae")[0] == 0
    assert set(hub.authorizations) == {""}
    monkeypatch.setenv("HF_TOKEN", "hf_one")
    assert pull(capsys, "org/vae")[0] == 0
    assert hub.authorizations[-1] == "Bearer hf_one"
    monkeypatch.setenv("OTHER", "hf_two")
    status, _, err = pull(capsys, "org/vae", "--token", "OTHER")
    assert status == 0
    assert hub.authorizations[-1] == "Bearer hf_two"
    assert "hf_two" not in err
    monkeypatch.setenv("OTHER", "not a token\n2")
    assert "no token has" in pull(capsys, "org/vae", "--token", "OTHER")[2]


def test_a_proxy_is_asked(
    hub: LoopbackHub, hub_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/vae", VAE)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("HTTP_PROXY", hub.url)
    huggingface_hub.close_session()  # it reads the environment when it is made
    status, _, _ = pull(capsys, "org/vae")
    huggingface_hub.close_session()
    assert status == 0
    assert all(path.startswith("http://hub.invalid/") for _, path, _ in hub.asked)


def test_a_full_disk(
    hub: LoopbackHub, hub_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/vae", VAE)
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: usage(2, 2, 1000))
        status, _, err = pull(capsys, "org/vae")
    assert status == 2
    assert "disk is full" in err
    real = os.fsync

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        status, _, err = pull(capsys, "org/vae")
    assert os.fsync is real
    assert status == 2
    assert "disk is full" in err
    assert not list(hub_home.glob("hub/*/snapshots/*/*"))
    assert pull(capsys, "org/vae")[0] == 0
    assert not leftovers(hub_home)


def test_two_pulls_at_once(hub: LoopbackHub, hub_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from filelock import FileLock

    hub.add("org/vae", VAE)
    lock = hub_home / "hub" / ".locks" / "models--org--vae" / "latentpipe.lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        status, _, err = pull(capsys, "org/vae")
    assert status == 2
    assert "another process" in err


def test_waits_grow(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    waits: list[float] = []
    monkeypatch.setattr(client, "WAIT_S", 1.0)
    monkeypatch.setattr("time.sleep", lambda seconds: waits.append(seconds) if seconds else None)
    hub.add("org/vae", VAE)
    hub.status["/revision/"] = [500] * 9
    assert pull(capsys, "org/vae")[0] == 2
    assert waits == [1, 2, 4, 8]


def test_no_other_code_reaches_out() -> None:
    """Libraries that ask the network are imported by `pull`, the page's server, and where a cluster is named."""
    package = Path(checkpoints.__file__).parents[1]
    asks = re.compile(
        r"^\s*(?:from|import) (huggingface_hub|httpx2?|requests|aiohttp|urllib3|urllib\.request|http\.client|socket)\b", re.M
    )
    found = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if asks.search(path.read_text())}
    assert {"checkpoints/hub/client.py", "checkpoints/hub/fetch.py"} <= found
    assert not {path for path in found if not path.startswith(("checkpoints/hub/", "ui/", "utils/cluster.py"))}


@pytest.mark.slow
def test_killed_ten_times_it_goes_on(hub: LoopbackHub, hub_home: Path, tmp_path: Path) -> None:
    """SIGKILL at ten different moments: each run goes on behind what the last one had, and the end is right."""
    data = {f"diffusion_pytorch_model-0000{at}-of-00002.safetensors": noise(8_000_000, at) for at in (1, 2)}
    index = {"weight_map": dict(zip("ab", data, strict=True))}
    files = VAE | data | {"diffusion_pytorch_model.safetensors.index.json": json.dumps(index).encode()}
    del files["diffusion_pytorch_model.safetensors"]
    commit = hub.add("org/vae", files)
    hub.slow_s = 0.004
    command = [sys.executable, "-m", "latentpipe", "pull", "org/vae"]
    blobs = hub_home / "hub" / "models--org--vae" / "blobs"

    def there() -> int:
        return sum(path.stat().st_size for path in blobs.glob("*")) if blobs.is_dir() else 0

    before = 0
    for _ in range(10):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        until = time.monotonic() + 60
        while there() < before + 1_000_000 and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert there() >= before, "a run began anew"
        assert not list(hub_home.glob("hub/*/snapshots/*/*"))
        before = there()
    hub.slow_s = 0.0
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    snapshot = hub_home / "hub" / "models--org--vae" / "snapshots" / commit
    assert {path: hashlib.sha256((snapshot / path).read_bytes()).hexdigest() for path in data} == {
        path: hashlib.sha256(content).hexdigest() for path, content in data.items()
    }
    assert all(path.resolve().name == etag(path.read_bytes()) for path in snapshot.iterdir())
    assert not leftovers(hub_home)
