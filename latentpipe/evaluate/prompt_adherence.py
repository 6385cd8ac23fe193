"""Does the picture follow the prompt? The yardstick of the embedded model.

One picture for each prompt, seed = index, nothing selected. A picture counts as right when the nearest of all
rendered emoji (mean squared error at 32 x 32 on white) carries the prompt among its captions. Seen prompts and
held-out combinations (role x gender x skin tone, never trained on) apart; Wilson intervals at 95 %.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from latentpipe.data.emoji import TONES, Combination, combination_of
from latentpipe.data.emoji_bank import SIDE, Bank, open_bank, small
from latentpipe.evaluate.artists import DrawBatches, artists
from latentpipe.evaluate.statistics import wilson
from latentpipe.evaluate.style_adherence import evaluate_styles
from latentpipe.pipelines.latent_pipeline import LatentPipeline
from latentpipe.pipelines.sampling import Settings
from latentpipe.utils.defaults import GUIDANCE, STEPS
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.images import sheet
from latentpipe.utils.io import atomic_file
from latentpipe.utils.setting_names import takes_settings

BATCH = 16
DIVERSITY_PROMPTS = 8


@takes_settings
def evaluate(
    model: str | Path = "emoji",
    seen: int = 400,
    held_out: int = 0,
    num_inference_steps: int = STEPS,
    guidance_scale: float = GUIDANCE,
    device: str | None = None,
    grid: Path | None = None,
    styles: int | None = None,
    objects: int | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Draw and score; `seen` and `held_out` say how many prompts of each list (0: all).

    styles   also score so many held-out cells of the other hands (0: all) and the variety of "any style"
    objects  also score so many of the seen prompts that name no skin tone and no flag (0: all)
    workers  processes of one thread that share the prompts; the pictures are those of one such process. None: this process alone

    Returns {"seen": scores, "held_out": scores with role, gender, tone, "baselines", "seeds", "protocol"}, and with styles
    {"cells", "variety"}, with objects {"objects"}.
    """
    if min(seen, held_out, styles or 0, objects or 0) < 0:
        given = f"seen is {seen}, held_out {held_out}, styles {styles} and objects {objects}"
        raise UserError(f"{given}; expected 0 (all) or more.")
    if grid is not None and (grid.suffix.lower() != ".png" or grid.is_dir()):
        raise UserError(f"--grid {grid}: expected the name of a PNG file.")
    bank = open_bank()
    pipe = LatentPipeline.from_pretrained(model, device=device)
    settings = pipe.check(Settings(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale))
    rows = {"seen": bank.rows_of("train")[: seen or None], "held_out": bank.rows_of("held_out")[: held_out or None]}
    if objects is not None:
        rows["objects"] = bank.objects()[: objects or None]
    with artists(pipe, model, workers, device) as draw:
        return _scored(bank, pipe, draw, rows, settings, grid, styles)


def _scored(
    bank: Bank,
    pipe: LatentPipeline,
    draw: DrawBatches,
    rows: dict[str, list[int]],
    settings: Settings,
    grid: Path | None,
    styles: Any,
) -> dict[str, Any]:
    """The scores of all lists, of pictures that `draw` makes."""
    result: dict[str, Any] = {}
    drawn: dict[str, list[Image.Image]] = {}
    for name, chosen in rows.items():
        prompts = [bank.captions[row][0] for row in chosen]
        drawn[name] = draw_all(draw, prompts, settings, name)
        pictures = np.stack([small(picture) for picture in drawn[name]])
        found = bank.nearest(pictures)
        result[name] = score(bank, chosen, found) | {"rms24": rms24(bank.pixels[chosen], pictures)}
        if name == "held_out":
            result[name] |= attributes(bank, prompts, found)
    if grid is not None:
        save_grid(bank, rows, drawn, grid)
    result["baselines"] = {name: baselines(bank, name, rows[name]) for name in ("seen", "held_out")}
    result["seeds"] = four_seeds(draw, [bank.captions[row][0] for row in rows["seen"][:DIVERSITY_PROMPTS]], settings)
    if styles is not None:
        result |= evaluate_styles(lambda texts, seeds: draw_all(draw, texts, settings, "styles", seeds), styles)
    result["protocol"] = _protocol(pipe, bank, settings)
    return result


