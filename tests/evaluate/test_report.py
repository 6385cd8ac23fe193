"""The page: parsed as HTML, nothing outside the file, every name escaped, every figure in the JSON; and the charts on it."""

from __future__ import annotations

import base64
import io
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers import draw_shape, tiny_vae
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latentpipe.cli.evaluate import compare as compare_verb
from latentpipe.evaluate.comparison import Comparison, compare
from latentpipe.evaluate.report.axes import Axis, log_ticks, ticks
from latentpipe.evaluate.report.crops import SIDE, Strip, choose, strip
from latentpipe.evaluate.report.html import page, write_report
from latentpipe.evaluate.report.svg import Interval, Series, bars, forest, lines, marker, scatter
from latentpipe.evaluate.results import Evaluation, Score
from latentpipe.utils.errors import UserError

N = 16
EVIL = '<script>alert("x")</script>&.png'
VOID = {"meta", "img", "br", "hr", "link", "input", "path", "rect", "circle"}


class Reader(HTMLParser):
    """Tags with their attributes, text by tag, and whether every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack, f"</{tag}> closes nothing"
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.stack and self.stack[-1] == "script" else self.text).append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def evaluation(name: str, gain: float, names: list[str]) -> Evaluation:
    """An evaluation by hand with all that the page can show."""
    random = np.random.default_rng(int(10 * gain))
    base = np.random.default_rng(0).normal(28, 2, N)
    rows = {"PSNR": base + gain + random.normal(0, 0.2, N), "rate": random.normal(1.2, 0.1, N)}
    rows |= {f"PSNR after {k} cycle{'s' * (k > 1)}": base + gain - k + random.normal(0, 0.2, N) for k in (1, 2, 5, 10)}
    kinds = {"rate": ("bits per pixel", "neither")}
    power = 1e4 / (1 + np.arange(32.0)) ** 2
    return Evaluation(
        name,
        f"{int(gain):x}" * 64,
        {"class": "AutoencoderKL", "channels": 4, "downscale": 8, "parameters": 1234567, "bytes": 4938268, "dtype": "fp32"},
        {"set": "pictures & more", "n": N, "size_px": [48, 64], "sha256": "0" * 64, "skipped": {EVIL: "<b>broken</b>"}},
        {"name": "latentpipe", "posterior": "mode", "open": []},
        {metric: Score.of(row.tolist(), *kinds.get(metric, ("dB", "higher"))) for metric, row in rows.items()},
        {metric: row.tolist() for metric, row in rows.items()},
        names,
        {
            "spectrum of pictures": power.tolist(),
            "spectrum of reconstructions": (power / 2).tolist(),
            "KL per channel": [2.0, 0.1, 0.0, 3.0],
        },
        {
            "decode": {"ms": 30.0 + gain, "least": 29.0, "most": 40.0, "peak_mb": 12.5},
            "encode": {"ms": 9.0, "least": 8.0, "most": 19.0, "peak_mb": None},
            "size_px": [48, 64],
            "threads": 1,
        },
        {"LPIPS (alex)": "its weights are missing"},
    )


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    """Three VAEs, one with a name that is markup, on files of which one has such a name too."""
    names = [EVIL, *(f"{index:02}.png" for index in range(1, N))]
    return compare([evaluation(name, gain, names) for name, gain in (("emoji", 0), ('a"<b>', 2), ("seed2", 0.1))])


@pytest.fixture(scope="module")
def strips(comparison: Comparison) -> list[Strip]:
    """Crops of the chosen pictures and of the one with the evil name."""
    original = np.asarray(draw_shape("red", "circle", 48))
    rebuilt = [np.clip(original.astype(int) + shift, 0, 255).astype(np.uint8) for shift in (5, -3, 0)]
    chosen = choose(comparison) | {EVIL: "its name"}
    return [strip(name, why, original, rebuilt, comparison.labels, [30, 31, 32]) for name, why in chosen.items()]


@pytest.fixture(scope="module")
def html(comparison: Comparison, strips: list[Strip]) -> str:
    """The page."""
    return page(comparison, strips, 'latentpipe compare "a<b>" --images x')


def test_the_page_is_html_with_every_element_closed(html: str) -> None:
    reader = Reader(html)
    assert reader.stack == []
    assert html.startswith("<!doctype html>")
    assert [attributes["lang"] for attributes in reader.named("html")] == ["en"]
    assert len(reader.named("h1")) == 1


def test_the_page_asks_for_nothing_outside_itself(html: str) -> None:
    assert set(re.findall(r"https?://[^\s\"'<]*", html)) <= {"http://www.w3.org/2000/svg"}
    assert "@import" not in html
    assert not re.search(r"url\(", html)
    reader = Reader(html)
    assert not {"link", "iframe", "object", "embed", "base", "form", "image", "use"} & {tag for tag, _ in reader.tags}
    for tag, attributes in reader.tags:
        assert not {"srcset", "href", "xlink:href", "action", "background"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes), tag
    policy = next(a["content"] for a in reader.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_every_picture_is_a_png_within_the_page_and_has_words(html: str, strips: list[Strip]) -> None:
    images = Reader(html).named("img")
    assert len(images) == 7 * len(strips)
    for attributes in images:
        start, data = (attributes["src"] or "").split(",")
        assert start == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.format == "PNG"
            assert (int(attributes["width"] or 0) / picture.width) % 1 == 0
        assert attributes["alt"]
    for attributes in Reader(html).named("svg"):
        assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"


def test_a_name_that_is_markup_is_shown_and_does_nothing(html: str) -> None:
    reader = Reader(html)
    assert [attributes.get("type") for attributes in reader.named("script")] == ["application/json"]
    assert "alert" not in [name for _, attributes in reader.tags for name in attributes]
    assert EVIL in "".join(reader.text)
    assert 'a"<b>' in "".join(reader.text)
    assert "<b>broken" not in html
    assert "<script>alert" not in html


def test_the_json_in_the_page_is_the_comparison(html: str, comparison: Comparison) -> None:
    (text,) = Reader(html).scripts
    assert json.loads(text) == comparison.as_dict()
    assert json.loads(text)["evaluations"][1]["per_picture"]["PSNR"] == comparison.evaluations[1].per_picture["PSNR"]


def test_the_best_is_bold_only_where_it_is_the_winner(comparison: Comparison) -> None:
    won = [metric for metric, outcome in comparison.outcomes.items() if outcome.winner]
    assert won
    assert page(comparison, [], "x").count('class="n win"') == len(won)
    tie = compare([comparison.evaluations[0], comparison.evaluations[0]])
    assert 'class="n win"' not in page(tie, [], "x")
    assert "are the same weights" in page(tie, [], "x")


def test_every_cell_of_a_table_has_a_heading(html: str) -> None:
    heads = Reader(html).named("th")
    assert heads
    assert {attributes.get("scope") for attributes in heads} == {"col", "row", "rowgroup"}


def test_what_was_not_measured_leaves_its_chart_out(comparison: Comparison) -> None:
    bare = [
        replace(one, curves={}, cost={}, scores={"PSNR": one.scores["PSNR"]}, about={}, not_measured={})
        for one in comparison.evaluations
    ]
    text = page(compare(bare), [], "x")
    assert "Radial spectra" not in text
    assert "KL per channel" not in text
    assert "time to decode" not in text
    assert Reader(text).stack == []


def test_the_page_appears_whole_or_not_at_all(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    path.mkdir(parents=True)
    with pytest.raises(OSError, match=r"report\.html"):
        write_report(path, comparison, [], "x")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    path.rmdir()
    write_report(path, comparison, [], "a name that is no text: \udc80")
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_the_shown_error_is_four_times_the_difference() -> None:
    original = np.full((10, 12, 3), 100, np.uint8)
    found = strip("x.png", "why", original, [original + 7, original - 90], ["a", "b"], [31.2, 9.0])
    values = [np.asarray(Image.open(io.BytesIO(tile.png))) for tile in found.errors]
    assert (values[0] == 28).all()
    assert (values[1] == 255).all()
    assert (np.asarray(Image.open(io.BytesIO(found.rebuilt[0].png))) == 107).all()
    assert found.size == (96, 80)  # 12 x 10, eightfold
    assert found.captions[0] == "a: 31.20 dB"


def test_a_large_picture_is_cropped_to_where_the_errors_are() -> None:
    original = np.zeros((600, 500, 3), np.uint8)
    rebuilt = original.copy()
    rebuilt[400:420, 300:320] = 50
    found = strip("x.png", "why", original, [rebuilt], ["a"], [30])
    shown = np.asarray(Image.open(io.BytesIO(found.rebuilt[0].png)))
    assert shown.shape == (SIDE, SIDE, 3)
    assert shown.sum() == rebuilt.sum()


def test_best_median_and_worst_are_chosen_by_mean_psnr(comparison: Comparison) -> None:
    mean = np.mean([one.per_picture["PSNR"] for one in comparison.evaluations], 0)
    names = comparison.evaluations[0].names
    found = choose(comparison)
    assert found[names[int(mean.argmax())]].startswith("best")
    assert found[names[int(mean.argmin())]].startswith("worst")
    middle = next(name for name, why in found.items() if why.startswith("median"))
    assert sorted(mean)[N // 2 - 1] <= mean[names.index(middle)] <= sorted(mean)[N // 2]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert 1 <= len(found) <= 6
    tolerance = 1e-6 * (span + abs(low))
    assert all(low - tolerance <= mark <= low + span + tolerance for mark in found)
    steps = np.diff(found)
    if len(steps) and span > 1e-6 * abs(low):
        digit = steps[0] / 10 ** np.floor(np.log10(steps[0]) + 1e-9)
        assert min(abs(digit - whole) for whole in (1, 2, 5, 10)) < 1e-3
        assert steps == pytest.approx(steps[0])


@given(st.floats(1e-9, 1e6), st.floats(1.05, 1e9))
def test_logarithmic_ticks_are_few_and_inside(low: float, factor: float) -> None:
    found = log_ticks(low, low * factor)
    assert 1 <= len(found) <= 6
    assert all(low * (1 - 1e-6) <= mark <= low * factor * (1 + 1e-6) for mark in found)
    assert found == sorted(found)


def texts(svg: str) -> list[str]:
    """The text of a chart, which must be well-formed XML."""
    return ["".join(node.itertext()) for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_a_chart_leaves_out_what_it_cannot_draw_and_says_so() -> None:
    series = [Series("a", [1, 2, 3, None], [1.0, float("nan"), 3.0, 4.0]), Series("b<", [0, 1, 2, 3], [float("inf"), 1, 2, 3])]
    for chart in (scatter, lines):
        said = texts(chart("t", series, Axis("x"), Axis("y")))
        assert "3 values left out: cannot be drawn" in said
        assert "b<" in said
    logarithmic = texts(scatter("t", series, Axis("x", log=True), Axis("y")))
    assert "3 values left out: cannot be drawn" in logarithmic  # x 0 has an infinite y as well
    assert "1 value left out: cannot be drawn" in texts(bars("t", [1.0, float("nan")], Axis("x"), Axis("y")))
    rows = [Interval("a", 1, 0.5, 1.5, True), Interval("b", float("nan"), 0, 1, False)]
    assert "1 value left out: cannot be drawn" in texts(forest("t", rows, Axis("x")))
    assert not [text for text in texts(scatter("t", series[:0], Axis("x"), Axis("y"))) if "left out" in text]


def test_a_chart_draws_values_where_they_are() -> None:
    one = Series("a", [0.0, 10.0, 5.0], [0.0, 1.0, 0.5])
    svg = lines("t", [one], Axis("x"), Axis("y"))
    path = next(d for d in re.findall(r'<path d="M([^"]*)" style="fill:none', svg) if "L" in d)
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, spot.split())) for spot in path.split("L"))
    assert x0 < x2 < x1
    assert y1 < y2 < y0
    assert (x2, y2) == pytest.approx(((x0 + x1) / 2, (y0 + y1) / 2), abs=0.1)


def test_every_text_of_a_chart_stays_inside_it() -> None:
    names = [f"a rather long name of a VAE {index}" for index in range(7)]
    series = [Series(name, [1e-4, 1e5], [-123456.0, 0.001], [-2e5, 0], [-1e5, 1]) for name in names]
    for x in (Axis("x"), Axis("x", log=True)):
        root = ET.fromstring(scatter("t", series, x, Axis("a long label of the axis (dB)")))
        width, height = float(root.get("width") or 0), float(root.get("height") or 0)
        for node in root.findall("{http://www.w3.org/2000/svg}text"):
            length = 0.56 * 12 * len("".join(node.itertext()))
            left = (
                float(node.get("x") or 0) - {"start": 0, "middle": length / 2, "end": length}[node.get("text-anchor") or "start"]
            )
            assert left >= 0
            assert left + length <= width
            assert 0 < float(node.get("y") or 0) <= height


def test_the_markers_of_56_series_differ() -> None:
    assert len({marker(index, 0, 0) for index in range(56)}) == 56


@pytest.mark.parametrize("out", ["report.txt", "folder.html"])
def test_a_place_that_is_no_page_is_refused_before_anything_is_measured(out: str, tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match="HTML file"):
        compare_verb(("no such", "vae"), images=tmp_path / "none", out=tmp_path / out)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders: six pictures of 48 pixels; a VAE of random weights and one at 1/4 size."""
    from latentpipe.checkpoints.vae_io import save_vae

    root = tmp_path_factory.mktemp("compare")
    (root / "set").mkdir()
    for index, (colour, shape) in enumerate((c, s) for c in ("red", "green") for s in ("circle", "square", "bar")):
        draw_shape(colour, shape, 48).save(root / "set" / f"{index}-{colour}.png")
    save_vae(tiny_vae(0), root / "first" / "vae", {})
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    save_vae(tiny_vae(1, block_out_channels=(8, 8, 16), **blocks), root / "second", {})
    return root, root / "set"


