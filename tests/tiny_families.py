"""Tiny random pipelines of every family of the table that can run without its text encoders: parts of a few thousand numbers.

`pipeline(name)` builds diffusers' own class from the parts of its family, `arguments(name)` calls it: prompts as random
embeddings, pictures, masks and control pictures where its signature asks for them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import tiny_hosts
import torch
from helpers import some_images
from tiny_hosts import SIDE, kl, unet

from latentpipe.pipelines.families import WITHOUT_SHIFT, WITHOUT_STATISTICS
from latentpipe.pipelines.family_table import FAMILY_BY_CLASS, PipelineFamily

UNTRIED = {
    "Kolors": "its class needs sentencepiece, which the tests do without",
    "Kolors PAG": "its class needs sentencepiece, which the tests do without",
    "Kandinsky 2.1": "draws with its own multilingual text encoder alone, and takes no embeddings in its place",
    "LongCat-Image": "draws with the processor of its vision-language encoder alone",
    "HiDream-I1": "draws a million pixels whatever size is asked for, a minute here; by hand it was equal, bit for bit",
    "Kandinsky 5 Image": "draws a million pixels whatever size is asked for, a minute here; by hand it was equal, bit for bit",
    "OmniGen": "draws with its own processor of interleaved texts and pictures alone",
    "DreamLite": "draws with the processor of its vision-language encoder alone",
    "DreamLite mobile": "draws with the processor of its vision-language encoder alone",
    "Bria Fibo 2": "draws with the processor of its vision-language encoder alone",
    "Ideogram 4": "draws with its vision-language encoder alone",
    "ERNIE-Image": "draws with its prompt enhancer's tokenizer alone",
}
UNTRIED_CLASSES = {
    "StableDiffusionDepth2ImgPipeline": "estimates depth by a transformer of its own",
    "StableDiffusionImageVariationPipeline": "reads the picture by an encoder of its own",
    "StableDiffusionLatentUpscalePipeline": "takes a UNet with Fourier features of K-diffusion",
    "StableUnCLIPPipeline": "draws after a prior of its own",
    "StableUnCLIPImg2ImgPipeline": "draws after a picture encoder of its own",
    "StableDiffusionXLControlNetUnionPipeline": "takes a ControlNet of several modes",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": "takes a ControlNet of several modes",
    "StableDiffusionXLControlNetUnionInpaintPipeline": "takes a ControlNet of several modes",
    "VisualClozeGenerationPipeline": "takes a grid of pictures that its processor lays out",
    "ChromaInpaintPipeline": "diffusers 0.42 asks its transformer for guidance_embeds, which it has not",
    "ZImageOmniPipeline": "reads pictures by an encoder of its own",
    "ZImageControlNetPipeline": "takes a ControlNet that shares layers of its transformer",
    "ZImageControlNetInpaintPipeline": "takes a ControlNet that shares layers of its transformer",
    "HunyuanDiTControlNetPipeline": "takes a ControlNet with the full conditioning of its transformer",
    "Flux2KleinKVPipeline": "keeps the keys of reference pictures in a transformer of its own kind",
}


# they finish their pictures in numpy, or encode the mask's rest: another order of rounding
ROUNDED = {"DiTPipeline", "StableDiffusionAdapterPipeline", "Flux2KleinInpaintPipeline"}


def embedding(*shape: int, seed: int = 5) -> torch.Tensor:
    """A random text embedding."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(cls: str, **config: Any) -> Any:
    """A random network of a diffusers class."""
    torch.manual_seed(1)
    return getattr(diffusers, cls)(**config).eval()


def flow(**config: Any) -> Any:
    """The scheduler of flow matching."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def ddim() -> Any:
    """A DDIM scheduler."""
    return diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)


def shifted(channels: int) -> Any:
    """An AutoencoderKL with scale and shift."""
    return kl(channels, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)


def movq() -> Any:
    """Kandinsky's VQModel."""
    torch.manual_seed(0)
    return diffusers.VQModel(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=8,
        norm_type="spatial",
        layers_per_block=1,
    ).eval()


