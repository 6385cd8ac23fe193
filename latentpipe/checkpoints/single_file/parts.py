"""Which networks lie in a file: names sorted by the prefixes that programs give them, shapes by the names without."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from latentpipe.utils.errors import UserError
from latentpipe.utils.io import Header

# Prefix and slot; longer ones first. LDM's, sgm's (SDXL) and ComfyUI's.
PREFIXES = (
    ("model.diffusion_model.", "denoiser"),
    ("diffusion_model.", "denoiser"),
    ("unet.", "denoiser"),
    ("first_stage_model.", "vae"),
    ("vae.", "vae"),
    ("cond_stage_model.transformer.", "clip_l"),
    ("cond_stage_model.model.", "clip_h"),
    ("conditioner.embedders.0.transformer.", "clip_l"),
    ("conditioner.embedders.0.model.", "clip_g"),
    ("conditioner.embedders.1.model.", "clip_g"),
    ("text_encoders.clip_l.transformer.", "clip_l"),
    ("text_encoders.clip_g.transformer.", "clip_g"),
    ("text_encoders.clip_h.transformer.", "clip_h"),
    ("text_encoders.t5xxl.transformer.", "t5"),
)
# One mark of each layout: a module that every network of that kind has, and nothing else.
LAYOUTS = (
    ("ldm", "denoiser", r"(input|output)_blocks\.\d+\.\d+\.|middle_block\.\d+\."),
    ("bfl", "denoiser", r"(double|single)_blocks\.\d+\.(img_|txt_|linear|modulation)"),
    ("sd3", "denoiser", r"joint_blocks\.\d+\.(x|context)_block\."),
    ("diffusers-unet", "denoiser", r"(down|up)_blocks\.\d+\.(resnets|attentions)\.|time_embedding\.linear_1\."),
    ("diffusers-flux", "denoiser", r"single_transformer_blocks\.\d+\."),
    ("diffusers-sd3", "denoiser", r"transformer_blocks\.\d+\.(attn2?|norm1(_context)?)\.(add_q_proj|linear)\."),
    ("vae", "vae", r"(encoder|decoder)\.(conv_in|conv_out|down|up|mid|down_blocks|up_blocks|mid_block)\."),
    ("open-clip", "clip", r"(model\.)?transformer\.resblocks\.\d+\."),
    ("clip", "clip", r"(text_model\.)?(encoder\.layers\.\d+\.self_attn|embeddings\.token_embedding)\."),
    ("t5", "t5", r"encoder\.block\.\d+\.layer\.\d+\.|shared\.weight$"),
)
VISION = re.compile(r"(.*\.)?(vision_model|visual)\.")
ADAPTER = re.compile(r"(.*[._])?(lora|hada|lokr)_?[._]?(down|up|A|B|w1|w2|mid)|lora_(unet|te)|(unet|text_encoder):\d+:(up|down)")
QUANTIZED = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale", ".comfy_quant")
MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "scaled_fp8")
# What training left beside the networks: averages, the schedule's tables, counters, the temperature of CLIP's loss.
LEFTOVER = re.compile(
    r"model_ema\.|loss\.|denoiser\.|(.*\.)?(logit_scale|scaled_fp8)$|(global_step|epoch|logvar|betas|posterior_.*|scale_factor|"
    r"alphas_cumprod.*|sqrt_.*|log_one_minus_.*|lvlb_weights)$|(.*\.)?position_ids$|optimizer"
)
EMBEDDING = re.compile(r"emb_params$|string_to_param|<.*>$|clip_[lg]$|bundle_emb\.")


@dataclass(frozen=True)
class Part:
    """A network of a file.

    slot    "denoiser", "vae", "clip_l", "clip_g", "clip_h", "t5", or "clip" where the names alone do not tell which
    layout  whose names it has: "ldm", "bfl", "sd3", "diffusers-...", "vae", "clip", "open-clip", "t5"
    path    the file
    names   its own names, without prefix -> the file's
    shapes  by its own names; dtypes likewise ("F16", ...)
    scales  file's names of fp8 scales, by the own name of the weight that they belong to
    """

    slot: str
    layout: str
    path: Path
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    scales: dict[str, str]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; UserError where a complete network has it and this one does not."""
        if name not in self.shapes:
            raise UserError(f"{self.path}: its {WORDS.get(self.slot, self.slot)} is not complete; it has no {name}.")
        return self.shapes[name]


