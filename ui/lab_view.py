"""What the VAE lab shows of its figures: sentences, tables, pictures, JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from latentpipe import UserError
from latentpipe.engine.jobs import Progress, Waiting
from latentpipe.evaluate.vae_lab import FEWEST, GAIN, MOST, Laboratory, Rebuilt
from latentpipe.ui import html
from latentpipe.ui.uploads import picture_of
from latentpipe.utils.images import sheet


def pictures_of(files: Sequence[str] | None) -> list[Image.Image]:
    """The uploaded files as pictures; UserError where there is none, or one that cannot be read."""
    if not files:
        raise UserError("There is no picture yet: drop some, or press 'Use example pictures'.")
    if len(files) > MOST:
        raise UserError(f"{len(files)} pictures were given; at most {MOST} are compared.")
    return [picture_of(str(file)) for file in files]


def words_of(event: Any) -> str:
    """A job's progress as HTML."""
    if isinstance(event, Waiting):
        return html.waiting(event.ahead)
    assert isinstance(event, Progress)
    return html.progress(event.done, event.total, event.what, event.eta_s)


def summary(lab: Laboratory) -> str:
    """What the comparison found, in a sentence."""
    n = len(lab.originals)
    if n < FEWEST:
        return f"{n} picture{'s' * (n > 1)} at {lab.side} px: too few for intervals; give {FEWEST} or more to name a best one."
    best = lab.best()
    rule = "its PSNR is at least 0.5 dB above every other one's, with zero outside of the 95 % interval of the paired difference"
    return f"{n} pictures at {lab.side} px. " + (
        f"Best: {best}: {rule}." if best else f"No best one: of none it holds that {rule}."
    )


def figures(lab: Laboratory) -> str:
    """The figures as tables."""
    n = len(lab.originals)
    scores = list(lab.vaes[0].scores)
    heads = [
        "VAE",
        "Latents",
        "Weights",
        "Encode, decode",
        *(f"{name}{'' if name in ('SSIM', 'seam') else ', dB'}" for name in scores),
    ]
    rows = [
        (
            f"{vae.name} ({vae.hash[:10]})", f"{vae.space}, {vae.dtype}", f"{vae.weights_mb:.1f} MB",
            f"{vae.cost['encode']['ms']:.0f}, {vae.cost['decode']['ms']:.0f} ms", *(_cell(vae, name) for name in scores),
        )
        for vae in lab.vaes
    ]  # fmt: skip
    first = html.table(f"Means of {n} pictures with 95 % bootstrap intervals; seam 1: no grid shows in the error", heads, rows)
    pairs = [
        (f"{one} - {other}", f"{mean:+.2f} dB ({low:+.2f} to {high:+.2f})") for one, other, mean, low, high in lab.differences()
    ]
    return first + (html.table("Paired differences in PSNR", ["VAEs", "Mean, 95 %"], pairs) if pairs else "")


def _cell(vae: Rebuilt, score: str) -> str:
    mean, low, high = vae.mean(score)
    digits = 3 if score in ("SSIM", "seam") else 1
    return f"{mean:.{digits}f}" + ("" if low is None else f" ({low:.{digits}f} to {high:.{digits}f})")


def pictures_html(lab: Laboratory) -> str:
    """Every picture: original, each reconstruction, and its difference."""
    lines = [html.words(f"Each picture, rebuilt by each VAE, and its difference times {GAIN} (grey: none).")]
    for index, original in enumerate(lab.originals):
        row = [(original, f"picture {index + 1}, original")]
        for vae in lab.vaes:
            db = vae.scores["PSNR"][index]
            row += [(vae.pictures[index], f"{vae.name}, {db:.1f} dB"), (vae.differences[index], f"difference of {vae.name}")]
        lines.append(html.pictures(row))
    return "".join(lines)


def comparison_sheet(lab: Laboratory) -> Image.Image:
    """All of it as one picture with labels."""
    cells, labels = [], []
    for index, original in enumerate(lab.originals):
        cells.append(original)
        labels.append("original")
        for vae in lab.vaes:
            cells += [vae.pictures[index], vae.differences[index]]
            labels += [f"{vae.name} {vae.scores['PSNR'][index]:.1f} dB", "difference"]
    return sheet(cells, 1 + 2 * len(lab.vaes), labels)


def comparison_json(lab: Laboratory) -> dict[str, Any]:
    """The figures for a program."""
    vaes = [
        {
            "name": vae.name, "hash": vae.hash, "space": vae.space, "dtype": vae.dtype, "weights_mb": vae.weights_mb,
            "cost": vae.cost, "scores": vae.scores, "means": {name: vae.mean(name) for name in vae.scores},
        }
        for vae in lab.vaes
    ]  # fmt: skip
    return {"n": len(lab.originals), "side_px": lab.side, "best": lab.best(), "vaes": vaes, "differences": lab.differences()}
