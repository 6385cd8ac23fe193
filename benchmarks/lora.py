"""What the shipped LoRA adapters do, on emoji that their training never saw.

python benchmarks/lora.py styles     each style: nearer to that hand's drawing than the base? content kept? two controls
python benchmarks/lora.py ranks      the flat style at rank 2, 4, 8, 16
python benchmarks/lora.py merges     ways of putting one, two and three adapters together
python benchmarks/lora.py sheet      one picture of them all
python benchmarks/lora.py sharp      the adapter on the VAE's decoder: PSNR on the emoji set's validation share
python benchmarks/lora.py speed      drawing without, with fused and with unfused adapters; attaching

Needs data/styles (benchmarks/styles.py). Results go to benchmarks/lora/*.json and, as tables, to the screen.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentpipe import LatentPipeline
from latentpipe.evaluate.statistics import interval, wilson
from latentpipe.lora.adapter import Lora
from latentpipe.lora.merge import METHODS
from latentpipe.lora.state_dict.io import read_lora
from latentpipe.lora.target_modules import select
from latentpipe.pipelines.sampling import Settings
from latentpipe.utils.images import flatten

STYLES = Path("data/styles")
OUT = Path("benchmarks/lora")
OWN = "resized"  # the base's own hand
GLYPH = 48
WEIGHTS = {1: 1.0, 2: 0.6, 3: 0.4}  # of each adapter, by how many are on
ALONE = ("sum", "svd", "ties_svd", "dare_linear_svd", "magnitude_prune_svd")  # the methods that change a single adapter
BATCH = 16


def glyph(picture: Image.Image) -> np.ndarray:
    """What is not white, fitted to a box of 48 x 48: float32, so that size and place in the frame do not count."""
    array = np.asarray(flatten(picture))
    rows, columns = np.nonzero(array.min(2) < 245)
    if len(rows) == 0:
        return np.full((GLYPH, GLYPH, 3), 255, np.float32)
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    return np.asarray(Image.fromarray(array).crop(box).resize((GLYPH, GLYPH), Image.Resampling.LANCZOS), np.float32)


@cache
def drawings(style: str) -> dict[str, np.ndarray]:
    """Every drawing of a style by its key, as glyphs."""
    return {path.stem: glyph(Image.open(path)) for path in sorted(STYLES.glob(f"{style}/*/*.png"))}


@cache
def captions(style: str, part: str) -> dict[str, str]:
    """Key to first caption of a part of a style, in a fixed order that means nothing (sha256 of the key)."""
    found: dict[str, str] = {}
    for line in (STYLES / style / part / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(Path(row["file_name"]).stem, row["text"])
    return dict(sorted(found.items(), key=lambda item: hashlib.sha256(item[0].encode()).hexdigest()))


def unlike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """1 - Pearson's correlation over the box, mean over the channels (N 48 48 3): blind to any per-channel change of colour."""
    a, b = (stack.reshape(len(stack), -1, 3) - stack.mean((1, 2))[:, None] for stack in (one, other))
    return 1 - ((a * b).sum(1) / np.sqrt(np.square(a).sum(1) * np.square(b).sum(1)).clip(1e-6)).mean(1)


