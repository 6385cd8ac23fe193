"""A run that goes on after its folder of pictures has changed says so."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from helpers import denoiser_run, draw_shape, vae_run, write_pictures

from latentpipe.data.latent_cache import encode_folder
from latentpipe.train.config import TrainLora, TrainVAE
from latentpipe.train.denoiser import train_denoiser
from latentpipe.train.lora.train import train_lora
from latentpipe.train.vae.train import train_vae
from latentpipe.utils.errors import LatentpipeWarning


def resumed(folder: Path, config: TrainVAE) -> list[str]:
    """What a run says when it goes on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LatentpipeWarning)
        train_vae(config)
    return [str(note.message) for note in caught if str(folder) in str(note.message)]


def test_case_41_a_resumed_run_says_which_pictures_are_new_or_gone(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "set")
    (folder / "metadata.jsonl").unlink()
    train_vae(vae_run(tmp_path, folder, optim={"steps": 2}))

    def go_on(steps: int) -> list[str]:
        return resumed(folder, vae_run(tmp_path, folder, optim={"steps": steps}, resume=True))

    assert go_on(2) == []
    draw_shape("red", "bar").save(folder / "new.png")
    draw_shape("red", "bar").save(folder / "newer.png")
    (folder / "red-bar.png").unlink()
    said = go_on(3)
    assert len(said) == 1
    assert "2 pictures are new and 1 gone" in said[0]
    assert "13 pictures of now, in another order" in said[0]
    assert go_on(4) == []  # it was told, and the run has begun with them


def test_case_41_the_denoiser_and_the_adapter_say_it_too(tmp_path: Path, vae_folder: Path, model_folder: Path) -> None:
    folder = write_pictures(tmp_path / "set")
    cache = tmp_path / "cache.safetensors"
    encode_folder(folder, vae_folder, cache, 16)
    lora = {
        "data": {"train": folder, "size_px": 16}, "model": model_folder, "adapter": {"rank": 1}, "sample_prompts": ["red"],
        "run": {"out": tmp_path / "a.safetensors", "work": tmp_path / "lora", "precision": "fp32"},
        "optim": {"steps": 1, "batch_size": 2, "warmup_steps": 0},
    }  # fmt: skip
    train_denoiser(denoiser_run(tmp_path, cache, vae_folder, optim={"steps": 1}))
    train_lora(TrainLora.model_validate(lora))
    draw_shape("red", "bar").save(folder / "new.png")
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "new.png", "text": "red bar"}\n')
    encode_folder(folder, vae_folder, cache, 16)
    with pytest.warns(LatentpipeWarning, match=r"cache\.safetensors: 1 picture is new and 0 gone"):
        train_denoiser(denoiser_run(tmp_path, cache, vae_folder, resume=True, optim={"steps": 2}))
    lora["run"]["resume"], lora["optim"]["steps"] = True, 2  # type: ignore[index]
    with pytest.warns(LatentpipeWarning, match="set: 1 picture is new and 0 gone"):
        train_lora(TrainLora.model_validate(lora))
