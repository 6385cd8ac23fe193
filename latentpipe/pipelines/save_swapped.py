"""Save a model with another VAE in the place of its own, so that stock diffusers opens it."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentpipe.checkpoints.model_files import read_card
from latentpipe.checkpoints.pipeline_io import hashes, load_pipeline
from latentpipe.checkpoints.registry import find_model, name_of
from latentpipe.checkpoints.single_file.gather import Stated
from latentpipe.checkpoints.single_file.gguf_tensors import refuse_packed
from latentpipe.checkpoints.tensor_source import CARD_FILE
from latentpipe.checkpoints.vae_io import PREVIEW_FILE, open_vae, vae_hash
from latentpipe.compatibility.measure import Verdict
from latentpipe.pipelines import families
from latentpipe.pipelines.facade import with_factors
from latentpipe.pipelines.swap import VAE, refuse_shape, stage_of
from latentpipe.utils.errors import LatentpipeWarning, UserError
from latentpipe.utils.io import atomic_folder, read_json
from latentpipe.utils.logging import quiet
from latentpipe.vae.latent_space import LatentSpace
from latentpipe.vae.stage import fold_normalization


def saveable(pipe: Any, vae: VAE) -> Any:
    """An autoencoder of the same function that this pipeline's own code reads right, to be saved with it.

    Where the host ignores a part of the normalization, it is folded into a copy's quant_conv and post_quant_conv.
    """
    stage, host = stage_of(vae), families.family_of(pipe)
    reason = families.honours(host, stage.space, stage.vae)
    if not reason:
        return with_factors(stage.vae, stage.space, host)
    if type(stage.vae).__name__ in host.plain and getattr(stage.vae, "quant_conv", None) is not None:
        folded = copy.deepcopy(stage.vae)
        fold_normalization(folded, stage.space)
        return with_factors(folded, LatentSpace.of(folded), host)
    raise UserError(
        f"{reason}, so this pipeline cannot be saved with it for stock diffusers; draw with "
        "LatentPipeline or 'latentpipe generate --vae', which decode by themselves."
    )


def save_swapped(
    folder: Path, vae: str | Path, out: Path, verdict: Verdict, force: bool = False, stated: Stated | None = None
) -> None:
    """Write the pipeline folder again, with `vae` in the place of its own; stock diffusers opens it.

    UserError with the verdict where it does not fit, unless `force`; a warning where its decoder alone fits. The card names
    the VAE that the denoiser was trained on and the one that was swapped in, each by its hash. `stated`: of a single file.
    """
    if Path(out).exists() or Path(out).resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {out} exists already, or lies within the model; name a folder that does not.")
    if force:
        refuse_shape(verdict.host_space, verdict.vae_space)
    elif not verdict.fits:
        raise UserError(f"Nothing was saved: this VAE does not fit (--force saves it all the same).\n{verdict}")
    place = find_model(vae, "vae")
    opened = open_vae(place)
    if not verdict.encodes and not force:
        warnings.warn(
            LatentpipeWarning(
                "the decoder alone fits: pictures from prompts are right, but img2img and inpainting of the saved pipeline would "
                "begin from another encoder's latents; 'latentpipe generate --vae' encodes by the model's own VAE"
            ),
            stacklevel=2,
        )
    pipe = load_pipeline(folder, stated=stated)
    for name, part in pipe.components.items():
        refuse_packed(part, f"{folder}: its {name}", "diffusers writes no folder of such weights")
    twin = saveable(pipe, opened.build())
    stored = next((tensor.dtype for tensor in opened.tensors.values() if tensor.is_floating_point()), torch.float32)
    kept = LatentSpace.of(twin) == opened.space  # else it was folded, which fp16 would round
    with atomic_folder(out) as part, quiet():
        if folder.is_file():
            load_pipeline(folder, None, stated).save_pretrained(part, safe_serialization=True)
            shutil.rmtree(part / "vae")
        else:
            shutil.copytree(folder, part, dirs_exist_ok=True, ignore=lambda at, names: ["vae"] if Path(at) == folder else [])
        (nn.Module.to(twin, stored) if kept else twin).save_pretrained(part / "vae", safe_serialization=True)
        for name in (CARD_FILE, PREVIEW_FILE):
            if place.is_dir() and (place / name).is_file():
                shutil.copy(place / name, part / "vae" / name)
        index = read_json(part / "model_index.json")
        (part / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", type(twin).__name__]}, indent=2) + "\n")
        card = read_card(folder) or {}
        proof = {"outcome": verdict.outcome, "reason": verdict.reason, "forced": force}
        new = vae_hash(part / "vae")
        card["vae_hash"] = card.get("vae_hash") or hashes(folder, stated)["vae"]
        card["swapped_vae"] = {"name": name_of(place, "vae"), "hash": new, "verdict": proof}
        if "hashes" in card:
            card["hashes"] = card["hashes"] | {"vae": new}
        (part / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n")
