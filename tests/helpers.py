"""What several test files draw, build and compare."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 210), "yellow": (240, 210, 40)}
SHAPES = ("circle", "square", "bar")


def draw_shape(colour: str, shape: str, side: int = 32) -> Image.Image:
    """A coloured shape on white."""
    picture = Image.new("RGB", (side, side), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    box = (side // 5, side // 5, side - side // 5, side - side // 5)
    if shape == "circle":
        draw.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        draw.rectangle(box, fill=COLOURS[colour])
    else:
        draw.rectangle((0, side // 3, side // 2, side // 2), fill=COLOURS[colour])
    return picture


def write_pictures(folder: Path) -> Path:
    """Twelve drawn pictures with captions, in the imagefolder convention."""
    folder.mkdir(parents=True)
    rows = []
    for colour in COLOURS:
        for shape in SHAPES:
            name = f"{colour}-{shape}.png"
            draw_shape(colour, shape).save(folder / name)
            rows.append({"file_name": name, "text": f"{colour} {shape}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tiny_vae(seed: int = 0, **config: Any) -> Any:
    """An AutoencoderKL of 4 channels at 1/2 size with random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    settings = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
        "sample_size": 16,
        "scaling_factor": 1.0,
    }
    return AutoencoderKL(**(settings | config)).eval()


def vae_run(root: Path, pictures: Path, **run: Any) -> Any:
    """A TrainVAE config of four tiny steps, which writes below `root`."""
    from latentpipe.train.config import TrainVAE

    optim = {"steps": 4, "batch_size": 4, "warmup_steps": 2, "ema_decay": 0.9} | run.pop("optim", {})
    data = {"train": pictures, "read_size_px": 24} | run.pop("data", {})
    loss = run.pop("loss", {})
    model = {"channels": 4, "blocks": (8, 16), "norm_groups": 4} | run.pop("model", {})
    crops = {"size_px": 16} | run.pop("crops", {})
    places = {"out": root / "vae", "work": root / "work", "precision": "fp32", "save_every_steps": 100, "sample_every_steps": 100}
    raw = {"data": data, "run": places | run, "optim": optim, "model": model, "loss": loss, "crops": crops}
    return TrainVAE.model_validate(raw)


def denoiser_run(root: Path, cache: Path, vae: Path, **run: Any) -> Any:
    """A TrainDenoiser config of two tiny steps, which writes below `root`."""
    from latentpipe.train.config import TrainDenoiser

    optim = {"steps": 2, "batch_size": 4, "warmup_steps": 1, "ema_decay": 0.9} | run.pop("optim", {})
    unet = {"blocks": (32, 64), "attention": (False, True), "norm_groups": 16, "heads_dim": 32} | run.pop("unet", {})
    prompts = run.pop("sample_prompts", ())
    places = {
        "out": root / "model",
        "work": root / "work",
        "precision": "fp32",
        "save_every_steps": 100,
        "sample_every_steps": 100,
    }
    return TrainDenoiser.model_validate(
        {
            "data": {"cache": cache, "vae": vae},
            "run": places | run,
            "optim": optim,
            "unet": unet,
            "text": {"width": 32, "layers": 1, "heads": 2, "vocabulary": 600, "length": 16},
            "sample_prompts": prompts,
        }
    )


def some_images(n: int = 4, side: int = 16, seed: int = 0) -> torch.Tensor:
    """Random images, B 3 H W in [-1, 1]."""
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def grey_levels(first: Image.Image, second: Image.Image) -> int:
    """The largest difference between two pictures, of 255."""
    pair = [np.asarray(picture.convert("RGB"), np.int16) for picture in (first, second)]
    assert pair[0].shape == pair[1].shape
    return int(np.abs(pair[0] - pair[1]).max())


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not None}))


def write_shards(folder: Path, cache: Any, per_shard: int) -> Path:
    """The rows of a cache in shards, as `encode --shards` would write them."""
    from safetensors.torch import save_file

    from latentpipe.data.shard_manifest import FORMAT, Manifest, ShardFile, shard_path, write_manifest
    from latentpipe.utils.io import file_hash

    folder.mkdir(parents=True)
    shards = []
    for number, first in enumerate(range(0, len(cache), per_shard)):
        rows = slice(first, first + per_shard)
        texts = [json.dumps(one).encode() if one else b"" for one in cache.captions[rows]]
        kinds = sorted(set(cache.kinds[rows]))
        tensors = {
            "mean": cache.mean[rows].clone(),
            "std": cache.std[rows].clone(),
            "captions": torch.tensor(list(b"".join(texts)), dtype=torch.uint8),
            "caption_ends": torch.tensor([len(text) for text in texts]).cumsum(0),
        }
        if kinds:
            tensors["kinds"] = torch.tensor([kinds.index(kind) for kind in cache.kinds[rows]], dtype=torch.int32)
        path = shard_path(folder, number)
        save_file(tensors, path, metadata={FORMAT: json.dumps({"kinds": kinds, "skipped": {}})})
        facts = {"rows": len(texts), "bytes": path.stat().st_size, "sha256": file_hash(path)}
        shards.append(ShardFile(pictures=len(texts), begins=0, **facts))
    common = {"latentpipe": "0", "torch": "0", "device": "cpu", "threads": 1, "per_shard": per_shard}
    of = {"vae_hash": cache.vae_hash, "size_px": cache.size_px, "shape": cache.shape}
    write_manifest(folder, Manifest.model_validate({**common, **of, "shards": shards}))
    return folder


class InThread:
    """A worker without a process of its own: the same job, seconds of imports earlier."""

    def __init__(self, opener: str, arguments: Any) -> None:
        from latentpipe.utils.worker_process import open_job

        self.job = open_job(opener, arguments, "cpu", 1)
        self.token = threading.Event()

    def ask(self, task: Any, on_event: Any = None) -> dict[str, Any]:
        """The answer to a task, as it comes from a process: through JSON."""
        from latentpipe.utils.worker_process import answer

        self.token.clear()  # as a process does
        told = json.loads(json.dumps(task))
        return json.loads(json.dumps(answer(lambda: self.job(told, on_event or (lambda event: None), self.token))))

    def cancel(self) -> None:
        """Stop the task in work."""
        self.token.set()

    def end(self) -> None:
        """Nothing is left behind."""


@contextmanager
def opened_in_threads(
    cluster: Any, opener: str, arguments: Any, threads: int, device: str | None = None
) -> Iterator[Callable[[int], InThread]]:
    """In place of `utils.cluster.opened_on`."""
    yield lambda number: InThread(opener, arguments)