def _protocol(pipe: LatentPipeline, bank: Bank, settings: Settings) -> dict[str, Any]:
    return {
        "set": "Noto Color Emoji",
        "font_sha256": bank.font_sha256,
        "bank": len(bank.keys),
        "steps": settings.num_inference_steps,
        "guidance": settings.guidance_scale,
        "scheduler": type(pipe.host.scheduler).__name__,
        "size_px": pipe.native_size[0],
        "seed": "index of the prompt",
        "hashes": pipe.hashes,
    }


def draw_all(
    draw: DrawBatches, prompts: Sequence[str], settings: Settings, name: str, seeds: Sequence[int] | None = None
) -> list[Image.Image]:
    """One picture for each prompt, seed = index where none are given, in batches."""
    seeds = range(len(prompts)) if seeds is None else seeds
    firsts = range(0, len(prompts), BATCH)
    batches = [(list(prompts[first : first + BATCH]), list(seeds[first : first + BATCH])) for first in firsts]
    shown = tqdm(draw(batches, settings), desc=name, total=len(batches), unit="batch", disable=None, file=sys.stderr)
    return [picture for pictures in shown for picture in pictures]


def score(bank: Bank, rows: Sequence[int], found: np.ndarray) -> dict[str, Any]:
    """Top-1 and top-5 of bank indices `found` (M, 5) against the true rows, Wilson intervals of top-1 and top-5."""
    n = len(rows)
    wanted = [bank.captions[row][0] for row in rows]
    hits = np.array([[caption in bank.captions[index] for index in near] for caption, near in zip(wanted, found, strict=True)])
    top1, top5 = int(hits[:, 0].sum()), int(hits.any(1).sum())
    low, high = wilson(top1, n)
    low5, high5 = wilson(top5, n)
    return {"n": n, "top1": top1 / n, "top5": top5 / n, "low": low, "high": high, "top5_low": low5, "top5_high": high5}


def rms24(wanted: np.ndarray, pictures: np.ndarray) -> float:
    """Root mean square difference in grey levels at 24 x 24 between two lists of 32 x 32 pictures: the mean over pictures."""

    def reduced(rows: np.ndarray) -> np.ndarray:
        tiles = rows.reshape(-1, SIDE, SIDE, 3).clip(0, 255).round().astype(np.uint8)
        return np.stack([np.asarray(Image.fromarray(tile).resize((24, 24), Image.Resampling.BOX), np.float64) for tile in tiles])

    return float(np.sqrt(np.square(reduced(wanted) - reduced(pictures)).mean((1, 2, 3))).mean())


def attributes(bank: Bank, prompts: Sequence[str], found: np.ndarray) -> dict[str, float]:
    """Share of the prompts whose nearest picture has the right role, gender and skin tone, each alone."""
    people = {combination_of(text).role for texts in bank.captions for text in texts if combination_of(text).tone}
    right = dict.fromkeys(("role", "gender", "tone"), 0)
    for prompt, near in zip(prompts, found[:, 0], strict=True):
        wanted = combination_of(prompt)
        for name in right:
            # A red apple has no gender: without this every object would count as a person's.
            named = [combination_of(text) for text in bank.captions[near]]
            right[name] += any(getattr(c, name) == getattr(wanted, name) and c.role in people for c in named)
    return {name: count / len(prompts) for name, count in right.items()}


def baselines(bank: Bank, name: str, rows: Sequence[int]) -> dict[str, Any]:
    """What copying from the training pictures would score."""
    train = bank.rows_of("train")
    words = [(index, frozenset(text.split())) for index in train for text in bank.captions[index]]

    def retrieve(row: int) -> np.ndarray:
        query = frozenset(bank.captions[row][0].split())
        best = max(words, key=lambda entry: len(query & entry[1]) / len(query | entry[1]))  # Jaccard
        return bank.pixels[best[0]]

    made = {"nearest_caption": [retrieve(row) for row in rows]}
    if name == "held_out":
        seen = {combination_of(bank.captions[index][0]): index for index in train}
        made |= {"nearest_sibling": [], "mean_of_siblings": []}
        for row in rows:
            siblings = _siblings(combination_of(bank.captions[row][0]), seen)
            made["nearest_sibling"].append(bank.pixels[siblings[0]])
            made["mean_of_siblings"].append(bank.pixels[siblings].mean(0))
    return {key: score(bank, rows, bank.nearest(np.stack(pictures))) for key, pictures in made.items()}


