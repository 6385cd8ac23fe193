"""Tiny pipelines of the supported families, and a writer of single files in the names of the models' authors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_hosts
import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}

# --- the writer ---------------------------------------------------------------------------------------------


def unet_names(state: Tensors, layers: int = 1) -> dict[str, str]:
    """LDM's name of each tensor of a UNet2DConditionModel: blocks are counted through from the entrance."""
    ends = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    found = {}
    for name in state:
        module, _, leaf = name.rpartition(".")
        if module in ends:
            found[name] = f"{ends[module]}.{leaf}"
            continue
        match = re.match(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
        assert match, name
        side, kind, index, rest = match[1], match[3], int(match[4]), match[5]
        if kind == "resnets":
            for mine, theirs in RESNET.items():
                if rest.startswith(mine):
                    rest = rest.replace(mine, theirs, 1)
        if side == "mid":
            found[name] = f"middle_block.{2 * index if kind == 'resnets' else 1}.{rest}"
            continue
        level = int(match[2])
        if side == "down":
            at = 1 + level * (layers + 1) + index
            if kind == "downsamplers":
                found[name] = f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
            else:
                found[name] = f"input_blocks.{at}.{0 if kind == 'resnets' else 1}.{rest}"
        elif kind == "upsamplers":
            attends = any(other.startswith(f"up_blocks.{level}.attentions.") for other in state)
            found[name] = f"output_blocks.{level * (layers + 1) + layers}.{2 if attends else 1}.{rest}"
        else:
            found[name] = f"output_blocks.{level * (layers + 1) + index}.{0 if kind == 'resnets' else 1}.{rest}"
    return found


def ldm_unet(model: Any) -> Tensors:
    """A UNet's tensors under LDM's names."""
    state = model.state_dict()
    return {theirs: state[mine] for mine, theirs in unet_names(state, model.config.layers_per_block).items()}


def ldm_vae(model: Any) -> Tensors:
    """An AutoencoderKL's tensors under LDM's names."""
    state, levels, found = model.state_dict(), len(model.config.block_out_channels), {}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for name, value in state.items():
        own = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        own = re.sub(r"decoder\.up_blocks\.(\d+)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", own)
        own = re.sub(r"encoder\.down_blocks\.(\d+)", r"encoder.down.\1", own)
        own = re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", own)
        own = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", own).replace("resnets", "block")
        if "mid_block.attentions.0." in own:
            own = own.replace("mid_block.attentions.0", "mid.attn_1")
            for mine, theirs in attention.items():
                own = own.replace(f".{mine}.", f".{theirs}.")
            value = value[:, :, None, None] if value.ndim == 2 else value
        found[own] = value
    return found


def clip(model: Any) -> Tensors:
    """A CLIP text encoder's tensors as OpenAI's model and transformers before 5.6 name them."""
    state = model.state_dict()
    prefixed = any(name.startswith("text_model.") for name in state)
    found = {
        name if prefixed or name.startswith("text_projection") else f"text_model.{name}": value for name, value in state.items()
    }
    return found | {"text_model.embeddings.position_ids": torch.arange(model.config.max_position_embeddings)[None]}


def open_clip(model: Any) -> Tensors:
    """A CLIP text encoder's tensors as OpenCLIP names them: queries, keys and values in one matrix."""
    state = {name.removeprefix("text_model."): value for name, value in model.state_dict().items()}
    found = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
    }
    if "text_projection.weight" in state:
        found["text_projection"] = state["text_projection.weight"].T
    for layer in range(model.config.num_hidden_layers):
        mine, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for leaf in ("weight", "bias"):
            stacked = [state[f"{mine}.self_attn.{which}_proj.{leaf}"] for which in "qkv"]
            found[f"{theirs}.attn.in_proj_{leaf}"] = torch.cat(stacked)
            found[f"{theirs}.attn.out_proj.{leaf}"] = state[f"{mine}.self_attn.out_proj.{leaf}"]
            for own, other in (
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                found[f"{theirs}.{other}.{leaf}"] = state[f"{mine}.{own}.{leaf}"]
    return found


def flux(model: Any) -> Tensors:
    """FLUX.1's transformer as its authors name it."""
    state, found = model.state_dict(), {}
    embedder = {"timestep_embedder": "time_in", "text_embedder": "vector_in", "guidance_embedder": "guidance_in"}
    for name, value in state.items():
        end = name.rpartition(".")[2]
        if match := re.match(r"time_text_embed\.(\w+)\.linear_([12])\.", name):
            found[f"{embedder[match[1]]}.{'in' if match[2] == '1' else 'out'}_layer.{end}"] = value
    for mine, theirs in (("context_embedder", "txt_in"), ("x_embedder", "img_in"), ("proj_out", "final_layer.linear")):
        for end in ("weight", "bias"):
            found[f"{theirs}.{end}"] = state[f"{mine}.{end}"]
    for end in ("weight", "bias"):
        scale, shift = state[f"norm_out.linear.{end}"].chunk(2)
        found[f"final_layer.adaLN_modulation.1.{end}"] = torch.cat([shift, scale])
        for i in range(model.config.num_layers):
            mine, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
            for own, other in FLUX_DOUBLE.items():
                found[f"{theirs}.{other}.{end}"] = state[f"{mine}.{own}.{end}"]
            found[f"{theirs}.img_attn.qkv.{end}"] = torch.cat([state[f"{mine}.attn.to_{which}.{end}"] for which in "qkv"])
            found[f"{theirs}.txt_attn.qkv.{end}"] = torch.cat([state[f"{mine}.attn.add_{which}_proj.{end}"] for which in "qkv"])
        for i in range(model.config.num_single_layers):
            mine, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
            found[f"{theirs}.modulation.lin.{end}"] = state[f"{mine}.norm.linear.{end}"]
            stacked = [*(state[f"{mine}.attn.to_{which}.{end}"] for which in "qkv"), state[f"{mine}.proj_mlp.{end}"]]
            found[f"{theirs}.linear1.{end}"] = torch.cat(stacked)
            found[f"{theirs}.linear2.{end}"] = state[f"{mine}.proj_out.{end}"]
    norms = {"norm_q": "img_attn.norm.query_norm", "norm_k": "img_attn.norm.key_norm"}
    norms |= {"norm_added_q": "txt_attn.norm.query_norm", "norm_added_k": "txt_attn.norm.key_norm"}
    for name, value in state.items():
        if match := re.match(r"(single_)?transformer_blocks\.(\d+)\.attn\.(norm_\w+)\.weight", name):
            where = norms[match[3]].removeprefix("img_attn.") if match[1] else norms[match[3]]
            found[f"{'single' if match[1] else 'double'}_blocks.{match[2]}.{where}.scale"] = value
    return found


def sd3(model: Any) -> Tensors:
    """Stable Diffusion 3's transformer as its authors name it."""
    state, last = model.state_dict(), model.config.num_layers - 1
    found = {"pos_embed": state["pos_embed.pos_embed"]}
    top = {
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
    }
    block = {
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "attn2.to_out.0": "x_block.attn2.proj",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
    }
    stacks = {"x_block.attn": "attn.to_{}", "context_block.attn": "attn.add_{}_proj", "x_block.attn2": "attn2.to_{}"}
    for name, value in state.items():
        module, _, end = name.rpartition(".")
        match = re.match(r"transformer_blocks\.(\d+)\.(.*)", module)
        if module in top:
            found[f"{top[module]}.{end}"] = value
        elif module == "norm_out.linear":
            found[f"final_layer.adaLN_modulation.1.{end}"] = torch.cat(value.chunk(2)[::-1])
        elif match and match[2] in block:
            turned = match[2] == "norm1_context.linear" and int(match[1]) == last
            found[f"joint_blocks.{match[1]}.{block[match[2]]}.{end}"] = torch.cat(value.chunk(2)[::-1]) if turned else value
    for i in range(last + 1):
        for theirs, mine in stacks.items():
            for end in ("weight", "bias"):
                names = [f"transformer_blocks.{i}.{mine.format(which)}.{end}" for which in "qkv"]
                if names[0] in state:
                    found[f"joint_blocks.{i}.{theirs}.qkv.{end}"] = torch.cat([state[name] for name in names])
    return found


def under(prefix: str, tensors: Tensors) -> Tensors:
    """Tensors with a prefix before their names."""
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def t5(model: Any) -> Tensors:
    """T5's encoder; its words stand once."""
    return {name: value for name, value in model.state_dict().items() if name != "encoder.embed_tokens.weight"}


UNET, VAE = "model.diffusion_model.", "first_stage_model."


def of_sd1(pipe: Any) -> Tensors:
    """Stable Diffusion 1, as LDM writes it."""
    return (
        under(UNET, ldm_unet(pipe.unet))
        | under(VAE, ldm_vae(pipe.vae))
        | under("cond_stage_model.transformer.", clip(pipe.text_encoder))
    )


def of_sd2(pipe: Any) -> Tensors:
    """Stable Diffusion 2: OpenCLIP's text encoder, of which one layer is not read."""
    text = open_clip(pipe.text_encoder)
    unread = {name.replace("resblocks.0.", "resblocks.23."): value for name, value in text.items() if "resblocks.0." in name}
    text |= unread | {"text_projection": torch.ones(8, 8)}
    return under(UNET, ldm_unet(pipe.unet)) | under(VAE, ldm_vae(pipe.vae)) | under("cond_stage_model.model.", text)


def of_sdxl(pipe: Any) -> Tensors:
    """Stable Diffusion XL, as sgm writes it; of the refiner the second encoder is the first."""
    both = pipe.text_encoder is not None
    found = under("conditioner.embedders.0.transformer.", clip(pipe.text_encoder)) if both else {}
    found |= under(f"conditioner.embedders.{int(both)}.model.", open_clip(pipe.text_encoder_2))
    return found | under(UNET, ldm_unet(pipe.unet)) | under(VAE, ldm_vae(pipe.vae))


def of_sd3(pipe: Any) -> Tensors:
    """Stable Diffusion 3 with its encoders, as ComfyUI writes it."""
    first = {name: value for name, value in clip(pipe.text_encoder).items() if not name.startswith("text_projection")}
    found = under("text_encoders.clip_l.transformer.", first) | under(
        "text_encoders.clip_g.transformer.", clip(pipe.text_encoder_2)
    )
    found |= under("text_encoders.t5xxl.transformer.", t5(pipe.text_encoder_3))
    return found | under(UNET, sd3(pipe.transformer)) | under(VAE, ldm_vae(pipe.vae))


def of_flux(pipe: Any) -> Tensors:
    """FLUX.1 all in one, as ComfyUI writes it."""
    found = under("text_encoders.clip_l.transformer.", clip(pipe.text_encoder)) | under(
        "text_encoders.t5xxl.transformer.", t5(pipe.text_encoder_2)
    )
    return found | under(UNET, flux(pipe.transformer)) | under("vae.", ldm_vae(pipe.vae))


def write(tensors: Tensors, path: Path, dtype: torch.dtype | None = None, metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of tensors, in `dtype` where they are floats."""
    cast = {name: value.to(dtype) if dtype and value.is_floating_point() else value for name, value in tensors.items()}
    save_file({name: value.contiguous().clone() for name, value in cast.items()}, path, metadata)
    return path


# --- tiny pipelines -----------------------------------------------------------------------------------------


def unet(cross: int, taken: int = 4, **config: Any) -> Any:
    """A UNet2DConditionModel of two levels that takes `taken` channels."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    settings = {
        "in_channels": taken,
        "out_channels": 4,
        "sample_size": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": cross,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(settings | config)).eval()


def tokenizer() -> Any:
    """CLIP's, with few words."""
    from transformers import CLIPTokenizer

    from latentpipe.checkpoints.registry import find_model

    return CLIPTokenizer.from_pretrained(find_model("emoji") / "tokenizer", model_max_length=24)


def classic(pipeline: str = "StableDiffusionPipeline", taken: int = 4, prediction: str = "epsilon", **config: Any) -> Any:
    """Stable Diffusion 1 or 2."""
    import diffusers

    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type=prediction)
    parts = {"vae": tiny_hosts.kl(4, scaling_factor=0.18215), "unet": unet(8, taken, **config), "scheduler": scheduler}
    parts |= {"text_encoder": tiny_hosts.clip(False), "tokenizer": tokenizer(), "safety_checker": None, "feature_extractor": None}
    return tiny_hosts.quiet(getattr(diffusers, pipeline)(**parts, requires_safety_checker=False))


def xl(pipeline: str = "StableDiffusionXLPipeline", taken: int = 4, first: bool = True, **config: Any) -> Any:
    """Stable Diffusion XL; its encoders have two widths. Without the `first`, its refiner."""
    import diffusers

    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    added["projection_class_embeddings_input_dim"] = (6 if first else 5) * 4 + 12
    model = unet(20 if first else 12, taken, **added, transformer_layers_per_block=(1, 2), use_linear_projection=True, **config)
    parts = {"vae": tiny_hosts.kl(4, scaling_factor=0.13025, force_upcast=False), "unet": model}
    parts |= {"text_encoder": tiny_hosts.clip(False) if first else None, "text_encoder_2": tiny_hosts.clip(True, 12)}
    parts |= {"tokenizer": tokenizer() if first else None, "tokenizer_2": tokenizer()}
    parts["scheduler"] = diffusers.EulerDiscreteScheduler(steps_offset=1)
    flags = {"requires_aesthetics_score": True} if not first else {}
    return tiny_hosts.quiet(getattr(diffusers, pipeline)(**parts, add_watermarker=False, **flags))


def three() -> Any:
    """Stable Diffusion 3; CLIP-L pools without a projection."""
    pipe = tiny_hosts.complete("sd3")
    with torch.no_grad():
        pipe.text_encoder.text_projection.weight.copy_(torch.eye(4))
    return pipe


PIPELINES: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensors]]] = {
    "sd1": (classic, of_sd1),
    "sd1-inpaint": (lambda: classic("StableDiffusionInpaintPipeline", 9), of_sd1),
    "sd2": (lambda: classic(use_linear_projection=True, attention_head_dim=[2, 4]), of_sd2),
    "sd2-v": (lambda: classic(prediction="v_prediction", use_linear_projection=True), of_sd2),
    "sdxl": (xl, of_sdxl),
    "sdxl-inpaint": (lambda: xl("StableDiffusionXLInpaintPipeline", 9), of_sdxl),
    "sdxl-refiner": (lambda: xl("StableDiffusionXLImg2ImgPipeline", first=False), of_sdxl),
    "sdxl-no-middle": (lambda: xl(mid_block_type="UNetMidBlock2D"), of_sdxl),
    "sd3": (three, of_sd3),
    "flux": (lambda: tiny_hosts.complete("flux"), of_flux),
}
