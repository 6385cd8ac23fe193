"""Guidance distillation: the targets are the base's guided predictions, on its own path and on noised pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_hosts
import torch
from diffusers import DDIMScheduler
from helpers import write_pictures
from test_train_lora import in_halves, log_of, lora_run

from latentpipe import UserError
from latentpipe.checkpoints.pipeline_io import load_pipeline
from latentpipe.lora.injection import attach
from latentpipe.lora.metadata import TRAINING, drawn_with
from latentpipe.lora.state_dict.io import read_lora
from latentpipe.train.lora import distillation
from latentpipe.train.lora import train as verb
from latentpipe.train.lora.loss import NoiseSchedule
from latentpipe.utils.io import content_hash, read_tensors

pytestmark = pytest.mark.numeric
GUIDANCE = 2.5
TURBO: dict[str, Any] = {
    "adapter": {"sites": ("unet.all",), "rank": 4},
    "distillation": {"guidance": GUIDANCE, "steps": 4, "path_share": 0.5},
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve captioned pictures."""
    return write_pictures(tmp_path_factory.mktemp("drawn") / "shapes")


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, list[str], torch.Tensor]]:
    """The batch, the prompts and the place of the paths of every step of a run."""
    seen: list[tuple[Any, list[str], torch.Tensor]] = []
    original = distillation.GuidedTeacher.batch

    def kept(self: Any, *arguments: Any) -> Any:
        place = self.paths.place.clone()
        found = original(self, *arguments)
        seen.append((*found, place))
        return found

    monkeypatch.setattr(distillation.GuidedTeacher, "batch", kept)
    return seen


def guided(host: Any, noisy: torch.Tensor, times: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """What a host predicts under guidance, by its own encoding of prompts."""
    states, without = host.encode_prompt(prompts, host.device, 1, True, negative_prompt=[""] * len(prompts))
    with torch.no_grad():
        asked = host.unet(noisy, times, states).sample
        unasked = host.unet(noisy, times, without).sample
    return unasked + GUIDANCE * (asked - unasked)


def test_targets_are_the_guided_predictions_of_the_base_and_the_path_is_ddims(
    tmp_path: Path, model_folder: Path, drawn: Path, batches: list[Any]
) -> None:
    more: dict[str, Any] = TURBO | {"optim": {"steps": 6, "batch_size": 8, "learning_rate": 1e-2}}
    verb.train_lora(lora_run(tmp_path, model_folder, drawn, **more))
    host = load_pipeline(model_folder)
    ddim = DDIMScheduler.from_config(host.scheduler.config, clip_sample=False, timestep_spacing="trailing")
    ddim.set_timesteps(4)
    times = distillation.step_times(host.scheduler, 4)
    assert times.tolist() == ddim.timesteps.tolist() == [999, 749, 499, 249]
    assert batches[0][2].tolist() == [0, 1, 2, 3]
    for step, (batch, prompts, place) in enumerate(batches):
        assert len(batch.noisy) == len(prompts) == 8
        assert batch.times[:4].tolist() == times[place].tolist()
        # the adapter has been trained for `step` steps, and the targets know nothing of it
        assert torch.allclose(batch.target, guided(host, batch.noisy, batch.times, prompts), atol=2e-5), step
        if step + 1 == len(batches):
            break
        following, names, after = batches[step + 1]
        for row in range(4):
            if place[row] == 3:
                assert after[row] == 0  # at its end it begins anew, from noise
                continue
            moved = ddim.step(batch.target[row : row + 1], int(times[place[row]]), batch.noisy[row : row + 1]).prev_sample
            assert torch.allclose(following.noisy[row : row + 1], moved, atol=2e-4)
            assert names[row] == prompts[row]
    begun = torch.cat([batch.noisy[:4][place == 0] for batch, _, place in batches[1:]])
    assert abs(begun.std().item() - 1) < 0.15
    assert len(log_of(tmp_path, "v")) == 6


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_split_takes_apart_what_mixed_puts_together(prediction: Any) -> None:
    schedule = NoiseSchedule(torch.linspace(0.999, 0.01, 100), prediction)
    clean, noise, times = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5), torch.tensor([3, 50, 99])
    noisy = distillation.mixed(schedule, clean, noise, times)
    a = schedule.alphas[times].view(-1, 1, 1, 1)
    predicted = noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * clean
    for found, true in zip(distillation.split(schedule, noisy, predicted, times), (clean, noise), strict=True):
        assert torch.allclose(found, true, atol=1e-4)