def grey_levels(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean absolute difference over the box in grey levels."""
    return np.abs(one - other).mean((1, 2, 3))


def draw(pipe: LatentPipeline, prompts: Sequence[str]) -> list[Image.Image]:
    """One picture for each prompt, seed = its place in the list."""
    found: list[Image.Image] = []
    for first in range(0, len(prompts), BATCH):
        part = list(prompts[first : first + BATCH])
        found += pipe.draw(part, range(first, first + len(part)), Settings(size=pipe.native_size))
    return found


def content(style: str, keys: Sequence[str], glyphs: np.ndarray) -> dict[str, Any]:
    """Share of the pictures whose emoji is among the five nearest drawings of that hand, Wilson interval."""
    count, n = int(hits(style, keys, glyphs).sum()), len(keys)
    return {"n": n, "top5": count / n, "top5_ci": wilson(count, n)}


def nearness(style: str, keys: Sequence[str], base: np.ndarray, drawn: np.ndarray) -> dict[str, Any]:
    """How often a picture is nearer to that hand's drawing of that emoji than the base's is, by correlation, and by how much.

    `nearer_grey` is the same by grey levels, where a mere change of colours counts too.
    """
    truth = np.stack([drawings(style)[key] for key in keys])
    gain = unlike(base, truth) - unlike(drawn, truth)
    nearer = int((gain > 0).sum())
    grey = float((grey_levels(drawn, truth) < grey_levels(base, truth)).mean())
    low, high = interval(gain)
    return {
        "nearer": nearer / len(keys),
        "ci": wilson(nearer, len(keys)),
        "gain": float(gain.mean()),
        "gain_ci": (low, high),
        "nearer_grey": grey,
    }


def colour_match(style: str, base: np.ndarray) -> np.ndarray:
    """Control: the base's glyphs with each channel's mean and deviation over ink set to those of the style's training glyphs."""
    train = set(captions(style, "train"))
    target = np.stack([value for key, value in drawings(style).items() if key in train])
    matched = base.copy()
    for channel in range(3):
        have, want = (stack[..., channel][stack.min(-1) < 245] for stack in (base, target))
        ink = base.min(-1) < 245
        matched[..., channel][ink] = (base[..., channel][ink] - have.mean()) / have.std() * want.std() + want.mean()
    return matched.clip(0, 255)


class Bench:
    """One model, and its pictures without adapters, which every comparison shares."""

    def __init__(self) -> None:
        self.pipe = LatentPipeline.from_pretrained("emoji")
        self._drawn: dict[str, np.ndarray] = {}

    def glyphs(self, prompts: Sequence[str], loras: Mapping[str, Any], method: str = "sum") -> np.ndarray:
        """The pictures with these adapters on, as glyphs; drawn once."""
        key = json.dumps([list(prompts), dict(loras), method])
        if key not in self._drawn:
            self.pipe.set_lora(loras, method=method)
            self._drawn[key] = np.stack([glyph(picture) for picture in draw(self.pipe, prompts)])
            self.pipe.set_lora({})
        return self._drawn[key]

    def load(self, path: Path) -> str:
        """Attach a file once, so that `set_lora` knows its name."""
        report = self.pipe.attach_lora(path, name=path.stem)
        self.pipe.set_lora({})
        return report.name

    def style(self, style: str, part: str, loras: Mapping[str, Any]) -> dict[str, Any]:
        """Nearness and content of adapters on a part of a style; the colour match beside it."""
        found = captions(style, part)
        keys, prompts = list(found), list(found.values())
        base, drawn = self.glyphs(prompts, {}), self.glyphs(prompts, loras)
        return {
            **nearness(style, keys, base, drawn),
            "colour_match": nearness(style, keys, base, colour_match(style, base)),
            "content": content(style, keys, drawn),
            "base_content": content(OWN, keys, base),
        }


def styles(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Each adapter on its own style, and the control adapter (trained on resized Noto) on every style."""
    bench, result = Bench(), {}
    control = bench.load(folder / f"{OWN}.safetensors") if (folder / f"{OWN}.safetensors").is_file() else None
    for name in names:
        bench.load(folder / f"{name}.safetensors")
        for part in ("held_out", "unseen"):
            if not (STYLES / name / part).is_dir():
                continue
            row = bench.style(name, part, {name: 1.0})
            if control:
                row["control"] = bench.style(name, part, {control: 1.0})["nearer"]
            result[f"{name} {part}"] = row
            print(line(f"{name} {part}", row), flush=True)
    return result


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    content_, base = row["content"], row["base_content"]
    return (
        f"{name:20} n {content_['n']:4}  nearer {row['nearer']:.1%} ({row['ci'][0]:.1%} to {row['ci'][1]:.1%}), "
        f"grey {row['nearer_grey']:.1%}  "
        f"controls: noto {row.get('control', float('nan')):.1%}, colours {row['colour_match']['nearer']:.1%}  "
        f"top-5 {content_['top5']:.1%}, base in its own bank {base['top5']:.1%}"
    )


def merges(folder: Path, sets: Sequence[Sequence[str]], part: str = "held_out", most: int = 60) -> dict[str, Any]:
    """Methods x number of adapters: content in the nearest bank, and how often nearer than the base to the hands."""
    bench, result = Bench(), {}
    for name in dict.fromkeys(name for names in sets for name in names):
        bench.load(folder / f"{name}.safetensors")
    found = dict(list(captions("flat", part).items())[:most])
    keys, prompts = list(found), list(found.values())
    base = bench.glyphs(prompts, {})
    for names in sets:
        weights = dict.fromkeys(names, WEIGHTS[len(names)])
        for method in ("sum", *METHODS) if len(names) > 1 else ALONE:
            drawn = bench.glyphs(prompts, weights, method)
            hands = [name for name in names if (STYLES / name / part).is_dir()]
            near = [nearness(name, keys, base, drawn) for name in hands]
            count = int(np.max([hits(name, keys, drawn) for name in [*hands, OWN]], axis=0).sum())
            share = float(np.mean([row["nearer"] for row in near]))
            row = result[f"{len(names)} {method}"] = {
                "adapters": list(names),
                "weight": WEIGHTS[len(names)],
                "n": len(keys),
                "nearer": share,
                "nearer_ci": wilson(round(share * len(keys) * len(hands)), len(keys) * len(hands)),
                "gain": float(np.mean([row["gain"] for row in near])),
                "top5": count / len(keys),
                "top5_ci": wilson(count, len(keys)),
            }
            print(f"{len(names)} {method:22} nearer {share:.1%}  gain {row['gain']:.3f}  top-5 {row['top5']:.1%}", flush=True)
    return result


def hits(style: str, keys: Sequence[str], glyphs: np.ndarray) -> np.ndarray:
    """Whether the emoji is among the five nearest drawings of a hand's whole bank (root mean square over the glyphs)."""
    names = list(drawings(style))
    bank = np.stack([drawings(style)[name] for name in names]).reshape(len(names), -1)
    flat = glyphs.reshape(len(glyphs), -1)
    near = np.argsort(np.square(bank).sum(1)[None] - 2 * flat @ bank.T, axis=1, kind="stable")[:, :5]
    return np.array([key in [names[index] for index in row] for key, row in zip(keys, near, strict=True)])


def speed(path: Path, rounds: int = 12) -> dict[str, float]:
    """Seconds for one picture (defaults), in turns: base, fused, unfused; and for attaching and taking off."""
    pipe = LatentPipeline.from_pretrained("emoji")
    pipe("red apple", seed=0)
    pipe.attach_lora(path, name="x")
    pipe.detach_lora()
    times: dict[str, list[float]] = {"base": [], "fused": [], "unfused": [], "unfused_attention": [], "attach": [], "switch": []}
    whole = read_lora(path)
    attention = select("unet", pipe.host.unet, ["unet.attention"])
    part = Lora({"unet": {name: layer for name, layer in whole.parts["unet"].items() if name in attention}}, "part")

    def picture() -> None:
        pipe("red apple", seed=0)

    for _ in range(rounds):
        times["base"].append(timed(picture))
        times["attach"].append(timed(lambda: pipe.attach_lora(path, name="x")))
        times["fused"].append(timed(picture))
        times["switch"].append(timed(lambda: pipe.set_lora({"x": 0.5})))
        pipe.set_lora({"x": 1.0}, fuse=False)
        times["unfused"].append(timed(picture))
        pipe.detach_lora()
        pipe.attach_lora(part)
        pipe.set_lora({"part": 1.0}, fuse=False)
        times["unfused_attention"].append(timed(picture))
        pipe.detach_lora()
    middle = {name: float(np.median(values)) for name, values in times.items()}
    ratios = {
        f"{name} / base": float(np.median(np.array(times[name]) / np.array(times["base"])))
        for name in ("fused", "unfused", "unfused_attention")
    }
    return middle | ratios


def sheet_of(folder: Path, names: Sequence[str]) -> None:
    """Draw FOLDER/samples.png: a row for the base, each adapter and two together; five prompts of either unseen list."""
    from latentpipe.utils.images import sheet

    pipe = LatentPipeline.from_pretrained("emoji")
    prompts = [text for part in ("held_out", "unseen") for text in list(captions("flat", part).values())[:5]]
    rows: dict[str, dict[str, float]] = (
        {"base": {}} | {name: {name: 1.0} for name in names} | {"flat 0.6 + pencil 0.6": {"flat": 0.6, "pencil": 0.6}}
    )
    for name in names:
        pipe.attach_lora(folder / f"{name}.safetensors", name=name)
    pictures, labels = [], []
    for row, weights in rows.items():
        pipe.set_lora(weights)
        pictures += [picture.resize((128, 128), Image.Resampling.LANCZOS) for picture in draw(pipe, prompts)]
        labels += [f"{row}: {prompt}" for prompt in prompts]
    sheet(pictures, len(prompts), labels).save(folder / "samples.png")


def sharp(path: Path) -> dict[str, Any]:
    """PSNR in dB of the mode on the validation emoji at 64 px (uint8), with and without the decoder's adapter, paired."""
    import torch

    from latentpipe.data.image_folder import read_pictures
    from latentpipe.utils.images import bytes_to_images, psnr, to_bytes

    pipe = LatentPipeline.from_pretrained("emoji")
    pixels = torch.from_numpy(read_pictures(Path("data/emoji/validation"), 64).pixels).permute(0, 3, 1, 2)

    @torch.no_grad()
    def measured() -> np.ndarray:
        rebuilt = [pipe.stage.decode(pipe.stage.encode(bytes_to_images(part))) for part in pixels.split(50)]
        return psnr(to_bytes(torch.cat(rebuilt)), to_bytes(bytes_to_images(pixels))).numpy()

    before = measured()
    report = pipe.attach_lora(path)
    after = measured()
    found = {"n": len(before), "base": float(before.mean()), "with": float(after.mean()), "gain": float((after - before).mean())}
    print(report, found | {"gain_ci": interval(after - before)})
    return found | {
        "gain_ci": interval(after - before),
        "parameters": report.parts["vae"].parameters,
        "mb": path.stat().st_size / 1e6,
    }


def step_seconds(ranks: Sequence[int], rounds: int = 4) -> dict[int, float]:
    """Seconds of one training step of 32 at each rank, in turns; the median."""
    import copy

    import torch

    from latentpipe.lora.injection import inject
    from latentpipe.lora.target_modules import select
    from latentpipe.train import loop
    from latentpipe.train.config import Run

    base = LatentPipeline.from_pretrained("emoji").host.unet
    models = {}
    for rank in ranks:
        models[rank] = copy.deepcopy(base).train()
        inject(models[rank], select("unet", base, ["unet.all"]), "x", rank, float(rank))
    run = Run(out=Path("x"), work=Path("y"))
    inputs = torch.randn(32, 8, 16, 16), torch.randint(1000, (32,)), torch.randn(32, 24, 256)

    def step(rank: int) -> None:
        with loop.fast_forward(run, torch.device("cpu")):
            found = models[rank](*inputs, return_dict=False)[0]
        found.float().square().mean().backward()

    times: dict[int, list[float]] = {rank: [] for rank in ranks}
    for _ in range(rounds + 1):
        for rank in ranks:
            times[rank].append(timed(lambda rank=rank: step(rank)))
    return {rank: float(np.median(values[1:])) for rank, values in times.items()}


def timed(call: Any) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    """Run what the first argument names; the second is the folder of the adapters."""
    if len(sys.argv) < 2 or sys.argv[1] not in ("styles", "ranks", "merges", "sheet", "sharp", "speed"):
        sys.exit(__doc__)
    what, folder = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "weights/lora")
    OUT.mkdir(exist_ok=True)
    if what == "styles":
        result: Any = styles(folder, sys.argv[3:] or ["flat", "solid", "pencil"])
    elif what == "ranks":
        bench = Bench()
        result = {path.stem: ranked(bench, path) for path in sorted(folder.glob("flat-r*.safetensors"))}
        seconds = step_seconds([row["rank"] for row in result.values()])
        result = {name: row | {"step_seconds": seconds[row["rank"]]} for name, row in result.items()}
    elif what == "merges":
        chosen = sys.argv[3:]
        result = merges(folder, [chosen] if chosen else [["flat"], ["flat", "pencil"], ["flat", "pencil", "solid"]])
    elif what == "sheet":
        sheet_of(folder, sys.argv[3:] or ["flat", "solid", "pencil"])
        return
    elif what == "sharp":
        result = sharp(folder / "sharp.safetensors")
    else:
        result = speed(folder / "flat.safetensors")
        print(result)
    path = OUT / f"{what}.json"
    before = json.loads(path.read_text()) if what in ("styles", "merges") and path.is_file() else {}
    path.write_text(json.dumps(before | result, indent=1) + "\n")


def ranked(bench: Bench, path: Path) -> dict[str, Any]:
    """The flat style by an adapter of another rank."""
    name = bench.load(path)
    part = next(iter(bench.pipe.loras.fuser.loaded[name].parts.values()))
    row = bench.style("flat", "held_out", {name: 1.0})
    row |= {
        "rank": next(iter(part.values())).rank,
        "parameters": sum(layer.parameters for layer in part.values()),
        "mb": path.stat().st_size / 1e6,
    }
    print(line(path.stem, row), f"{row['parameters']:,} parameters, {row['mb']:.2f} MB", flush=True)
    return row


if __name__ == "__main__":
    main()
