"""Probe images, and what is measured on them where a file is silent."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import edit_json
from parts import ldm_names, levels_vae, write

from latentpipe import UserError, VAEStage
from latentpipe.checkpoints.convert import convert
from latentpipe.checkpoints.infer_config import space_of
from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import load_vae, open_vae, save_vae, vae_hash
from latentpipe.utils.errors import LatentpipeWarning
from latentpipe.utils.images import open_picture, to_images
from latentpipe.vae.latent_space import PUBLISHED, LatentSpace
from latentpipe.vae.probe_images import probe_images

pytestmark = pytest.mark.slow

# --- probes -------------------------------------------------------------------------------------------------


def test_probes_are_the_same_every_time_and_nested() -> None:
    images = probe_images(9, 32)
    assert images.shape == (9, 3, 32, 32)
    assert images.dtype == torch.float32
    assert torch.equal(images[:4], probe_images(4, 32))
    assert not torch.equal(images, probe_images(9, 32, seed=1))
    assert not any(torch.equal(images[i], images[j]) for i in range(9) for j in range(i))
    for wrong in ({"n": 0}, {"side": 4}):
        with pytest.raises(ValueError, match="Probes are"):
            probe_images(**wrong)


@pytest.mark.parametrize("side", [48, 128])
def test_probes_are_spread_as_photographs_are(side: int) -> None:
    images = probe_images(16, side)
    assert images.min() >= -1
    assert images.max() <= 1
    assert -0.25 < images.mean() < 0.1
    assert 0.4 < images.std() < 0.65
    channels = torch.corrcoef(images.permute(1, 0, 2, 3).flatten(1))
    assert channels.min() > 0.7  # channels mostly agree
    step = (images[..., 1:] - images[..., :-1]).std()
    assert step < 0.5 * images.std()  # neighbours mostly agree
    assert (images.flatten(1).std(1) > 0.1).all()


@torch.no_grad()
def test_probes_have_the_latents_of_photographs(assets: Path, tmp_path: Path) -> None:
    names = ("astronaut", "coffee", "chelsea", "500px_cvo9xd_keong_macan_srgb8", "500px_u76c0g_bliznaca_srgb8")
    pictures = [open_picture(assets / "data/photos" / f"{name}.png") for name in names]
    crops = [p.crop((p.width // 2 - 96, p.height // 2 - 96, p.width // 2 + 96, p.height // 2 + 96)) for p in pictures]
    convert([assets / f"weights/taesd/taef2_{side}.pth" for side in ("encoder", "decoder")], tmp_path / "vae")
    stage = VAEStage(load_vae(tmp_path / "vae"))
    photos, probes = stage.encode(to_images(crops)).std(), stage.encode(probe_images(16)).std()
    assert abs(math.log(probes / photos)) < 0.1


# --- the scaling factor ---------------------------------------------------------------------------------------


def scaled(std: float, mean: float = 0.0, **shape: Any) -> Any:
    """A random f8 VAE whose latents on the probes have this std (and mean) over all components, without a posterior's noise."""
    vae = levels_vae(4, **({"use_quant_conv": False} | shape))
    c = vae.config.latent_channels
    space = LatentSpace(c, 8, (1.0,) * c, (0.0,) * c)
    with torch.no_grad():
        last = vae.encoder.conv_out
        last.bias[:] = 0
        last.weight[c:] = 0
        last.bias[c:] = -60  # log-variance
        latents = VAEStage(vae, space).encode(probe_images(16))
        factor = std / latents.std(correction=0)
        last.weight[:c] *= factor
        last.bias[:c] = mean - latents.mean() * factor
    return vae


def silent_file(vae: Any, path: Path) -> Path:
    return write(ldm_names(vae), path)


