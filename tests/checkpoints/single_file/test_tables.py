"""The tables of FLUX's and Stable Diffusion 3's names against diffusers' own converters."""

from __future__ import annotations

import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from sized import network
from written import PIPELINES, flux, sd3

from latentpipe.checkpoints.single_file.tables import from_bfl, from_sd3


def filled(names: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of as many rows, each of its own values and one column wide."""
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(value.shape[0], 1, generator=random) for name, value in names.items()}


def test_flux_as_diffusers_converts_it() -> None:
    """diffusers' converter knows one width, 3072: rows of the true number, columns of one."""
    blocks = ("double_blocks.0.", "double_blocks.1.", "single_blocks.0.", "single_blocks.1.")
    names = {
        name: value for name, value in flux(network("flux-dev", 64)).items() if "_blocks." not in name or name.startswith(blocks)
    }
    tensors = filled(names)
    theirs, ours = convert_flux_transformer_checkpoint_to_diffusers(dict(tensors)), from_bfl(tensors)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_stable_diffusion_3_as_diffusers_converts_it() -> None:
    tensors = sd3(PIPELINES["sd3"][0]().transformer)
    theirs, ours = convert_sd3_transformer_checkpoint_to_diffusers(dict(tensors)), from_sd3(tensors)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_stable_diffusion_3_5_with_normed_queries_and_two_attentions() -> None:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    shape = {
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 8,
        "caption_projection_dim": 16,
    }
    model = SD3Transformer2DModel(
        sample_size=4, pooled_projection_dim=8, pos_embed_max_size=4, qk_norm="rms_norm", dual_attention_layers=(0, 1), **shape
    )
    tensors = sd3(model)
    theirs, ours, own = convert_sd3_transformer_checkpoint_to_diffusers(dict(tensors)), from_sd3(tensors), model.state_dict()
    assert theirs.keys() == ours.keys() == own.keys()
    assert all(torch.equal(theirs[name], ours[name]) and torch.equal(own[name], ours[name]) for name in ours)