def _siblings(wanted: Combination, seen: dict[Combination, int]) -> list[int]:
    """Training pictures of the same role and gender, the nearest skin tone first."""
    tones = sorted(TONES, key=lambda tone: abs(TONES.index(tone) - TONES.index(wanted.tone)))
    same = [Combination(wanted.role, wanted.gender, tone) for tone in tones]
    return [seen[combination] for combination in same if combination in seen]


def four_seeds(draw: DrawBatches, prompts: Sequence[str], settings: Settings) -> dict[str, float]:
    """How far four seeds of one prompt differ: root mean squared difference in grey levels over pairs."""
    apart: list[float] = []
    for drawn in draw([([prompt] * 4, list(range(4))) for prompt in prompts], settings):
        pictures = np.stack([np.asarray(picture, np.float64) for picture in drawn])
        pairs = [(a, b) for a in range(4) for b in range(a)]
        apart += [math.sqrt(np.square(pictures[a] - pictures[b]).mean()) for a, b in pairs]
    return {"prompts": len(prompts), "pairs": len(apart), "smallest": min(apart), "mean": sum(apart) / len(apart)}


def save_grid(bank: Bank, rows: dict[str, list[int]], drawn: dict[str, list[Image.Image]], path: Path) -> None:
    """A sheet of the first 16 pictures of each list with their prompts, at twice their size."""
    pictures, labels = [], []
    for name in rows:
        for row, picture in list(zip(rows[name], drawn[name], strict=True))[:16]:
            pictures.append(picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.LANCZOS))
            labels.append(bank.captions[row][0])
    with atomic_file(path) as part:
        sheet(pictures, 8, labels).save(part, format="PNG")


def adherence_table(result: dict[str, Any]) -> str:
    """The scores as text."""
    lines = [f"{'':34}{'n':>5}  top-1                  top-5"]
    entries: list[tuple[str, Any]] = [(name, result[name]) for name in ("seen", "objects", "held_out") if name in result]
    entries += [(f"  {name}: {key}", scores) for name, group in result["baselines"].items() for key, scores in group.items()]
    for name, row in entries:
        shares = [
            f"{row[key]:6.1%} ({row[low]:.1%} to {row[high]:.1%})"
            for key, low, high in (("top1", "low", "high"), ("top5", "top5_low", "top5_high"))
        ]
        lines.append(f"{name:34}{row['n']:>5}  {shares[0]}  {shares[1]}")
    distances = ", ".join(f"{name} {result[name]['rms24']:.1f}" for name in ("seen", "objects", "held_out") if name in result)
    lines.append(f"rms difference to the true picture at 24 x 24, grey levels: {distances}")
    held = result["held_out"]
    lines.append(f"held_out attributes: role {held['role']:.1%}, gender {held['gender']:.1%}, tone {held['tone']:.1%}")
    seeds = result["seeds"]
    lines.append(f"four seeds of one prompt: rms difference {seeds['mean']:.1f} grey levels, smallest {seeds['smallest']:.1f}")
    lines += _style_lines(result) if "cells" in result else []
    protocol = result["protocol"]
    lines.append(
        f"nearest of {protocol['bank']} {protocol['set']} pictures at 32 x 32; {counted(protocol['steps'], 'step')}, "
        f"guidance {protocol['guidance']}, {protocol['size_px']} px; Wilson intervals, 95 %"
    )
    return "\n".join(lines)


def _style_lines(result: dict[str, Any]) -> list[str]:
    cells, variety = result["cells"], result["variety"]
    lines = [
        f"held-out cells (n = {cells['n']}): nearer to the right hand {_percent(cells['nearer'])}, "
        f"right emoji {_percent(cells['top1'])}, among five {_percent(cells['top5'])}"
    ]
    lines += [
        f"  {name:12} n = {row['n']:<4} nearer {row['nearer']:.1%}, among five {row['top5']:.1%}"
        for name, row in cells["hands"].items()
    ]
    lines.append(
        f"any style (n = {variety['n']}): four seeds show two or more hands {_percent(variety['two_hands'])}, "
        f"rms difference {variety['pairwise_rms']:.1f} grey levels (the hands themselves {variety['pairwise_rms_of_hands']:.1f})"
    )
    return lines


def _percent(share: dict[str, float]) -> str:
    return f"{share['share']:.1%} ({share['low']:.1%} to {share['high']:.1%})"
