"""Families of models, told by the shapes of their denoisers; and whose names mean a family that is not opened."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from latentpipe.checkpoints.single_file.parts import Part
from latentpipe.utils.errors import UserError, near


@dataclass(frozen=True)
class Family:
    """A family whose single files open.

    name       for --family
    title      for people
    configs    the shipped set of configs
    pipelines  diffusers' class by the channels that the denoiser takes
    """

    name: str
    title: str
    configs: str
    pipelines: Mapping[int, str]


_XL = {4: "StableDiffusionXLPipeline", 9: "StableDiffusionXLInpaintPipeline", 8: "StableDiffusionXLInstructPix2PixPipeline"}
_SD = {4: "StableDiffusionPipeline", 9: "StableDiffusionInpaintPipeline", 8: "StableDiffusionInstructPix2PixPipeline"}
FAMILIES = {
    family.name: family
    for family in (
        Family("sd1", "Stable Diffusion 1.x", "sd1", _SD),
        Family("sd2", "Stable Diffusion 2.x", "sd2", {4: _SD[4], 9: _SD[9]}),
        Family("sdxl", "Stable Diffusion XL", "sdxl", _XL),
        Family("sdxl-refiner", "Stable Diffusion XL refiner", "sdxl-refiner", {4: "StableDiffusionXLImg2ImgPipeline"}),
        Family("ssd-1b", "SSD-1B", "sdxl", {4: _XL[4]}),
        Family("vega", "Segmind Vega", "sdxl", {4: _XL[4]}),
        Family("sd3", "Stable Diffusion 3", "sd3", {16: "StableDiffusion3Pipeline"}),
        Family("sd3.5", "Stable Diffusion 3.5", "sd3", {16: "StableDiffusion3Pipeline"}),
        Family("flux-dev", "FLUX.1 dev", "flux", {64: "FluxPipeline"}),
        Family("flux-schnell", "FLUX.1 schnell", "flux", {64: "FluxPipeline"}),
        Family("flux-kontext", "FLUX.1 Kontext", "flux", {64: "FluxKontextPipeline"}),
        Family("flux-fill", "FLUX.1 Fill", "flux", {384: "FluxFillPipeline"}),
        Family("flux-control", "FLUX.1 Depth or Canny", "flux", {128: "FluxControlPipeline"}),
    )
}
# Transformer layers of the down, middle and up blocks, from above (the attention blocks of each level).
DEPTHS: dict[tuple[tuple[tuple[int, ...], ...], int, tuple[tuple[int, ...], ...]], str] = {
    (((), (2, 2), (10, 10)), 10, ((10, 10, 10), (2, 2, 2), ())): "sdxl",
    (((), (2, 2), (4, 4)), 0, ((4, 4, 10), (2, 1, 1), ())): "ssd-1b",
    (((), (1, 1), (2, 2)), 0, ((2, 2, 2), (1, 1, 1), ())): "vega",
}
# Marks of families that are not opened, of parts of none, and of models that draw nothing; the first that matches is told.
OTHERS = (
    (r"(.*\.)?(nerf_|__x0__)", "Chroma Radiance"),
    (r"(.*\.)?distilled_guidance_layer\.", "Chroma"),
    (r"(.*\.)?(double_stream_modulation_img|single_stream_modulation)\.", "FLUX.2"),
    (r"(.*\.)?early_stream_modulations\.", "FLUX.3"),
    (r"(.*\.)?txt_in\.individual_token_refiner\.", "HunyuanVideo"),
    (r"(.*\.)?(mlp_t5|style_embedder)\.", "HunyuanDiT"),
    (r"(.*\.)?encoder_hid_proj\.", "Kolors"),
    (r"(.*\.)?(t_block\.1|y_embedder\.y_embedding|adaln_single\.emb)", "PixArt"),
    (r"(.*\.)?(patchify_proj|audio_patchify_proj)\.", "LTX-Video"),
    (r"(.*\.)?head\.modulation$", "Wan (a video model)"),
    (r"(.*\.)?cap_embedder\.", "Lumina 2 or Z-Image"),
    (r"(.*\.)?double_layers\.\d+\.attn\.w[12]q\.", "AuraFlow"),
    (r"(.*\.)?txt_norm\.weight$|(.*\.)?transformer_blocks\.\d+\.img_mod\.1\.", "Qwen-Image"),
    (r"(.*\.)?blocks\.\d+\.cross_attn\.(q|kv)_linear\.", "Sana"),
    (r"(.*\.)?(clip_txt_mapper|effnet_mapper)\.|(.*\.)?down_blocks\.\d+\.\d+\.channelwise\.", "Stable Cascade"),
    (r"(.*\.)?motion_modules\.", "AnimateDiff (a motion module)"),
    (r"control_model\.|controlnet_cond_embedding\.|input_hint_block\.|(.*\.)?controlnet_blocks\.", "a ControlNet"),
    (r"image_proj\.|ip_adapter\.", "an IP-Adapter"),
    (r"pretransform\.|conditioner\.conditioners\.|model\.model\.(to_timestep|transformer)\.", "an audio model (Stable Audio)"),
    (
        r"encodec|quantizer\.(vq|quantizers)|(model\.)?encoder\.conv1\.|spec_enc\.|(.*\.)?enc_p\.|generator\.ups\.",
        "an audio model",
    ),
    (r"(model\.)?(language_model\.)?(model\.)?layers\.\d+\.(self_attn|mlp|input_layernorm)\.|lm_head\.", "a language model"),
    (r"(transformer\.)?h\.\d+\.(attn|mlp|ln_1)\.|transformer\.h\.|gpt_neox\.|(bert|roberta)\.", "a language model"),
    (r"(.*\.)?(body|RRDB_trunk)\.\d+\.(rdb|RDB)|params(_ema)?$|conv_first\.|model\.\d+\.sub\.", "an upscaler"),
    (r"(.*\.)?(vision_model|visual)\.", "an image encoder"),
)


def named(family: str) -> Family:
    """The family of a name; UserError lists the names."""
    if family not in FAMILIES:
        raise UserError(f"There is no family '{family}'; expected one of {', '.join(FAMILIES)}.{near(family, FAMILIES)}")
    return FAMILIES[family]


def other(names: Collection[str]) -> str:
    """What is known of names that no family here has; empty where nothing is."""
    return next((what for pattern, what in OTHERS if any(re.match(pattern, name) for name in names)), "")


def readings(part: Part) -> list[str]:
    """Names of the families that a denoiser's shapes fit, the likeliest first; UserError where it is of none, with what it is."""
    if what := other(part.shapes):
        raise UserError(f"{part.path} holds a model of another family: {what}; it is not opened.")
    if part.layout in ("ldm", "diffusers-unet"):
        return _unet(part)
    if part.layout in ("bfl", "diffusers-flux"):
        return _flux(part)
    if part.layout in ("sd3", "diffusers-sd3"):
        return _sd3(part)
    raise UserError(f"{part.path} holds a denoiser that is not known here.")


