"""What a LoRA file says about itself: title, base, trigger words, training; for people, for other programs and for us."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from latentpipe.lora.adapter import Lora
from latentpipe.utils.errors import UserError
from latentpipe.utils.reading import parse_json

BASE, WORDS, SAMPLE = "latentpipe.base", "latentpipe.trigger_words", "latentpipe.sample"
TRAINING, MERGED = "latentpipe.training", "latentpipe.loras"


def card(
    lora: Lora,
    *,
    title: str,
    base_hashes: Mapping[str, str],
    trigger_words: Sequence[str] = (),
    sample_settings: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    base_model: str = "",
    architecture: str = "",
    description: str = "",
    date: str = "",
    loras: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Metadata for `write_lora`: ModelSpec 1.0.1 (Stability-AI/ModelSpec), kohya's ``ss_*`` and our own keys.

    base_hashes      content hash of each component it was made for: "unet", "text_encoder", "vae", ...
    sample_settings  a prompt and settings that show it; training: what made it; loras: weights of those it was merged from
    base_model       what the base is called; architecture is that of ModelSpec ("stable-diffusion-v1/lora")
    date             ISO 8601; left out unless given, so that the same LoRA is the same file

    ``modelspec.hash_sha256`` depends on the layout, so `write_lora` adds it.
    """
    kinds = {layer.kind for _, _, layer in lora.layers()}
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture or f"{base_model or 'unknown'}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.description": description,
        "modelspec.date": date,
        "modelspec.trigger_phrase": ", ".join(trigger_words),
        "modelspec.usage_hint": f"Use: {', '.join(trigger_words)}" if trigger_words else "",
        "ss_network_dim": _common(layer.rank for _, _, layer in lora.layers()),
        "ss_network_alpha": _common(layer.scale * layer.rank for _, _, layer in lora.layers()),
        "ss_network_module": "networks.lora" if kinds <= {"lora"} else "lycoris.kohya",
        "ss_base_model_version": base_model,
        "ss_sd_model_name": base_model,
        "ss_sd_model_hash": base_hashes.get("unet", base_hashes.get("transformer", "")),
        "ss_vae_hash": base_hashes.get("vae", ""),
        BASE: json.dumps(dict(base_hashes), sort_keys=True),
        WORDS: json.dumps(list(trigger_words)) if trigger_words else "",
        SAMPLE: json.dumps(dict(sample_settings), sort_keys=True) if sample_settings else "",
        TRAINING: json.dumps(dict(training), sort_keys=True) if training else "",
        MERGED: json.dumps(dict(loras), sort_keys=True) if loras else "",
    }
    return {name: value for name, value in metadata.items() if value}


def stated_base(lora: Lora) -> dict[str, str]:
    """Content hashes by component of the base that it was made for; empty where the file names none."""
    value = _stored(lora, BASE, {})
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise UserError(_damaged(lora, BASE, "an object of component and hash"))
    return value


def trigger_words(lora: Lora) -> list[str]:
    """The words of a prompt that call it up; also ModelSpec's trigger phrase of other people's files."""
    phrase = lora.metadata.get("modelspec.trigger_phrase", "")
    value = _stored(lora, WORDS, [word.strip() for word in phrase.split(",") if word.strip()])
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise UserError(_damaged(lora, WORDS, "a list of words"))
    return value


def drawn_with(lora: Lora) -> dict[str, int | float]:
    """The settings that it was distilled for, by their names in Python; empty where its file names none."""
    value = _stored(lora, SAMPLE, {})
    if not isinstance(value, dict):
        raise UserError(_damaged(lora, SAMPLE, "an object of settings"))
    found = {name: value[name] for name in ("num_inference_steps", "guidance_scale") if name in value}
    if not all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in found.values()):
        raise UserError(_damaged(lora, SAMPLE, "numbers of steps and guidance"))
    return found


def _stored(lora: Lora, key: str, default: Any) -> Any:
    if key not in lora.metadata:
        return default
    try:
        return parse_json(lora.metadata[key])
    except ValueError:
        raise UserError(_damaged(lora, key, "JSON")) from None


def _damaged(lora: Lora, key: str, expected: str) -> str:
    return f"LoRA '{lora.name}': its metadata's {key} is damaged; expected {expected}. Export the LoRA again."


def _common(values: Any) -> str:
    """The value that most layers have, as kohya writes it: "Dynamic" where they differ."""
    counts = Counter(values)
    return f"{next(iter(counts)):g}" if len(counts) == 1 else ("Dynamic" if counts else "")
