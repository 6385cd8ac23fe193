"""Names of modules in LoRA files: kohya's underscores, LDM's blocks and prefixes, to and from diffusers' dotted paths."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping

from latentpipe.lora.adapter import COMPONENTS
from latentpipe.utils.errors import UserError

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
ROLES = {
    "lora_A": "lora_A",
    "lora_down": "lora_A",
    "down": "lora_A",
    "lora_B": "lora_B",
    "lora_up": "lora_B",
    "up": "lora_B",
    "lora_mid": "lora_mid",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "lora_magnitude_vector": "lora_magnitude_vector",
} | {name: name for name in LOHA + LOKR}

# ``lora_A.weight`` and, with the adapter's name as in a live model, ``lora_A.default.weight``
_PAIR = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up|lora_mid)(?:\.[^.]+)?\.weight")
_OLD = re.compile(r"(.+?)(_lora|\.lora|\.lora_linear_layer)\.(down\.weight|up\.weight|alpha)")
_SINGLE = re.compile(
    rf"(.+)\.(alpha|dora_scale|lora_magnitude_vector|{'|'.join(sorted(LOHA + LOKR, key=len, reverse=True))})"
    r"(?:\.[^.]+)?(?:\.weight)?"
)


def take_apart(key: str) -> tuple[str, str] | None:
    """Stem and role of a key, None for one of no adapter.

    Roles are peft's parameter names, and "alpha", "dora_scale" (kohya's magnitudes), "lora_mid" (LoCon's third factor).
    The stem of diffusers' oldest keys (``to_q_lora.down.weight``) ends with "@old".
    """
    if found := _OLD.fullmatch(key):
        role = found[3].removesuffix(".weight")
        return found[1] + ("@old" if found[2] == "_lora" else ""), ROLES[role]
    found = _PAIR.fullmatch(key) or _SINGLE.fullmatch(key)
    return (found[1], ROLES[found[2]]) if found else None


Base = Mapping[str, Collection[str]]  # module paths of the model by component

PEFT = "base_model.model."
TEXT = "text_model."
CLIP_TOPS = ("encoder.layers.", "embeddings.", "final_layer_norm")  # what lies below ``text_model.`` in files
UNET_TOPS = {"down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding", "class_embedding"}
KOHYA = {
    "unet": "unet",
    "transformer": "transformer",
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
    "vae": "vae",
}
_KOHYA_STEM = re.compile(r"(?:lora_(unet|transformer|te[123]?|vae)|lycoris)_([^.]+)")
_LDM_DOTTED = re.compile(
    r"(?:(?:unet|model|diffusion_model)\.)*(?:base_model\.model\.)?"
    r"((?:(?:input|output)_blocks|middle_block|time_embed|label_emb|out)\.\d.*)"
)
_FIRST_CODE = re.compile(r"(^|[._])(double_blocks|single_blocks|joint_blocks)[._]\d")
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

# Names of modules that hold an underscore themselves: diffusers' UNets, transformers and autoencoders, CLIP, T5, Gemma.
_COMPOUND = """
    add_embedding add_k_proj add_q_proj add_time_proj add_v_proj caption_norm caption_projection class_embedding cond_proj
    context_embedder conv_depth conv_in conv_inverted conv_norm_out conv_out conv_point conv_shortcut down_blocks down_proj
    embed_tokens ff_context final_layer_norm gate_proj group_norm guidance_embedder k_proj layer_norm1 layer_norm2 linear_1
    linear_2 mid_block norm1_context norm2_context norm_added_k norm_added_q norm_k norm_out norm_q out_proj patch_embed
    pos_embed position_embedding post_quant_conv proj_attn proj_in proj_mlp proj_out q_proj quant_conv self_attn
    single_transformer_blocks text_embedder text_model text_projection time_emb_proj time_embed time_embedding time_text_embed
    timestep_embedder to_add_out to_k to_out to_q to_qkv to_qkv_multiscale to_v token_embedding transformer_blocks up_blocks
    up_proj v_proj wi_0 wi_1 x_embedder
"""
COMPOUND = frozenset(_COMPOUND.split())
_LONGEST = max(name.count("_") for name in COMPOUND) + 1

_LDM_ALONE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
_LDM_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}


def flat(path: str) -> str:
    """A dotted path as kohya writes it."""
    return path.replace(".", "_")


def unflat(name: str) -> str:
    """Kohya's name as a dotted path, by the table of names that hold underscores themselves."""
    words, path, at = name.split("_"), [], 0
    while at < len(words):
        size = next((n for n in range(_LONGEST, 1, -1) if "_".join(words[at : at + n]) in COMPOUND), 1)
        path.append("_".join(words[at : at + size]))
        at += size
    return ".".join(path)


def from_ldm(name: str, per_block: int = 2) -> str:
    """Kohya's name in the blocks of the first UNet code (``input_blocks_4_1_...``) as its name in diffusers' blocks.

    per_block  residual layers in a block of the encoder: 2 in SD1.5 and SDXL
    """
    if name in _LDM_ALONE:
        return _LDM_ALONE[name]
    if found := re.fullmatch(r"middle_block_(\d)_(.+)", name):
        part = {"0": "resnets_0", "1": "attentions_0", "2": "resnets_1"}.get(found[1], found[1])
        return f"mid_block_{part}_{_LDM_RESNET.get(found[2], found[2])}"
    found = re.fullmatch(r"(input|output)_blocks_(\d+)_(\d)_(.+)", name)
    if found is None:
        return name
    side, place, part, rest = found[1], int(found[2]), found[3], found[4]
    block, layer = divmod(place - 1 if side == "input" else place, per_block + 1)
    level = f"{'down' if side == 'input' else 'up'}_blocks_{block}"
    if rest == "op" or (rest == "conv" and side == "output"):
        return f"{level}_{'downsamplers' if rest == 'op' else 'upsamplers'}_0_conv"
    if part == "0":
        return f"{level}_resnets_{layer}_{_LDM_RESNET.get(rest, rest)}"
    return f"{level}_attentions_{layer}_{rest}"


def in_file(component: str, path: str) -> str:
    """The path as files have it: a CLIP encoder's with ``text_model.``."""
    return TEXT + path if component.startswith("text_encoder") and path.startswith(CLIP_TOPS) else path


def kohya_stem(component: str, path: str, two: bool) -> str:
    """The part of kohya's keys before the first dot; `two`: the pipeline has two text encoders."""
    prefix = {
        "text_encoder": "te1" if two else "te",
        "text_encoder_2": "te2",
        "text_encoder_3": "te3",
    }.get(component, component)
    return f"lora_{prefix}_{flat(in_file(component, path))}"


class KeyResolver:
    """Component and path of each stem (a key without its last words) of one file.

    base     module paths of the model it shall go on: kohya's names are resolved among them first
    default  the component of stems that name none, where the file says so
    """

    def __init__(self, stems: Iterable[str], base: Base | None = None, default: str = "") -> None:
        stems = sorted(set(stems))
        foreign = next((stem for stem in stems if _FIRST_CODE.search(stem)), None)
        if foreign:
            raise UserError(
                f"it names modules as FLUX's or SD3's first code does ({foreign}), where several of diffusers' layers are one; "
                "load it with diffusers' load_lora_weights, save it with save_lora_weights, and give that file."
            )
        self.base = base or {}
        self._flat: dict[str, dict[str, str]] = defaultdict(dict)
        for component, paths in self.base.items():
            for path in paths:
                self._flat[component].setdefault(flat(path), path)
        unet = self.base.get("unet", ())
        counts = [int(found[1]) for path in unet if (found := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", path))]
        self._per_block = max(counts, default=1) + 1
        self._bare = default if default in COMPONENTS else self._majority([self._parts(stem) for stem in stems])

    def resolve(self, stem: str) -> tuple[str, str]:
        """Component and path; whether the model has that module, the report says."""
        component, name, dotted = self._parts(stem)
        component = component or self._bare
        if dotted:
            return component, _dotted(component, name)
        if component == "unet" and "unet" not in self.base and ("transformer" in self.base or self._bare == "transformer"):
            component = "transformer"  # kohya calls every denoiser unet
        text = component.startswith("text_encoder")
        known = self._flat.get(component, {})
        for candidate in (name, name.removeprefix("text_model_") if text else from_ldm(name, self._per_block)):
            if candidate in known:
                return component, known[candidate]
        path = unflat(name if text else from_ldm(name, self._per_block))
        return component, path.removeprefix(TEXT) if text else path

    def _parts(self, stem: str) -> tuple[str, str, bool]:
        """Component ("" where none is named), the rest, and whether that is dotted."""
        if found := _KOHYA_STEM.fullmatch(stem.removesuffix("@old")):
            return KOHYA.get(found[1] or "", ""), found[2], False
        if stem.startswith("diffusion_model."):  # LDM's blocks with dots
            return "unet", flat(stem.removeprefix("diffusion_model.")), False
        name = stem.removeprefix(PEFT)
        if found := _LDM_DOTTED.fullmatch(name):  # OneTrainer, LyCORIS: "unet." or nothing before LDM's blocks
            return "unet", flat(found[1]), False
        head, _, rest = name.partition(".")
        if head in COMPONENTS and rest:
            return head, rest.removeprefix(PEFT), True
        return "", name, True

    def _majority(self, parts: list[tuple[str, str, bool]]) -> str:
        """The component of the stems that name none (and of kohya's ``lora_unet_``)."""
        names = [
            _dotted(component, name) if dotted else unflat(from_ldm(name))
            for component, name, dotted in parts
            if component in ("", "unet")
        ]
        paths = [name.removeprefix(TEXT) for name in names]
        hits = {component: len(set(paths) & set(known)) for component, known in self.base.items()}
        if hits and max(hits.values()):
            return max(hits, key=lambda component: hits[component])
        votes = Counter(component for name in names if (component := _looks(name)))
        return votes.most_common(1)[0][0] if votes else "unet"


def _dotted(component: str, name: str) -> str:
    old = ".processor." in name or name.endswith("@old")
    path = name.removesuffix("@old").replace(".processor.", ".")
    head, _, last = path.rpartition(".")
    if component.startswith("text_encoder"):
        path = path.removeprefix(TEXT)
        return f"{head.removeprefix(TEXT)}.{_OLD_TEXT[last]}" if old and last in _OLD_TEXT else path
    return f"{path}.0" if old and last == "to_out" else path


def _looks(path: str) -> str:
    """The component that a path alone speaks for, "" for none."""
    head, _, rest = path.partition(".")
    if head == "text_model" or path.startswith("encoder.layers.") or ".self_attn." in path:
        return "text_encoder"
    if head in ("encoder", "decoder") and not rest.startswith("block."):
        return "vae"
    if head in ("quant_conv", "post_quant_conv"):
        return "vae"
    if head in UNET_TOPS:
        return "unet"
    return "transformer" if "transformer_blocks" in head else ""
