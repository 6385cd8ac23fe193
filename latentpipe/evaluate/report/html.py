"""One HTML page about a comparison: tables, charts and crops, with nothing outside the file.

The page holds its style, its charts (SVG) and its pictures (PNG as data URIs), forbids every request by its own content
security policy, and carries all figures as JSON in ``<script type="application/json" id="comparison">``. Every name that
comes from a file or a person is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from latentpipe.evaluate.comparison import Comparison, Difference
from latentpipe.evaluate.report.crops import GAIN, Strip, Tile
from latentpipe.evaluate.report.figures import Figure, figures, forests, machine, mark
from latentpipe.evaluate.report.text import heading, interval_words, rounded, size_words
from latentpipe.evaluate.results import Score
from latentpipe.utils.errors import counted, short
from latentpipe.utils.io import HASH_LENGTH, atomic_file
from latentpipe.version import VERSION

STYLE = Path(__file__).with_name("report.css")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(path: Path, comparison: Comparison, strips: Sequence[Strip], command: str) -> None:
    """Write the page, atomically; `strips` are the pictures to show, `command` is the one that made it."""
    with atomic_file(path) as part:
        # a file name may hold bytes that are no text
        part.write_text(page(comparison, strips, command), encoding="utf-8", errors="replace")


def page(comparison: Comparison, strips: Sequence[Strip], command: str) -> str:
    """The page as text."""
    pictures = comparison.evaluations[0].pictures
    title = f"{_list(comparison.labels)} on {pictures['set']}"
    body = [
        f"<header><h1>{escape(title)}</h1>{_summary(comparison)}</header><main>",
        _section("What was compared", _vaes(comparison), *(f'<p class="small">{escape(note)}</p>' for note in comparison.notes)),
        _section("Pictures and protocol", _protocol(comparison)),
        _section(
            "Scores", _scores(comparison), f'<p class="small soft">{escape(_explained(comparison))}</p>', _missing(comparison)
        ),
        _section("Paired differences", _grid(forests(comparison), "three"), _differences(comparison)),
        _section("Rate, cost, spectra and rounds", _cost(comparison), _grid(figures(comparison))),
        _section("Pictures", _about_strips(strips), *map(_strip, strips)),
        _section("Where they differ most", _extremes(comparison)) if comparison.extremes else "",
        _section("How this page was made", f"<pre><code>{escape(command)}</code></pre>", _colophon()),
        "</main>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + f'\n<script type="application/json" id="comparison">{_json(comparison.as_dict())}</script>\n</body>\n</html>\n'
    )


def _summary(comparison: Comparison) -> str:
    """What was found, in a sentence for each VAE that won something."""
    won: dict[str, list[str]] = {label: [] for label in comparison.labels}
    open_: list[str] = []
    for metric, outcome in comparison.outcomes.items():
        if outcome.winner is not None:
            won[outcome.winner].append(metric)
        elif outcome.open:
            open_.append(metric)
    said = [f"<b>{escape(label)}</b> is clearly best in {escape(_list(metrics))}." for label, metrics in won.items() if metrics]
    if open_:
        said.append(f"No clear winner in {escape(_list(open_))}.")
    first = comparison.evaluations[0]
    size = size_words(first.pictures.get("size_px"))
    told = f"{counted(len(comparison.labels), 'VAE')} on the same {counted(first.pictures['n'], 'picture')} ({size})."
    return f'<p class="lede">{escape(told)} {" ".join(said)}</p>'


def _vaes(comparison: Comparison) -> str:
    heads = ["VAE", "class", "channels", "downscale", "parameters", "MB", "dtype", "hash"]
    rows = []
    for index, (label, one) in enumerate(zip(comparison.labels, comparison.evaluations, strict=True)):
        about = one.about
        size = about.get("bytes")
        cells = [
            _cell(about.get("class", "")),
            _cell(about.get("channels", ""), "n"),
            _cell(about.get("downscale", ""), "n"),
            _cell(f"{about['parameters']:,}" if isinstance(about.get("parameters"), int) else "", "n"),
            _cell(f"{size / 1e6:.1f}" if isinstance(size, int | float) else "", "n"),
            _cell(about.get("dtype", "")),
            f'<td><code title="{escape(one.hash)}">{escape(one.hash[:HASH_LENGTH])}</code></td>',
        ]
        rows.append(f'<tr><th scope="row" class="vae">{mark(index)}{escape(label)}</th>{"".join(cells)}</tr>')
    return _table("", heads, rows, numeric=range(2, 6))


def _protocol(comparison: Comparison) -> str:
    """Set, size and protocol, as a list of terms."""
    first = comparison.evaluations[0]
    pictures = {"set": first.pictures["set"], "pictures": first.pictures["n"], "size": size_words(first.pictures.get("size_px"))}
    rest = {key: value for key, value in first.pictures.items() if key not in ("set", "n", "size_px")}
    return f"<dl>{_terms(pictures | rest)}{_terms({f'protocol: {key}': value for key, value in first.protocol.items()})}</dl>"


def _terms(values: Mapping[str, Any]) -> str:
    """Terms and their values; what is absent or empty is left out."""
    shown = {
        key: _words(value) for key, value in values.items() if value is not None and value != "" and value != [] and value != {}
    }
    return "".join(f"<dt>{escape(str(key).replace('_', ' '))}</dt><dd>{escape(value)}</dd>" for key, value in shown.items())


def _scores(comparison: Comparison) -> str:
    rows = []
    for metric in comparison.metrics():
        scores = [evaluation.scores.get(metric) for evaluation in comparison.evaluations]
        outcome = comparison.outcomes.get(metric)
        winner = outcome.winner if outcome else None
        cells = [_score(score, label == winner) for label, score in zip(comparison.labels, scores, strict=True)]
        verdict = _cell(str(outcome) if outcome else "–")
        rows.append(f'<tr><th scope="row">{escape(heading(metric, scores))}</th>{"".join(cells)}{verdict}</tr>')
    caption = "Mean over the pictures, or distance between the sets, with 95 % bootstrap interval. ↑ higher is better, ↓ lower."
    columns = range(1, len(comparison.labels) + 1)
    return _table(caption, ["metric", *comparison.labels, "winner"], rows, numeric=columns)


def _missing(comparison: Comparison) -> str:
    """What could not be measured, and why."""
    rows = {name: reason for evaluation in comparison.evaluations for name, reason in evaluation.not_measured.items()}
    return f'<p class="small">Not measured:</p><dl>{_terms(rows)}</dl>' if rows else ""


def _cost(comparison: Comparison) -> str:
    """Milliseconds and peak memory, for the VAEs that were timed."""
    rows = []
    for index, (label, one) in enumerate(zip(comparison.labels, comparison.evaluations, strict=True)):
        ways = [one.cost[way] for way in ("encode", "decode") if way in one.cost]
        if len(ways) == 2:
            cells = "".join(map(_time, ways)) + "".join(_cell(_short(way.get("peak_mb")), "n") for way in ways)
            rows.append(f'<tr><th scope="row" class="vae">{mark(index)}{escape(label)}</th>{cells}</tr>')
    heads = ["VAE", "encode (ms)", "decode (ms)", "encode, peak MB", "decode, peak MB"]
    caption = f"One picture: median of several runs, and the shortest and longest. {machine(comparison.evaluations[0])}"
    return _table(caption, heads, rows, numeric=range(1, 5)) if rows else ""


def _time(way: Mapping[str, Any]) -> str:
    span = f"{_short(way.get('least'))} to {_short(way.get('most'))}"
    return f'<td class="n">{_short(way.get("ms"))}<span class="ci">{span}</span></td>'


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _score(score: Score | None, wins: bool) -> str:
    if score is None:
        return _cell("not measured", "n")
    value, low, high = rounded(score.value, score.low, score.high)
    return f'<td class="n{" win" if wins else ""}">{value}<span class="ci">{interval_words(low, high)}</span></td>'


def _differences(comparison: Comparison) -> str:
    """The figures behind the forest plots."""
    if not comparison.differences:
        return "<p>No metric has values for each picture: no pair was tested.</p>"
    rows: list[str] = []
    for metric in dict.fromkeys(one.metric for one in comparison.differences):
        group = [one for one in comparison.differences if one.metric == metric]
        unit = f" ({group[0].unit})" if group[0].unit else ""
        head = f'<th scope="rowgroup" rowspan="{len(group)}">{escape(metric + unit)}</th>'
        rows += [f"<tr>{head if one is group[0] else ''}{_difference(one)}</tr>" for one in group]
    heads = ["metric", "first − second", "difference", "95 % interval", "pictures", "p", "p, Holm", "better"]
    table = _table("", heads, rows, numeric=range(2, 7))
    return f"<details><summary>The same as numbers: {len(comparison.differences)} comparisons</summary>{table}</details>"


def _difference(one: Difference) -> str:
    value, low, high = rounded(one.value, one.low, one.high)
    pair = f'<th scope="row">{escape(one.first)} − {escape(one.second)}</th>'
    numbers = (value, interval_words(low, high), one.n, _p(one.p), _p(one.adjusted))
    return (
        pair
        + "".join(_cell(number, "n") for number in numbers)
        + _cell(one.better or ("too small" if one.clear else "not clear"))
    )


def _extremes(comparison: Comparison) -> str:
    rows = []
    for one in comparison.extremes:
        unit = " dB" if one.metric == "PSNR" else ""
        gain = f'<td class="n">{short(one.value)}{unit}</td>'
        cells = [_cell(one.second), gain, _cell(one.metric)]
        rows.append(f'<tr><th scope="row">{escape(one.picture)}</th>{_cell(one.first)}{"".join(cells)}</tr>')
    return _table("", ["picture", "better", "worse", "by", "metric"], rows, numeric=[3])


def _about_strips(strips: Sequence[Strip]) -> str:
    if not strips:
        return "<p>No pictures were asked for.</p>"
    return (
        '<p class="small soft">Above the original and the reconstructions, below each its absolute error '
        f"times {GAIN}: black is no error. The PSNR is of the whole picture.</p>"
    )


def _strip(strip: Strip) -> str:
    shown = [_tiles([strip.original], "original", strip.size)]
    for rebuilt, error, caption in zip(strip.rebuilt, strip.errors, strip.captions, strict=True):
        shown.append(_tiles([rebuilt, error], caption, strip.size))
    said = f'<p class="small soft">{escape(strip.why)}. Shown: {escape(strip.place)}.</p>'
    return f'<h3>{escape(strip.picture)}</h3>{said}<div class="strip">{"".join(shown)}</div>'


def _tiles(tiles: Sequence[Tile], caption: str, size: tuple[int, int]) -> str:
    width, height = size
    images = "".join(
        f'<img src="{tile.data_uri()}" alt="{escape(tile.alt)}" width="{width}" height="{height}">' for tile in tiles
    )
    return f'<figure style="max-width:{max(width, 120)}px">{images}<figcaption>{escape(caption)}</figcaption></figure>'


def _grid(shown: Sequence[Figure], kind: str = "") -> str:
    parts = [
        f"<figure><b>{escape(one.title)}</b>{one.svg}<figcaption>{escape(one.caption)}</figcaption></figure>" for one in shown
    ]
    return f'<div class="grid {kind}">{"".join(parts)}</div>' if parts else ""


def _explained(comparison: Comparison) -> str:
    return f"Bold: winner. {comparison.rule()}"


def _colophon() -> str:
    return (
        f'<p class="small soft">latentpipe {escape(VERSION)}. The file holds everything that it shows and makes no request. All '
        "figures, those for each picture too, are in its element <code>script#comparison</code> as JSON.</p>"
    )


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _table(caption: str, heads: Sequence[str], rows: Sequence[str], numeric: Sequence[int] | range = ()) -> str:
    names = "".join(
        f'<th scope="col"{" class=n" if index in numeric else ""}>{escape(head)}</th>' for index, head in enumerate(heads)
    )
    said = f"<caption><div>{escape(caption)}</div></caption>" if caption else ""
    return f'<div class="wide"><table>{said}<thead><tr>{names}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _cell(value: Any, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<td{attribute}>{escape(str(value))}</td>"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_words(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(_words, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _list(names: Sequence[str]) -> str:
    """Names with commas and an "and" before the last."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _json(value: Any) -> str:
    """JSON that no HTML parser takes for markup."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")
