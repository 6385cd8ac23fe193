"""Every script of examples/ runs as its first line says, with small numbers."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from helpers import draw_shape
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS = {
    "text_to_picture": (["red apple", "drawn"], ["drawn/7.png", "drawn/8.png"]),
    "swap_in_diffusers": (["emoji-decoder-ft", "drawn"], ["drawn/own.png", "drawn/swapped.png"]),
    "compare_two_vaes": (["pictures", "emoji", "emoji-decoder-ft", "report.html"], ["report.html"]),
    "train_vae_on_folder": (["pictures", "3", "vae"], ["vae/vae/diffusion_pytorch_model.safetensors"]),
    "finetune_decoder": (["pictures", "1", "decoder"], ["decoder/apple.png"]),
    "lora_on_three_stages": (["pictures", "1", "lora"], ["lora/apple.png", "lora/words.safetensors"]),
    "edit_in_latents": (["", "edit.png"], ["edit.png"]),
}


def test_every_script_is_listed_and_short() -> None:
    scripts = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() == RUNS.keys() | {"page_client"}  # which tests/ui runs
    table = (EXAMPLES / "README.md").read_text()
    for name, text in scripts.items():
        assert f"`{name}.py" in table
        assert len(text.splitlines()) <= 45, name


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, files = RUNS[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for index, colour in enumerate(("red", "green", "blue", "yellow")):
        draw_shape(colour, "circle", 64).save(f"pictures/{index}.png")
        Path(f"pictures/{index}.txt").write_text(f"{colour} circle")
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*arguments)
    assert capsys.readouterr().out
    for file in files:
        path = tmp_path / file
        assert path.stat().st_size > 1000
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert len(set(picture.convert("L").tobytes())) > 20
