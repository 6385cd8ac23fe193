"""Every family of the table on tiny random parts, diffusers as the oracle; the table in docs/ is made of what passes here."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import family_page
import pytest
import tiny_families
import tiny_hosts
import torch
from made import random_lora
from tiny_families import ROUNDED, UNTRIED, UNTRIED_CLASSES, arguments, drawn, pipeline

from latentpipe import UserError, VAEStage, check_swap, swap_vae
from latentpipe.lora import injection
from latentpipe.pipelines import families, hosting
from latentpipe.pipelines.family_table import FAMILIES, FAMILY_BY_CLASS, TASKS, PipelineFamily
from latentpipe.utils.errors import LatentpipeWarning
from latentpipe.utils.io import content_hash
from latentpipe.vae.probe_images import probe_images

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings("ignore")]

TRIED = [family for family in FAMILIES if family.name not in UNTRIED]
CLASSES = [name for family in TRIED for name in family.classes if name not in UNTRIED_CLASSES]


def test_what_is_not_tried_says_why() -> None:
    assert UNTRIED.keys() <= {family.name for family in FAMILIES}
    assert UNTRIED_CLASSES.keys() <= FAMILY_BY_CLASS.keys()
    assert {family.name for family in TRIED} == set(tiny_families.PARTS)


@pytest.mark.parametrize("name", CLASSES)
def test_pictures_are_those_of_diffusers(name: str) -> None:
    """With the stage in the place of the VAE, and decoded by the stage from the latents: bit for bit."""
    pipe = pipeline(name)
    expected = drawn(pipe, name)
    assert expected.std() > 0.01
    assert torch.equal(drawn(hosting.hosted(pipe), name), expected)
    torch.manual_seed(0)
    ours = (hosting.draw(pipe, **arguments(name)) * 0.5 + 0.5).clamp(0, 1)
    assert torch.equal(ours, expected) if name not in ROUNDED else (ours - expected).abs().max() <= 1e-6


def rescaled(vae: Any, by: float = 1.3) -> Any:
    """The same function on latents that are `by` times as large in raw units, and says so; None where its class cannot."""
    twin = copy.deepcopy(vae)
    before, after = getattr(twin, "quant_conv", None), getattr(twin, "post_quant_conv", None)
    if before is None or after is None or not twin.config.get("scaling_factor") or type(vae).__name__ == "VQModel":
        return None
    c = twin.config.latent_channels
    with torch.no_grad():
        before.weight[:c] *= by
        before.bias[:c] *= by
        if before.out_channels == 2 * c:
            before.bias[c:] += 2 * torch.log(torch.tensor(by))
        after.weight /= by
    factors: dict[str, Any] = {"scaling_factor": twin.config.scaling_factor / by}
    if twin.config.get("latents_mean") is not None:
        factors = {"latents_mean": [by * value for value in twin.config.latents_mean]}
        factors["latents_std"] = [by * value for value in twin.config.latents_std]
    if twin.config.get("shift_factor"):
        factors["shift_factor"] = twin.config.shift_factor * by
    twin.register_to_config(**factors)
    return twin


def other(vae: Any) -> Any:
    """A VAE of the same class and shapes with other weights."""
    twin = copy.deepcopy(vae)
    torch.manual_seed(11)
    with torch.no_grad():
        for value in twin.parameters():
            value.add_(torch.randn(value.shape) * (0.2 + value.std().nan_to_num(0)))
    return twin


@pytest.mark.parametrize("family", TRIED, ids=lambda family: family.name)
def test_the_verdict_of_a_swap(family: PipelineFamily) -> None:
    """Its own VAE, rescaled where its class can be, is the same space; another is refused."""
    pipe, images = pipeline(family.text), probe_images(4, 64)
    own, space = families.autoencoder(pipe), families.own_stage(pipe).space
    same = rescaled(own) or copy.deepcopy(own)
    stage = VAEStage(same, space) if family.raw else VAEStage(same)
    assert (stage.space != space) == (same.config != own.config)
    assert check_swap(pipe, stage, images).outcome == "same space"
    strange = VAEStage(other(own), space)
    assert not check_swap(pipe, strange, images).fits
    with pytest.raises(UserError):
        swap_vae(pipe, strange, images=images)


@pytest.fixture
def adapted() -> Iterator[Any]:
    """Attach a random adapter to every layer of a denoiser, and take it off in the end."""
    models: list[Any] = []

    def attach(pipe: Any) -> Any:
        model = getattr(pipe, families.denoiser(pipe))
        lora = random_lora({"unet": model}, ["unet.all"], scale=0.3)
        injection.attach(model, lora.parts["unet"], "a")
        models.append(model)
        return model

    yield attach
    for model in models:
        injection.detach(model)


@pytest.mark.parametrize("family", TRIED, ids=lambda family: family.name)
def test_lora_attaches_and_detaches(family: PipelineFamily, adapted: Any) -> None:
    """The picture changes, equally with and without the stage, and is back to the byte."""
    name = family.text
    pipe = hosting.hosted(pipeline(name))
    before, weights = drawn(pipe, name), content_hash(getattr(pipe, families.denoiser(pipe)).state_dict())
    model = adapted(pipe)
    with_lora = drawn(pipe, name)
    assert (with_lora - before).abs().max() > 1e-4
    assert torch.equal(drawn(pipeline(name), name), with_lora)
    injection.detach(model)
    assert content_hash(model.state_dict()) == weights
    assert torch.equal(drawn(pipe, name), before)


@pytest.mark.parametrize("name", [name for family in TRIED for task in TASKS if (name := getattr(family, task)) in CLASSES])
def test_saved_with_the_stage_and_opened_by_diffusers(name: str, tmp_path: Path) -> None:
    pipe = pipeline(name)
    hosting.hosted(pipe).save_pretrained(tmp_path)
    absent: dict[str, Any] = {part: None for part, one in pipe.components.items() if one is None}
    if "pag_applied_layers" in inspect.signature(type(pipe)).parameters:  # diffusers does not write them
        absent["pag_applied_layers"] = pipe.pag_applied_layers
    again = tiny_hosts.quiet(getattr(diffusers, name).from_pretrained(tmp_path, **absent))
    assert torch.equal(drawn(again, name), drawn(pipe, name))


def test_the_page_shows_what_is_tried() -> None:
    """Where it does not: python tests/family_page.py."""
    assert family_page.PAGE.read_text() == family_page.page()


def test_an_undeclared_pipeline_is_tried_and_says_so() -> None:
    """Whatever its latents look like on the way; one whose decoding cannot be followed is told."""

    class Newer(diffusers.PixArtSigmaPipeline):
        pass

    pipe = hosting.rebuild(pipeline("PixArtSigmaPipeline"), Newer)
    given = arguments("PixArtSigmaPipeline")
    with pytest.warns(LatentpipeWarning, match=r"Newer is in no family .* decodes raw latents of shape \(1, 4, 4, 4\)"):
        ours = hosting.draw(pipe, **given)
    assert torch.equal((ours * 0.5 + 0.5).clamp(0, 1), drawn(pipeline("PixArtSigmaPipeline"), "PixArtSigmaPipeline"))
    sag = tiny_hosts.quiet(hosting.rebuild(pipeline("StableDiffusionPipeline"), diffusers.StableDiffusionPanoramaPipeline))
    with pytest.warns(LatentpipeWarning, match=r"Panorama.*\(deprecated by diffusers"):
        hosting.draw(sag, **arguments("StableDiffusionPipeline"))

    class Silent(diffusers.PixArtSigmaPipeline):
        def __call__(self, *args: Any, output_type: str = "pt", **options: Any) -> Any:
            return super().__call__(*args, output_type="latent", **options)

    with pytest.raises(UserError, match=r"measurement failed: it gave its VAE nothing to decode; expected one tensor"):
        hosting.draw(hosting.rebuild(pipe, Silent), **given)
