"""Encoding in shards at scale: python benchmarks/shards.py [--pictures 20000] [--small 1000] [--kills 20] [--rows 100000]

Draws so many pictures of noise, and encodes them with one worker, with two, and with two while workers and the driver are killed
(SIGKILL) at random moments and the call is given again. Prints seconds, the ratio of two workers to one, whether all shards
have the same bytes, shards made beyond those that there are, and the largest memory of driver and worker, beside
the same for `--small` pictures. Then how long training takes to its first step from 1,000 and from 100,000 rows (`--rows`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from latentpipe.utils.io import file_hash

SIDE = 64


def draw(folder: Path, count: int) -> Path:
    """Pictures of coarse noise with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        path = folder / f"{number:07d}.jpg"
        if not path.exists():
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path, quality=90)
        rows.append(json.dumps({"file_name": path.name, "text": f"noise number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def call(folder: Path, out: Path, arguments: argparse.Namespace, workers: int) -> subprocess.Popen[bytes]:
    """`latentpipe encode`, begun."""
    words = [sys.executable, "-m", "latentpipe", "encode", str(folder), "--vae", arguments.vae, "--size", str(arguments.size)]
    words += ["--shards", str(out), "--workers", str(workers), "--per-shard", str(arguments.per_shard)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def processes(driver: int) -> list[int]:
    """The driver and its workers."""
    children = Path(f"/proc/{driver}/task/{driver}/children")
    return [driver, *(int(number) for number in (children.read_text().split() if children.exists() else ()))]


def private_bytes(process: int) -> int:
    """Memory that is a process's own; mapped files do not count."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def encode(folder: Path, out: Path, arguments: argparse.Namespace, workers: int) -> dict[str, float]:
    """One undisturbed run: seconds, and the largest memory of driver and worker in MB."""
    begin, driver = time.monotonic(), call(folder, out, arguments, workers)
    most = {"driver_mb": 0.0, "worker_mb": 0.0}
    while driver.poll() is None:
        first, *rest = processes(driver.pid)
        most["driver_mb"] = max(most["driver_mb"], private_bytes(first) / 2**20)
        most["worker_mb"] = max(most["worker_mb"], *(private_bytes(one) / 2**20 for one in rest), 0.0)
        time.sleep(0.2)
    assert driver.returncode == 0, driver.returncode
    return {"seconds": time.monotonic() - begin, **most}


def killed(folder: Path, out: Path, arguments: argparse.Namespace, seconds: float) -> dict[str, int]:
    """The same with kills at random moments; kills of each kind, and shards that were made more than once."""
    chance, count = random.Random(0), {"workers_killed": 0, "drivers_killed": 0}
    driver, made = call(folder, out, arguments, 2), 0
    seen: dict[str, int] = {}
    left = arguments.kills
    until = time.monotonic() + chance.uniform(0.2, 2) * seconds / arguments.kills
    while True:
        for path in out.glob("shard-*"):
            if seen.get(path.name) != (stamp := path.stat().st_mtime_ns):
                seen[path.name], made = stamp, made + 1
        if left and time.monotonic() > until:
            victims = processes(driver.pid)
            victim = chance.choice(victims)
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                continue
            count["drivers_killed" if victim == driver.pid else "workers_killed"] += 1
            left -= 1
            until = time.monotonic() + chance.uniform(0.2, 2) * seconds / arguments.kills
        if driver.poll() is not None:
            if driver.returncode == 0:
                break
            driver = call(folder, out, arguments, 2)
        time.sleep(0.02)
    return {**count, "made_again": made - len(seen)}


def first_step(rows: int, out: Path) -> dict[str, float]:
    """Seconds from the start of `train-denoiser` on so many rows to the end of its first step, and its memory in MB."""
    shards, run = out / f"rows-{rows}", out / f"run-{rows}"
    subprocess.run([sys.executable, __file__, "--write-rows", str(rows), "--out", str(shards)], check=True)
    words = [
        "train-denoiser",
        "small-denoiser",
        "--data.cache",
        str(shards),
        "--data.vae",
        "emoji",
        "--run.out",
        str(run / "model"),
    ]
    words += ["--run.work", str(run / "work"), "--optim.steps", "3", "--optim.batch-size", "8", "--optim.warmup-steps", "0"]
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "latentpipe", *words], stdout=subprocess.DEVNULL)
    log, most = run / "work" / "log.jsonl", 0.0
    while process.poll() is None and not (log.is_file() and log.stat().st_size):
        most = max(most, private_bytes(process.pid) / 2**20)
        time.sleep(0.05)
    seconds = time.monotonic() - begin
    process.wait()
    assert process.returncode == 0
    return {"seconds": seconds, "mb": most}


def write_rows(count: int, out: Path, per_shard: int = 1024) -> None:
    """Shards of random latents with captions of their own, for the embedded VAE at 64 pixels."""
    import torch
    from safetensors.torch import save_file

    from latentpipe.checkpoints.registry import find_model
    from latentpipe.checkpoints.vae_io import vae_hash
    from latentpipe.data.shard_manifest import FORMAT, Manifest, ShardFile, shard_path, write_manifest

    out.mkdir(parents=True, exist_ok=True)
    shards = []
    for first in range(0, count, per_shard):
        rows = min(per_shard, count - first)
        texts = [json.dumps([f"a picture number {first + row} of {(first + row) % 977} kinds"]).encode() for row in range(rows)]
        path = shard_path(out, first // per_shard)
        tensors = {
            "mean": torch.randn(rows, 8, 16, 16).half(),
            "std": torch.full((rows, 8, 16, 16), 0.1).half(),
            "captions": torch.from_numpy(np.frombuffer(b"".join(texts), np.uint8).copy()),
            "caption_ends": torch.tensor([len(text) for text in texts]).cumsum(0),
        }
        save_file(tensors, path, metadata={FORMAT: json.dumps({"kinds": [], "skipped": {}})})
        facts = {"rows": rows, "bytes": path.stat().st_size, "sha256": file_hash(path)}
        shards.append(ShardFile.model_validate({"pictures": rows, "begins": 0, **facts}))
    common = {"latentpipe": "0", "torch": "0", "device": "cpu", "threads": 1, "per_shard": per_shard, "size_px": 64}
    digest = vae_hash(find_model("emoji", "vae"))
    write_manifest(out, Manifest.model_validate({**common, "shape": (8, 16, 16), "vae_hash": digest, "shards": shards}))


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("pictures", 20_000),
        ("small", 1000),
        ("kills", 20),
        ("size", 64),
        ("per-shard", 256),
        ("rows", 100_000),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vae", default="emoji")
    parser.add_argument("--write-rows", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.write_rows:
        write_rows(arguments.write_rows, arguments.out)
        return
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as at:
        root = Path(at)
        small, folder = draw(root / "small", arguments.small), draw(root / "set", arguments.pictures)
        found["small"] = encode(small, root / "out-small", arguments, 1)
        one, two = (encode(folder, root / f"out-{workers}", arguments, workers) for workers in (1, 2))
        found |= {"one": one, "two": two, "two_to_one": one["seconds"] / two["seconds"]}
        found["killed"] = killed(folder, root / "out-killed", arguments, two["seconds"])
        folders = [root / f"out-{name}" for name in ("1", "2", "killed")]
        hashes = [[file_hash(path) for path in sorted(one_of.glob("shard-*"))] for one_of in folders]
        found |= {"shards": len(hashes[0]), "same_bytes": hashes[0] == hashes[1] == hashes[2]}
        found["first_step"] = {rows: first_step(rows, root) for rows in (1000, arguments.rows)}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
