"""The whole chain of the embedded model: pictures, latents, denoiser, enlarging decoder, and the pipeline of them all.

Every part is kept below one folder and taken from there when the command is given again, so a chain goes on where it stopped;
training runs go on from their newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from latentpipe.checkpoints.pipeline_io import load_pipeline, save_pipeline
from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import load_vae
from latentpipe.data.emoji_hands import open_library, write_hands
from latentpipe.data.latent_cache import encode_folder, open_cache
from latentpipe.train.config import TrainDenoiser, TrainVAE, load, parse
from latentpipe.train.config.base import Config
from latentpipe.train.denoiser import train_denoiser
from latentpipe.train.distributed import refuse_several
from latentpipe.train.vae.train import train_vae
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import read_json

LATENT_PX = 64  # side of the pictures that the latents are of
Say = Callable[[str], None]


def train_chain(
    packages: Path,
    work: Path,
    configs: Path,
    vae: str,
    start: str | None,
    denoiser_steps: int | None = None,
    decoder_steps: int | None = None,
    tuning_steps: int | None = None,
    batch_size: int | None = None,
    decay: bool = True,
    say: Say = print,
) -> Path:
    """Train it all below `work`; returns the folder of the model, ``work/model``.

    packages        folder with the artists' sets, as for ``latentpipe emoji --hands``
    configs         folder with emoji-hands-denoiser.yaml, emoji-hands-decoder.yaml and emoji-hands-decoder-tuned.yaml
    vae             the VAE whose latents are kept, by name or folder
    start           the model that the denoiser begins with; None: random weights
    denoiser_steps, decoder_steps, tuning_steps, batch_size   in place of the configs'
    decay           let the denoiser's rate fall at the end; without, the run can be made longer later
    """
    refuse_several("train-embedded")
    vae_folder, hands, cache = find_model(vae, "vae"), work / "hands", work / "train.safetensors"
    if start is not None:
        find_model(start)
    shape = {} if batch_size is None else {"batch_size": batch_size}
    pictures = {"train": hands / "train", "validation": hands / "validation"}
    # all configs before the first picture: what is wrong with a size is said at once
    denoiser = _changed(
        configs / "emoji-hands-denoiser.yaml",
        TrainDenoiser,
        data={"cache": cache, "vae": vae_folder},
        run=_places(work, "denoiser") | {"warm_start": start},
        optim={**shape, **_steps(denoiser_steps), "decay_share": 0.25 if decay else 0.0},
        text={"new_vocabulary": start is not None},
    )
    decoder = _changed(
        configs / "emoji-hands-decoder.yaml",
        TrainVAE,
        data=pictures,
        run=_places(work, "decoder"),
        optim={**shape, **_steps(decoder_steps)},
        teacher=vae_folder,
    )
    tuned = _changed(
        configs / "emoji-hands-decoder-tuned.yaml",
        TrainVAE,
        data=pictures,
        run=_places(work, "tuned") | {"warm_start": work / "decoder"},
        optim={**shape, **_steps(tuning_steps)},
        teacher=vae_folder,
        predicted={"model": work / "denoiser"},
    )
    if not (hands / "train" / "metadata.jsonl").is_file():
        say(f"1/6 pictures: {hands}")
        write_hands(hands, open_library(packages), progress=lambda planned: tqdm(planned, unit="picture"))
    if not cache.is_file():
        say(f"2/6 latents: {cache}")
        encode_folder(hands / "train", vae_folder, cache, LATENT_PX, progress=lambda parts: tqdm(parts, unit="batch"))
    open_cache(cache, vae_folder)  # refused now where it is another VAE's
    say("3/6 denoiser")
    train_denoiser(denoiser)
    say("4/6 decoder")
    train_vae(decoder)
    say("5/6 decoder on what the denoiser predicts")
    train_vae(tuned)
    say(f"6/6 model: {work / 'model'}")
    return assemble(work / "denoiser", work / "tuned", work / "model")


def assemble(denoiser: Path, decoder: Path, out: Path) -> Path:
    """A model folder of a denoiser's pipeline around another VAE of the same latents, whose pictures may be larger."""
    pipe = load_pipeline(denoiser)
    vae = load_vae(decoder)
    if vae.config["latent_channels"] != pipe.unet.config["in_channels"]:
        raise UserError(
            f"{decoder} has {vae.config['latent_channels']} latent channels, {denoiser} draws {pipe.unet.config['in_channels']}; "
            "give a VAE that was distilled onto the latents of this denoiser."
        )
    pipe.register_modules(vae=vae)
    pipe.vae_scale_factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    card = {name: value for name, value in read_json(denoiser / "card.json").items() if name not in ("vae_hash", "hashes")}
    card["size_px"] = int(pipe.unet.config["sample_size"]) * pipe.vae_scale_factor
    save_pipeline(pipe, out, card, decoder)
    return out


def _places(work: Path, name: str) -> dict[str, Any]:
    return {"out": work / name, "work": work / f"{name}-run", "resume": True}


def _steps(count: int | None) -> dict[str, int]:
    return {} if count is None else {"steps": count}


def _changed(path: Path, schema: type[Config], **changes: Any) -> Config:
    """A shipped config with other values: sections are merged, single values replaced."""
    raw = load(path, schema).model_dump()
    for name, value in changes.items():
        raw[name] = {**raw[name], **value} if isinstance(value, dict) else value
    return parse(raw, schema, str(path))
