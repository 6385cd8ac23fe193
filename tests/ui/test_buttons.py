"""Every button of the page answers a click: with nothing given, with what is wrong, with what is right.

The page itself is asked which buttons there are, so that a new one without an answer fails here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_browser import TABS, choose, open_tab

pytestmark = pytest.mark.slow

STRICT_S, LIMIT_S = 1.0, 15.0  # what a person waits gladly; what a machine that does other things too may take
PARTS = {"Playground": ("Edit live", "Traverse", "Interpolate")}
WATCH = """() => {
  const shown = (each) => each.offsetParent !== null;
  window.lpFolds = () => [...document.querySelectorAll('button.label-wrap:not(.open)')].filter(shown);
  window.lpButtons = () => {
    const count = {};
    const kinds = 'button.lg, button.md, button.sm, button.gallery-item';
    return [...document.querySelectorAll(kinds)].filter(each => shown(each) && !each.disabled).map(each => {
      const name = each.id || each.innerText.trim();
      count[name] = (count[name] || 0) + 1;
      return [each, count[name] > 1 ? `${name} ${count[name]}` : name];
    });
  };
  // all that a person sees of the page, as one text
  const seen = () => {
    const fields = [...document.querySelectorAll('input, textarea')].map(each => `${each.checked} ${each.value}`);
    const marks = [...document.querySelectorAll('button, img, progress')].map(
      each => [each.ariaSelected, each.disabled, each.classList.contains('open'), `${each.src}`.slice(-40), each.value].join());
    return [document.body.innerText, ...fields, ...marks].join('|');
  };
  const pause = (ms) => new Promise(done => setTimeout(done, ms));
  window.lpPress = async ([name, limit]) => {
    for (const toast of document.querySelectorAll('.toast-close')) toast.click();
    let now = seen(), old = now, begun = performance.now(), since = begun;
    while (performance.now() - since < 300 && performance.now() - begun < 60000) {
      await pause(50);
      now = seen();
      if (now !== old) { old = now; since = performance.now(); }
    }
    const button = name === '' ? lpFolds()[0] : lpButtons().find(each => each[1] === name)[0];
    const start = performance.now();
    button.click();
    while (performance.now() - start < 1000 * limit) {
      await pause(15);
      if (seen() !== old) return (performance.now() - start) / 1000;
    }
    return null;
  };
}"""
AT_REST = """() => [...document.querySelectorAll('.lp-said')].every(
  each => !each.querySelector('progress') && !/\\.\\.\\.$|before you\\.$/.test(each.innerText.trim()))"""
STOP = "() => { for (const each of document.querySelectorAll('button.lp-stop')) if (each.offsetParent) each.click(); }"

Took = dict[tuple[str, str], float | None]


def press_all(page: Any, tab: str, state: str, only: str = "") -> Took:
    """Press every button of a tab whose name begins with `only`; seconds until the page changed, None where it did not."""
    took: Took = {}
    for part in PARTS.get(tab, ("",)):

        def there(part: str = part) -> None:
            if page.locator("#lp-tabs > .tab-wrapper [role=tab][aria-selected=true]").first.inner_text() != tab:
                open_tab(page, tab)
            if part:
                page.get_by_role("tab", name=part, exact=True).click()

        there()
        while page.evaluate("lpFolds().length"):
            took[f"{tab}, {state}", f"unfold {len(took)}"] = page.evaluate("given => lpPress(given)", ["", LIMIT_S])
        for name in page.evaluate("lpButtons().map(each => each[1])"):
            key = (f"{tab}, {state}", name)
            if key in took or not name.startswith(only):
                continue
            there()
            took[key] = (
                downloaded(page, name)
                if name.endswith("-download")
                else page.evaluate("given => lpPress(given)", [name, LIMIT_S])
            )
            if not page.evaluate(AT_REST):
                page.evaluate(STOP)
                page.wait_for_function(AT_REST)
    return took


def downloaded(page: Any, name: str) -> float:
    """Press a button that gives a file."""
    begin = time.monotonic()
    with page.expect_download(timeout=LIMIT_S * 1000):
        page.click(f"#{name}")
    return time.monotonic() - begin


def judge(took: Took) -> None:
    """Fails for each button without an answer; prints those that were slower than a person likes."""
    slow = {key: round(seconds, 2) for key, seconds in took.items() if seconds is not None and seconds > STRICT_S}
    print(f"{len(took)} presses; over {STRICT_S} s: {slow}")
    assert [key for key, seconds in took.items() if seconds is None] == []


@pytest.fixture
def watched(page: Any) -> Iterator[Any]:
    """The page, with what looks for changes in it."""
    page.evaluate(WATCH)
    return page


def test_every_button_answers_where_nothing_is_given(watched: Any) -> None:
    took: Took = {}
    for tab in TABS:
        took |= press_all(watched, tab, "nothing given")
    assert len(took) >= 45
    judge(took)


def test_every_button_answers_where_something_is_wrong(watched: Any, tmp_path: Path) -> None:
    page, took = watched, {}
    words, plain = tmp_path / "no-picture.png", tmp_path / "plain.png"
    words.write_text("words")
    Image.new("RGB", (16, 16), "red").save(plain)
    unfold_by_name(page, "lp-vae")
    choose(page, "lp-vae-choice", "odd")
    page.wait_for_selector("#lp-verdict .lp-red")
    took |= press_all(page, "Generate", "wrong", "lp-")
    open_tab(page, "VAE lab")
    page.set_input_files("#lp-lab-files input[type=file]", str(words))
    page.get_by_text("no-picture.png cannot be read as a picture").first.wait_for()
    took |= press_all(page, "VAE lab", "wrong", "lp-")
    open_tab(page, "Playground")
    page.set_input_files("#lp-play-first input[type=file]", str(words))
    page.get_by_text("cannot be read as a picture").first.wait_for()
    took |= press_all(page, "Playground", "wrong", "lp-")
    open_tab(page, "Grid")
    page.fill("#lp-grid-x-values textarea, #lp-grid-x-values input", "one, two")
    took |= press_all(page, "Grid", "wrong", "lp-")
    open_tab(page, "PNG info")
    page.set_input_files("#lp-info-image input[type=file]", str(plain))
    page.wait_for_selector("#lp-facts .lp-red")
    took |= press_all(page, "PNG info", "wrong", "lp-")
    judge(took)


def test_every_button_answers_where_all_is_right(watched: Any, tmp_path: Path) -> None:
    page, took = watched, {}
    page.fill("#lp-prompt textarea", "red apple")
    unfold_by_name(page, "lp-advanced")
    page.get_by_label("number input for Steps").first.fill("1")
    page.get_by_label("number input for Steps").first.blur()
    page.click("#lp-generate")
    page.wait_for_selector("#lp-gallery img")
    with page.expect_download() as download:
        page.click("#lp-download")
    picture = tmp_path / "apple.png"
    download.value.save_as(picture)
    took |= press_all(page, "Generate", "right", "lp-")
    open_tab(page, "VAE lab")
    page.wait_for_selector("#lp-lab-files >> text=red-apple")
    took |= press_all(page, "VAE lab", "right", "lp-")
    open_tab(page, "Playground")
    page.get_by_role("button", name="red apple → green apple").click()
    page.wait_for_selector("#lp-play-second img")
    took |= press_all(page, "Playground", "right", "lp-")
    took |= press_all(page, "Grid", "right", "lp-")
    open_tab(page, "PNG info")
    page.set_input_files("#lp-info-image input[type=file]", str(picture))
    page.wait_for_selector("#lp-facts table")
    took |= press_all(page, "PNG info", "right", "lp-")
    judge(took)


def unfold_by_name(page: Any, name: str) -> None:
    """Open one folded part."""
    page.locator(f"#{name} button.label-wrap").first.click()
    time.sleep(0.5)