WORDS = {"denoiser": "denoiser", "vae": "VAE", "clip": "text encoder", "t5": "T5 text encoder"} | {
    name: f"text encoder ({name})" for name in ("clip_l", "clip_g", "clip_h")
}


@dataclass(frozen=True)
class Contents:
    """What the names of a file are: its networks by slot, its marker keys, and how many tensors belong to none of these."""

    parts: dict[str, Part]
    markers: frozenset[str]
    leftovers: int
    strange: tuple[str, ...]


def contents(header: Header, path: Path) -> Contents:
    """The networks of a file by its header. UserError where two of one kind lie in it."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    markers, leftovers, bare = set(), 0, {}
    for name in header.shapes:
        prefix, slot = next(((prefix, slot) for prefix, slot in PREFIXES if name.startswith(prefix)), ("", ""))
        own = name.removeprefix(prefix)
        if name in MARKERS:
            markers.add(name)
        elif LEFTOVER.match(name) or (slot and LEFTOVER.match(own)):
            leftovers += 1
        elif slot:
            groups.setdefault((slot, prefix), {})[own] = name
        else:
            bare[name] = name
    parts: dict[str, Part] = {}
    for (slot, prefix), names in groups.items():
        layout = next((layout for layout, kind, _ in _layouts(names) if slot.startswith(kind)), "")
        if not layout and prefix != "model.diffusion_model.":
            bare |= {full: full for full in names.values()}  # a prefix by chance, such as ``vae.`` of a video model
            continue
        if slot in parts:
            raise UserError(f"{path}: it holds two networks of one kind ({WORDS[slot]}): {next(iter(names.values()))} and "
                            f"{next(iter(parts[slot].names.values()))}; it mixes two formats.")  # fmt: skip
        parts[slot] = _part(slot, layout, path, names, header)
    if bare and (found := _layouts(bare)) and not any(VISION.match(name) for name in bare):
        layout, slot, _ = found[0]
        slot = _width_slot(bare, header) if slot == "clip" else slot
        if slot not in parts and (not parts or slot != "clip"):
            parts[slot] = _part(slot, layout, path, bare, header)
            bare = {}
    return Contents(parts, frozenset(markers), leftovers, tuple(bare))


def is_adapter(names: Iterable[str]) -> bool:
    """Whether names are those of a LoRA, or of a network with one attached."""
    return any(ADAPTER.match(name) for name in names)


def names_an_embedding(names: Iterable[str]) -> bool:
    """Whether names are those of a textual inversion embedding, alone."""
    names = list(names)
    return bool(names) and all(EMBEDDING.match(name) for name in names)


def _layouts(names: Mapping[str, str]) -> list[tuple[str, str, str]]:
    return [row for row in LAYOUTS if any(re.match(row[2], name) for name in names)]


def _part(slot: str, layout: str, path: Path, names: Mapping[str, str], header: Header) -> Part:
    scales = {}
    for own, full in names.items():
        if own.endswith((".scale_weight", ".weight_scale")):
            scales[own.rpartition(".")[0] + ".weight"] = full
    kept = {name: full for name, full in names.items() if not name.endswith(QUANTIZED)}
    shapes = {name: header.shapes[full] for name, full in kept.items()}
    return Part(slot, layout, path, kept, shapes, {name: header.dtypes[full] for name, full in kept.items()}, scales)


def _width_slot(names: Mapping[str, str], header: Header) -> str:
    """Which of CLIP's text encoders a file of one alone holds, by its width."""
    ends = ("token_embedding.weight", "token_embedding")
    width = next((header.shapes[name][-1] for name in names if name.endswith(ends) and header.shapes[name]), 0)
    return {768: "clip_l", 1024: "clip_h", 1280: "clip_g"}.get(width, "clip")
