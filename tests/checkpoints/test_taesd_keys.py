"""The TAESD family from its authors' files, against their Sequential run by hand."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from helpers import some_images
from parts import f32, taesd, write, write_halves
from safetensors.torch import load_file, save_file
from torch import nn

from latentpipe import UserError, VAEStage
from latentpipe.checkpoints.convert import convert
from latentpipe.checkpoints.tensor_source import VAE_FILE
from latentpipe.checkpoints.vae_file import StatedConfig
from latentpipe.checkpoints.vae_io import load_vae, save_vae, vae_hash
from latentpipe.utils.errors import LatentpipeWarning
from latentpipe.utils.images import open_picture, psnr, to_bytes, to_images

Halves = tuple[nn.Module, nn.Module]


@torch.no_grad()
def check(halves: Halves, vae: Path, downscale: int, side: int = 32) -> None:
    """The folder encodes and decodes exactly as the Sequential does."""
    stage = VAEStage(load_vae(vae))
    images = some_images(2, side)
    latents = stage.encode(images)
    assert torch.equal(latents, halves[0]((images + 1) / 2))
    assert stage.space.downscale == downscale == side // latents.shape[-1]
    assert torch.equal(stage.decode(latents * 3), halves[1](latents * 3) * 2 - 1)


def convert_quietly(sources: list[Path], out: Path, given: StatedConfig | None = None) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LatentpipeWarning)  # random latents have any scale
        return convert(sources, out, given=given)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.slow
def test_a_pair_becomes_a_plain_autoencodertiny(suffix: str, swapped: bool, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    halves = taesd()
    paths = write_halves(halves, tmp_path / "pth", suffix)
    convert_quietly(paths[::-1] if swapped else paths, tmp_path / "vae")
    check(halves, tmp_path / "vae", 4)
    stock = AutoencoderTiny.from_pretrained(tmp_path / "vae").eval()
    images = some_images()
    with torch.no_grad():
        assert torch.equal(stock.encode(images).latents, halves[0]((images + 1) / 2))


def test_a_pool_branch_is_not_dropped(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, AutoencoderTiny

    halves = taesd(channels=4, pool=True)
    digest = convert_quietly(write_halves(halves, tmp_path / "pth"), tmp_path / "vae")
    check(halves, tmp_path / "vae", 4)
    for stock in (AutoencoderTiny, AutoencoderKL):  # by name and shape the rest would fit: a wrong picture, silently
        with pytest.raises(ValueError, match="open it with latentpipe"):
            stock.from_pretrained(tmp_path / "vae")
    assert (
        json.loads((tmp_path / "vae" / "card.json").read_text())["note"]
        == "this VAE has layers that diffusers lacks; open it with latentpipe"
    )
    assert save_vae(load_vae(tmp_path / "vae").half().float(), tmp_path / "again", {}) == vae_hash(tmp_path / "again") != digest


@pytest.mark.parametrize("ending", ["diffusers", "comfy"])
@pytest.mark.slow
def test_one_file_with_both_halves_opens(ending: str, tmp_path: Path) -> None:
    halves = taesd(pool=True)
    pair = convert_quietly(write_halves(halves, tmp_path / "pth"), tmp_path / "vae")
    tensors = load_file(tmp_path / "vae" / VAE_FILE)
    if ending == "comfy":
        tensors = {f"taesd_encoder.{k}": v for k, v in halves[0].state_dict().items()}
        tensors |= {f"taesd_decoder.{k}": v for k, v in halves[1].state_dict().items()}
    path = write(tensors, tmp_path / "one.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LatentpipeWarning)
        assert vae_hash(path) == pair
        check(halves, path, 4)


@pytest.mark.slow
def test_the_deep_variant_has_strides_that_its_decoder_tells(tmp_path: Path) -> None:
    halves = f32()
    paths = write_halves(halves, tmp_path / "pth")
    convert_quietly(paths, tmp_path / "vae")
    check(halves, tmp_path / "vae", 32, 64)
    with pytest.raises(UserError, match="its decoder enlarges 32 times, but downscale 8 was given"):
        convert_quietly(paths, tmp_path / "no", StatedConfig(downscale=8))


@torch.no_grad()
def test_an_encoder_alone_asks_for_its_downscale(tmp_path: Path) -> None:
    halves = f32()
    encoder, decoder = write_halves(halves, tmp_path / "pth", ".safetensors")
    with pytest.raises(UserError, match=r"do not tell the strides.*--downscale N\.$"):
        load_vae(encoder)
    with pytest.raises(UserError, match=r"8 times, or 32 times .* 16 fits neither"):
        load_vae(encoder, downscale=16)
    with pytest.raises(UserError, match="decoder without an encoder; give both"):
        load_vae(decoder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LatentpipeWarning)
        stage = VAEStage(load_vae(encoder, downscale=32))
        convert([encoder], tmp_path / "vae", given=StatedConfig(downscale=32))
    images = some_images(1, 64)
    assert torch.equal(stage.encode(images), halves[0]((images + 1) / 2))
    assert torch.equal(VAEStage(load_vae(tmp_path / "vae")).encode(images), stage.encode(images))
    with pytest.raises(UserError, match="has no decoder"):
        stage.decode(stage.encode(images))


def test_halves_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    first, second = write_halves(taesd(), tmp_path / "a", ".safetensors"), write_halves(taesd(channels=5), tmp_path / "b")
    with pytest.raises(UserError, match="are not the encoder and the decoder"):
        convert([first[0], second[0]], tmp_path / "vae")
    with pytest.raises(UserError, match="encoder makes 4 channels and its decoder takes 5"):
        convert_quietly([first[0], second[1]], tmp_path / "vae")
    broken = load_file(first[0])
    broken["3.conv.0.weight"] = torch.zeros(9, 9, 3, 3)
    with pytest.raises(UserError, match="gives 8 channels and the next takes 9"):
        convert([write(broken, tmp_path / "c.safetensors"), first[1]], tmp_path / "vae")
    assert not (tmp_path / "vae").exists()


@pytest.mark.parametrize(
    "layer", [["conv", 3], ["conv", 3, 8, 1, "yes"], ["import", "os"], [], "relu", ["conv", 10**9, 8, 1, 1], 5]
)
@pytest.mark.slow
def test_a_config_cannot_build_anything_else(layer: object, tmp_path: Path) -> None:
    convert_quietly(write_halves(taesd(pool=True), tmp_path / "pth"), tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    config = json.loads(path.read_text())
    config["encoder_layers"][0] = layer
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="is no layer of a TinyVAE"):
        load_vae(tmp_path / "vae")


def test_latents_of_an_implausible_scale_are_noted(tmp_path: Path) -> None:
    encoder, decoder = taesd()
    state = encoder.state_dict()
    last = str(len(encoder) - 1)
    for name in (f"{last}.weight", f"{last}.bias"):
        state[name] = state[name] * 1000
    encoder.load_state_dict(state)
    with pytest.warns(LatentpipeWarning, match="normalized by training"):
        convert(write_halves((encoder, decoder), tmp_path / "pth"), tmp_path / "vae")


@torch.no_grad()
@pytest.mark.slow
def test_the_real_flux2_pair_rebuilds_photographs(assets: Path, tmp_path: Path) -> None:
    sources = [assets / f"weights/taesd/taef2_{side}.pth" for side in ("encoder", "decoder")]
    convert(sources, tmp_path / "vae")
    stage = VAEStage(load_vae(tmp_path / "vae"))
    assert (stage.space.channels, stage.space.downscale) == (32, 8)
    pictures = [open_picture(assets / "data/photos" / f"{name}.png") for name in ("astronaut", "coffee", "chelsea")]
    crops = [p.crop((p.width // 2 - 96, p.height // 2 - 96, p.width // 2 + 96, p.height // 2 + 96)) for p in pictures]
    images = to_images(crops)
    assert float(psnr(to_bytes(images), to_bytes(stage.decode(stage.encode(images)))).mean()) > 28
    tensors = load_file(tmp_path / "vae" / VAE_FILE)
    assert tensors["encoder.layers.11.pool.0.weight"].dtype == torch.float16
    save_file({name: tensor for name, tensor in tensors.items() if ".pool." not in name}, tmp_path / "vae" / VAE_FILE)
    with pytest.raises(UserError, match=r"missing encoder\.layers\.11\.pool"):
        load_vae(tmp_path / "vae")


@pytest.mark.slow
def test_the_real_sana_encoder_needs_its_downscale(assets: Path, tmp_path: Path) -> None:
    source = assets / "weights/taesd/taesana_encoder.pth"
    with pytest.raises(UserError, match="--downscale N"):
        convert([source], tmp_path / "vae")
    convert([source], tmp_path / "vae", given=StatedConfig(downscale=32))
    stage = VAEStage(load_vae(tmp_path / "vae"))
    with torch.no_grad():
        assert stage.encode(some_images(1, 64)).shape == (1, 32, 2, 2)
