"""The VAEs that ship beside the embedded model: small, what their cards say, and fitting as their verdicts say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from latentpipe import check_swap
from latentpipe.checkpoints.pipeline_io import load_pipeline
from latentpipe.checkpoints.registry import available, bundled_weights_dir, find_model
from latentpipe.checkpoints.vae_io import load_vae, vae_hash
from latentpipe.data.emoji_bank import COLUMNS, SHEET, SIDE
from latentpipe.explore.codec.codec import compress, decompress, open_codec
from latentpipe.utils.images import psnr, to_bytes, to_images, to_pixels
from latentpipe.vae.stage import VAEStage

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NAMES = ("emoji-decoder-ft", "emoji-eq", "emoji-tiny", "emoji-vector")
CODECS = ("emoji-codec-small", "emoji-codec", "emoji-codec-large")
RESULTS = json.loads((bundled_weights_dir() / "vae" / "results.json").read_text())["vaes"]


def stage(name: str) -> VAEStage:
    """A shipped VAE."""
    return VAEStage(load_vae(find_model(name, "vae")))


def emoji(n: int = 24) -> torch.Tensor:
    """Pictures of the emoji bank, 64 x 64."""
    with Image.open(SHEET) as sheet:
        places = [(index * 37 % 3000) for index in range(n)]
        boxes = [(place % COLUMNS * SIDE, place // COLUMNS * SIDE) for place in places]
        tiles = [
            sheet.convert("RGB").crop((x, y, x + SIDE, y + SIDE)).resize((64, 64), Image.Resampling.BICUBIC) for x, y in boxes
        ]
    return to_images(tiles)


def test_they_are_listed_as_built_in() -> None:
    found = {name for name, path in available("vae").items() if path.is_relative_to(bundled_weights_dir())}
    assert found == {"emoji", *NAMES, *CODECS}


@pytest.mark.parametrize("name", NAMES)
def test_each_is_small_and_what_its_card_says(name: str) -> None:
    folder = find_model(name, "vae")
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 10e6
    card = json.loads((folder / "card.json").read_text())
    assert card["content_hash"] == vae_hash(folder) == RESULTS[name]["hash"]
    assert (ROOT / "configs" / f"{name}.yaml").is_file()
    assert card["validation"]["n"] == 150
    near = 0.1 if name == "emoji-vector" else 0.02  # its own run read the pictures at 72 px
    assert card["validation"]["psnr_db"] == pytest.approx(RESULTS[name]["psnr_db"][0], abs=near)


@pytest.mark.parametrize("name", CODECS)
def test_each_codec_is_small_and_what_its_card_says(name: str) -> None:
    folder = find_model(name, "vae")
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 3.3e6
    card = json.loads((folder / "card.json").read_text())
    assert card["content_hash"] == vae_hash(folder)
    codec = open_codec(name)
    assert codec.weights is not None
    picture = to_pixels(emoji(1))[0]
    data = compress(picture, codec)
    back = decompress(data)  # found by its identity
    assert len(data) < 700
    assert psnr(to_bytes(to_images(picture)), to_bytes(to_images(back))).item() > 18


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.numeric
def test_each_opens_with_stock_diffusers(name: str) -> None:
    import diffusers

    folder = find_model(name, "vae")
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    theirs = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=torch.float32).eval()
    images, ours = emoji(2), stage(name)
    with torch.no_grad():
        encoded = theirs.encode(images)
        raw = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        assert torch.equal(theirs.decode(raw).sample, ours.decode(ours.encode(images)))


@pytest.mark.parametrize(("name", "outcome"), [("emoji-decoder-ft", "same space"), ("emoji-tiny", "same space"),
                                               ("emoji-eq", "same shape, other space"),
                                               ("emoji-vector", "other shape")])  # fmt: skip
def test_each_fits_or_not_as_its_verdict_says(name: str, outcome: str) -> None:
    verdict: Any = check_swap(load_pipeline(find_model("emoji")), name, emoji())
    assert verdict.outcome == outcome, str(verdict)


@torch.no_grad()
@pytest.mark.numeric
def test_the_decoders_are_as_good_as_was_measured() -> None:
    """On other renderings than those of the table, so only the order is asserted."""
    images, own = emoji(), stage("emoji")
    latents, truth = own.encode(images), to_bytes(images)
    first, tuned, tiny = (
        psnr(to_bytes(one.decode(latents)), truth).mean() for one in (own, *map(stage, ("emoji-decoder-ft", "emoji-tiny")))
    )
    assert tuned > first
    assert tiny > first - 3
    assert torch.equal(stage("emoji-decoder-ft").encode(images), latents)


def test_the_floors_hold_in_the_measured_figures() -> None:
    tuned, tiny, turned = (RESULTS[name] for name in (*NAMES[:1], "emoji-tiny", "emoji-eq"))
    assert tuned["psnr_minus_emoji"][1] > 0.5  # the interval's lower end
    assert tiny["decodes_emoji_minus_emoji"][0] >= -1.5
    assert tiny["decode_speed"]["16"] >= 4
    assert turned["turned_psnr_db"][1] > RESULTS["emoji"]["turned_psnr_db"][2] + 3


@torch.no_grad()
@pytest.mark.numeric
def test_turned_latents_of_the_equivariant_one_decode_to_turned_pictures() -> None:
    images = emoji()
    scores = {}
    for name in ("emoji", "emoji-eq"):
        one = stage(name)
        rebuilt = one.decode(one.encode(images).rot90(1, (2, 3)))
        scores[name] = psnr(to_bytes(rebuilt), to_bytes(images.rot90(1, (2, 3)))).mean().item()
    assert scores["emoji-eq"] > scores["emoji"] + 3
