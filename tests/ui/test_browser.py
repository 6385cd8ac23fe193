"""What a person does, in a real headless Chromium."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from served import opened

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
AXE = ROOT / ".venv" / "axe.min.js"
TABS = ("Generate", "VAE lab", "Playground", "Grid", "PNG info")


def draw(page: Any, prompt: str = "red apple", seed: int = 7) -> None:
    """Fill the form and press Generate; returns when the picture is there."""
    page.fill("#lp-prompt textarea", prompt)
    unfold(page, "lp-advanced", "Advanced")
    page.get_by_label("Seed", exact=True).first.fill(str(seed))
    page.get_by_label("Seed", exact=True).first.blur()
    again(page)


def again(page: Any) -> None:
    """Press Generate, and wait for another picture than the one that is shown."""
    images = page.locator("#lp-gallery img")
    old = images.first.get_attribute("src") if images.count() else ""
    page.click("#lp-generate")
    page.wait_for_function("old => { const i = document.querySelector('#lp-gallery img'); return i && i.src !== old }", arg=old)
    drawn(page)


def drawn(page: Any) -> None:
    """Wait for the end of a drawing."""
    page.wait_for_function("/picture|Stopped after/.test(document.querySelector('#lp-status').innerText)")
    page.wait_for_selector("#lp-gallery img")


def unfold(page: Any, name: str, title: str) -> None:
    """Open a folded part."""
    button = page.locator(f"#{name} > button.label-wrap, #{name} button.label-wrap").first
    assert title in button.inner_text()
    if "open" not in (button.get_attribute("class") or "").split():
        button.click()
        time.sleep(0.5)  # fields that are made now take their first value, which would replace one that is typed too soon


def choose(page: Any, name: str, option: str) -> None:
    """Choose in a drop-down field."""
    page.locator(f"#{name} input").first.click()
    page.get_by_role("option", name=option, exact=True).first.click()


def shown(page: Any) -> Image.Image:
    """The first picture of the gallery, fetched as the browser does."""
    source = page.locator("#lp-gallery img").first.get_attribute("src")
    # a kept connection may be closed by the server just as it is asked again: a browser asks once more, and so does this
    return Image.open(io.BytesIO(page.request.get(source, max_retries=3).body()))


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.convert("RGB").tobytes() == second.convert("RGB").tobytes()


def test_a_prompt_gives_a_picture_with_its_recipe(page: Any, ui_home: Path) -> None:
    draw(page)
    picture = shown(page)
    assert picture.format == "PNG"
    assert '"prompt":"red apple"' in picture.info["latentpipe"]
    assert "seed 7" in page.inner_text("#lp-status")
    assert page.locator("#lp-gallery img").first.get_attribute("alt")
    kept = sorted((ui_home / "kept").rglob("red-apple-7*.png"))
    assert kept
    assert same(Image.open(kept[0]), picture)
    with page.expect_download() as download:
        page.click("#lp-download")
    assert same(Image.open(download.value.path()), picture)


def test_the_keys_draw_and_stop_keeps_the_unfinished_picture(page: Any) -> None:
    unfold(page, "lp-advanced", "Advanced")
    page.get_by_label("number input for Steps").first.fill("100")
    page.get_by_label("number input for Pictures").first.fill("8")
    page.fill("#lp-prompt textarea", "red apple")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#lp-status progress")
    preview = page.wait_for_selector("#lp-status img")
    assert "Preview" in preview.get_attribute("alt")
    page.keyboard.press("Escape")
    drawn(page)
    assert "Stopped after" in page.inner_text("#lp-status")
    assert '"stopped_after":' in shown(page).info["latentpipe"]
    assert page.locator("#lp-gallery img").count() >= 8


def test_what_a_button_has_to_say_is_seen(page: Any, tmp_path: Path) -> None:
    page.click("#lp-stop-generate")
    page.get_by_text("Nothing is running.").first.wait_for()
    page.click("#lp-to-img2img")
    page.get_by_text("There is no picture yet").first.wait_for()
    (tmp_path / "no-picture.png").write_text("words")
    open_tab(page, "PNG info")
    page.set_input_files("#lp-info-image input[type=file]", str(tmp_path / "no-picture.png"))
    page.wait_for_selector("#lp-facts .lp-red")
    assert "no-picture.png cannot be read as a picture" in page.inner_text("#lp-facts")
    assert "/" not in page.inner_text("#lp-facts")


def test_a_vae_gets_its_light_before_anything_is_drawn(page: Any) -> None:
    unfold(page, "lp-vae", "Model and VAE")
    choose(page, "lp-vae-choice", "emoji-decoder-ft")
    page.wait_for_selector("#lp-verdict .lp-green")
    page.wait_for_function("document.querySelector('#lp-in-use').innerText.includes('emoji-decoder-ft')")
    assert "emoji-decoder-ft" in page.inner_text("#lp-state")
    draw(page)
    assert '"vae":"emoji-decoder-ft"' in shown(page).info["latentpipe"]
    choose(page, "lp-vae-choice", "odd")
    page.wait_for_selector("#lp-verdict .lp-red")
    assert "4-channel latents at 1/2 size" in page.inner_text("#lp-verdict")
    assert "'odd' does not fit" in page.inner_text("#lp-state")
    page.click("#lp-generate")
    page.wait_for_selector(".toast-body.error")
    assert "4-channel latents" in page.inner_text(".toast-body.error")
    choose(page, "lp-vae-choice", "emoji-eq")
    page.wait_for_selector("#lp-verdict .lp-amber")


def test_the_weight_of_a_lora_changes_the_picture(page: Any) -> None:
    draw(page, "woman firefighter medium dark skin tone")
    plain = shown(page)
    unfold(page, "lp-lora", "LoRA")
    page.get_by_label("LoRA 1 on").check()
    pictures = []
    for weight in ("1", "0.4"):
        page.get_by_label("number input for Weight of LoRA 1").fill(weight)
        page.get_by_label("number input for Weight of LoRA 1").blur()
        again(page)
        pictures.append(shown(page))
    assert not same(plain, pictures[0])
    assert not same(pictures[0], pictures[1])
    assert '"loras":{"flat":0.4}' in pictures[1].info["latentpipe"]


def test_a_picture_is_read_restored_and_drawn_again_pixel_for_pixel(page: Any) -> None:
    draw(page, "thumbs up medium skin tone", 12)
    first = shown(page)
    page.click("#lp-to-replay")
    page.wait_for_function("document.querySelector('#lp-facts')?.innerText.includes('thumbs up medium skin tone')")
    page.click("#lp-replay")
    page.wait_for_selector("#lp-replay-verdict .lp-green")
    assert "Identical" in page.inner_text("#lp-replay-verdict")
    assert page.locator("#lp-replayed img").first.get_attribute("alt")
    open_tab(page, "Generate")
    draw(page, "cat face", 3)
    open_tab(page, "PNG info")
    page.click("#lp-restore")
    page.wait_for_selector("#lp-generate", state="visible")
    again(page)
    assert same(shown(page), first)
    assert shown(page).info["latentpipe"] == first.info["latentpipe"]


def test_a_picture_goes_on_to_img2img(page: Any) -> None:
    draw(page)
    first = shown(page)
    page.click("#lp-to-img2img")  # which unfolds the part that it sends to
    page.wait_for_selector("#lp-image img", state="visible")
    page.fill("#lp-prompt textarea", "green apple")
    again(page)
    assert '"source":{"sha256"' in shown(page).info["latentpipe"]
    assert not same(shown(page), first)


def test_vaes_are_compared_in_every_way(page: Any) -> None:
    open_tab(page, "VAE lab")
    page.click("#lp-lab-examples")
    page.wait_for_function("document.querySelector('#lp-lab-files').innerText.includes('example-1')")
    page.click("#lp-lab-run")
    page.wait_for_selector("#lp-lab-numbers table")
    assert "Best: emoji-decoder-ft" in page.inner_text("#lp-lab-status")
    assert page.locator("#lp-lab-numbers tbody tr").count() >= 2
    assert page.locator("#lp-lab-verdicts .lp-light").count() == 2
    alts = page.locator("#lp-lab-pictures img").evaluate_all("all => all.map(each => each.alt)")
    assert len(alts) == 12 * 5
    assert all(alts)
    assert any("difference" in alt for alt in alts)
    page.wait_for_selector("#lp-lab-slider img")
    page.click("#lp-lab-same")
    page.wait_for_function("document.querySelector('#lp-lab-status').innerText.includes('Decoded')")


def test_a_grid_is_drawn_and_is_one_picture_with_its_recipe(page: Any) -> None:
    open_tab(page, "Grid")
    page.fill("#lp-grid-prompt textarea", "red apple")
    page.click("#lp-grid-run")
    page.wait_for_selector("#lp-grid-sheet img")
    with page.expect_download() as download:
        page.click("#lp-grid-download")
    from latentpipe.engine.xy_grid.plot import read_grid

    assert read_grid(Path(download.value.path())) is not None
    assert page.locator("#lp-grid-sheet img").first.get_attribute("alt")


def test_the_playground_answers(page: Any) -> None:
    open_tab(page, "Playground")
    page.get_by_role("button", name="red apple → green apple").click()
    page.wait_for_selector("#lp-play-second img")
    before = ""
    for share in ("0.5", "0.9"):
        page.get_by_label("number input for Mix in the second picture").fill(share)
        page.get_by_label("number input for Mix in the second picture").blur()
        page.wait_for_function(
            "old => { const i = document.querySelector('#lp-play-live img'); return i && i.src !== old }", arg=before
        )
        before = page.locator("#lp-play-live img").first.get_attribute("src")
    assert page.locator("#lp-play-live img").first.get_attribute("alt")


def test_a_reloaded_page_is_ready_again(page: Any) -> None:
    draw(page)
    page.reload()
    page.wait_for_selector("#lp-state .lp-green")
    draw(page, seed=8)
    assert "seed 8" in page.inner_text("#lp-status")


def test_keyboard_alone_is_enough(page: Any) -> None:
    page.locator("#lp-prompt textarea").focus()
    page.keyboard.type("red apple")
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.innerText") == "Generate":
            break
    assert page.evaluate("document.activeElement.innerText") == "Generate"
    page.keyboard.press("Enter")
    drawn(page)
    page.get_by_role("tab", name="Generate").focus()
    for _ in TABS[1:]:
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("[role=tab][aria-selected=true]").inner_text() != "Generate"


@pytest.fixture
def phone(browser: Any, address: str) -> Iterator[Any]:
    """The page at the width of a phone."""
    yield from opened(browser, address, {"width": 390, "height": 844})


def test_a_phone_needs_no_scrolling_sideways(phone: Any) -> None:
    draw(phone)
    for name in tabs_of(phone):
        open_tab(phone, name)
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390, name


def test_on_a_phone_the_picture_fills_the_width_and_is_seen(phone: Any) -> None:
    unfold(phone, "lp-advanced", "Advanced")
    phone.get_by_label("number input for Steps").first.fill("1")
    phone.evaluate("scrollTo(0, 0)")
    phone.fill("#lp-prompt textarea", "red apple")
    again(phone)
    time.sleep(1)
    box = phone.locator("#lp-gallery img").first.bounding_box()
    assert box["width"] > 0.75 * 390
    assert 0 <= box["y"] < 844 / 2
    caption = phone.locator("#lp-gallery .caption-label").first.bounding_box()
    assert caption["y"] >= box["y"] + box["height"] - 1
    run, stop = (phone.locator(f"#{name}").bounding_box() for name in ("lp-generate", "lp-stop-generate"))
    assert stop["width"] < 0.6 * run["width"]
    for name in TABS:
        assert phone.get_by_role("tab", name=name, exact=True).first.is_visible(), name


def test_of_two_pictures_the_chosen_one_is_larger_and_captions_are_read_to_their_end(phone: Any) -> None:
    unfold(phone, "lp-advanced", "Advanced")
    phone.get_by_label("number input for Pictures").fill("2")
    phone.get_by_label("number input for Pictures").blur()
    draw(phone)
    caption = phone.locator("#lp-gallery .caption-label").nth(1)
    assert caption.evaluate("each => each.scrollWidth <= each.clientWidth && each.scrollHeight <= each.clientHeight")
    thumbnail = phone.locator("#lp-gallery img").first
    before = thumbnail.bounding_box()["width"]
    thumbnail.click()
    chosen = phone.wait_for_selector("#lp-gallery .preview img[data-testid=detailed-image]")
    assert min(chosen.bounding_box()[side] for side in ("width", "height")) > before


def test_why_nothing_was_drawn_stays(page: Any) -> None:
    page.fill("#lp-prompt textarea", "red apple <lora:nope:1>")
    page.click("#lp-generate")
    page.wait_for_function("document.querySelector('#lp-status').innerText.includes(\"No LoRA 'nope' is installed\")")


def test_what_is_too_large_or_no_picture_is_refused_as_soon_as_it_is_dropped(phone: Any, tmp_path: Path) -> None:
    Image.new("1", (5000, 5000)).save(tmp_path / "my large.png")
    unfold(phone, "lp-img2img", "Begin from a picture (img2img)")
    phone.set_input_files("#lp-image input[type=file]", str(tmp_path / "my large.png"))
    toast = phone.wait_for_selector(".toast-body")
    assert "5000 x 5000 pixels" in toast.inner_text()
    assert "/" not in toast.inner_text()
    assert toast.bounding_box()["height"] < 844 / 3
    phone.wait_for_selector("#lp-image img", state="detached")


def tabs_of(page: Any) -> list[str]:
    """The tabs there are."""
    return [name for name in TABS if page.get_by_role("tab", name=name, exact=True).count()]


def open_tab(page: Any, name: str) -> None:
    """Click a tab; on a narrow page it may stand in the menu of those that do not fit."""
    tab = page.get_by_role("tab", name=name, exact=True).first
    if not tab.is_visible():
        page.locator(".overflow-menu button").first.click()
        tab = page.locator(".overflow-dropdown").get_by_text(name, exact=True)
    tab.click()
    time.sleep(0.3)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_serious_accessibility_violation(browser: Any, address: str, theme: str) -> None:
    if not AXE.is_file():
        pytest.skip("make .venv/axe.min.js (axe-core from npm) to check accessibility")
    for page in opened(browser, f"{address}/?__theme={theme}", {"width": 1280, "height": 900}):
        draw(page)
        found = {}
        for name in tabs_of(page):
            open_tab(page, name)
            page.evaluate(AXE.read_text())
            result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
            for violation in result["violations"]:
                if violation["impact"] in ("serious", "critical"):
                    found[name, violation["id"]] = [node["html"][:160] for node in violation["nodes"][:4]]
        assert found == {}, "\n".join(f"{key}: {nodes}" for key, nodes in found.items())
