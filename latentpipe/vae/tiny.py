"""TinyVAE: a tiny autoencoder of the TAESD family with any of its layers, also without a decoder."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from latentpipe.utils.errors import UserError

OPENS_HERE_ONLY = "this VAE has layers that diffusers lacks; open it with latentpipe"
MAX_WIDTH = 4096  # a config from a file builds layers; this bounds them


class TinyVAE(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Images (B 3 H W, [-1, 1]) to raw latents and back, deterministic; layers are described in `checkpoints.taesd_keys`.

    The family works on [0, 1] and on latents clamped by ``3 tanh(z / 3)``; both are done here. Its latents are
    normalized by training: the teacher's latents after the teacher's own factor.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int,
        downscale: int,
        encoder_layers: list[list[Any]],
        decoder_layers: list[list[Any]] | None = None,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        act_fn: str = OPENS_HERE_ONLY,
    ) -> None:
        super().__init__()
        self.encoder = TinyHalf(encoder_layers)
        self.decoder = TinyHalf(decoder_layers) if decoder_layers else None

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """Images to raw latents, B C h w."""
        latents = self.encoder((x + 1) / 2)
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    def decode(self, z: torch.Tensor, generator: torch.Generator | None = None, return_dict: bool = True) -> Any:
        """Raw latents to images; UserError where the file held an encoder alone."""
        if self.decoder is None:
            raise UserError("this VAE has no decoder: its file held an encoder alone; it can encode only.")
        images = self.decoder(torch.tanh(z / 3) * 3) * 2 - 1
        return DecoderOutput(sample=images) if return_dict else (images,)


class TinyHalf(nn.Module):
    """The encoder or the decoder: layers in a row."""

    def __init__(self, layers: list[list[Any]]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*map(_layer, layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """B C H W through all layers."""
        return self.layers(x)


class TinyBlock(nn.Module):
    """Three convolutions beside a skip; with `pool`, a normalized branch of 1 x 1 convolutions before them."""

    def __init__(self, n_in: int, n_out: int, pool: bool) -> None:
        super().__init__()
        wide = 4 * n_in
        self.pool = (
            nn.Sequential(
                nn.Conv2d(n_in, wide, 1, bias=False), nn.GroupNorm(4, wide), nn.ReLU(), nn.Conv2d(wide, n_in, 1, bias=False)
            )
            if pool
            else None
        )
        self.conv = nn.Sequential(_conv(n_in, n_out), nn.ReLU(), _conv(n_out, n_out), nn.ReLU(), _conv(n_out, n_out))
        self.skip = nn.Conv2d(n_in, n_out, 1, bias=False) if n_in != n_out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """B n_in H W to B n_out H W."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + self.skip(x))


def _conv(n_in: int, n_out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, stride, 1, bias=bias)


def _layer(spec: list[Any]) -> nn.Module:
    """A layer from its description in a config; UserError where it is none."""
    kind, *values = spec if isinstance(spec, list | tuple) and spec else [None]
    whole = all(isinstance(value, int) and 0 <= value <= MAX_WIDTH for value in values)
    if kind == "relu" and not values:
        return nn.ReLU()
    if kind == "up" and not values:
        return nn.Upsample(scale_factor=2)
    if kind == "conv" and len(values) == 4 and whole and min(values[:3]) > 0:
        return _conv(*values)
    if kind == "block" and len(values) == 3 and whole and min(values[:2]) > 0:
        return TinyBlock(*values)
    raise UserError(f"{spec} is no layer of a TinyVAE; expected conv, block, relu or up, as 'latentpipe convert' writes them.")
