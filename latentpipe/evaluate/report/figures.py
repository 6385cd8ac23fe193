"""The charts of a comparison, each with its title and caption; a chart whose figures were not measured is left out."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from latentpipe.evaluate.comparison import Comparison
from latentpipe.evaluate.report.axes import Axis
from latentpipe.evaluate.report.svg import Interval, Series, bars, forest, lines, marker, scatter
from latentpipe.evaluate.report.text import size_words
from latentpipe.evaluate.results import Evaluation, Score

PIXELS = "spectrum of pictures"
REBUILT = "spectrum of reconstructions"
KL = "KL per channel"
RATE = "rate"
ROUND = re.compile(r"PSNR after (\d+) cycles?")


@dataclass(frozen=True)
class Figure:
    """A chart on the page."""

    title: str
    svg: str
    caption: str


def mark(index: int) -> str:
    """The marker of a VAE, to stand in a line of text."""
    return f'<svg class="mark" viewBox="0 0 14 14" aria-hidden="true">{marker(index, 7, 7, 5)}</svg>'


def forests(comparison: Comparison) -> list[Figure]:
    """For each metric the paired differences of all pairs about zero."""
    found = []
    for metric in dict.fromkeys(one.metric for one in comparison.differences):
        rows = [one for one in comparison.differences if one.metric == metric]
        score = comparison.evaluations[0].scores[metric]
        shown = [Interval(f"{one.first} − {one.second}", one.value, one.low, one.high, one.clear) for one in rows]
        unit = f" ({rows[0].unit})" if rows[0].unit else ""
        side = "right" if score.better == "higher" else "left"
        chart = forest(f"Paired differences in {metric}", shown, Axis(f"difference{unit}"))
        told = f"{score.better.capitalize()} is better: to the {side} of zero the VAE named first is ahead. Filled: clear."
        found.append(Figure(metric, chart, told))
    return found


def figures(comparison: Comparison) -> list[Figure]:
    """Rate and distortion, quality against time, spectra, rounds of coding, and KL per channel, as far as they were measured."""
    parts = (rate_distortion(comparison), quality_time(comparison), spectra(comparison), rounds(comparison))
    return [one for one in parts if one is not None] + kl_bars(comparison)


def rate_distortion(comparison: Comparison) -> Figure | None:
    """PSNR against the rate in bits for each pixel, or against latent values for each pixel where no rate was measured."""
    scores = _psnr(comparison)
    if scores is None:
        return None
    rates = [bits_per_pixel(one) for one in comparison.evaluations]
    if all(rate is not None for rate in rates):
        x, told = Axis("rate (bits per pixel)", log=True), "The rate is the KL of the posterior to the prior N(0, 1)."
    else:
        rates = [values_per_pixel(one) for one in comparison.evaluations]
        x, told = Axis("latent values per pixel", log=True), "Channels divided by the square of the downscale."
    series = [
        Series(label, [rate], [score.value], [score.low], [score.high])
        for label, rate, score in zip(comparison.labels, rates, scores, strict=True)
    ]
    chart = scatter("PSNR against rate", series, x, Axis("PSNR (dB)"))
    return Figure("Rate and distortion", chart, f"{told} Up and to the left is better. Bars: 95 % intervals.")


def quality_time(comparison: Comparison) -> Figure | None:
    """PSNR against the milliseconds of a decode."""
    scores = _psnr(comparison)
    times = [decode_ms(one) for one in comparison.evaluations]
    if scores is None or all(time is None for time in times):
        return None
    series = [
        Series(label, [time], [score.value], [score.low], [score.high])
        for label, time, score in zip(comparison.labels, times, scores, strict=True)
    ]
    chart = scatter("PSNR against time to decode", series, Axis("decode, one picture (ms)", log=True), Axis("PSNR (dB)"))
    return Figure("Quality and time", chart, f"Up and to the left is better. {machine(comparison.evaluations[0])}")


def spectra(comparison: Comparison) -> Figure | None:
    """Radially averaged power of the pictures and of each reconstruction, both axes logarithmic."""
    first = comparison.evaluations[0]
    kept = [(label, one.curves[REBUILT]) for label, one in _labelled(comparison) if REBUILT in one.curves]
    if not kept or PIXELS not in first.curves:
        return None
    # the mean (entry 0) has no place on a logarithmic axis
    series = [Series(label, _frequencies(len(row))[1:], row[1:]) for label, row in kept]
    pictures = first.curves[PIXELS]
    series.append(Series("pictures", _frequencies(len(pictures))[1:], pictures[1:], plain=True))
    chart = lines("Radial spectra", series, Axis("frequency (cycles per pixel)", log=True), Axis("power", log=True))
    told = "Mean power of the grey pictures over rings of equal frequency; below the line of the pictures detail is lost."
    return Figure("Spectra", chart, told)


def rounds(comparison: Comparison) -> Figure | None:
    """PSNR against the first picture after several rounds of encoding and decoding."""
    series = []
    for label, one in _labelled(comparison):
        found = [(int(match[1]), score) for name, score in one.scores.items() if (match := ROUND.fullmatch(name))]
        if found:
            x, scores = zip(*sorted(found, key=lambda entry: entry[0]), strict=True)
            low, high = [score.low for score in scores], [score.high for score in scores]
            series.append(Series(label, x, [score.value for score in scores], low, high))
    if len(series) < len(comparison.labels):
        return None
    chart = lines("PSNR over rounds of coding", series, Axis("rounds of encoding and decoding", log=True), Axis("PSNR (dB)"))
    return Figure("Rounds", chart, "Against the first picture, rounded to 8 bits between rounds. Bars: 95 % intervals.")


def kl_bars(comparison: Comparison) -> list[Figure]:
    """KL for each channel, one chart for each VAE, all with one height of the axis."""
    kept = [(index, label, one.curves[KL]) for index, (label, one) in enumerate(_labelled(comparison)) if KL in one.curves]
    values = [value for _, _, row in kept for value in row if value is not None and math.isfinite(value)]
    top = 1.05 * max(values, default=1.0) or 1.0
    told = "Bits for each latent value, mean over pictures and positions; a channel near zero carries nothing."
    return [
        Figure(
            f"KL per channel: {label}",
            bars(f"KL per channel of {label}", row, Axis("channel"), Axis("KL (bits per value)"), index, top),
            told,
        )
        for index, label, row in kept
    ]


def values_per_pixel(evaluation: Evaluation) -> float | None:
    """Latent values for each pixel: channels / downscale^2."""
    channels, downscale = evaluation.about.get("channels"), evaluation.about.get("downscale")
    return channels / downscale**2 if channels and downscale else None


def bits_per_pixel(evaluation: Evaluation) -> float | None:
    """The measured rate in bits for each pixel; None where none was measured."""
    score = evaluation.scores.get(RATE)
    return score.value if score else None


def decode_ms(evaluation: Evaluation) -> float | None:
    """Milliseconds to decode one picture; None where it was not timed."""
    return evaluation.cost.get("decode", {}).get("ms")


def machine(evaluation: Evaluation) -> str:
    """Where and on what the times were measured, in words; empty where nothing was timed."""
    cost = evaluation.cost
    size = size_words(cost["size_px"]) if cost.get("size_px") else ""
    threads = f"{cost['threads']} thread{'s' if cost['threads'] != 1 else ''}" if cost.get("threads") else ""
    told = [part for part in (size, threads, cost.get("device"), cost.get("dtype")) if part]
    return f"Measured at {', '.join(told)}." if told else ""


def _psnr(comparison: Comparison) -> list[Score] | None:
    scores = [one.scores.get("PSNR") for one in comparison.evaluations]
    return [score for score in scores if score is not None] if all(scores) else None


def _labelled(comparison: Comparison) -> Sequence[tuple[str, Evaluation]]:
    return list(zip(comparison.labels, comparison.evaluations, strict=True))


def _frequencies(count: int) -> list[float]:
    """Cycles per pixel of the entries of a radial spectrum of `count` rings; the mean (entry 0) is at 0."""
    return [0.5 * ring / count for ring in range(count)]
