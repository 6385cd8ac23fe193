"""Pictures of every tab of the interface, light, dark and on a phone, into ui/screenshots: python benchmarks/screenshots.py

With a folder (python benchmarks/screenshots.py FOLDER) they go there, together with one after each kind of message.

Needs Debian's chromium and the package playwright. Starts a server of its own.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
OUT = ROOT / "ui" / "screenshots"
LOOKS = {"light": (1280, 900), "dark": (1280, 900), "phone": (390, 844)}


def generate(page: Any) -> None:
    """A picture of the embedded model."""
    page.fill("#lp-prompt textarea", "woman firefighter medium dark skin tone <lora:flat:0.8>")
    page.click("#lp-generate")
    page.wait_for_selector("#lp-gallery img")
    unfold(page, "lp-vae")
    page.locator("#lp-vae-choice input").first.click()
    page.get_by_role("option", name="emoji-decoder-ft", exact=True).first.click()
    page.wait_for_selector("#lp-verdict .lp-green")
    page.wait_for_function("document.querySelector('#lp-in-use').innerText.includes('decoder')")


def lab(page: Any) -> None:
    """Example pictures through two VAEs."""
    page.click("#lp-lab-examples")
    page.wait_for_function("document.querySelector('#lp-lab-files').innerText.includes('example-1')")
    page.click("#lp-lab-run")
    page.wait_for_selector("#lp-lab-slider img")


def playground(page: Any) -> None:
    """Half of one picture, half of another."""
    page.get_by_role("button", name="smiling face → full moon face").click()
    page.wait_for_selector("#lp-play-second img")
    page.get_by_label("number input for Mix in the second picture").fill("0.5")
    page.get_by_label("number input for Mix in the second picture").blur()
    page.wait_for_selector("#lp-play-live img")


def grid(page: Any) -> None:
    """Three seeds by three guidances."""
    page.click("#lp-grid-run")
    page.wait_for_selector("#lp-grid-sheet img")


def info(page: Any) -> None:
    """A picture's settings, and the picture drawn again."""
    page.set_input_files("#lp-info-image input[type=file]", str(drawn()))
    page.wait_for_function("document.querySelector('#lp-facts').innerText.includes('red apple')")
    page.click("#lp-replay")
    page.wait_for_selector("#lp-replay-verdict .lp-green")


def refused_vae(page: Any) -> None:
    """A VAE of another shape is chosen, and drawing with it refused."""
    unfold(page, "lp-vae")
    page.locator("#lp-vae-choice input").first.click()
    page.get_by_role("option", name="emoji-vector", exact=True).first.click()
    page.wait_for_selector("#lp-verdict .lp-red")
    page.click("#lp-generate")
    page.wait_for_selector(".toast-body")


def unknown_word(page: Any) -> None:
    """A word that the model has never seen."""
    page.fill("#lp-prompt textarea", "red aple")
    page.click("#lp-generate")
    page.wait_for_selector("#lp-gallery img")


def sent(page: Any) -> None:
    """A picture sent on to img2img."""
    page.fill("#lp-prompt textarea", "red apple")
    page.click("#lp-generate")
    page.wait_for_selector("#lp-gallery img")
    page.click("#lp-to-img2img")
    page.wait_for_selector("#lp-image img")


def too_large(page: Any) -> None:
    """A picture with too many pixels."""
    path = Path(tempfile.mkdtemp()) / "large.png"
    Image.new("1", (5000, 5000)).save(path)
    unfold(page, "lp-img2img")
    page.set_input_files("#lp-image input[type=file]", str(path))
    page.wait_for_selector(".toast-body")


def no_picture(page: Any) -> None:
    """A file that is no picture."""
    path = Path(tempfile.mkdtemp()) / "words.png"
    path.write_text("words")
    page.set_input_files("#lp-info-image input[type=file]", str(path))
    page.wait_for_selector("#lp-facts .lp-red")


MESSAGES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "message-refused-vae": ("Generate", refused_vae),
    "message-unknown-word": ("Generate", unknown_word),
    "message-sent": ("Generate", sent),
    "message-too-large": ("Generate", too_large),
    "message-no-picture": ("PNG info", no_picture),
    "message-nothing-to-compare": ("VAE lab", lambda page: page.click("#lp-lab-run")),
    "message-nothing-to-move": ("Playground", lambda page: page.click("#lp-play-reset")),
    "message-nothing-runs": ("Grid", lambda page: page.click("#lp-grid-stop")),
}

TABS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "generate": ("Generate", generate),
    "lab": ("VAE lab", lab),
    "playground": ("Playground", playground),
    "grid": ("Grid", grid),
    "info": ("PNG info", info),
}


def drawn() -> Path:
    """A picture with a recipe."""
    from latentpipe import LatentPipeline

    path = Path(tempfile.mkdtemp()) / "apple.png"
    return path if path.exists() else LatentPipeline.from_pretrained(device="cpu")("red apple", seed=7)[0].save(path)


def unfold(page: Any, name: str) -> None:
    """Open a folded part."""
    page.locator(f"#{name} button.label-wrap").first.click()


def main() -> None:
    """Take them all."""
    sys.path[:0] = [str(ROOT / "tests" / "ui"), str(ROOT / "tests")]
    from playwright.sync_api import sync_playwright
    from served import CHROMIUM, FLAGS, opened, start

    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    shots = TABS if out == OUT else {**TABS, **MESSAGES}
    out.mkdir(exist_ok=True)
    process, address = start("--no-save", home=Path(tempfile.mkdtemp()))
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            for look, (width, height) in LOOKS.items():
                for name, (title, act) in shots.items():
                    theme = "dark" if look == "dark" else "light"
                    for page in opened(browser, f"{address}/?__theme={theme}", {"width": width, "height": height}):
                        tab = page.get_by_role("tab", name=title, exact=True).first
                        if not tab.is_visible():
                            page.locator(".overflow-menu button").first.click()
                            tab = page.locator(".overflow-dropdown").get_by_text(title, exact=True)
                        tab.click()
                        act(page)
                        if look == "phone" and name == "generate":
                            page.evaluate("document.querySelector('#lp-status').scrollIntoView()")
                        time.sleep(1.5)
                        save(page.screenshot(full_page=look != "phone" and name != "lab"), out / f"{name}-{look}.png")
                        print(out / f"{name}-{look}.png")
    finally:
        process.terminate()


def save(png: bytes, path: Path) -> None:
    """Write a screenshot with few colours, which a page of text needs."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(200, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
