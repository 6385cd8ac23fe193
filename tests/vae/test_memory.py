"""Predicted memory against measured memory, what is free, and the choice that follows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_vae

from latentpipe.utils.errors import UserError
from latentpipe.vae import memory
from latentpipe.vae.memory import MB, available, choose, predict

ROOT = Path(__file__).parents[2]
GB = 2**30

# Peak resident memory of one call above what is resident before it, in a process of its own: VmHWM after a reset.
MEASURE = """
import ctypes, json, sys
import torch
from helpers import tiny_vae
from latentpipe.vae.tiling import tiled as tiles
from latentpipe.utils.system import release_freed_memory

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

def call(side):
    numbers = torch.Generator().manual_seed(0)
    shape = (1, 4, side // 2, side // 2) if direction == "decode" else (1, 3, side, side)
    given = torch.rand(shape, generator=numbers)
    trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    with release_freed_memory(given.device):
        getattr(tiles, direction)(vae, given, rows) if rows else getattr(vae, direction)(given)
    return status("VmHWM") - before

torch.set_num_threads(1)
torch.set_grad_enabled(False)
trim = ctypes.CDLL(None).malloc_trim
config = json.loads(sys.argv[1])
vae = tiny_vae(**config)
found = {}
rows = int(sys.argv[3])
for direction in ("encode", "decode"):
    call(32)
    found[direction] = call(int(sys.argv[2]))
print(json.dumps(found))
"""
WIDE = {"block_out_channels": (48, 48), "norm_num_groups": 8}


@pytest.fixture(scope="module")
def wide() -> Any:
    """A VAE whose maps outweigh everything else; tests leave it as it is."""
    return tiny_vae(**WIDE)


def shape(direction: str, side: int, n: int = 1) -> tuple[int, int, int, int]:
    """The input's shape for square pictures."""
    return (n, 3, side, side) if direction == "encode" else (n, 4, side // 2, side // 2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("rows", [None, 16])
@pytest.mark.slow
def test_the_prediction_is_within_a_fifth_of_what_is_measured(wide: Any, rows: int | None) -> None:
    side = 384
    command = [sys.executable, "-c", MEASURE, json.dumps(WIDE), str(side), str(rows or 0)]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=paths, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2
    for direction, measured in found.items():
        predicted = predict(wide, direction, shape(direction, side), rows)
        assert abs(predicted - measured) <= 0.2 * measured, (
            f"{direction}: {predicted / MB:.0f} MB, measured {measured / MB:.0f} MB"
        )


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_more_pixels_and_taller_bands_take_more(wide: Any, direction: Any) -> None:
    by_side = [predict(wide, direction, shape(direction, side)) for side in (64, 128, 256, 1024)]
    by_rows = [predict(wide, direction, shape(direction, 1024), rows) for rows in (8, 16, 64, 256)]
    assert by_side == sorted(by_side)
    assert by_rows == sorted(by_rows)
    assert by_rows[0] * 2.5 <= by_side[-1]  # bands are worth it
    assert predict(wide, direction, shape(direction, 256, 2)) > by_side[2] * 1.5
    # with bands a further picture costs no more than its result
    one, two = (predict(wide, direction, shape(direction, 1024, n), 16) for n in (1, 2))
    assert one < two < 1.2 * one


def test_the_prediction_takes_no_memory_and_knows_the_dtype(wide: Any) -> None:
    huge = shape("decode", 2**15)
    assert predict(wide, "decode", huge) > 100 * GB
    half = tiny_vae(**WIDE).to(torch.bfloat16)
    ratio = predict(half, "decode", shape("decode", 512)) / predict(wide, "decode", shape("decode", 512))
    assert 0.45 < ratio < 0.55


def test_attention_makes_no_matrix_of_all_pairs() -> None:
    vae = tiny_vae(mid_block_add_attention=True)
    side = 512  # 65,536 positions: their pairs would take 16 GB
    assert predict(vae, "decode", shape("decode", side), 16) < 100 * MB
    with torch.no_grad():
        from latentpipe.vae.tiling import tiled

        tiled.decode(vae, torch.zeros(1, 4, 64, 64), 8)


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_the_choice_follows_what_is_free(wide: Any, direction: Any) -> None:
    given = shape(direction, 512)
    whole = predict(wide, direction, given)
    assert choose(wide, direction, given, 2 * whole) is None
    chosen = [choose(wide, direction, given, int(whole * share)) for share in (1.1, 0.7, 0.5)]
    assert all(isinstance(rows, int) and predict(wide, direction, given, rows) <= whole * 0.88 for rows in chosen)
    assert chosen == sorted(chosen, reverse=True)
    with pytest.raises(UserError, match=r"MB in the smallest bands and .* MB are free.*smaller picture"):
        choose(wide, direction, given, whole // 20)


def test_an_autoencoder_without_bands_is_refused_only_where_memory_is_short() -> None:
    around = tiny_vae()
    around.decoder.conv_out.padding_mode = "circular"
    given = shape("decode", 256)
    assert choose(around, "decode", given, 10 * GB) is None
    with pytest.raises(UserError, match=r"conv_out.*smaller picture"):
        choose(around, "decode", given, MB)


def machine(root: Path, files: dict[str, str]) -> Path:
    """A folder that looks like the root of a Linux machine with 8 GB available."""
    for name, text in ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    8388608 kB\n"} | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


CPU = torch.device("cpu")


def test_without_groups_the_machine_decides(tmp_path: Path) -> None:
    assert available(CPU, machine(tmp_path, {})) == 8 * GB
    assert available(CPU, tmp_path / "nowhere") > 2**50


def test_version_2_every_enclosing_group_counts(tmp_path: Path) -> None:
    base = "sys/fs/cgroup"
    files = {
        "proc/self/cgroup": "0::/outer/inner\n",
        f"{base}/outer/memory.max": f"{3 * GB}\n",
        f"{base}/outer/memory.current": f"{GB}\n",
        f"{base}/outer/inner/memory.max": "max\n",
        f"{base}/outer/inner/memory.current": f"{GB}\n",
    }
    assert available(CPU, machine(tmp_path, files)) == 2 * GB
    files[f"{base}/outer/inner/memory.max"] = f"{GB + GB // 2}"
    assert available(CPU, machine(tmp_path, files)) == GB // 2
    files[f"{base}/outer/inner/memory.stat"] = f"anon 5\ninactive_file {GB // 4}\n"
    assert available(CPU, machine(tmp_path, files)) == GB // 2 + GB // 4


def test_version_1_and_paths_of_the_host(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "4:memory:/docker/abc\n3:cpuset:/docker/abc\n0::/\n",
        f"{base}/memory.limit_in_bytes": f"{4 * GB}",
        f"{base}/memory.usage_in_bytes": f"{GB}",
    }
    assert available(CPU, machine(tmp_path, files)) == 3 * GB  # the container sees its own group at the root
    files[f"{base}/docker/abc/memory.limit_in_bytes"] = "9223372036854771712"  # no limit
    files[f"{base}/docker/abc/memory.usage_in_bytes"] = f"{GB}"
    assert available(CPU, machine(tmp_path, files)) == 3 * GB
    files[f"{base}/memory.usage_in_bytes"] = f"{5 * GB}"
    assert available(CPU, machine(tmp_path, files)) == 0


def test_this_machine_has_some_memory() -> None:
    assert MB < available(CPU) < 2**60
    assert memory.SHARE < 1