def patched() -> Any:
    """FLUX.2's autoencoder, 4 channels at 1/8 size, with statistics of its 2 x 2 patches."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()
    vae.bn.running_mean.copy_(torch.linspace(-0.3, 0.3, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 1.5, 16))
    return vae


def pixart(**more: Any) -> dict[str, Any]:
    """PixArt's parts; its transformer also draws a variance."""
    transformer = made(
        "PixArtTransformer2DModel",
        sample_size=4,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=8,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        attention_bias=True,
        activation_fn="gelu-approximate",
    )
    return {"transformer": transformer, "vae": kl(4, scaling_factor=0.18215), "scheduler": ddim()} | more


def hunyuan_dit() -> dict[str, Any]:
    """HunyuanDiT's parts."""
    transformer = made(
        "HunyuanDiT2DModel",
        sample_size=4,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=8,
        hidden_size=16,
        activation_fn="gelu-approximate",
        text_len=4,
        text_len_t5=4,
    )
    return {"transformer": transformer, "vae": kl(4, scaling_factor=0.13025), "scheduler": ddim()}


def hunyuan_image() -> dict[str, Any]:
    """HunyuanImage's parts, without its second text encoder and its guiders."""
    transformer = made(
        "HunyuanImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        guidance_embeds=True,
        text_embed_dim=8,
        text_embed_2_dim=8,
        rope_axes_dim=(4, 4),
    )
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        scaling_factor=0.476986,
        spatial_compression_ratio=8,
        sample_size=32,
    ).eval()
    return {"transformer": transformer, "vae": vae, "scheduler": flow(shift=7.0)}


