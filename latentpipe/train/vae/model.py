"""The VAE that a run begins with: a new one, an earlier one, or an earlier one with a new head."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch

from latentpipe.checkpoints.components import built_to_train
from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import load_vae, open_vae
from latentpipe.train.config import TrainVAE, VAEShape
from latentpipe.train.run_dir import refuse_other_shape
from latentpipe.utils.errors import LatentpipeWarning, UserError, counted
from latentpipe.vae.latent_space import LatentSpace
from latentpipe.vae.memory import available
from latentpipe.vae.stage import VAEStage


def build_vae(config: TrainVAE, teacher: VAEStage | None) -> Any:
    """The autoencoder to train, in fp32 and training mode."""
    if config.run.warm_start is None:
        vae = built_to_train(lambda: new_vae(config.model, config.crops.size_px), available(torch.device("cpu")))
    else:
        vae = load_vae(find_model(config.run.warm_start, "vae"))
        if not hasattr(vae, "decoder"):
            raise UserError(f"run.warm_start {config.run.warm_start} is an encoder alone; training needs both halves.")
        if config.model != VAEShape():
            _refuse_another(config, vae)
        if config.new_channels is not None:
            vae = with_new_head(vae, config.new_channels)
    if config.run.gradient_checkpointing:
        try:
            vae.enable_gradient_checkpointing()
        except ValueError as error:
            raise UserError(f"run.gradient_checkpointing: {error}") from None
    if teacher is not None:
        _refuse_other_space(vae, teacher)
    return vae.train()


def new_vae(shape: VAEShape, size_px: int) -> Any:
    """An autoencoder of this shape with random weights; its raw values are its latents until they are measured."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    levels = len(shape.blocks)
    if shape.kind == "tiny":
        layers = (shape.layers_per_block,) * (levels - 1)
        return AutoencoderTiny(
            encoder_block_out_channels=shape.blocks,
            decoder_block_out_channels=shape.blocks,
            num_encoder_blocks=(1, *layers),
            num_decoder_blocks=(*layers, shape.full_size_blocks),
            latent_channels=shape.channels,
        )
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=shape.blocks,
        layers_per_block=shape.layers_per_block,
        latent_channels=shape.channels,
        norm_num_groups=shape.norm_groups,
        mid_block_add_attention=shape.attention,
        sample_size=size_px,
        scaling_factor=1.0,
    )


def with_new_head(vae: Any, channels: int) -> Any:
    """The same autoencoder with another number of latent channels: every tensor whose shape stays is taken over."""
    if "latent_channels" not in vae.config or "block_out_channels" not in vae.config:
        raise UserError(f"new_channels gives an AutoencoderKL a new head; {type(vae).__name__} has none that could be changed.")
    wanted = {**vae.config, "latent_channels": channels, "scaling_factor": 1.0}
    wanted |= {name: None for name in ("shift_factor", "latents_mean", "latents_std") if name in wanted}
    new = built_to_train(lambda: type(vae).from_config(wanted), available(torch.device("cpu")))
    old, fresh = vae.state_dict(), new.state_dict()
    taken = {name: copy.deepcopy(tensor) for name, tensor in old.items() if fresh[name].shape == tensor.shape}
    new.load_state_dict({**fresh, **taken})
    begun = sorted(set(fresh) - set(taken))
    warnings.warn(
        LatentpipeWarning(f"a new head of {counted(channels, 'channel')}: {', '.join(begun) or 'nothing'} begins anew"),
        stacklevel=2,
    )
    return new


def training_space(vae: Any, config: TrainVAE) -> LatentSpace:
    """The space while training: what the VAE declares where its latents stay, else its raw values as they are."""
    declared = LatentSpace.of(vae)
    if config.run.warm_start is not None or config.mode == "distil":
        return declared
    c = declared.channels
    return LatentSpace(c, declared.downscale, (1.0,) * c, (0.0,) * c)


def open_teacher(config: TrainVAE) -> VAEStage | None:
    """The frozen VAE whose latents are to be learned; None where there is none."""
    if config.teacher is None:
        return None
    path = find_model(config.teacher, "vae")
    opened = open_vae(path)
    return VAEStage(load_vae(path).requires_grad_(False), opened.space)


def _refuse_another(config: TrainVAE, vae: Any) -> None:
    shape, kind = config.model, type(vae).__name__
    if kind != {"kl": "AutoencoderKL", "tiny": "AutoencoderTiny"}[shape.kind]:
        raise UserError(f"run.warm_start {config.run.warm_start} is an {kind}; leave out 'model', it brings its own shape.")
    if shape.kind == "tiny":
        wanted: dict[str, Any] = {"latent_channels": shape.channels, "encoder_block_out_channels": shape.blocks}
    else:
        wanted = {
            "latent_channels": shape.channels,
            "block_out_channels": shape.blocks,
            "layers_per_block": shape.layers_per_block,
            "norm_num_groups": shape.norm_groups,
            "mid_block_add_attention": shape.attention,
        }
    assert config.run.warm_start is not None
    refuse_other_shape(config.run.warm_start, vae.config, wanted)


def _refuse_other_space(vae: Any, teacher: VAEStage) -> None:
    own, wanted = LatentSpace.of(vae), teacher.space
    if own.channels != wanted.channels or own.downscale % wanted.downscale:
        raise UserError(
            f"The teacher makes {counted(wanted.channels, 'channel')} at 1/{wanted.downscale} size, this model {own.channels} at "
            f"1/{own.downscale}. Set model.channels to {wanted.channels} and give model.blocks "
            f"{wanted.downscale.bit_length()} levels, or one more for pictures of twice the size."
        )
