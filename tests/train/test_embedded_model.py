"""The whole chain: every part once, again from what is there, and a model that stock diffusers opens."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers import denoiser_run, tiny_vae, vae_run, write_pictures

from latentpipe import LatentPipeline, UserError
from latentpipe.checkpoints.pipeline_io import hashes
from latentpipe.checkpoints.vae_io import save_vae
from latentpipe.train.embedded_model import assemble, train_chain


@pytest.fixture
def chain(tmp_path: Path) -> dict[str, object]:
    """What train_chain is given: pictures that are rendered already, a VAE of half the size, tiny configs."""
    for name in ("train", "validation"):
        write_pictures(tmp_path / "work" / "hands" / name)
    save_vae(tiny_vae(), tmp_path / "vae", {})
    denoiser = denoiser_run(tmp_path, Path("x.safetensors"), Path("v"))
    decoder = vae_run(tmp_path, Path("p"), data={"read_size_px": 32}, crops={"size_px": 32}, loss={"equivariance": 0},
                      model={"blocks": (8, 8, 8)}).model_dump(mode="json")  # fmt: skip
    decoder |= {"mode": "distil", "teacher": "v"}
    tuned = decoder | {"predicted": {"model": "m"}, "crops": {"size_px": 32, "whole": 1.0, "flip": False}}
    (tmp_path / "configs").mkdir()
    for name, config in (("denoiser", denoiser.model_dump(mode="json")), ("decoder", decoder), ("decoder-tuned", tuned)):
        (tmp_path / "configs" / f"emoji-hands-{name}.yaml").write_text(yaml.safe_dump(config))
    return {"packages": tmp_path, "work": tmp_path / "work", "configs": tmp_path / "configs", "vae": str(tmp_path / "vae")}


def test_the_chain_trains_every_part_and_goes_on_where_it_stopped(chain: dict[str, object], tmp_path: Path) -> None:
    said: list[str] = []
    sizes = {"start": None, "denoiser_steps": 2, "decoder_steps": 2, "tuning_steps": 2, "batch_size": 2, "say": said.append}
    out = train_chain(**chain, **sizes)  # type: ignore[arg-type]
    assert [line[:3] for line in said] == ["2/6", "3/6", "4/6", "5/6", "6/6"]  # the pictures were there
    first = hashes(out)
    pipe = LatentPipeline.from_pretrained(out)
    assert pipe.native_size == (128, 128)  # of latents of 64 px
    assert pipe("red circle", seed=1, num_inference_steps=1)[0].image.size == (128, 128)
    again = train_chain(**chain, **sizes)  # type: ignore[arg-type]
    assert hashes(again) == first
    longer = train_chain(**chain, **{**sizes, "denoiser_steps": 3})  # type: ignore[arg-type]
    changed = {name for name, value in hashes(longer).items() if value != first[name]}
    assert {"unet", "text_encoder"} <= changed
    assert "vae" not in changed  # its run had all its steps


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tuning_steps": 0}, "optim.steps"),
        ({"batch_size": -1}, "optim.batch_size"),
        ({"start": "nothing"}, "nothing"),
        ({"vae": "nothing"}, "nothing"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_part(chain: dict[str, object], changes: dict[str, object], words: str) -> None:
    said: list[str] = []
    with pytest.raises(UserError, match=words):
        train_chain(**{"start": None, **chain, **changes, "say": said.append})  # type: ignore[arg-type]
    assert said == []


def test_a_decoder_of_other_latents_is_refused(model_folder: Path, tmp_path: Path) -> None:
    save_vae(tiny_vae(latent_channels=6), tmp_path / "other", {})
    with pytest.raises(UserError, match="has 6 latent channels"):
        assemble(model_folder, tmp_path / "other", tmp_path / "model")
    assert not (tmp_path / "model").exists()