@pytest.mark.parametrize(
    ("name", "off"),
    [(name, off) for name in ("Stable Diffusion 1.x and 2.x", "Stable Diffusion XL", "FLUX.1") for off in (0.9, 1.1)],
)
def test_the_published_space_that_fits_is_taken(name: str, off: float, tmp_path: Path) -> None:
    space = PUBLISHED[name]
    path = silent_file(scaled(off / space.scale[0], space.shift[0], latent_channels=space.channels), tmp_path / "a.safetensors")
    with pytest.warns(LatentpipeWarning, match=f"which fits {name}") as notes:
        vae = load_vae(path, norm_groups=4)
    assert "would give std" in str(notes[0].message)
    assert VAEStage(vae).space == space
    with warnings.catch_warnings():  # measured once
        warnings.simplefilter("error")
        assert vae_hash(path, norm_groups=4) == vae_hash(
            path, norm_groups=4, scaling_factor=space.scale[0], shift_factor=space.shift[0]
        )


@pytest.mark.parametrize(
    ("std", "shape"),
    [(1 / math.sqrt(0.18215 * 0.13025), {}), (1.0, {}), (30.0, {}), (1 / 0.18215, {"latent_channels": 8})],
)
def test_where_none_or_several_fit_the_factor_is_asked_for(std: float, shape: dict[str, Any], tmp_path: Path) -> None:
    path = silent_file(scaled(std, **shape), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"--scaling-factor X \[--shift-factor Y\]; 1/std is") as error:
        load_vae(path, norm_groups=4)
    assert "published space of" in str(error.value)
    assert VAEStage(load_vae(path, norm_groups=4, scaling_factor=0.3)).space.scale[0] == 0.3


def test_a_folder_without_a_factor_is_measured_too(tmp_path: Path) -> None:
    save_vae(scaled(1 / 0.13025), tmp_path / "vae", {})
    edit_json(tmp_path / "vae" / "config.json", scaling_factor=None)
    with pytest.warns(LatentpipeWarning, match="Stable Diffusion XL"):
        assert open_vae(tmp_path / "vae").space == PUBLISHED["Stable Diffusion XL"]


def test_an_encoder_that_gives_nothing_is_broken(tmp_path: Path) -> None:
    vae = scaled(1.0)
    with torch.no_grad():
        vae.encoder.conv_out.weight[:] = 0
        vae.encoder.conv_out.bias[:4] = 0
        vae.encoder.conv_out.bias[4:] = -1000
    path = silent_file(vae, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"gives no usable latents|declares no scaling factor"):
        load_vae(path, norm_groups=4)


def test_the_posteriors_own_noise_counts() -> None:
    vae = scaled(1.0)
    with torch.no_grad():
        vae.encoder.conv_out.bias[4:] = 2 * math.log(math.sqrt((1 / 0.18215) ** 2 - 1))
    config = {**vae.config, "_class_name": "AutoencoderKL"}
    with pytest.warns(LatentpipeWarning, match="Stable Diffusion 1"):
        assert space_of(config, vae.state_dict(), Path("a")) == (0.18215, 0.0)


# --- groups of the norms --------------------------------------------------------------------------------------


def test_groups_that_shapes_do_not_tell_are_measured(tmp_path: Path) -> None:
    folder = find_model("emoji", "vae")  # trained, 8 groups; 32 would divide its widths and draw a wrong picture
    vae = load_vae(folder)
    path = write(ldm_names(vae), tmp_path / "a.safetensors")
    with pytest.warns(LatentpipeWarning, match="8 rebuilds the probe images best"):
        found = open_vae(path, scaling_factor=1.0)
    assert found.config["norm_num_groups"] == 8
    assert found.space == VAEStage(vae).space


def test_groups_that_nothing_tells_are_asked_for(tmp_path: Path) -> None:
    path = write(ldm_names(levels_vae(2)), tmp_path / "a.safetensors")  # untrained: no number rebuilds anything
    with pytest.raises(UserError, match=r"none of 1, 2, 4, 8 clearly rebuilds.*--norm-groups N\.$"):
        load_vae(path, scaling_factor=1.0)
    wide = write(ldm_names(levels_vae(1, block_out_channels=(32,), norm_num_groups=32)), tmp_path / "b.safetensors")
    assert open_vae(wide, scaling_factor=1.0).config["norm_num_groups"] == 32  # LDM's constant, as nothing speaks against it