def test_the_verb_measures_compares_and_writes_the_page(
    three: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, images = three
    out = tmp_path / "report.html"
    compare_verb((str(root / "first" / "vae"), str(root / "second")), images=images, out=out, device="cpu", json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["labels"] == ["first", "second"]
    reader = Reader(out.read_text(encoding="utf-8"))
    assert json.loads(reader.scripts[0]) == said
    assert reader.stack == []
    assert len(reader.named("img")) >= 3 * 5
    charts = {attributes.get("aria-label") for attributes in reader.named("svg")}
    assert {"PSNR against rate", "PSNR against time to decode", "Radial spectra", "PSNR over rounds of coding"} <= charts
    assert {"KL per channel of first", "KL per channel of second", "Paired differences in PSNR"} <= charts
    metrics = {one["metric"] for one in said["differences"]}
    assert {"PSNR", "Frechet distance on emoji-words"} <= metrics
    command = next(text for text in reader.text if text.startswith("latentpipe compare"))
    assert f"--images {images}" in command


@pytest.mark.numeric
def test_the_crops_are_the_reconstructions_that_were_measured(three: tuple[Path, Path]) -> None:
    from latentpipe.evaluate.compare_vaes import compare_with_crops
    from latentpipe.evaluate.protocol import find_protocol
    from latentpipe.utils.images import psnr

    root, images = three
    vaes, protocol = [root / "first" / "vae", root / "second"], find_protocol("latentpipe")
    found, strips = compare_with_crops(vaes, images, protocol, 3, "emoji-words", False, "cpu")
    for one in strips:
        shown = [np.asarray(Image.open(io.BytesIO(tile.png))) for tile in (one.original, *one.rebuilt)]
        place = found.evaluations[0].names.index(one.picture)
        for evaluation_, other in zip(found.evaluations, shown[1:], strict=True):
            import torch

            pair = [torch.from_numpy(np.array(array)).permute(2, 0, 1)[None] for array in (shown[0], other)]
            assert float(psnr(*pair)) == pytest.approx(evaluation_.per_picture["PSNR"][place], abs=1e-3)
