"""Rate and distortion of .lpz files beside JPEG, WebP and AVIF, in bytes on disk: python benchmarks/codec.py [--fuzz 10000]

Needs matplotlib and scipy. Emoji come from data/emoji (latentpipe emoji), photographs from LATENTPIPE_ASSETS.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features

from latentpipe.evaluate.metrics.ssim import ms_ssim, scales_of
from latentpipe.explore.codec import bd_rate
from latentpipe.explore.codec import codec as files
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import open_picture, psnr, to_bytes, to_images

HERE = Path(__file__).parent
QUALITIES = {"JPEG": (5, 10, 20, 35, 50, 70, 85), "WebP": (0, 5, 10, 20, 35, 50, 70, 85), "AVIF": (5, 15, 30, 45, 60, 75)}
RESAMPLES = 1000
WHOLE = 5  # scales of MS-SSIM


def conventional(kind: str, picture: Image.Image, quality: int, folder: Path) -> tuple[int, Image.Image, float, float]:
    """Bytes on disk, the picture that comes back, and the seconds of both ways."""
    path = folder / f"picture.{kind.lower()}"
    options: dict[str, dict[str, Any]] = {"WebP": {"method": 6}, "JPEG": {"optimize": True}}
    started = time.perf_counter()
    picture.save(path, kind, quality=quality, **options.get(kind, {}))
    middle = time.perf_counter()
    with Image.open(path) as opened:
        back = opened.convert("RGB")
    return path.stat().st_size, back, middle - started, time.perf_counter() - middle


def ours(codec: files.Codec, picture: Image.Image, step: float, folder: Path) -> tuple[int, Image.Image, float, float]:
    """As `conventional`, with a VAE that is open already."""
    path = folder / "picture.lpz"
    started = time.perf_counter()
    path.write_bytes(files.compress(picture, codec, step))
    middle = time.perf_counter()
    back = files.decompress(path.read_bytes(), codec)
    return path.stat().st_size, back, middle - started, time.perf_counter() - middle


def measure(pictures: list[Image.Image], code) -> dict[str, np.ndarray]:
    """Bytes, PSNR (dB), MS-SSIM in dB and seconds of every picture."""
    rows = []
    for picture in pictures:
        size, back, wrote, read = code(picture)
        first, second = to_images(picture), to_images(back)
        similarity = ms_ssim(first, second, 2.0).item()
        decibels = psnr(to_bytes(first), to_bytes(second)).clamp_max(99).item()
        rows.append((size, decibels, -10 * np.log10(max(1e-9, 1 - similarity)), wrote, read))
    return dict(zip(("bytes", "psnr_db", "ms_ssim_db", "encode_s", "decode_s"), np.array(rows).T, strict=True))


def curve(points: list[dict[str, np.ndarray]], metric: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean bytes and mean quality of each point over the pictures of `rows`."""
    return np.array([point["bytes"][rows].mean() for point in points]), np.array([point[metric][rows].mean() for point in points])


def difference(points: list, anchor: list, metric: str, n: int) -> dict[str, float] | str:
    """BD-rate against an anchor, its 95 % bootstrap interval over pictures, and the range of quality; or why there is none."""
    every = np.arange(n)
    own, other = curve(points, metric, every), curve(anchor, metric, every)
    try:
        value = bd_rate.bd_rate(*own, *other)
        low, high = bd_rate.common(own[1], other[1])
    except UserError as error:
        return str(error)
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        rows = random.integers(0, n, n)
        try:
            drawn.append(bd_rate.bd_rate(*curve(points, metric, rows), *curve(anchor, metric, rows)))
        except UserError:
            continue
    lows, highs = np.quantile(drawn, (0.025, 0.975))
    return {"bd_rate": value, "low": float(lows), "high": float(highs), "from_db": low, "to_db": high}


def emoji(folder: Path, size: int, n: int) -> list[Image.Image]:
    """`n` pictures spread evenly over a folder, at a size."""
    paths = sorted(folder.glob("*.png"))
    chosen = [paths[int(index)] for index in np.linspace(0, len(paths) - 1, min(n, len(paths)))]
    return [open_picture(path).resize((size, size), Image.Resampling.LANCZOS) for path in chosen]


def photographs(most: int = 512) -> list[Image.Image]:
    """The photographs in 8-bit sRGB that are large enough for MS-SSIM of all scales, their longer side at most `most` pixels."""
    root = os.environ.get("LATENTPIPE_ASSETS")
    if not root:
        return []
    found = []
    for path in sorted((Path(root) / "data" / "photos").iterdir()):
        if not (path.suffix == ".jpg" or "srgb8" in path.name or path.name.count("_") == 0):
            continue
        picture = open_picture(path)
        picture.thumbnail((most, most), Image.Resampling.LANCZOS)
        if scales_of(picture.height, picture.width) == WHOLE:
            found.append(picture)
    return found


