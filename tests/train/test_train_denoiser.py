"""train-denoiser: exact resume, the schedule, what is saved, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import denoiser_run, edit_json, grey_levels, tiny_vae, write_pictures
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from latentpipe import LatentPipeline, UserError
from latentpipe.checkpoints.pipeline_io import PARTS, hashes, load_pipeline
from latentpipe.checkpoints.vae_io import vae_hash
from latentpipe.data.latent_cache import LatentCache, encode_folder
from latentpipe.train import denoiser
from latentpipe.train.config import Diffusion, TrainDenoiser, UNetShape

pytestmark = pytest.mark.slow


def weights_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every weight file."""
    return {part: (folder / part / file).read_bytes() for part, file in PARTS.items()}


@pytest.mark.parametrize("stop_at", [1, 2])
def test_k_steps_are_k_half_stop_resume_k_half_bit_for_bit(
    tmp_path: Path, cache_file: Path, vae_folder: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    optim = {"steps": 4}
    whole = denoiser.train_denoiser(denoiser_run(tmp_path / "a", cache_file, vae_folder, optim=optim))
    original, count = denoiser.velocity_target, iter(range(100))

    def target(*arguments: Any) -> torch.Tensor:
        if next(count) == stop_at:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(denoiser, "velocity_target", target)
        with pytest.raises(KeyboardInterrupt):
            denoiser.train_denoiser(denoiser_run(tmp_path / "b", cache_file, vae_folder, optim=optim))
    assert not (tmp_path / "b" / "model").exists()
    torch.rand(7)
    halves = denoiser.train_denoiser(denoiser_run(tmp_path / "b", cache_file, vae_folder, optim=optim, resume=True))
    assert weights_of(whole) == weights_of(halves)
    assert hashes(whole) == hashes(halves)


def test_drawing_sheets_does_not_change_the_training(tmp_path: Path, cache_file: Path, vae_folder: Path) -> None:
    plain = denoiser.train_denoiser(denoiser_run(tmp_path / "a", cache_file, vae_folder))
    config = denoiser_run(tmp_path / "b", cache_file, vae_folder, sample_every_steps=1, sample_prompts=("red circle", "blue bar"))
    assert weights_of(plain) == weights_of(denoiser.train_denoiser(config))
    assert (tmp_path / "b" / "work" / "samples-000001.png").is_file()


def test_unet_and_text_encoder_are_both_trained(tmp_path: Path, cache_file: Path, vae_folder: Path) -> None:
    short = {"steps": 1, "learning_rate": 1e-12}
    before = load_pipeline(denoiser.train_denoiser(denoiser_run(tmp_path / "a", cache_file, vae_folder, optim=short)))
    after = load_pipeline(
        denoiser.train_denoiser(denoiser_run(tmp_path / "b", cache_file, vae_folder, optim={"learning_rate": 1e-2}))
    )
    for part in ("unet", "text_encoder"):
        first, second = getattr(before, part).state_dict(), getattr(after, part).state_dict()
        moved = [name for name in first if not torch.equal(first[name], second[name])]
        assert len(moved) > 0.9 * len(first), part
    assert all(torch.equal(first, second) for first, second in zip(before.vae.parameters(), after.vae.parameters(), strict=True))


def test_training_learns(tmp_path: Path, cache_file: Path, vae_folder: Path) -> None:
    with safe_open(cache_file, "pt") as file:
        metadata, mean = file.metadata(), file.get_tensor("mean")
    pattern = torch.linspace(-1.5, 1.5, mean[0].numel()).view(mean[0].shape).half()
    latents = pattern.expand(mean.shape).contiguous()  # one picture twelve times: what is left to learn is the noise
    save_file({"mean": latents, "std": torch.zeros_like(latents)}, tmp_path / "x.safetensors", metadata=metadata)
    optim = {"steps": 50, "batch_size": 12, "learning_rate": 3e-3, "warmup_steps": 5}
    denoiser.train_denoiser(denoiser_run(tmp_path, tmp_path / "x.safetensors", vae_folder, optim=optim))
    rows = [json.loads(line)["v"] for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()]
    assert sum(rows[-10:]) < 0.8 * sum(rows[:10])


def test_the_card_and_the_preview_come_along(model_folder: Path, vae_folder: Path) -> None:
    card = json.loads((model_folder / "card.json").read_text())
    assert (card["pictures"], card["size_px"], card["steps"]) == (12, 16, 2)
    assert card["hashes"]["vae"] == vae_hash(vae_folder)
    for name in ("card.json", "latent_rgb.json"):
        assert (model_folder / "vae" / name).read_bytes() == (vae_folder / name).read_bytes()


# --- the schedule -------------------------------------------------------------------------------------------


def test_the_terminal_snr_is_zero() -> None:
    alphas = denoiser.training_alphas(denoiser.build_scheduler(Diffusion()))
    assert len(alphas) == 1000
    assert alphas[-1] == 0
    assert (alphas[:-1] > alphas[1:]).all()
    plain = 1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()
    roots = plain.cumprod(0).sqrt()
    expected = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()  # Lin et al., algorithm 1
    assert torch.allclose(alphas, expected, atol=1e-5)


def test_sampling_begins_at_the_terminal_step() -> None:
    scheduler = denoiser.build_scheduler(Diffusion())
    for steps in (1, 4, 20, 50):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps[0] == 999


@given(st.integers(1, 64), st.integers(0, 2**31), st.sampled_from([10, 1000]))
def test_times_are_spread_evenly(batch: int, seed: int, total: int) -> None:
    times = denoiser.stratified_times(batch, total, 0.25, torch.Generator().manual_seed(seed))
    assert times.shape == (batch,)
    assert times.min() >= 0
    assert times.max() < total
    gaps = times.sort().values.diff()
    if batch > 1:
        assert gaps.min() >= total // batch - 1
        assert gaps.max() <= total // batch + 2


def test_times_are_uniform() -> None:
    drawn = torch.cat([denoiser.stratified_times(3, 10, 0.25, torch.Generator().manual_seed(seed)) for seed in range(2000)])
    counts = torch.bincount(drawn, minlength=10)
    assert (counts - 600).abs().max() < 120
    first = torch.stack([denoiser.stratified_times(4, 1000, 0.25, torch.Generator().manual_seed(seed))[0] for seed in range(500)])
    assert 420 < first.float().mean() < 580  # no place in the batch is bound to a part of the schedule


@pytest.mark.parametrize("share", [0.1, 0.6, 0.9])
def test_noisy_share_is_the_share_of_the_noisiest_quarter(share: float) -> None:
    drawn = torch.cat([denoiser.stratified_times(64, 1000, share, torch.Generator().manual_seed(seed)) for seed in range(100)])
    assert (drawn >= 750).float().mean() == pytest.approx(share, abs=0.02)
    for low, high in ((0, 750), (750, 1000)):  # uniform inside and outside
        part = drawn[(drawn >= low) & (drawn < high)].float()
        assert part.mean() == pytest.approx((low + high) / 2, rel=0.03)


def test_captions_are_dropped_and_chosen_evenly() -> None:
    choices = [("a", "b"), ("c",)] * 4000
    drawn = denoiser.pick_captions(choices, 0.25, torch.Generator().manual_seed(0))
    assert all(text in {*own, ""} for text, own in zip(drawn, choices, strict=True))
    assert drawn.count("") / len(drawn) == pytest.approx(0.25, abs=0.03)
    assert drawn.count("a") / (drawn.count("a") + drawn.count("b")) == pytest.approx(0.5, abs=0.05)
    assert "" not in denoiser.pick_captions(choices, 0.0, torch.Generator().manual_seed(0))


def test_the_unet_has_the_shape(vae_folder: Path) -> None:
    cache = LatentCache(torch.zeros(2, 6, 8, 8), torch.zeros(2, 6, 8, 8), [(), ()], 16, "x")
    unet = denoiser.build_unet(UNetShape(blocks=(32, 64), attention=(False, True)), cache, 48)
    assert unet(torch.zeros(1, 6, 8, 8), 5, torch.zeros(1, 7, 48)).sample.shape == (1, 6, 8, 8)
    assert unet.config.sample_size == 8
    heads = [module.heads for module in unet.modules() if hasattr(module, "heads")]
    assert set(heads) == {2}  # width 64 / heads_dim 32
    odd = LatentCache(torch.zeros(1, 4, 6, 6), torch.zeros(1, 4, 6, 6), [()], 12, "x")
    with pytest.raises(UserError, match=r"cannot be halved 2 times"):
        denoiser.build_unet(UNetShape(), odd, 48)


# --- refusals and other VAEs --------------------------------------------------------------------------------


def test_a_cache_of_another_vae_is_refused(tmp_path: Path, cache_file: Path, vae_copy: Path) -> None:
    edit_json(vae_copy / "config.json", scaling_factor=2.0)
    with pytest.raises(UserError, match="encode the pictures again"):
        denoiser.train_denoiser(denoiser_run(tmp_path, cache_file, vae_copy))


def test_pictures_without_captions_are_refused(tmp_path: Path, vae_folder: Path) -> None:
    folder = write_pictures(tmp_path / "set")
    (folder / "metadata.jsonl").unlink()
    encode_folder(folder, vae_folder, tmp_path / "x.safetensors", 16)
    with pytest.raises(UserError, match="none of its 12 pictures has a caption"):
        denoiser.train_denoiser(denoiser_run(tmp_path, tmp_path / "x.safetensors", vae_folder))


def test_pictures_without_a_caption_are_left_out(tmp_path: Path, vae_folder: Path) -> None:
    folder = write_pictures(tmp_path / "set")
    rows = (folder / "metadata.jsonl").read_text().splitlines()
    bare = [json.dumps({"file_name": json.loads(row)["file_name"]}) for row in rows[3:]]
    (folder / "metadata.jsonl").write_text("\n".join(rows[:3] + bare) + "\n")
    encode_folder(folder, vae_folder, tmp_path / "x.safetensors", 16)
    assert denoiser.train_denoiser(denoiser_run(tmp_path, tmp_path / "x.safetensors", vae_folder)).is_dir()


@pytest.mark.parametrize("factors", [{"scaling_factor": 0.3}, {"scaling_factor": 2.0, "shift_factor": 0.1}])
def test_a_vae_that_diffusers_saved_can_be_trained_on(tmp_path: Path, pictures: Path, factors: dict[str, Any]) -> None:
    tiny_vae(2, **factors).save_pretrained(tmp_path / "vae")  # fp32, without a card
    encode_folder(pictures, tmp_path / "vae", tmp_path / "x.safetensors", 16)
    folder = denoiser.train_denoiser(denoiser_run(tmp_path, tmp_path / "x.safetensors", tmp_path / "vae"))
    picture = LatentPipeline.from_pretrained(folder, device="cpu")("red circle", seed=0, num_inference_steps=2)[0]
    assert picture.image.size == (16, 16)


def test_a_model_beside_another_vae_is_refused(model_copy: Path, tmp_path: Path) -> None:
    from latentpipe.checkpoints.vae_io import save_vae

    shutil.rmtree(model_copy / "vae")
    save_vae(tiny_vae(77), model_copy / "vae", {})
    with pytest.raises(UserError, match="was trained on latents of VAE"):
        LatentPipeline.from_pretrained(model_copy, device="cpu")


def test_a_warm_start_begins_with_the_other_model(tmp_path: Path, cache_file: Path, vae_folder: Path, model_folder: Path) -> None:
    optim = {"steps": 1, "learning_rate": 1e-12, "ema_decay": 0.0, "weight_decay": 0.0}
    config = denoiser_run(tmp_path, cache_file, vae_folder, optim=optim, warm_start=model_folder)
    folder = denoiser.train_denoiser(config)
    old, new = (LatentPipeline.from_pretrained(path, device="cpu") for path in (model_folder, folder))
    assert (
        grey_levels(
            old("red bar", seed=3, num_inference_steps=2)[0].image, new("red bar", seed=3, num_inference_steps=2)[0].image
        )
        <= 1
    )
    assert old.host.tokenizer("red bar").input_ids == new.host.tokenizer("red bar").input_ids


def test_a_warm_start_of_another_shape_is_refused(tmp_path: Path, cache_file: Path, vae_folder: Path, model_folder: Path) -> None:
    config = denoiser_run(tmp_path, cache_file, vae_folder, warm_start=model_folder, unet={"blocks": (32, 32)})
    with pytest.raises(UserError, match="warm_start"):
        denoiser.train_denoiser(config)


def test_the_configs_defaults_are_a_model() -> None:
    raw = {"data": {"cache": "a", "vae": "b"}, "run": {"out": "c", "work": "d"}, "optim": {"steps": 1}}
    config = TrainDenoiser.model_validate(raw)
    cache = LatentCache(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), [("a",)], 32, "x")
    assert denoiser.build_unet(config.unet, cache, config.text.width).config.cross_attention_dim == 192


def test_places_are_looked_at_before_anything_is_opened(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "letter.txt").write_text("x")
    with pytest.raises(UserError, match="holds something that is no model"):
        denoiser.train_denoiser(denoiser_run(tmp_path, tmp_path / "none.safetensors", tmp_path / "none"))
