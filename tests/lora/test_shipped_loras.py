"""The adapters that ship: small, of this base, whole, credited, and they draw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from latentpipe import LatentPipeline
from latentpipe.checkpoints.pipeline_io import hashes
from latentpipe.checkpoints.registry import available, bundled_weights_dir, find_model
from latentpipe.lora.state_dict.io import read_lora, stated_base

FILES = sorted((bundled_weights_dir() / "lora").glob("*.safetensors"))
README = (bundled_weights_dir() / "lora" / "README.md").read_text()


@pytest.fixture(scope="module")
def emoji() -> LatentPipeline:
    """The embedded model."""
    return LatentPipeline.from_pretrained("emoji")


def test_they_are_listed_by_name() -> None:
    assert {path.stem for path in FILES} == {"flat", "pencil", "sharp", "solid"} == set(available("lora"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_is_small_whole_and_of_this_base(path: Path, emoji: LatentPipeline) -> None:
    assert path.stat().st_size <= 2_000_000
    lora = read_lora(path)
    found = hashes(find_model("emoji"))
    assert stated_base(lora)
    assert all(found[component] == digest for component, digest in stated_base(lora).items())
    assert json.loads(lora.metadata["latentpipe.training"])
    report = emoji.attach_lora(path)
    emoji.detach_lora()
    assert report.base_checked
    assert not report.left_out
    assert all(part.matched == part.layers and part.output_delta for part in report.parts.values())
    assert set(report.parts) == ({"vae"} if path.stem == "sharp" else {"unet"})
    assert f"`{path.stem}`" in README
    assert lora.hash[:16] in README


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_each_draws_another_picture(name: str, emoji: LatentPipeline) -> None:
    plain = np.asarray(emoji("red apple", seed=7, num_inference_steps=4)[0].image, np.int16)
    drawn = emoji(f"red apple <lora:{name}:1>", seed=7, num_inference_steps=4)[0]
    assert drawn.recipe.loras == {name: 1.0}
    assert np.abs(np.asarray(drawn.image, np.int16) - plain).max() > 8
    again = np.asarray(emoji("red apple", seed=7, num_inference_steps=4)[0].image, np.int16)
    assert np.array_equal(again, plain)


def test_the_licences_are_named() -> None:
    for words in ("CC BY 4.0", "Twitter", "MIT", "Microsoft", "SIL Open Font License"):
        assert words in README


def test_the_figures_are_the_measured_ones() -> None:
    """The tables are copied from what benchmarks/lora.py wrote."""
    folder = Path(__file__).parents[2] / "benchmarks" / "lora"
    measured = {
        name: json.loads((folder / f"{name}.json").read_text()) for name in ("styles", "ranks", "merges", "sharp", "speed")
    }
    shares = [row["nearer"] for row in (*measured["styles"].values(), *measured["ranks"].values(), *measured["merges"].values())]
    shares += [row["content"]["top5"] for row in measured["styles"].values()]
    assert all(f"{100 * share:.1f} %" in README for share in shares)
    assert f"+{measured['sharp']['gain']:.2f} dB" in README
    assert f"unfused {measured['speed']['unfused / base']:.2f} x" in README
