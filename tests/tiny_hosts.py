"""Tiny random pipelines of the five host families, made of the real classes."""

from __future__ import annotations

from typing import Any

import torch

SIDE = 32  # of the pictures, in pixels


def kl(channels: int, seed: int = 0, **factors: Any) -> Any:
    """An AutoencoderKL at 1/8 size with the factors of a family."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        **factors,
    ).eval()


def dc(seed: int = 0) -> Any:
    """An AutoencoderDC, 32 channels at 1/32 size."""
    from diffusers import AutoencoderDC

    torch.manual_seed(seed)
    blocks = (8, 8, 8, 8, 8, 32)
    return AutoencoderDC(
        latent_channels=32,
        attention_head_dim=4,
        encoder_block_out_channels=blocks,
        decoder_block_out_channels=blocks,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_block_types=("ResBlock",) * 6,
        decoder_block_types=("ResBlock",) * 6,
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    ).eval()


def unet(channels: int, cross: int, **config: Any) -> Any:
    """A UNet2DConditionModel of two levels."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    return UNet2DConditionModel(
        in_channels=channels,
        out_channels=channels,
        sample_size=SIDE // 8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        attention_head_dim=4,
        norm_num_groups=4,
        **config,
    ).eval()


def sd15(vae: Any = None) -> Any:
    """Stable Diffusion 1."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    vae = vae or kl(4, scaling_factor=0.18215)
    pipe = StableDiffusionPipeline(
        vae, None, None, unet(vae.config.latent_channels, 8), scheduler, None, None, requires_safety_checker=False
    )  # type: ignore[arg-type]
    return quiet(pipe)


def sdxl(vae: Any = None) -> Any:
    """Stable Diffusion XL, with per-channel statistics."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    statistics = {"latents_mean": [0.3, -0.2, 0.1, 0.4], "latents_std": [1.2, 0.8, 1.1, 0.9]}
    vae = vae or kl(4, scaling_factor=0.13025, force_upcast=False, **statistics)
    model = unet(
        4,
        8,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
        transformer_layers_per_block=(1, 1),
    )
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    pipe = StableDiffusionXLPipeline(vae, None, None, None, None, model, scheduler, add_watermarker=False)
    return quiet(pipe)


def sd3(vae: Any = None) -> Any:
    """Stable Diffusion 3: scale and shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(1)
    model = SD3Transformer2DModel(
        sample_size=SIDE // 8,
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=16,
    ).eval()
    vae = vae or kl(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = FlowMatchEulerDiscreteScheduler()
    return quiet(StableDiffusion3Pipeline(model, scheduler, vae, None, None, None, None, None, None))


def flux(vae: Any = None) -> Any:
    """FLUX.1: scale and shift, latents packed 2 x 2."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(1)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    vae = vae or kl(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    return quiet(FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, model))


def sana(vae: Any = None) -> Any:
    """Sana, with an AutoencoderDC."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

    return quiet(SanaPipeline(None, None, vae or dc(), _sana_transformer(), FlowMatchEulerDiscreteScheduler()))


def sprint(vae: Any = None) -> Any:
    """Sana Sprint, which has an img2img pipeline."""
    from diffusers import SanaSprintPipeline, SCMScheduler

    model = _sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads", timestep_scale=1000.0)
    return quiet(SanaSprintPipeline(None, None, vae or dc(), model, SCMScheduler()))


def _sana_transformer(**config: Any) -> Any:
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(1)
    return SanaTransformer2DModel(
        in_channels=32,
        out_channels=32,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
        patch_size=1,
        **config,
    ).eval()


def quiet(pipe: Any) -> Any:
    """Without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


BUILDERS = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "flux": flux, "sana": sana, "sprint": sprint}


def call(name: str, n: int = 1, **more: Any) -> dict[str, Any]:
    """Arguments of a two-step call: prompt embeddings and a seeded generator."""
    random = torch.Generator().manual_seed(5)

    def embeds(*shape: int) -> torch.Tensor:
        return torch.randn(n, *shape, generator=random)

    arguments: dict[str, Any] = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(7), "guidance_scale": 1.0}
    if name in ("sana", "sprint"):
        mask = torch.ones(n, 4)
        arguments |= {"prompt_embeds": embeds(4, 8), "prompt_attention_mask": mask, "height": 64, "width": 64}
        arguments |= {"use_resolution_binning": False}
    elif name == "sd15":
        arguments |= {"prompt_embeds": embeds(4, 8)}
    else:
        arguments |= {"prompt_embeds": embeds(4, 8), "pooled_prompt_embeds": embeds(8)}
    if name not in ("sana", "sprint") and "image" not in more:
        arguments |= {"height": SIDE, "width": SIDE}
    return arguments | more


# --- complete pipelines, with text ---------------------------------------------------------------------------


def clip(projection: bool, width: int = 8) -> Any:
    """A CLIP text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=4000,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def words() -> Any:
    """A tokenizer with a word for each letter, as T5's and Gemma's are used."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


def complete(name: str) -> Any:
    """A pipeline of a family with tokenizers and text encoders, ready to be saved."""
    from transformers import CLIPTokenizer, Gemma2Config, Gemma2Model, T5Config, T5EncoderModel

    from latentpipe.checkpoints.registry import find_model

    tokenizer = CLIPTokenizer.from_pretrained(find_model("emoji") / "tokenizer")
    pipe = BUILDERS[name]()
    parts = {key: value for key, value in pipe.components.items() if value is not None}
    t5 = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    torch.manual_seed(2)
    if name == "sdxl":
        parts["unet"] = unet(
            4,
            16,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 8,
            transformer_layers_per_block=(1, 1),
        )
        text = {"text_encoder": clip(False), "text_encoder_2": clip(True), "tokenizer": tokenizer, "tokenizer_2": tokenizer}
    elif name == "sd3":
        text = {"text_encoder": clip(True, 4), "text_encoder_2": clip(True, 4), "tokenizer": tokenizer, "tokenizer_2": tokenizer}
        text |= {"text_encoder_3": T5EncoderModel(t5).eval(), "tokenizer_3": words()}
    elif name == "flux":
        text = {
            "text_encoder": clip(False),
            "tokenizer": tokenizer,
            "text_encoder_2": T5EncoderModel(t5).eval(),
            "tokenizer_2": words(),
        }
    else:
        gemma = Gemma2Config(
            vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            head_dim=4, pad_token_id=0, eos_token_id=1, bos_token_id=1,
        )  # fmt: skip
        text = {"text_encoder": Gemma2Model(gemma).eval(), "tokenizer": words()}

    from latentpipe.pipelines import hosting

    return hosting.rebuild(pipe, **parts | text)
