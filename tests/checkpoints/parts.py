"""What the tests of file formats build: LDM files written by another hand, and TAESD's Sequential in its published order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from helpers import tiny_vae
from safetensors.torch import save_file
from torch import nn

LEAVES = {"conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def levels_vae(levels: int = 3, seed: int = 0, **config: Any) -> Any:
    """A tiny AutoencoderKL of any number of levels."""
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    widths = tuple(8 * (1 + min(i, 1)) for i in range(levels))
    return tiny_vae(seed, **(kinds | {"block_out_channels": widths, "sample_size": 2 ** (levels + 1)} | config))


def ldm_names(vae: Any) -> dict[str, torch.Tensor]:
    """An AutoencoderKL's weights under LDM's names, by rules of our own writing: the oracle for `checkpoints.ldm_keys`."""
    levels = len(vae.config.block_out_channels)
    found = {}
    for name, tensor in vae.state_dict().items():
        new = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block.", name)
        new = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", new)
        new = re.sub(r"down_blocks\.(\d+)\.attentions\.", r"down.\1.attn.", new)
        new = re.sub(r"up_blocks\.(\d+)\.attentions\.", lambda m: f"up.{levels - 1 - int(m[1])}.attn.", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
        for ours, theirs in LEAVES.items():
            new = new.replace(f".{ours}.", f".{theirs}.")
        linear = ".attn" in new and tensor.ndim == 2
        found[new] = tensor[:, :, None, None].clone() if linear else tensor.clone()
    return found


def write(tensors: dict[str, torch.Tensor], path: Path, **metadata: str) -> Path:
    """A safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata or None)
    return path


def conv(n_in: int, n_out: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, **options)


class Clamp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """relu(convs(x) + skip(x)); with `pool`, x + pool(x) enters."""

    def __init__(self, n_in: int, n_out: int, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(n_in, n_out), nn.ReLU(), conv(n_out, n_out), nn.ReLU(), conv(n_out, n_out))
        self.skip = nn.Conv2d(n_in, n_out, 1, bias=False) if n_in != n_out else nn.Identity()
        wide = 4 * n_in
        layers = [nn.Conv2d(n_in, wide, 1, bias=False), nn.GroupNorm(4, wide), nn.ReLU(), nn.Conv2d(wide, n_in, 1, bias=False)]
        self.pool = nn.Sequential(*layers) if pool else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + self.skip(x))


def taesd(width: int = 8, channels: int = 4, pool: bool = False, stages: int = 2, blocks: int = 2) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder in the published order, random, downscale 2 ** stages."""
    torch.manual_seed(0)
    encoder: list[nn.Module] = [conv(3, width), Block(width, width)]
    decoder: list[nn.Module] = [Clamp(), conv(channels, width), nn.ReLU()]
    for stage in range(stages):
        encoder.append(conv(width, width, stride=2, bias=False))
        encoder += [Block(width, width, pool and stage == stages - 1) for _ in range(blocks)]
        decoder += [Block(width, width, pool and stage == 0) for _ in range(blocks)]
        decoder += [nn.Upsample(scale_factor=2), conv(width, width, bias=False)]
    return (
        nn.Sequential(*encoder, conv(width, channels)).eval(),
        nn.Sequential(*decoder, Block(width, width), conv(width, 3)).eval(),
    )


def f32(channels: int = 4) -> tuple[nn.Module, nn.Module]:
    """The order of the 1/32 variant, narrow: two strided convolutions with bias first, widths that change in the decoder."""
    torch.manual_seed(1)
    encoder: list[nn.Module] = [conv(3, 8, stride=2), nn.ReLU(), conv(8, 8, stride=2), nn.ReLU(), Block(8, 8)]
    for _ in range(3):
        encoder += [conv(8, 8, stride=2, bias=False), Block(8, 8)]
    decoder: list[nn.Module] = [Clamp(), conv(channels, 16), nn.ReLU()]
    for n_in, n_out in ((16, 12), (12, 8), (8, 8), (8, 8), (8, 8)):
        decoder += [Block(n_in, n_in), nn.Upsample(scale_factor=2), conv(n_in, n_out, bias=False)]
    return nn.Sequential(*encoder, conv(8, channels)).eval(), nn.Sequential(*decoder, Block(8, 8), conv(8, 3)).eval()


def write_halves(halves: tuple[nn.Module, nn.Module], folder: Path, suffix: str = ".pth") -> list[Path]:
    """tae_encoder and tae_decoder, as their authors write them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"tae_{side}{suffix}" for side in ("encoder", "decoder")]
    for half, path in zip(halves, paths, strict=True):
        if suffix == ".safetensors":
            write(half.state_dict(), path)
        else:
            torch.save(half.state_dict(), path)
    return paths
