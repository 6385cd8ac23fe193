"""train-lora on the transformers of SD3, FLUX.1, Sana and PixArt: loss and gradient of diffusers' scripts, and a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_families
import tiny_hosts
import torch
from helpers import write_pictures
from transformers import T5Config, T5EncoderModel

from latentpipe import LatentPipeline
from latentpipe.checkpoints.pipeline_io import hashes
from latentpipe.lora.injection import inject
from latentpipe.lora.target_modules import select
from latentpipe.train.config import LoraLoss, TrainLora
from latentpipe.train.lora.flow import FlowSchedule, TransformerTraining, flow_noised
from latentpipe.train.lora.loss import noised
from latentpipe.train.lora.train import train_lora

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings("ignore")]
NAMES = ("sd3", "flux", "sana", "pixart")
PROMPTS = ["abc", "de"]


def complete(name: str) -> Any:
    """A pipeline with text encoders."""
    if name != "pixart":
        return tiny_hosts.complete(name)
    torch.manual_seed(2)
    t5 = T5EncoderModel(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).eval()
    return tiny_hosts.quiet(
        diffusers.PixArtSigmaPipeline(**tiny_families.pixart(), text_encoder=t5, tokenizer=tiny_hosts.words())
    )


@pytest.fixture(scope="module", params=NAMES)
def host(request: pytest.FixtureRequest) -> Any:
    return complete(request.param)


def gradients(host: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    """Of the adapter's parameters."""
    parameters = [value for value in host.transformer.parameters() if value.requires_grad]
    return list(torch.autograd.grad(loss, parameters))


def plain_loss(host: Any, latents: torch.Tensor, noise: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """One step of diffusers' training script of this family, written out; `at` places in the scheduler's own order."""
    net, n = host.transformer, len(latents)
    with torch.no_grad():
        if isinstance(host, diffusers.StableDiffusion3Pipeline):
            states, _, pooled, _ = host.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
        elif isinstance(host, diffusers.FluxPipeline):
            states, pooled, text_ids = host.encode_prompt(PROMPTS, None)
        else:
            states, mask, *_ = host.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    if isinstance(host, diffusers.PixArtSigmaPipeline):
        noisy = host.scheduler.add_noise(latents, noise, at)
        added = {"resolution": None, "aspect_ratio": None}
        predicted = net(
            noisy, encoder_hidden_states=states, encoder_attention_mask=mask, timestep=at, added_cond_kwargs=added
        ).sample
        return (predicted.chunk(2, dim=1)[0] - noise).square().mean()
    times, sigmas = host.scheduler.timesteps[at], host.scheduler.sigmas[at].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    if isinstance(host, diffusers.StableDiffusion3Pipeline):
        predicted = net(noisy, encoder_hidden_states=states, pooled_projections=pooled, timestep=times).sample
    elif isinstance(host, diffusers.FluxPipeline):
        h, w = noisy.shape[-2:]
        packed = host._pack_latents(noisy, n, 16, h, w)
        ids = host._prepare_latent_image_ids(n, h // 2, w // 2, noisy.device, noisy.dtype)
        given = {"encoder_hidden_states": states, "pooled_projections": pooled, "txt_ids": text_ids, "img_ids": ids}
        predicted = host._unpack_latents(net(packed, timestep=times / 1000, **given).sample, h * 8, w * 8, 8)
    else:
        predicted = net(noisy, encoder_hidden_states=states, encoder_attention_mask=mask, timestep=times).sample
    return (predicted - (noise - latents)).square().mean()


def test_loss_and_gradient_are_those_of_a_plain_loop(host: Any) -> None:
    torch.manual_seed(3)
    paths = select("transformer", host.transformer, ["unet.attention"])
    if not any(
        type(module).__name__.endswith("Wrapper") or hasattr(module, "latentpipe_name") for module in host.transformer.modules()
    ):
        inject(host.transformer, paths, "train", 2, 2.0)
    with torch.no_grad():
        for name, value in host.transformer.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1)
    space = LatentPipeline(host).stage.space
    latents = torch.randn(2, space.channels, 4, 4)
    training, loss = TransformerTraining(host), LoraLoss(caption_dropout=0.0)
    make = flow_noised if isinstance(training.schedule, FlowSchedule) else noised
    batch = make(latents, training.schedule, loss, torch.Generator().manual_seed(7))
    ours = batch.loss(training(batch.noisy, batch.times, PROMPTS))
    noise = batch.target + latents if make is flow_noised else batch.target
    at = batch.times
    if make is flow_noised:
        at = torch.tensor([(host.scheduler.timesteps - time).abs().argmin() for time in batch.times])
    theirs = plain_loss(host, latents, noise, at)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for mine, other in zip(gradients(host, ours), gradients(host, theirs), strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-6)
    assert sum(value.abs().sum() for value in gradients(host, batch.loss(training(batch.noisy, batch.times, PROMPTS)))) > 0


def test_the_path_is_straight() -> None:
    """At the noisy end nothing but noise is left, at the clean end nearly nothing of it."""
    schedule = FlowSchedule.of(diffusers.FlowMatchEulerDiscreteScheduler())
    assert schedule.sigmas[-1] == 1.0
    assert schedule.sigmas[0] <= 0.001
    assert torch.equal(schedule.times, schedule.sigmas * 1000)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_makes_a_file_that_its_model_draws_with(name: str, tmp_path: Path) -> None:
    model, side = tmp_path / "model", 64 if name == "sana" else 32
    complete(name).save_pretrained(model)
    before = hashes(model)
    raw = {
        "model": model,
        "data": {"train": write_pictures(tmp_path / "shapes"), "size_px": side},
        "run": {"out": tmp_path / "a.safetensors", "work": tmp_path / "work", "precision": "fp32", "sample_every_steps": 100},
        "optim": {"steps": 2, "batch_size": 4, "warmup_steps": 1, "learning_rate": 1e-2},
        "adapter": {"rank": 2, "sites": ("unet.attention",)},
    }
    out = train_lora(TrainLora.model_validate(raw))
    assert hashes(model) == before
    pipe = LatentPipeline.from_pretrained(model, device="cpu")
    plain = pipe("abc", seed=1, size=(side, side), num_inference_steps=2)[0]
    pipe.attach_lora(out)
    assert pipe("abc", seed=1, size=(side, side), num_inference_steps=2)[0].image.tobytes() != plain.image.tobytes()