def lumina(kind: int) -> dict[str, Any]:
    """Lumina's and Lumina 2's parts."""
    common = {"sample_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 8, "num_layers": 1, "num_attention_heads": 1}
    common |= {"num_kv_heads": 1, "multiple_of": 16, "norm_eps": 1e-5, "scaling_factor": 1.0}
    if kind == 1:
        transformer = made("LuminaNextDiT2DModel", **common, learn_sigma=True, qk_norm=True, cross_attention_dim=8)
        return {"transformer": transformer, "vae": kl(4, scaling_factor=0.13025), "scheduler": flow()}
    transformer = made("Lumina2Transformer2DModel", **common, axes_dim_rope=[4, 2, 2], cap_feat_dim=8)
    return {"transformer": transformer, "vae": shifted(4), "scheduler": flow()}


def aura() -> dict[str, Any]:
    """AuraFlow's parts."""
    transformer = made(
        "AuraFlowTransformer2DModel",
        sample_size=4,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=8,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return {"transformer": transformer, "vae": kl(4, scaling_factor=0.13025), "scheduler": flow()}


def cogview(kind: int, channels: int = 4) -> dict[str, Any]:
    """CogView3-Plus's and CogView4's parts."""
    common = {
        "patch_size": 2,
        "in_channels": channels,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 4,
        "num_attention_heads": 4,
    }
    common |= {"text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 4}
    if kind == 3:
        transformer = made("CogView3PlusTransformer2DModel", **common, pos_embed_max_size=8, sample_size=4)
        return {"transformer": transformer, "vae": kl(4, scaling_factor=0.13025), "scheduler": diffusers.CogVideoXDDIMScheduler()}
    scheduler = flow(base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear")
    return {
        "transformer": made("CogView4Transformer2DModel", **common),
        "vae": kl(4, scaling_factor=0.13025),
        "scheduler": scheduler,
    }


def like_flux(cls: str, **config: Any) -> dict[str, Any]:
    """The parts of a family that packs latents as FLUX.1 does."""
    common = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
    }
    return {"transformer": made(cls, **common, **config), "vae": shifted(4), "scheduler": flow()}


def z_image() -> dict[str, Any]:
    """Z-Image's parts."""
    transformer = made(
        "ZImageTransformer2DModel",
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():  # two pads that are left without values
        for pad in (transformer.x_pad_token, transformer.cap_pad_token):
            pad.normal_()
    return {"transformer": transformer, "vae": shifted(4), "scheduler": flow()}


def prx() -> dict[str, Any]:
    """PRX's parts."""
    transformer = made(
        "PRXTransformer2DModel",
        patch_size=1,
        in_channels=4,
        context_in_dim=8,
        hidden_size=8,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[2, 2],
    )
    return {"transformer": transformer, "vae": shifted(4), "scheduler": flow()}


def dit() -> dict[str, Any]:
    """DiT's parts; it draws classes."""
    transformer = made(
        "DiTTransformer2DModel",
        sample_size=4,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return {"transformer": transformer, "vae": kl(4, scaling_factor=0.18215), "scheduler": ddim()}


def kandinsky22(taken: int = 4) -> dict[str, Any]:
    """Kandinsky 2.2's parts; the UNet also draws a variance."""
    torch.manual_seed(1)
    model = diffusers.UNet2DConditionModel(
        in_channels=taken,
        out_channels=8,
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        addition_embed_type="image_hint" if taken == 8 else "image",
        encoder_hid_dim=8,
        encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift",
        class_embed_type=None,
    ).eval()
    return {"unet": model, "movq": movq(), "scheduler": ddim()}


def kandinsky3() -> dict[str, Any]:
    """Kandinsky 3's parts."""
    model = made(
        "Kandinsky3UNet",
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=8,
    )
    return {"unet": model, "movq": movq(), "scheduler": diffusers.DDPMScheduler()}


def flux2() -> dict[str, Any]:
    """FLUX.2's parts."""
    transformer = made(
        "Flux2Transformer2DModel",
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
    )
    return {"transformer": transformer, "vae": patched(), "scheduler": flow()}


def of_host(name: str, **more: Any) -> Callable[[], dict[str, Any]]:
    """The parts of one of `tiny_hosts`."""
    return lambda: {key: part for key, part in tiny_hosts.BUILDERS[name]().components.items() if part is not None} | more


ROPE = {"joint_attention_dim": 8, "axes_dims_rope": (4, 4, 8)}
PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "Stable Diffusion 1/2": of_host("sd15"),
    "Stable Diffusion 1/2 PAG": of_host("sd15"),
    "Stable Diffusion XL": of_host("sdxl"),
    "Stable Diffusion XL PAG": of_host("sdxl"),
    "Stable Diffusion 3": of_host("sd3"),
    "Stable Diffusion 3 PAG": of_host("sd3"),
    "FLUX.1": of_host("flux"),
    "Sana": of_host("sana"),
    "Sana PAG": of_host("sana"),
    "Sana Sprint": of_host("sprint"),
    "Latent Consistency": lambda: {
        "unet": unet(4, 8, time_cond_proj_dim=8),
        "vae": kl(4, scaling_factor=0.18215),
        "scheduler": diffusers.LCMScheduler(),
    },
    "PixArt-alpha": pixart,
    "PixArt-Sigma": pixart,
    "PixArt-Sigma PAG": pixart,
    "HunyuanDiT": hunyuan_dit,
    "HunyuanDiT PAG": hunyuan_dit,
    "HunyuanImage 2.1": hunyuan_image,
    "Lumina": lambda: lumina(1),
    "Lumina 2": lambda: lumina(2),
    "AuraFlow": aura,
    "CogView3-Plus": lambda: cogview(3),
    "CogView4": lambda: cogview(4),
    "Chroma": lambda: like_flux(
        "ChromaTransformer2DModel", **ROPE, approximator_hidden_dim=8, approximator_layers=1, approximator_num_channels=16
    ),
    "Bria": lambda: like_flux(
        "BriaTransformer2DModel", joint_attention_dim=8, axes_dims_rope=(0, 8, 8), pooled_projection_dim=None
    ),
    "Ovis-Image": lambda: like_flux("OvisImageTransformer2DModel", out_channels=16, **ROPE),
    "Z-Image": z_image,
    "PRX": prx,
    "DiT": dit,
    "Kandinsky 2.2": kandinsky22,
    "Kandinsky 3": kandinsky3,
    "FLUX.2": flux2,
    "FLUX.2 klein": flux2,
}


@functools.cache
def parts_of(family: str) -> dict[str, Any]:
    """The parts of a family, made once; a test that changes one copies it."""
    return PARTS[family]()


def special(name: str) -> dict[str, Any]:
    """The parts in which a class differs from its family."""
    if "InstructPix2Pix" in name or name == "StableDiffusionUpscalePipeline":
        wide = tiny_hosts.unet(4, 8, **(XL_UNET if "XL" in name else {}))
        count = 7 if "Upscale" in name else 8
        wide.conv_in = torch.nn.Conv2d(count, 8, 3, padding=1)
        wide.register_to_config(in_channels=count)
        more = {"low_res_scheduler": diffusers.DDPMScheduler()} if count == 7 else {}
        return {"unet": wide, **more}
    if name in ("FluxControlPipeline", "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline"):
        return {"transformer": flux_transformer(128)}
    if name == "FluxFillPipeline":
        return {"transformer": flux_transformer(384)}
    if name == "CogView4ControlPipeline":
        return cogview(4, 8)
    if "Controlnet" in name:  # Kandinsky 2.2
        return kandinsky22(8)
    if name == "KandinskyV22InpaintPipeline":
        return kandinsky22(9)
    if "ControlNet" in name:
        extra = {"extra_conditioning_channels": 1} if name == "StableDiffusion3ControlNetInpaintingPipeline" else {}
        return {"controlnet": controlnet(FAMILY_BY_CLASS[name].name.removesuffix(" PAG"), **extra)}
    if "Adapter" in name:
        large = "XL" in name
        blocks = {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
        config = dict(parts_of(FAMILY_BY_CLASS[name].name)["unet"].config) | blocks
        torch.manual_seed(1)
        if large:
            return {"adapter": t2i_adapter(large)}
        return {"adapter": t2i_adapter(large), "unet": diffusers.UNet2DConditionModel.from_config(config).eval()}
    return {}


def sound(name: str) -> dict[str, Any]:
    """A VAE that keeps clear of the faults of diffusers 0.42, which have tests of their own."""
    if name in WITHOUT_STATISTICS:
        return {"vae": kl(4, scaling_factor=0.13025)}
    return {"vae": kl(16, scaling_factor=1.5305, shift_factor=0.0)} if name in WITHOUT_SHIFT else {}


XL_UNET: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
    "transformer_layers_per_block": (1, 1),
}


def flux_transformer(channels: int) -> Any:
    """FLUX.1's transformer that takes more than noise."""
    common = {"patch_size": 1, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    return made("FluxTransformer2DModel", **common, **ROPE, in_channels=channels, out_channels=64, pooled_projection_dim=8)


def controlnet(family: str, **more: Any) -> Any:
    """A ControlNet of a family, whose zero layers are random."""
    model = parts_of(family)["unet" if "unet" in parts_of(family) else "transformer"]
    if family.startswith("Stable Diffusion 3"):
        net = diffusers.SD3ControlNetModel(**{key: value for key, value in model.config.items() if key in SD3_KEYS}, **more)
    elif family == "FLUX.1":
        kept = {
            key: value
            for key, value in model.config.items()
            if key in inspect.signature(diffusers.FluxControlNetModel).parameters
        }
        net = diffusers.FluxControlNetModel(**kept)
    elif family == "Sana":
        kept = {
            key: value
            for key, value in model.config.items()
            if key in inspect.signature(diffusers.SanaControlNetModel).parameters
        }
        net = diffusers.SanaControlNetModel(**kept)
    else:
        net = diffusers.ControlNetModel.from_unet(model, conditioning_channels=3)
    torch.manual_seed(3)
    with torch.no_grad():
        for value in net.parameters():
            if not value.any():
                value.normal_(std=0.1)
    return net.eval()


SD3_KEYS = tuple(inspect.signature(diffusers.SD3ControlNetModel.__init__).parameters)


def t2i_adapter(large: bool) -> Any:
    """A T2I-Adapter of two levels."""
    torch.manual_seed(3)
    kind = "full_adapter_xl" if large else "full_adapter"
    return diffusers.T2IAdapter(
        in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=16 if large else 8, adapter_type=kind
    ).eval()


def pipeline(name: str, **more: Any) -> Any:
    """A pipeline of a class of the table."""
    cls, family = getattr(diffusers, name), FAMILY_BY_CLASS[name]
    parts = parts_of(family.name) | special(name) | sound(name) | more
    wanted = inspect.signature(cls).parameters
    flags = {"requires_safety_checker": False, "add_watermarker": False}
    given = {part: parts.get(part) for part, one in wanted.items() if part in parts or one.default is inspect.Parameter.empty}
    given |= {flag: value for flag, value in flags.items() if flag in wanted}
    if "pag_applied_layers" in wanted and "transformer" in parts:
        given["pag_applied_layers"] = "blocks.1" if family.name.startswith("Hunyuan") else r"blocks\.0"
    if name == "SanaPAGPipeline":
        del given["pag_applied_layers"]
    return tiny_hosts.quiet(cls(**given))


MASKS = {"PRX": torch.bool, "Lumina 2": torch.bool, "Chroma": torch.float}


def prompts(family: PipelineFamily, wanted: Any) -> dict[str, Any]:
    """Random embeddings in the place of prompts."""
    name, text = family.name, embedding(1, 4, 8)
    if name == "DiT":
        return {"class_labels": [3]}
    if name == "Kandinsky 2.2":
        return {"image_embeds": embedding(1, 8), "negative_image_embeds": embedding(1, 8, seed=6)}
    if name == "Kandinsky 3":
        return {"prompt_embeds": text, "attention_mask": torch.ones(1, 4)}
    if name == "Z-Image":
        return {"prompt_embeds": [embedding(4, 8)], "negative_prompt_embeds": [embedding(4, 8, seed=6)]}
    found: dict[str, Any] = {"prompt_embeds": text}
    if name.startswith("Hunyuan"):
        found |= {"prompt_embeds_2": embedding(1, 4, 8, seed=6)}
        masks = ("prompt_attention_mask", "prompt_attention_mask_2", "prompt_embeds_mask", "prompt_embeds_mask_2")
        if "PAG" in name:
            found |= {
                "negative_prompt_embeds": embedding(1, 4, 8, seed=7),
                "negative_prompt_embeds_2": embedding(1, 4, 8, seed=8),
            }
            masks += ("negative_prompt_attention_mask", "negative_prompt_attention_mask_2")
        found |= {mask: torch.ones(1, 4, dtype=torch.long) for mask in masks if mask in wanted}
    elif "prompt_attention_mask" in wanted:
        found["prompt_attention_mask"] = torch.ones(1, 4, dtype=MASKS.get(name, torch.long))
    if "pooled_prompt_embeds" in wanted:
        found["pooled_prompt_embeds"] = embedding(1, 8)
    return found


# whose "pt" is what the autoencoder gave
UNFINISHED = {"KandinskyV22Pipeline", "KandinskyV22ControlnetPipeline", "KandinskyV22InpaintPipeline", "Kandinsky3Pipeline"}


def drawn(pipe: Any, name: str, **more: Any) -> torch.Tensor:
    """The pipeline's own picture, in [0, 1]; the chance that has no generator begins anew."""
    torch.manual_seed(0)
    with torch.no_grad():
        images = pipe(**arguments(name, **more), output_type="pt", return_dict=False)[0]
    images = images if isinstance(images, torch.Tensor) else torch.from_numpy(images).movedim(-1, 1)
    return (images * 0.5 + 0.5).clamp(0, 1) if name in UNFINISHED else images


def arguments(name: str, **more: Any) -> dict[str, Any]:
    """A call of two steps."""
    cls, family = getattr(diffusers, name), FAMILY_BY_CLASS[name]
    wanted = inspect.signature(cls.__call__).parameters
    side = 64 if family.name.startswith(("Sana", "Kandinsky")) else SIDE
    picture = some_images(1, side) * 0.5 + 0.5
    mask = torch.zeros(1, 1, side, side)
    mask[..., : side // 2] = 1.0
    given = prompts(family, wanted)
    no_guide = {"guidance_scale": 1.0, "true_cfg_scale": 1.0, "use_resolution_binning": False, "use_pe": False}
    if "PAG" in family.name:  # what it adds is drawn without guidance too
        no_guide["pag_scale"] = 3.0
    given |= {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(7)}
    given |= {key: value for key, value in no_guide.items() if key in wanted}
    optional = family.name in ("FLUX.2", "FLUX.2 klein") and "mask_image" not in wanted
    given |= {key: picture for key in ("image", "control_image", "hint") if key in wanted and not (key == "image" and optional)}
    given |= {"mask_image": mask} if "mask_image" in wanted else {}
    given |= {"control_mask": mask} if name == "StableDiffusion3ControlNetInpaintingPipeline" else {}
    given |= {"strength": 0.9} if "strength" in wanted else {}
    given |= {"height": side, "width": side} if "height" in wanted else {}
    if name.startswith("FluxKontext"):
        given |= {"max_area": side**2, "_auto_resize": False}
    if family.name == "HunyuanDiT PAG":
        given["guidance_scale"] = 3.0
    if name == "FluxFillPipeline":
        del given["strength"]
    return given | more