def run(name: str, pictures: list[Image.Image], settings: list[tuple[str, float]], folder: Path) -> dict:
    """Every codec's points on a set, and the BD-rates of ours."""
    kinds = [kind for kind in QUALITIES if kind != "AVIF" or features.check("avif")]
    points = {
        kind: [measure(pictures, lambda p, k=kind, q=quality: conventional(k, p, q, folder)) for quality in QUALITIES[kind]]
        for kind in kinds
    }
    opened = {vae: files.open_codec(vae) for vae, _ in settings}
    points["lpz"] = []
    for vae, step in settings:
        found = measure(pictures, lambda p, v=vae, s=step: ours(opened[v], p, s, folder))
        points["lpz"].append(found)
        print(name, Path(vae).name, step, {key: round(float(value.mean()), 3) for key, value in found.items()}, flush=True)
    n = len(pictures)
    table = {
        f"{kind} {metric}": difference(points["lpz"], points[kind], metric, n)
        for metric in ("ms_ssim_db", "psnr_db")
        for kind in kinds
    }
    for key, value in table.items():
        print(name, "BD-rate against", key, value, flush=True)
    pixels = float(np.mean([p.width * p.height for p in pictures]))
    means = {
        kind: [{key: float(value.mean()) for key, value in point.items()} for point in rows] for kind, rows in points.items()
    }
    return {
        "n": n,
        "pixels": pixels,
        "scales": sorted({scales_of(p.height, p.width) for p in pictures}),
        "bd_rate": table,
        "points": means,
        "settings": [[Path(vae).name, *rest] for vae, *rest in settings],
    }


def model_bytes(vae: str) -> int:
    """Bytes of a VAE's weights and of its probabilities."""
    folder = files.find_model(vae, "vae")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def fuzz(vae: str, count: int, seed: int = 0) -> dict[str, int]:
    """Damage a file in `count` ways: none may end in anything but a UserError or a picture."""
    import zlib

    codec = files.open_codec(vae)
    random = np.random.default_rng(seed)
    whole = files.compress(Image.fromarray(random.integers(0, 256, (16, 24, 3), np.uint8)), codec)
    ended = {"refused": 0, "picture": 0}
    for trial in range(count):
        data = bytearray(whole)
        for _ in range(random.integers(1, 6)):
            place = int(random.integers(0, len(data) - 4)) if trial % 2 else int(random.integers(0, len(data)))
            data[place] = int(random.integers(0, 256))
        if random.random() < 0.3:
            data = data[: int(random.integers(0, len(data)))]
        if trial % 2:  # as if the sender had meant it: the checksum is right, and the width and height stay small
            data[:11] = whole[:11]
            data = data[:-4] + zlib.crc32(bytes(data[:-4])).to_bytes(4)
        try:
            files.decompress(bytes(data), codec)
            ended["picture"] += 1
        except UserError:
            ended["refused"] += 1
    return ended


def draw(results: dict, out: Path) -> None:
    """MS-SSIM and PSNR over bits for each pixel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(results), figsize=(4.2 * len(results), 6.4), layout="constrained", squeeze=False)
    for column, (name, result) in enumerate(results.items()):
        for row, (metric, label) in enumerate((("ms_ssim_db", "MS-SSIM, dB"), ("psnr_db", "PSNR, dB"))):
            axis = axes[row][column]
            if metric == "ms_ssim_db" and result["scales"] != [WHOLE]:
                label = label.replace("MS-SSIM", f"MS-SSIM-{' or '.join(map(str, result['scales']))}")
            for kind, points in result["points"].items():
                rates = np.array([8 * point["bytes"] / result["pixels"] for point in points])
                values = np.array([point[metric] for point in points])
                kept = bd_rate.front(rates, values)
                axis.plot(rates[kept], values[kept], marker="o", markersize=3, linewidth=2 if kind == "lpz" else 1, label=kind)
            axis.set(xscale="log", xlabel="bits for each pixel, whole files", ylabel=label, title=f"{name}, n = {result['n']}")
            axis.set_xticks([0.25, 0.5, 1, 2], ["1/4", "1/2", "1", "2"])
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.savefig(out, dpi=90)


def main() -> None:
    """Measure, print, write benchmarks/codec.json and codec.png; sets that are not measured now keep their figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=76, help="emoji of each set")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--vae", nargs="+", default=["emoji-codec-small", "emoji-codec", "emoji-codec-large"])
    parser.add_argument("--photo-vae", default="emoji")
    parser.add_argument("--steps", type=float, nargs="+", default=[0.7, 1.0, 1.4])
    parser.add_argument(
        "--sets", nargs="+", default=["held_out-64", "held_out-128", "validation-64", "validation-128", "photographs"]
    )
    parser.add_argument("--fuzz", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "codec.json")
    given = parser.parse_args()
    if given.fuzz:
        print(given.fuzz, "damaged files:", fuzz(given.vae[0], given.fuzz))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.sets:
            if name == "photographs":
                pictures = photographs()
                settings = [(given.photo_vae, step) for step in (0.1, 0.2, 0.35, 0.5, 0.8, 1.2)]
            else:
                part, _, size = name.partition("-")
                pictures = emoji(given.data / part, int(size), given.n)
                settings = [(vae, step) for vae in given.vae for step in given.steps]
            if pictures:
                results[name] = run(name, pictures, settings, Path(folder))
    sizes = {Path(vae).name: model_bytes(vae) for vae in [*given.vae, given.photo_vae]}
    print("model bytes:", sizes)
    if given.out.exists():
        known = json.loads(given.out.read_text())
        sizes, results = known["model_bytes"] | sizes, known["sets"] | results
    given.out.write_text(json.dumps({"model_bytes": sizes, "threads": torch.get_num_threads(), "sets": results}, indent=1) + "\n")
    draw(results, given.out.with_suffix(".png"))
    print(given.out)


if __name__ == "__main__":
    main()
