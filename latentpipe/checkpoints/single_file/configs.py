"""Configs of a model's parts: the shipped set of its family, fitted to the shapes; or those of a diffusers folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentpipe.checkpoints.components import check_config
from latentpipe.checkpoints.config_ranges import check_network_config, check_scheduler_config
from latentpipe.checkpoints.single_file.families import FAMILIES, channels, depths
from latentpipe.checkpoints.single_file.identify import Identity
from latentpipe.checkpoints.single_file.parts import Part
from latentpipe.checkpoints.single_file.tokenizers import DATA
from latentpipe.checkpoints.single_file.unet import diffusers_names
from latentpipe.utils.errors import UserError
from latentpipe.utils.reading import read_json

# Which text encoders a pipeline's components are, by what its class name begins with; the first that fits.
SLOTS: dict[str, dict[str, tuple[str, ...]]] = {
    "StableDiffusionXL": {"text_encoder": ("clip_l",), "text_encoder_2": ("clip_g",)},
    "StableDiffusion3": {"text_encoder": ("clip_l",), "text_encoder_2": ("clip_g",), "text_encoder_3": ("t5",)},
    "StableDiffusion": {"text_encoder": ("clip_l", "clip_h")},
    "Flux": {"text_encoder": ("clip_l",), "text_encoder_2": ("t5",)},
}
COMPONENTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
PASSIVE = ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3", "feature_extractor", "image_encoder", "safety_checker")


@dataclass(frozen=True)
class Configs:
    """What no file of weights states.

    index       as model_index.json: the pipeline's class, its components and their classes, its flags
    networks    config of each component that has weights
    scheduler   config of the scheduler
    tokenizers  entries of the shipped tokenizers, by component
    folder      the diffusers folder that all of it is from; None: shipped
    """

    index: dict[str, Any]
    networks: dict[str, dict[str, Any]]
    scheduler: dict[str, Any]
    tokenizers: dict[str, dict[str, Any]]
    folder: Path | None = None

    @property
    def pipeline(self) -> str:
        """The pipeline's class."""
        return str(self.index.get("_class_name"))

    def slots(self, component: str) -> tuple[str, ...]:
        """The slots of `parts.Part` that a component can be filled from."""
        if component in ("unet", "transformer"):
            return ("denoiser",)
        if component == "vae":
            return ("vae",)
        family = next((family for family in SLOTS if self.pipeline.startswith(family)), "")
        return SLOTS.get(family, {}).get(component, ())


def bundled_configs(found: Identity) -> Configs:
    """The shipped configs of an identified model, fitted to what its denoiser's shapes tell."""
    assert found.family is not None
    assert found.prediction is not None
    family, denoiser = FAMILIES[found.family], found.parts["denoiser"]
    stored = read_json(DATA / f"{family.configs}.json")
    index = stored["index"] | {"_class_name": family.pipelines[channels(denoiser)]}
    networks = {name: config for name, config in stored.items() if name not in (*PASSIVE, "index")}
    name = "unet" if "unet" in networks else "transformer"
    networks[name] |= {"ldm": _unet, "diffusers-unet": _unet, "bfl": _flux, "diffusers-flux": _flux}.get(denoiser.layout, _sd3)(
        denoiser
    )
    if found.family == "sd2" and found.prediction.kind == "v_prediction":
        networks[name] |= {"sample_size": 96, "upcast_attention": True}
    scheduler = found.prediction.scheduler(stored["scheduler"])
    if found.family == "flux-schnell":
        scheduler |= {"shift": 1.0, "use_dynamic_shifting": False}
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    tokenizers = {each: config for each, config in stored.items() if each.startswith("tokenizer")}
    return Configs(index, networks, scheduler, tokenizers)


