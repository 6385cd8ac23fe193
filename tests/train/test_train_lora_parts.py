"""The parts of train-lora: the weights of the loss against their closed forms, and which pictures are trained on."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_hosts
import torch
from helpers import draw_shape, write_pictures
from hypothesis import given
from hypothesis import strategies as st

from latentpipe import UserError
from latentpipe.data.emoji import held_out_captions
from latentpipe.train.config import Diffusion, LoraLoss
from latentpipe.train.denoiser import build_scheduler
from latentpipe.train.lora import data
from latentpipe.train.lora.data import held_out, open_pictures, plain
from latentpipe.train.lora.loss import NoiseSchedule, noised, snr_weights
from latentpipe.train.lora.prompts import Prompts
from latentpipe.utils.errors import LatentpipeWarning

# --- the loss -----------------------------------------------------------------------------------------------


@given(st.floats(1e-4, 1 - 1e-4), st.floats(0.1, 20))
def test_min_snr_is_the_closed_form(a: float, gamma: float) -> None:
    snr = a / (1 - a)
    alphas = torch.tensor([a], dtype=torch.float64)
    assert snr_weights(alphas, gamma, "epsilon").item() == pytest.approx(min(snr, gamma) / snr, rel=1e-9)
    assert snr_weights(alphas, gamma, "v_prediction").item() == pytest.approx(min(snr, gamma) / (snr + 1), rel=1e-9)


@given(st.floats(0.01, 0.99), st.floats(0.1, 20), st.integers(0, 1000))
def test_both_predictions_weigh_the_clean_latents_alike(a: float, gamma: float, seed: int) -> None:
    """The same mistake about the clean latents costs min(SNR, gamma) times its square, however the host predicts."""
    random = torch.Generator().manual_seed(seed)
    clean, noise, wrong = torch.randn(3, 1, 2, 4, 4, generator=random, dtype=torch.float64)
    alphas = torch.tensor([a], dtype=torch.float64)
    noisy = a**0.5 * clean + (1 - a) ** 0.5 * noise
    guess = clean + 0.1 * wrong
    expected = min(a / (1 - a), gamma) * (guess - clean).square().mean()
    said = (noisy - a**0.5 * guess) / (1 - a) ** 0.5  # the noise that this guess stands for
    found = {
        "epsilon": (said - noise).square().mean(),
        "v_prediction": ((a**0.5 * said - (1 - a) ** 0.5 * guess) - (a**0.5 * noise - (1 - a) ** 0.5 * clean)).square().mean(),
    }
    for prediction, error in found.items():
        weight = snr_weights(alphas, gamma, prediction)  # type: ignore[arg-type]
        assert (weight * error).item() == pytest.approx(expected.item(), rel=1e-6), prediction


def test_min_snr_at_the_ends() -> None:
    ends = torch.tensor([0.0, 1.0])
    assert snr_weights(ends, 5.0, "epsilon").tolist() == [1.0, 0.0]
    assert snr_weights(ends, 5.0, "v_prediction").tolist() == [0.0, 0.0]
    assert snr_weights(ends, None, "v_prediction").tolist() == [1.0, 1.0]


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_weighted_error_and_zero_for_the_right_answer(prediction: Any, gamma: float | None) -> None:
    schedule = NoiseSchedule(torch.linspace(0.999, 0.001, 100), prediction)
    latents = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    batch = noised(latents, schedule, LoraLoss(min_snr_gamma=gamma), torch.Generator().manual_seed(2))
    assert batch.loss(batch.target) == 0
    off = batch.target + torch.arange(8.0).view(-1, 1, 1, 1)
    assert batch.loss(off).item() == pytest.approx((batch.weights * torch.arange(8.0).square()).mean().item(), rel=1e-5)
    a = schedule.alphas[batch.times].view(-1, 1, 1, 1)
    noise = (batch.noisy - a.sqrt() * latents) / (1 - a).sqrt()
    wanted = noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents
    assert torch.allclose(batch.target, wanted, atol=1e-3)


def test_the_noises_offset_is_shared_by_the_positions_of_a_channel() -> None:
    schedule = NoiseSchedule(torch.zeros(10), "epsilon")  # all noise, so the noisy latents are the noise itself
    offset = LoraLoss(noise_offset=2.0)
    drawn = noised(torch.zeros(400, 4, 8, 8), schedule, offset, torch.Generator().manual_seed(0))
    means = drawn.noisy.mean((2, 3))
    assert means.std().item() == pytest.approx((4 + 1 / 64) ** 0.5, rel=0.05)
    assert (drawn.noisy - means[..., None, None]).std().item() == pytest.approx(1.0, rel=0.05)
    assert torch.equal(drawn.noisy, drawn.target)


def test_the_schedule_is_the_hosts() -> None:
    ours = NoiseSchedule.of(build_scheduler(Diffusion()))
    assert (ours.prediction, ours.term) == ("v_prediction", "v")
    assert ours.alphas[-1] == 0
    stock = tiny_hosts.sd15().scheduler
    theirs = NoiseSchedule.of(stock)
    assert (theirs.prediction, theirs.term) == ("epsilon", "noise")
    assert torch.equal(theirs.alphas, stock.alphas_cumprod)
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler"):
        NoiseSchedule.of(tiny_hosts.sd3().scheduler)


# --- the pictures -------------------------------------------------------------------------------------------


def folder_of(root: Path, captions: list[list[str]]) -> Path:
    """A folder with a picture for each list of captions."""
    root.mkdir(parents=True)
    rows = []
    for index, texts in enumerate(captions):
        draw_shape("red", "circle", 16 + index).save(root / f"{index}.png")
        rows += [{"file_name": f"{index}.png", "text": text} for text in texts or [""]]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_held_out_captions_are_left_out_however_they_are_written(tmp_path: Path, vae_folder: Path) -> None:
    assert "man dark skin tone" in held_out_captions()
    forms = ["man dark skin tone", "Man: Dark Skin Tone", "man, dark-skin-tone", "dark skin tone man"]
    folder = folder_of(tmp_path / "a", [*([text] for text in forms), ["a cat"], ["a man", forms[0]], ["man medium skin tone"]])
    with pytest.warns(LatentpipeWarning, match="5 of 7 pictures left out"):
        found = open_pictures(folder, vae_folder, 16, tmp_path / "work", held_out=held_out(None))
    assert found.left_out == 5
    assert found.rows.tolist() == [4, 6]


def test_every_held_out_caption_is_found() -> None:
    held = held_out(None)
    assert all(plain(text) in held for text in held_out_captions())
    assert plain("MEDIUM-LIGHT skin tone, artist:") in held
    assert plain("猫") == ""
    assert "" not in held


def test_a_persons_own_list_is_left_out_too(tmp_path: Path, vae_folder: Path) -> None:
    (tmp_path / "list.txt").write_text("A Cat\n\n")
    folder = folder_of(tmp_path / "a", [["a cat"], ["a dog"]])
    with pytest.warns(LatentpipeWarning, match="1 of 2 pictures left out"):
        found = open_pictures(folder, vae_folder, 16, tmp_path / "work", held_out=held_out(tmp_path / "list.txt"))
    assert found.rows.tolist() == [1]


def test_pictures_that_nothing_is_left_of_are_refused(tmp_path: Path, vae_folder: Path) -> None:
    bare = folder_of(tmp_path / "a", [[], []])
    with pytest.raises(UserError, match="none of its 2 pictures can be trained on; they have no caption"):
        open_pictures(bare, vae_folder, 16, tmp_path / "work", held_out=frozenset())
    assert len(open_pictures(bare, vae_folder, 16, tmp_path / "work", held_out=frozenset(), captioned=False).rows) == 2
    held = folder_of(tmp_path / "b", [["man dark skin tone"]])
    with pytest.warns(LatentpipeWarning), pytest.raises(UserError, match="they are held out"):
        open_pictures(held, vae_folder, 16, tmp_path / "work", held_out=held_out(None))


def test_pixels_and_latents_are_of_the_same_pictures(tmp_path: Path, vae_folder: Path) -> None:
    from latentpipe.checkpoints.vae_io import load_vae
    from latentpipe.utils.images import bytes_to_images
    from latentpipe.vae.stage import VAEStage

    folder = write_pictures(tmp_path / "a")
    (folder / "red-square.png").write_bytes(b"no picture")
    found = open_pictures(folder, vae_folder, 16, tmp_path / "work", held_out=frozenset(), pixels=True)
    assert found.pixels is not None
    assert len(found.pixels) == len(found.captions) == 11
    mean, _ = VAEStage(load_vae(vae_folder)).posterior(bytes_to_images(found.pixels))
    assert torch.allclose(mean, found.cache.mean.float(), atol=5e-3)


def test_latents_are_encoded_once_and_again_when_the_folder_changes(
    tmp_path: Path, vae_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "a", [["a cat"], ["a dog"]])
    made: list[Path] = []
    original = data.encode_folder

    def counted(one: Path, vae: Path, out: Path, size: int, **named: Any) -> Any:
        made.append(out)
        return original(one, vae, out, size, **named)

    monkeypatch.setattr(data, "encode_folder", counted)

    def read() -> Any:
        return open_pictures(folder, vae_folder, 16, tmp_path / "work", held_out=frozenset())

    first = read()
    assert torch.equal(read().cache.mean, first.cache.mean)
    assert len(made) == 1
    assert made[0].parent == tmp_path / "work" / "latents"
    assert not (folder / ".latents").exists()  # nothing is written beside people's pictures
    (folder / "metadata.jsonl").write_text((folder / "metadata.jsonl").read_text().replace("dog", "wolf"))
    assert read().captions == [("a cat",), ("a wolf",)]
    draw_shape("blue", "bar", 16).save(folder / "1.png")
    later = made[0].stat().st_mtime + 10
    os.utime(folder / "1.png", (later, later))
    assert not torch.equal(read().cache.mean[1], first.cache.mean[1])
    assert len(made) == 3


def test_a_cache_that_encode_put_into_the_folder_serves(tmp_path: Path, vae_folder: Path) -> None:
    from latentpipe.data.latent_cache import default_path, encode_folder

    folder = folder_of(tmp_path / "a", [["a cat"]])
    encode_folder(folder, vae_folder, default_path(folder, vae_folder, 16), 16)
    open_pictures(folder, vae_folder, 16, tmp_path / "work", held_out=frozenset())
    assert not (tmp_path / "work").exists()


# --- the prompts --------------------------------------------------------------------------------------------


def test_a_prompts_states_do_not_depend_on_its_batch(pipe: Any) -> None:
    prompts = Prompts(pipe.host, False, 16)
    alone, _ = prompts(["red circle"])
    together, added = prompts(["blue bar", "red circle"])
    assert added is None
    assert torch.equal(alone[0], together[1])
    assert set(prompts.kept) == {"red circle", "blue bar"}
    states, _ = Prompts(pipe.host, True, 16)(["blue bar", "red circle"])
    assert torch.allclose(states, together, atol=1e-5)
    assert not together.requires_grad


def test_stable_diffusion_xl_gets_sizes_and_zeros_for_no_prompt() -> None:
    host = tiny_hosts.complete("sdxl")
    host.register_to_config(force_zeros_for_empty_prompt=True)
    states, added = Prompts(host, False, 48)(["red circle", ""])
    assert added is not None
    assert added["time_ids"].tolist() == [[48.0, 48.0, 0.0, 0.0, 48.0, 48.0]] * 2
    assert added["text_embeds"].shape == (2, 8)
    assert states[1].abs().max() == added["text_embeds"][1].abs().max() == 0
    with torch.no_grad():
        theirs = host.encode_prompt("red circle", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    assert torch.allclose(states[0], theirs[0][0], atol=1e-6)
    assert torch.equal(states[1], theirs[1][0])


def test_long_captions_are_noted(pipe: Any) -> None:
    tokenizer = pipe.host.tokenizer
    with pytest.warns(LatentpipeWarning, match="1 of 2 captions are longer than the 14 tokens"):
        data.note_long_captions(tokenizer, [("red circle",), ("red circle " * 40,)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.note_long_captions(tokenizer, [("red circle",), ()])