def channels(part: Part) -> int:
    """How many channels a denoiser takes (of FLUX: of its tokens)."""
    name = {"ldm": "input_blocks.0.0.weight", "bfl": "img_in.weight", "sd3": "x_embedder.proj.weight"}.get(part.layout)
    name = name or {"diffusers-flux": "x_embedder.weight", "diffusers-sd3": "pos_embed.proj.weight"}.get(part.layout)
    return part.shape(name or "conv_in.weight")[1]


def depths(names: Collection[str]) -> tuple[tuple[tuple[int, ...], ...], int, tuple[tuple[int, ...], ...]]:
    """Transformer layers of each attention block of a UNet (diffusers names): down, middle (0: none), up."""
    found: dict[tuple[str, int, int], int] = {}
    for name in names:
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(?:attentions\.(\d+)\.transformer_blocks\.(\d+)|resnets)\.", name):
            key = (match[1], int(match[2]), int(match[3] or -1))
            found[key] = max(found.get(key, 0), int(match[4]) + 1 if match[4] else 0)
    sides = {}
    for side in ("down", "up"):
        levels = 1 + max((level for which, level, _ in found if which == side), default=-1)
        sides[side] = tuple(
            tuple(count for (which, at, index), count in sorted(found.items()) if (which, at) == (side, level) and index >= 0)
            for level in range(levels)
        )
    middle = [
        int(match[1]) + 1 for name in names if (match := re.match(r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.", name))
    ]
    return sides["down"], max(middle, default=0), sides["up"]


def _unet(part: Part) -> list[str]:
    from latentpipe.checkpoints.single_file.unet import diffusers_names

    ours = diffusers_names(part)
    shapes = {mine: part.shapes[own] for mine, own in ours.items()}
    context = next((shapes[name][1] for name in sorted(shapes) if name.endswith("attn2.to_k.weight")), 0)
    added = shapes.get("add_embedding.linear_1.weight", (0, 0))[1]
    taken, width = channels(part), shapes.get("conv_in.weight", (0,))[0]
    if "class_embedding.weight" in shapes or "label_emb.weight" in part.shapes:
        raise UserError(f"{part.path} holds the UNet of an upscaler with noise levels, which is not opened.")
    found = ""
    if (context, added, width) in ((768, 0, 320), (1024, 0, 320)):
        found = "sd1" if context == 768 else "sd2"
    elif (context, added, width) == (1280, 2560, 384):
        found = "sdxl-refiner"
    elif (context, added, width) == (2048, 2816, 320):
        known = DEPTHS.get(depths(shapes))
        if known is None:
            raise UserError(
                f"{part.path} holds a UNet as SDXL's, but of other depths ({depths(shapes)}); 'sdxl', 'ssd-1b' and 'vega' are "
                "known. Give --family sdxl to take the depths from its names."
            )
        found = known
    elif context == 1024 and added:
        raise UserError(f"{part.path} holds the UNet of Stable Diffusion 2.1 unCLIP (embedding of {added}), which is not opened.")
    if not found:
        raise UserError(
            f"{part.path} holds a UNet that is not known here: it reads texts of width {context or 'none'}, an added "
            f"embedding of {added}, and is {width} wide. Give its config folder with --config."
        )
    if taken not in FAMILIES[found].pipelines:
        what = {5: "a depth map beside noise", 7: "a small picture beside noise", 8: "a picture beside noise"}.get(taken, "")
        raise UserError(
            f"{part.path} holds a UNet of {FAMILIES[found].title} that takes {taken} channels{f' ({what})' if what else ''}; "
            f"expected {', '.join(map(str, FAMILIES[found].pipelines))}."
        )
    return [found]


def _flux(part: Part) -> list[str]:
    taken = channels(part)
    inner = part.shape("img_in.weight" if part.layout == "bfl" else "x_embedder.weight")[0]
    guided = any("guidance" in name for name in part.shapes)
    known = {384: ["flux-fill"], 128: ["flux-control"], 64: ["flux-dev", "flux-kontext"] if guided else ["flux-schnell"]}
    if inner != 3072 or taken not in known:
        raise UserError(
            f"{part.path} holds a FLUX transformer that is not known here: {inner} wide, with {taken} channels a token; expected "
            "3072 and 64, 128 or 384. Give its config folder with --config."
        )
    return known[taken]


def _sd3(part: Part) -> list[str]:
    ldm = part.layout == "sd3"
    hidden = part.shape("x_embedder.proj.weight" if ldm else "pos_embed.proj.weight")[0]
    positions = part.shape("pos_embed" if ldm else "pos_embed.pos_embed")[1]
    normed = any(re.search(r"\.(ln_q|norm_q)\.", name) for name in part.shapes)
    blocks = len({name.split(".")[1] for name in part.shapes if re.match(r"(joint|transformer)_blocks\.\d+\.", name)})
    found = {(24, 192, False): "sd3", (24, 384, True): "sd3.5", (38, 192, True): "sd3.5"}
    known = found.get((blocks, round(positions**0.5), normed))
    if known is None or hidden != 64 * blocks:
        raise UserError(
            f"{part.path} holds a transformer as Stable Diffusion 3's that is not known here: {blocks} blocks, {hidden} wide, "
            f"{positions} positions. Give its config folder with --config."
        )
    return [known]