def configs_in_folder(folder: Path, found: Identity) -> Configs:
    """The configs of a diffusers folder; its weights, where it has any, fill in what the file lacks."""
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"--config {folder}: no model_index.json in it; expected a diffusers folder (its weights may be absent).")
    index = read_json(folder / "model_index.json")
    _check_index(index, folder / "model_index.json")
    networks = {}
    for name, source in index.items():
        if isinstance(source, list) and source[0] and name not in PASSIVE:
            place = folder / name / "config.json"
            networks[name] = read_json(place)
            check_config(networks[name], place)
            check_network_config(networks[name], place)
    place = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(place, infinite=True)
    check_scheduler_config(scheduler, place)
    if found.prediction is not None and found.prediction.source == "stated":
        scheduler = found.prediction.scheduler(scheduler)
    return Configs(index, networks, scheduler, {}, folder)


def _check_index(index: Mapping[str, Any], place: Path) -> None:
    """UserError where a component is no library and class; other values (flags of the pipeline) are no lists."""
    for name, value in index.items():
        component = isinstance(value, list | dict) or name in (*PASSIVE, *COMPONENTS)
        two = isinstance(value, list) and len(value) == 2 and all(isinstance(word, str | None) for word in value)
        if component and not (two and name.isidentifier() and (value[0] is None) == (value[1] is None)):
            raise UserError(f"{place}: {name[:80]!r} is {str(value)[:80]}; expected a library and a class.")


def _unet(part: Part) -> dict[str, Any]:
    """Input channels and depths of a UNet's transformers."""
    config: dict[str, Any] = {"in_channels": channels(part)}
    down, middle, up = depths(diffusers_names(part))
    if not any(
        part.shapes[name][1:] == (2816,)
        for name in ("label_emb.0.0.weight", "add_embedding.linear_1.weight")
        if name in part.shapes
    ):
        return config  # every level that attends does so once, or as the family's config says
    layers = [_depth(level) for level in down]
    mirrored = [_depth(level) for level in up]
    config["transformer_layers_per_block"] = layers
    if mirrored != layers[::-1] or any(isinstance(depth, list) for depth in layers):
        config["reverse_transformer_layers_per_block"] = mirrored
    if not middle:
        config["mid_block_type"] = "UNetMidBlock2D"
    return config


def _depth(level: tuple[int, ...]) -> int | list[int]:
    return list(level) if len(set(level)) > 1 else level[0] if level else 1


def _flux(part: Part) -> dict[str, Any]:
    def blocks(pattern: str) -> int:
        return len({match[1] for name in part.shapes if (match := re.match(rf"{pattern}\.(\d+)\.", name))})

    taken = channels(part)
    return {
        "in_channels": taken,
        "out_channels": None if taken == 64 else 64,
        "num_layers": blocks("(?:double_blocks|transformer_blocks)"),
        "num_single_layers": blocks("(?:single_blocks|single_transformer_blocks)"),
        "guidance_embeds": any("guidance" in name for name in part.shapes),
    }


def _sd3(part: Part) -> dict[str, Any]:
    ldm = part.layout == "sd3"
    hidden = part.shape("x_embedder.proj.weight" if ldm else "pos_embed.proj.weight")[0]
    positions = part.shape("pos_embed" if ldm else "pos_embed.pos_embed")[1]
    blocks = {int(name.split(".")[1]) for name in part.shapes if re.match(r"(joint|transformer)_blocks\.\d+\.", name)}
    dual = {
        int(name.split(".")[1]) for name in part.shapes if re.match(r"(joint|transformer)_blocks\.\d+\.(x_block\.)?attn2\.", name)
    }
    config: dict[str, Any] = {
        "num_layers": max(blocks) + 1,
        "num_attention_heads": hidden // 64,
        "caption_projection_dim": hidden,
    }
    config |= {"pos_embed_max_size": round(positions**0.5), "dual_attention_layers": sorted(dual)}
    normed = any(re.search(r"\.(ln_q|norm_q)\.", name) for name in part.shapes)
    return config | {"qk_norm": "rms_norm" if normed else None}
