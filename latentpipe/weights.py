"""Where VAEs and pipelines live: find, open, save, describe, verify. Safetensors only."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from latentpipe.errors import UserError
from latentpipe.files import HASH_LENGTH, atomic_folder, content_hash, load_strictly, read_json, read_tensors
from latentpipe.latents import LatentSpace

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AsymmetricAutoencoderKL")
VAE_FILE = "diffusion_pytorch_model.safetensors"
PARTS = {"vae": VAE_FILE, "unet": VAE_FILE, "text_encoder": "model.safetensors"}  # of a Stable Diffusion folder
CARD_FILE = "card.json"
PREVIEW_FILE = "latent_rgb.json"


def home() -> Path:
    """People's own files: $LATENTPIPE_HOME, else latentpipe/ in the user's data folder; holds models/, vae/, lora/."""
    if os.environ.get("LATENTPIPE_HOME"):
        return Path(os.environ["LATENTPIPE_HOME"])
    data = os.environ.get("XDG_DATA_HOME") or os.environ.get("LOCALAPPDATA")
    return Path(data or Path.home() / ".local" / "share") / "latentpipe"


def shipped() -> Path:
    """The folder of the weights that ship with the project: in the wheel, or in a checkout."""
    here = Path(__file__).parent
    return here / "embedded" if (here / "embedded").is_dir() else here.parent / "weights"


def available(kind: str = "models") -> dict[str, Path]:
    """Names and folders of all `kind` ("models" or "vae"): the shipped ones, then people's own."""
    index = "model_index.json" if kind == "models" else "config.json"
    found: dict[str, Path] = {}
    for root in (shipped(), home() / "models"):
        for path in sorted(root.glob("*/model_index.json")):
            found[path.parent.name] = path.parent if kind == "models" else path.parent / "vae"
    for root in (shipped() / kind, home() / kind):
        found |= {path.parent.name: path.parent for path in sorted(root.glob(f"*/{index}"))}
    return found


def find_model(name: str | Path, kind: str = "models") -> Path:
    """The folder that a name or a path means; UserError lists the names there are."""
    known = available(kind)
    if str(name) in known:
        return known[str(name)]
    if Path(name).is_dir():
        return Path(name).resolve()
    raise UserError(f"No {kind.removesuffix('s')} '{name}': neither a folder nor one of {', '.join(known) or 'none installed'}.")


def load_vae(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A diffusers autoencoder from its folder (config.json and safetensors), strictly, in eval mode."""
    import diffusers

    folder = Path(folder)
    config = read_json(folder / "config.json")
    name = config.get("_class_name")
    if name not in AUTOENCODERS:
        raise UserError(f"{folder}/config.json: _class_name is {name!r}; expected one of {', '.join(AUTOENCODERS)}.")
    tensors = read_tensors(folder / VAE_FILE)
    vae = getattr(diffusers, name).from_config(config)
    load_strictly(vae, tensors, folder / VAE_FILE)
    return torch.nn.Module.to(vae, dtype).eval()


def vae_hash(folder: Path) -> str:
    """The content hash of a VAE folder: its weights as they lie in the file, and its normalization."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    return content_hash(read_tensors(folder / VAE_FILE), LatentSpace.from_config(config))


def save_vae(vae: Any, folder: Path, card: Mapping[str, Any], preview: Any = None) -> str:
    """Write a VAE folder in fp16 with its card, atomically; return the content hash.

    It opens with ``AutoencoderKL.from_pretrained(folder)``; `preview` is the linear latent-to-RGB map.
    """
    half = torch.nn.Module.half(copy.deepcopy(vae))
    digest = content_hash(half.state_dict(), LatentSpace.of(vae))
    with atomic_folder(folder) as part:
        half.save_pretrained(part, safe_serialization=True)
        (part / CARD_FILE).write_text(json.dumps({**card, "content_hash": digest}, indent=2) + "\n")
        if preview is not None:
            (part / PREVIEW_FILE).write_text(json.dumps(preview) + "\n")
    return digest


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


def name_of(folder: Path, kind: str = "models") -> str:
    """The name under which `find_model` finds a folder; a folder elsewhere has its own name."""
    known = {path.resolve(): name for name, path in available(kind).items()}
    return known.get(folder.resolve(), folder.name)


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


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and advice of diffusers and transformers (torchvision is missing, ...) from the user."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [
        (module, module.get_verbosity(), module.is_progress_bar_enabled()) for module in (diffusers_logging, transformers_logging)
    ]
    for module, _, _ in before:
        module.set_verbosity_error()
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, level, bars in before:
            module.set_verbosity(level)
            if bars:
                module.enable_progress_bar()


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
