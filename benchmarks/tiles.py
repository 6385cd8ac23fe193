"""What bands cost: python benchmarks/tiles.py [--side 512] [--direction decode|encode|both] [--vae FOLDER] [--sweep]

One run: the whole picture at once, our bands, and diffusers' enable_tiling(), each in a process of its own, on the same
weights (random ones of Stable Diffusion 1.5's architecture, unless a folder is given) and the same input.

measured MB   resident memory at its peak above that before the call (VmHWM, after a small call and a reset)
seam          mean difference of neighbours across the tile borders / the same elsewhere, of the error in brackets
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from latentpipe.vae import memory
from latentpipe.vae.latent_space import downscale_of
from latentpipe.vae.tiling import tiled


def load(folder: str | None) -> Any:
    """The VAE of a folder, or one of Stable Diffusion 1.5's architecture with random weights."""
    from diffusers import AutoencoderKL

    if folder:
        from latentpipe.checkpoints.vae_io import load_vae

        return load_vae(Path(folder))
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae: Any = AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)
    return vae.eval()


def given(vae: Any, direction: str, side: int) -> torch.Tensor:
    """The input: noise as raw latents, or a smooth picture with some noise."""
    numbers = torch.Generator().manual_seed(1)
    factor = downscale_of(vae.config)
    if direction == "decode":
        return torch.randn(1, vae.config.latent_channels, side // factor, side // factor, generator=numbers)
    coarse = torch.rand(1, 3, 8, 8, generator=numbers) * 2 - 1
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    return (smooth + 0.05 * torch.randn(1, 3, side, side, generator=numbers)).clamp(-1, 1)


def status(name: str) -> int:
    """A value of /proc/self/status, in bytes."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024


def run_one(job: dict[str, Any]) -> None:
    """In a process of its own: one contender, its time and memory; the result goes to a file."""
    vae = load(job["vae"])
    direction, rows = job["direction"], job["rows"]
    if job["name"] == "diffusers tiles":
        vae.enable_tiling()

    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            made = getattr(tiled, direction)(vae, x, rows) if rows else getattr(vae, direction)(x)
        made = getattr(made, "sample", made) if direction == "decode" else made
        return made if isinstance(made, torch.Tensor) else made.latent_dist.mean if "latent_dist" in made else made.latents

    x = given(vae, direction, job["side"])
    call(given(vae, direction, 8 * downscale_of(vae.config)))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = status("VmRSS"), time.perf_counter()
    result = call(x)
    seconds, peak = time.perf_counter() - begin, status("VmHWM") - before
    torch.save(result, job["out"])
    print(json.dumps({"seconds": seconds, "peak": peak}))


def seam(values: torch.Tensor, borders: list[int]) -> float:
    """Mean absolute difference of neighbouring rows and columns at the borders, over that everywhere else."""
    at, other = [], []
    for axis in (-2, -1):
        step = values.diff(dim=axis).abs().mean([i for i in range(values.ndim) if i != values.ndim + axis])
        inside = [border - 1 for border in borders if 0 < border < values.shape[axis]]
        mask = torch.zeros(len(step), dtype=torch.bool)
        mask[inside] = True
        at.append(step[mask])
        other.append(step[~mask])
    return (torch.cat(at).mean() / torch.cat(other).mean().clamp_min(1e-30)).item()


def compare(args: argparse.Namespace, direction: str, vae: Any) -> None:
    """One table."""
    shape = tuple(given(vae, direction, args.side).shape)
    limit = int(memory.predict(vae, direction, shape) * 0.35 / memory.SHARE)  # type: ignore[arg-type]
    heights = [8, 16, 32, 64, 128] if args.sweep else [args.rows or memory.choose(vae, direction, shape, limit) or 64]  # type: ignore[arg-type]
    contenders = [("whole", None), *((f"bands of {rows}", rows) for rows in heights), ("diffusers tiles", None)]
    print(f"\n{direction}, {args.side} x {args.side}\n")
    print("| | max error | PSNR dB | seam (whole) | seconds | ratio | predicted MB | measured MB | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    whole: Any = None
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in contenders:
            out = f"{folder}/{name.replace(' ', '-')}.pt"
            job = {"name": name, "rows": rows, "direction": direction, "side": args.side, "vae": args.vae, "out": out}
            done = subprocess.run(
                [sys.executable, __file__, "--job", json.dumps(job)], stdout=subprocess.PIPE, text=True, check=True
            )
            found = json.loads(done.stdout.splitlines()[-1]) | {"result": torch.load(out, weights_only=True)}
            whole = whole or found
            print(line(name, rows, found, whole, vae, direction, shape))


def line(name: str, rows: int | None, found: Any, whole: Any, vae: Any, direction: str, shape: Any) -> str:
    """A row of the table."""
    result, truth = found["result"], whole["result"]
    error = (result - truth).abs().max().item()
    psnr = 10 * torch.log10((truth.max() - truth.min()) ** 2 / (result - truth).square().mean().clamp_min(1e-30)).item()
    tile = getattr(vae, "tile_sample_min_size" if direction == "decode" else "tile_latent_min_size", 512)
    step = rows or int(tile * (1 - getattr(vae, "tile_overlap_factor", 0.25)))
    borders = list(range(step, truth.shape[-2], step))
    seams = f"{seam(result, borders):.3f} ({seam(truth, borders):.3f})" if borders else "no border"
    predicted = "" if name == "diffusers tiles" else f"{memory.predict(vae, direction, shape, rows) / 2**20:,.0f}"  # type: ignore[arg-type]
    return (
        f"| {name} | {error:.1e} | {psnr:.1f} | {seams} | {found['seconds']:.1f} | {found['seconds'] / whole['seconds']:.2f} "
        f"| {predicted} | {found['peak'] / 2**20:,.0f} | {found['peak'] / whole['peak']:.2f} |"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--direction", choices=("decode", "encode", "both"), default="both")
    parser.add_argument("--vae", help="a diffusers VAE folder")
    parser.add_argument("--rows", type=int, help="height of the bands; default: the largest that takes a third of the memory")
    parser.add_argument("--sweep", action="store_true", help="several heights of bands")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        run_one(json.loads(args.job))
        return
    vae = load(args.vae)
    for direction in ("decode", "encode") if args.direction == "both" else (args.direction,):
        compare(args, direction, vae)
    print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
