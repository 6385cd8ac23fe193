"""A single file of true size: opening time and memory against diffusers' from_single_file with a local config; two steps drawn.

python benchmarks/single_file.py [FOLDER]     writes a random Stable Diffusion 1.5 in fp16 (2.1 GB) there, once
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "checkpoints" / "single_file")]


def private() -> float:
    """Private memory of this process now, in GiB: without the pages of mapped files."""
    return _listed("smaps_rollup", "Anonymous:")


def peak() -> float:
    """The most memory that this process has had, in GiB: with those pages."""
    return _listed("status", "VmHWM:")


def _listed(name: str, key: str) -> float:
    lines = Path(f"/proc/self/{name}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**20


def written(file: Path) -> None:
    """A random Stable Diffusion 1.5 in fp16, in LDM's names; and its configs as a diffusers folder beside it."""
    import sized
    import torch
    import written as writer

    if not file.is_file():
        random = torch.Generator().manual_seed(0)
        tensors = {}
        for name, value in sized.whole("sd1").items():
            if name.endswith("position_ids"):
                tensors[name] = torch.arange(77)[None]
            elif name.endswith("weight") and value.ndim == 1:
                tensors[name] = torch.ones(value.shape, dtype=torch.float16)
            else:
                fan = max(1, value[0].numel()) if value.ndim > 1 else 1
                tensors[name] = (torch.randn(value.shape, generator=random) * (0.5 / fan**0.5 if value.ndim > 1 else 0.01)).half()
        writer.write(tensors, file)
    folder = file.with_suffix("")
    if not folder.is_dir():
        from latentpipe.checkpoints.single_file.tokenizers import DATA, bundled_tokenizer

        stored = json.loads((DATA / "sd1.json").read_text())
        for part in ("unet", "vae", "text_encoder", "scheduler"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / f"{'scheduler_' if part == 'scheduler' else ''}config.json").write_text(json.dumps(stored[part]))
        (folder / "model_index.json").write_text(json.dumps(stored["index"]))
        bundled_tokenizer(stored["tokenizer"]).save_pretrained(folder / "tokenizer")


def one(who: str, file: Path, dtype: str) -> None:
    """One opening in a process of its own; prints seconds and GiB over what the imports hold."""
    import diffusers
    import torch
    import transformers

    from latentpipe.checkpoints.single_file import opening

    wanted = {"fp16": torch.float16, "fp32": torch.float32}[dtype]
    (
        hasattr(diffusers, "StableDiffusionPipeline"),
        hasattr(transformers, "CLIPTextModel"),
        hasattr(diffusers, "UNet2DConditionModel"),
    )
    before, most, start = private(), peak(), time.perf_counter()
    cpu = time.process_time()
    if who == "latentpipe":
        pipe = opening.load(file, None if dtype == "fp16" else wanted)
    else:
        pipe = diffusers.StableDiffusionPipeline.from_single_file(
            str(file), config=str(file.with_suffix("")), local_files_only=True, torch_dtype=wanted, safety_checker=None
        )
    seconds, held = time.perf_counter() - start, private() - before
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu": time.process_time() - cpu,
                "private": held,
                "peak": peak() - most,
                "dtype": str(pipe.unet.dtype),
            }
        )
    )


def drawn(file: Path) -> None:
    """Two steps at 256 pixels in bf16."""
    from latentpipe import LatentPipeline

    start = time.perf_counter()
    pipe = LatentPipeline.from_pretrained(file, device="cpu", dtype="bf16")
    opened = time.perf_counter() - start
    picture = pipe("a photo of a cat", seed=1, num_inference_steps=2, size=(256, 256))[0]
    print(
        json.dumps({"opened": opened, "drawn": time.perf_counter() - start - opened, "peak": peak(), "size": picture.image.size})
    )


def main() -> None:
    """Each opening three times in turn; the median of each."""
    if sys.argv[1:2] == ["one"]:
        return one(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
    if sys.argv[1:2] == ["drawn"]:
        return drawn(Path(sys.argv[2]))
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "out"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "random-sd15.safetensors"
    written(file)

    def run(*words: str) -> dict[str, float]:
        done = subprocess.run([sys.executable, "-W", "ignore", __file__, *words], capture_output=True, text=True, check=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    for dtype, times in (("fp16", 3), ("fp32", 1)):
        rows: dict[str, list[dict[str, float]]] = {"diffusers": [], "latentpipe": []}
        for _ in range(times):
            for who, found in rows.items():
                found.append(run("one", who, str(file), dtype))
        for key in ("seconds", "cpu", "private", "peak"):
            middle = {who: sorted(row[key] for row in found)[times // 2] for who, found in rows.items()}
            ratio = middle["latentpipe"] / middle["diffusers"] if middle["diffusers"] else float("nan")
            print(
                f"{dtype} {key}: latentpipe {middle['latentpipe']:.3f}, diffusers {middle['diffusers']:.3f} (ratio {ratio:.2f})"
            )
    print("drawn:", run("drawn", str(file)))


if __name__ == "__main__":
    main()
