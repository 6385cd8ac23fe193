"""Whole pipelines: open, save, describe, hash, and the identity chain from VAE to denoiser. Safetensors only."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from latentpipe.errors import UserError
from latentpipe.files import HASH_LENGTH, atomic_folder, content_hash, load_strictly, read_json, read_tensors
from latentpipe.latents import LatentSpace
from latentpipe.weights import CARD_FILE, PREVIEW_FILE, VAE_FILE, find_model, load_vae, quiet, vae_hash

PARTS = {"vae": VAE_FILE, "unet": VAE_FILE, "text_encoder": "model.safetensors"}  # of a Stable Diffusion folder


def load_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A StableDiffusionPipeline from its folder, offline; VAE, UNet and text encoder are checked before use."""
    with quiet():
        from diffusers import StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        folder = Path(folder)
        index = read_json(folder / "model_index.json")
        if index.get("_class_name") != "StableDiffusionPipeline":
            raise UserError(f"{folder} holds a {index.get('_class_name')}; expected a StableDiffusionPipeline.")
        _check_parts(folder)
        enforce_chain(folder)
        text = folder / "text_encoder"
        return StableDiffusionPipeline.from_pretrained(
            folder,
            vae=load_vae(folder / "vae", dtype),
            unet=_filled(UNet2DConditionModel.from_config(read_json(folder / "unet" / "config.json")), folder / "unet", dtype),
            text_encoder=_filled(CLIPTextModel(CLIPTextConfig.from_pretrained(text)), text, dtype),
            local_files_only=True,
            use_safetensors=True,
        )


def _check_parts(folder: Path) -> None:
    """UserError where a part is missing; transformers would otherwise come up with an empty tokenizer."""
    tokenizer = folder / "tokenizer"
    complete = (tokenizer / "tokenizer.json").is_file() or all(
        (tokenizer / name).is_file() for name in ("vocab.json", "merges.txt")
    )
    missing = [] if complete else ["tokenizer/tokenizer.json (or vocab.json and merges.txt)"]
    files = ["scheduler/scheduler_config.json", "unet/config.json", "text_encoder/config.json", "vae/config.json"]
    missing += [name for name in files if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is not a complete model; missing: {', '.join(missing)}. Fetch or export it again.")


def _filled(model: Any, folder: Path, dtype: torch.dtype) -> Any:
    """`model` with the weights of `folder`, in eval mode."""
    source = folder / PARTS[folder.name]
    load_strictly(model, _as_named_by(model, read_tensors(source)), source)
    return torch.nn.Module.to(model, dtype).eval()


def save_pipeline(pipe: Any, folder: Path, card: Mapping[str, Any], vae_folder: Path) -> None:
    """Write a pipeline folder in fp16, atomically, that ``StableDiffusionPipeline.from_pretrained(folder)`` opens.

    The VAE's card and preview map come along from `vae_folder`; the VAE's hash is written into the card.
    """
    with atomic_folder(folder) as part, quiet():
        pipe.to(torch.float16).save_pretrained(part, safe_serialization=True)
        text = part / "text_encoder"
        config = read_json(text / "config.json")
        config["dtype"] = "float32"  # else transformers comes up in fp16 beside a UNet in fp32
        (text / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _restore_prefix(text / PARTS["text_encoder"])
        for name in (CARD_FILE, PREVIEW_FILE):
            if (vae_folder / name).is_file():
                shutil.copy(vae_folder / name, part / "vae" / name)
        found = hashes(part)
        # The VAE is stored in fp16 here; its hash may differ from that of the file it came from.
        (part / CARD_FILE).write_text(json.dumps({**card, "vae_hash": found["vae"], "hashes": found}, indent=2) + "\n")
        pipe.to(torch.float32)


def hashes(folder: Path) -> dict[str, str]:
    """Hashes of what decides a pipeline's pictures: contents of VAE, UNet and text encoder; tokenizer and scheduler files."""
    folder = Path(folder)
    tokenizer = hashlib.sha256()
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        if (folder / "tokenizer" / name).is_file():
            tokenizer.update((folder / "tokenizer" / name).read_bytes())
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    scheduler.pop("_diffusers_version", None)
    settings = hashlib.sha256(json.dumps(scheduler, sort_keys=True).encode())
    found = {part: content_hash(read_tensors(folder / part / file)) for part, file in PARTS.items() if part != "vae"}
    return {"vae": vae_hash(folder / "vae"), **found, "tokenizer": tokenizer.hexdigest(), "scheduler": settings.hexdigest()}


def enforce_chain(folder: Path) -> None:
    """UserError where a pipeline's card says that its denoiser was trained on another VAE's latents."""
    card = folder / CARD_FILE
    if not card.is_file():
        return
    expected, given = read_json(card).get("vae_hash"), vae_hash(folder / "vae")
    if expected and expected != given:
        raise UserError(
            f"{folder}: its denoiser was trained on latents of VAE {expected[:HASH_LENGTH]}, but the VAE beside it is "
            f"{given[:HASH_LENGTH]}. Put the right VAE back, or train a denoiser for this one."
        )


def _restore_prefix(path: Path) -> None:
    """transformers >= 5.6 writes CLIP text encoders without ``text_model.``; older readers need it."""
    from safetensors.torch import save_file

    tensors = read_tensors(path)
    named = {name if name.startswith("text_model.") else f"text_model.{name}": value for name, value in tensors.items()}
    save_file(named, path, metadata={"format": "pt"})


def _as_named_by(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors with or without the prefix ``text_model.``, whichever `model` uses; position ids are no weights."""
    tensors = {name: value for name, value in tensors.items() if not name.endswith("position_ids")}
    prefixed = any(name.startswith("text_model.") for name in model.state_dict())
    if prefixed:
        return tensors
    return {name.removeprefix("text_model."): value for name, value in tensors.items()}


def describe(name: str | Path) -> dict[str, Any]:
    """What a model or VAE folder says about itself: class, parameters, latent space, hashes, card."""
    try:
        folder = find_model(name)
    except UserError:
        folder = find_model(name, "vae")
    card = read_json(folder / CARD_FILE) if (folder / CARD_FILE).is_file() else None
    if (folder / "model_index.json").is_file():
        parts = {
            part: sum(tensor.numel() for tensor in read_tensors(folder / part / file).values()) for part, file in PARTS.items()
        }
        space = _space(folder / "vae")
        return {"folder": str(folder), "parameters": parts, "space": space, "hashes": hashes(folder), "card": card}
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds neither model_index.json (a pipeline) nor config.json (a VAE).")
    parameters = sum(tensor.numel() for tensor in read_tensors(folder / VAE_FILE).values())
    kind = read_json(folder / "config.json").get("_class_name")
    return {
        "folder": str(folder),
        "class": kind,
        "parameters": parameters,
        "space": _space(folder),
        "hash": vae_hash(folder),
        "card": card,
    }


def _space(folder: Path) -> dict[str, Any]:
    return asdict(LatentSpace.from_config(read_json(folder / "config.json")))