def test_the_adapter_comes_nearer_to_the_guided_base(tmp_path: Path, model_folder: Path, drawn: Path) -> None:
    optim = {"steps": 120, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 5, "weight_decay": 0.0, "ema_decay": 0.9}
    sharper = {"distillation": {"guidance": 8.0, "steps": 4}, "loss": {"caption_dropout": 0.0}, "adapter": TURBO["adapter"]}
    out = verb.train_lora(lora_run(tmp_path, model_folder, drawn, optim=optim, **sharper))
    host = load_pipeline(model_folder)
    prompts = ["red circle", "blue square"] * 8
    noisy, times = torch.randn(16, *read_shape(host)), torch.arange(16) * 60 + 50
    states, without = host.encode_prompt(prompts, host.device, 1, True, negative_prompt=[""] * 16)
    with torch.no_grad():
        plain = host.unet(noisy, times, states).sample
        unasked = host.unet(noisy, times, without).sample
        target = unasked + 8.0 * (plain - unasked)
        attach(host.unet, read_lora(out).parts["unet"], "turbo")
        learned = host.unet(noisy, times, states).sample
    assert (learned - target).square().mean() < 0.5 * (plain - target).square().mean()


def read_shape(host: Any) -> tuple[int, int, int]:
    """Latents of one picture (C h w)."""
    config = host.unet.config
    return config.in_channels, config.sample_size, config.sample_size


def test_k_steps_are_k_half_stop_resume_k_half_bit_for_bit(
    tmp_path: Path, model_folder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = TURBO | {"optim": {"steps": 6}}
    whole, halves = in_halves(tmp_path, model_folder, drawn, monkeypatch, more)
    assert content_hash(read_tensors(whole)) == content_hash(read_tensors(halves))


def test_the_file_says_how_it_is_drawn_with(tmp_path: Path, model_folder: Path, drawn: Path) -> None:
    made = read_lora(verb.train_lora(lora_run(tmp_path / "a", model_folder, drawn, **TURBO)))
    assert drawn_with(made) == {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert json.loads(made.metadata[TRAINING])["distillation"] == {"guidance": GUIDANCE, "steps": 4, "path_share": 0.5}
    plain = read_lora(verb.train_lora(lora_run(tmp_path / "b", model_folder, drawn)))
    assert drawn_with(plain) == {}


def test_stable_diffusion_xl_is_distilled_too(tmp_path: Path, drawn: Path) -> None:
    tiny_hosts.complete("sdxl").save_pretrained(tmp_path / "xl", safe_serialization=True)
    verb.train_lora(lora_run(tmp_path, tmp_path / "xl", drawn, **TURBO))
    assert len(log_of(tmp_path, "noise")) == 2


def test_a_prior_beside_it_is_refused(tmp_path: Path, drawn: Path) -> None:
    with pytest.raises(ValueError, match=r"leave prior\.train out"):
        lora_run(tmp_path, tmp_path, drawn, **(TURBO | {"prior": {"train": drawn}}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapter": {"sites": ("unet.attention", "text")}}, "distillation.guidance trains the denoiser alone"),
        ({"adapter": {"sites": ("vae.decoder",)}}, "distillation.guidance trains the denoiser alone"),
    ],
    ids=["text", "decoder"],
)
def test_other_sites_are_refused(tmp_path: Path, model_folder: Path, drawn: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        verb.train_lora(lora_run(tmp_path, model_folder, drawn, **(TURBO | change)))
