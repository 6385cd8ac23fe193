"""Whole pipelines: open, save, describe, hash, and the identity chain from VAE to denoiser. Safetensors only."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from latentpipe.checkpoints.components import built_within, check_config, telling
from latentpipe.checkpoints.config_ranges import check_network_config, check_schedule, check_scheduler_config
from latentpipe.checkpoints.model_files import (
    STABLE_DIFFUSION,
    check_parts,
    check_small_files,
    check_tokenizer,
    read_card,
    tokenizer_hash,
)
from latentpipe.checkpoints.plain_text import PlainTextEncoder, plain_pipeline, plain_text
from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.single_file import opening as single_file
from latentpipe.checkpoints.single_file.folders import check_folder
from latentpipe.checkpoints.single_file.gather import Stated
from latentpipe.checkpoints.single_file.gguf_tensors import refuse_packed
from latentpipe.checkpoints.single_file.hashes import file_hashes, former_file_hash
from latentpipe.checkpoints.tensor_source import CARD_FILE, VAE_FILE, offline, weight_files
from latentpipe.checkpoints.text_names import as_hashed, as_named_by, restore_prefix
from latentpipe.checkpoints.vae_io import PREVIEW_FILE, load_vae, open_vae, refuse_wrapped, vae_hash
from latentpipe.utils.deferred_imports import active
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import HASH_LENGTH, atomic_folder, content_hash, load_strictly, read_header, read_json, read_tensors
from latentpipe.utils.logging import quiet
from latentpipe.utils.out_of_memory import refuse
from latentpipe.vae.precision import all_finite

TEXT_FILE = "model.safetensors"
PARTS = {"vae": VAE_FILE, "unet": VAE_FILE, "text_encoder": TEXT_FILE}  # of a Stable Diffusion folder


def load_pipeline(
    folder: Path, dtype: torch.dtype | None = torch.float32, stated: Stated | None = None, to_draw: bool = False
) -> Any:
    """A diffusers pipeline from its folder or single file, offline; every network is checked.

    dtype    None: as it is stored
    to_draw  it is not saved: where imports are put off, its text side may be one that needs no transformers
    """
    folder = Path(folder)
    if folder.is_file():
        with quiet():
            return check_tokenizer(single_file.load(folder, dtype, stated), folder)
    dtype = check_folder(folder, dtype, stated)
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    with quiet():
        import diffusers

        cls: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
        if not _is_class(cls, diffusers.DiffusionPipeline) or "vae" not in index:
            raise UserError(
                f"{folder} holds a {str(name)[:80]}; expected a pipeline with a VAE of diffusers {diffusers.__version__}."
            )
        if name in STABLE_DIFFUSION:  # Stable Diffusion 1 and 2: text to image, img2img, inpainting
            check_parts(folder)
        check_small_files(folder)
        _check_numbers(folder, index)
        enforce_chain(folder)
        length = plain_text(folder, index) if to_draw and active() else None
        told = {part: source for part, source in networks(index).items() if part != "vae"}
        parts = {part: _network(folder / part, *source, dtype, plain=length is not None) for part, source in told.items()}
        options = {"requires_safety_checker": index.get("requires_safety_checker", True)} if "safety_checker" in index else {}
        parts["vae"] = load_vae(folder / "vae", dtype)
        try:
            if length is not None:
                pipe = plain_pipeline(cls, folder, index["scheduler"][1], length, parts)
            else:
                pipe = cls.from_pretrained(folder, **parts, **options, local_files_only=True, use_safetensors=True)
        except Exception as error:  # of diffusers, transformers and tokenizers, for a file that is missing or damaged
            refuse(error, str(folder))
            reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
            raise UserError(f"{folder} is not a complete model: {reason}") from None
        check_tokenizer(pipe, folder)
        check_schedule(getattr(pipe, "scheduler", None), folder / "scheduler")
        return pipe


def _is_class(value: Any, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base)


def _check_numbers(folder: Path, index: dict[str, Any]) -> None:
    """UserError where a number in a part's config would make wrong pictures."""
    source = folder / "scheduler" / "scheduler_config.json"
    if index.get("scheduler"):
        check_scheduler_config(read_json(source, infinite=True), source)
    for part in networks(index):
        source = folder / part / "config.json"
        if source.is_file():
            check_network_config(read_json(source), source)


def move_pipeline(pipe: Any, device: str) -> Any:
    """The pipeline with its networks on a device; UserError where that cannot be used."""
    try:
        return pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None


