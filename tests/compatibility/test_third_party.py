"""Real third-party VAEs: the documentation's table of verdicts is what the command prints."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from latentpipe import UserError, VAEStage, check_swap, swap_vae
from latentpipe.checkpoints.pipeline_io import load_pipeline
from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import load_vae

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_table_of_verdicts_is_the_measured_one(assets: Path) -> None:
    spec = importlib.util.spec_from_file_location("verdicts", ROOT / "benchmarks" / "verdicts.py")
    assert spec is not None
    assert spec.loader is not None
    verdicts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(verdicts)
    page = (ROOT / "docs" / "concepts" / "verdict.md").read_text()
    rows = verdicts.rows(assets / "weights" / "taesd")
    assert len(rows) == 9
    for name, host, outcome, reason in rows:
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} | {host} |"))
        shown = re.sub(r"[\d.]+ dB", "dB", line)
        assert shown == re.sub(r"[\d.]+ dB", "dB", f"| {name} | {host} | {outcome} | {reason} |")


def test_a_vae_of_another_family_is_refused_beside_the_embedded_model(tmp_path: Path) -> None:
    """The sibling that needs no files: a TAESD-like autoencoder made by code."""
    from diffusers import AutoencoderTiny

    tiny = AutoencoderTiny(
        latent_channels=32,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    tiny.save_pretrained(tmp_path / "tiny")
    pipe = load_pipeline(find_model("emoji"))
    verdict = check_swap(pipe, VAEStage(load_vae(tmp_path / "tiny")))
    assert verdict.outcome == "other shape"
    assert "32-channel latents at 1/8 size; this denoiser takes 8 channels at 1/4" in verdict.reason
    with pytest.raises(UserError, match="other shape"):
        swap_vae(pipe, tmp_path / "tiny")


def test_the_flux2_tiny_vae_works_in_bands_on_a_photograph(assets: Path, tmp_path: Path) -> None:
    import torch

    from latentpipe.checkpoints.convert import convert
    from latentpipe.checkpoints.vae_file import StatedConfig
    from latentpipe.utils.images import open_picture, psnr, to_bytes, to_images

    files = [assets / "weights" / "taesd" / f"taef2_{half}.pth" for half in ("encoder", "decoder")]
    convert(files, tmp_path / "taef2", None, StatedConfig(), None)
    vae = load_vae(tmp_path / "taef2")
    images = to_images(open_picture(assets / "data" / "photos" / "chelsea.png").crop((40, 20, 424, 276)))
    with torch.no_grad():
        whole = VAEStage(vae, tile=None)
        latents = whole.encode(images)
        rebuilt = whole.decode(latents)
        for rows in (17, 64):
            bands = VAEStage(vae, tile=rows)
            assert (bands.encode(images) - latents).abs().max() <= 1e-4
            assert (bands.decode(latents) - rebuilt).abs().max() <= 1e-4
    assert psnr(to_bytes(rebuilt), to_bytes(images)).item() > 28