def networks(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of the parts of a pipeline that have weights, from its model_index.json."""
    found: dict[str, tuple[str, str]] = {}
    for name, source in index.items():
        if isinstance(source, list) and len(source) == 2 and source[0]:
            if not (name.isidentifier() and all(isinstance(word, str) for word in source)):
                raise UserError(f"model_index.json: {name[:80]!r} is {str(source)[:80]}; expected a library and a class.")
            found[name] = (source[0], source[1])
    passive = ("Tokenizer", "TokenizerFast", "Scheduler", "Processor", "Extractor")
    return {name: source for name, source in found.items() if not source[1].endswith(passive) and "okenizer" not in name}


def _network(folder: Path, library: str, name: str, dtype: torch.dtype, plain: bool = False) -> Any:
    """A part with its weights, strictly, in eval mode."""
    import diffusers
    import transformers

    headers = [read_header(file) for file in sorted(folder.glob("*.safetensors"))]  # says what is wrong with a damaged one
    config = read_json(folder / "config.json")
    check_config(config, folder / "config.json")
    if plain and name == "CLIPTextModel":
        return _filled(lambda: PlainTextEncoder(config), name, folder, dtype)
    if library == "transformers" and name == "CLIPTextModel":
        read = transformers.CLIPTextConfig.from_pretrained
        return _filled(lambda: transformers.CLIPTextModel(read(folder)), name, folder, dtype)
    if library == "diffusers" and name == "UNet2DConditionModel":
        return _filled(lambda: diffusers.UNet2DConditionModel.from_config(config), name, folder, dtype)
    cls: Any = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), name, None)
    if cls is None:
        module = getattr(diffusers.pipelines, library, None)
        cls = getattr(module, name, None)
    if not _is_class(cls, torch.nn.Module) or not hasattr(cls, "from_pretrained"):
        raise UserError(f"{folder}: the class {library}.{name} is no network of this version of diffusers or transformers.")
    elements = sum(math.prod(shape) for header in headers for shape in header.shapes.values())
    with telling(folder, name):
        model, seen = built_within(
            lambda: cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, **offline(folder)),
            elements,
            sum(len(header.shapes) for header in headers),
        )
    wrong = [f"missing {key}" for key in seen["missing_keys"]] + [f"misshapen {key}" for key in seen["mismatched_keys"]]
    wrong += [f"{key} holds values that are not finite" for key, value in model.named_parameters() if not all_finite(value)]
    if wrong:
        raise UserError(f"{folder} does not fit {name}: {'; '.join(map(str, sorted(wrong)[:5]))}.")
    return model.eval()


def _filled(build: Callable[[], Any], name: str, folder: Path, dtype: torch.dtype) -> Any:
    """What `build` makes, with the weights of `folder`, in eval mode."""
    source = folder / PARTS[folder.name]
    if not any(folder.glob("*.safetensors")):
        read_header(source)  # says that there is none
    tensors = tensors_of_part(folder)
    with telling(folder, name):
        model = built_within(build, sum(map(torch.numel, tensors.values())), len(tensors))
    load_strictly(model, as_named_by(model, tensors), source if source.is_file() else folder)
    return torch.nn.Module.to(model, dtype).eval()


def save_pipeline(pipe: Any, folder: Path, card: Mapping[str, Any], vae_folder: Path) -> None:
    """Write a pipeline folder in fp16, atomically, that ``StableDiffusionPipeline.from_pretrained(folder)`` opens.

    The VAE's card and preview map come along from `vae_folder`; the VAE's hash is written into the card.
    """
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            refuse_wrapped(part, f"The model's {name}")
            refuse_packed(part, f"The model's {name}", "a folder is written in fp16")
    with atomic_folder(folder) as part, quiet():
        pipe.to(torch.float16).save_pretrained(part, safe_serialization=True)
        text = part / "text_encoder"
        config = read_json(text / "config.json")
        config["dtype"] = "float32"  # else transformers comes up in fp16 beside a UNet in fp32
        (text / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        restore_prefix(text / PARTS["text_encoder"])
        for name in (CARD_FILE, PREVIEW_FILE):
            if (vae_folder / name).is_file():
                shutil.copy(vae_folder / name, part / "vae" / name)
        found = hashes(part)
        # The VAE is stored in fp16 here; its hash may differ from that of the file it came from.
        (part / CARD_FILE).write_text(json.dumps({**card, "vae_hash": found["vae"], "hashes": found}, indent=2) + "\n")
        pipe.to(torch.float32)


def hashes(folder: Path, stated: Stated | None = None) -> Mapping[str, str]:
    """Hashes of what decides a pipeline's pictures: contents of its networks; tokenizer and scheduler files."""
    folder = Path(folder)
    if folder.is_file():
        return file_hashes(folder, stated)  # each is computed when it is asked for
    found = {"vae": vae_hash(folder / "vae")}
    index = read_json(folder / "model_index.json")
    for part, (_, cls) in networks(index).items():
        if part != "vae":
            found[part] = content_hash(as_hashed(tensors_of_part(folder / part), cls))
    for part in sorted(path.name for path in folder.glob("tokenizer*") if path.is_dir()):
        found[part] = tokenizer_hash(folder / part) or hashlib.sha256().hexdigest()
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", infinite=True)
    scheduler.pop("_diffusers_version", None)
    return found | {"scheduler": hashlib.sha256(json.dumps(scheduler, sort_keys=True).encode()).hexdigest()}


def former_hash(folder: Path, stated: Stated | None, part: str) -> str | None:
    """The hash of a text encoder as recipes and LoRA files of before have it: of its tensors by their stored names."""
    if not part.startswith("text_encoder"):
        return None
    if folder.is_file():
        return former_file_hash(folder, stated, part)
    return content_hash(tensors_of_part(folder / part)) if (folder / part).is_dir() else None


def tensors_of_part(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a part's weights: its file, the shards that an index names, or its one variant (such as fp16)."""
    known = (weight_files(folder, name) for name in (VAE_FILE, TEXT_FILE))
    files = next((found for found in known if found[0].is_file() or len(found) > 1), ())
    files = files or tuple(path for path in sorted(folder.glob("*.safetensors")) if "." not in path.stem)
    if not files:
        raise UserError(f"{folder}: no such file; expected weights in safetensors format.")
    return {name: tensor for path in files for name, tensor in read_tensors(path).items()}


def enforce_chain(folder: Path) -> None:
    """UserError where a pipeline's card says that its denoiser was trained on another VAE's latents.

    A VAE that was swapped in, and proved to have the same space, is named in the card by its own hash.
    """
    content = read_card(folder)
    if content is None:
        return
    expected, given = content.get("vae_hash"), vae_hash(folder / "vae")
    swapped = content.get("swapped_vae") or {}
    if expected and given not in (expected, swapped.get("hash")):
        raise UserError(
            f"{folder}: its denoiser was trained on latents of VAE {expected[:HASH_LENGTH]}, but the VAE beside it is "
            f"{given[:HASH_LENGTH]}. Put the right VAE back, or train a denoiser for this one."
        )


def check_reference(folder: Path) -> None:
    """UserError where a model's VAE was put in by force, or for its decoder alone: nothing can be measured against that one."""
    card = read_card(folder) or {}
    swapped = card.get("swapped_vae") or {}
    verdict = swapped.get("verdict") or {}
    if verdict.get("forced") or verdict.get("outcome") == "decoder fits":
        how = "by force" if verdict.get("forced") else "for its decoder alone"
        raise UserError(
            f"{folder}: its VAE was put in {how} ({swapped.get('name')}), so other VAEs cannot be judged beside it. "
            f"Its denoiser was trained on VAE {str(card.get('vae_hash'))[:HASH_LENGTH]}; give the model that has that one."
        )


def describe(name: str | Path) -> dict[str, Any]:
    """What a model or VAE says about itself: class, parameters, latent space, hashes, card."""
    try:
        folder = find_model(name)
    except UserError:
        folder = find_model(name, "vae")
    card = read_card(folder)
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        parts = {part: _count(tensors_of_part(folder / part)) for part in networks(index) if part != "vae"}
        vae = open_vae(folder / "vae")
        return {
            "folder": str(folder),
            "class": index.get("_class_name"),
            "parameters": {"vae": _count(vae.tensors), **parts},
            "space": asdict(vae.space),
            "hashes": hashes(folder),
            "card": card,
        }
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds neither model_index.json (a pipeline) nor config.json (a VAE).")
    vae = open_vae(folder)
    return {
        "folder": str(folder),
        "class": vae.config.get("_class_name"),
        "parameters": _count(vae.tensors),
        "space": asdict(vae.space),
        "hash": content_hash(vae.tensors, vae.space),
        "card": card,
    }


def _count(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
