"""Train the VAE: images -> (reconstruction, posterior) -> losses; then fold the measured normalization in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from latentpipe.config import Crops, TrainVAE, VAEShape
from latentpipe.data.folder import Pictures, read_pictures
from latentpipe.errors import UserError
from latentpipe.images import bytes_to_images, psnr, sheet, to_bytes, to_pixels
from latentpipe.latents import LatentSpace, Measured
from latentpipe.train import loop, losses
from latentpipe.train.loop import refuse_other_shape
from latentpipe.vae import VAEStage, fold_normalization
from latentpipe.weights import find_model, load_vae, save_vae


def train_vae(config: TrainVAE) -> Path:
    """Run `latentpipe train-vae`: returns the folder of the finished VAE (diffusers AutoencoderKL, fp16 safetensors)."""
    torch.manual_seed(config.run.seed)
    vae = _build(config)
    size = config.crops.size_px
    _check_size(config)
    loop.begin(config, config.run)
    pictures = read_pictures(config.data.train, config.data.read_size_px)
    print(f"Training on {config.data.train}: {pictures.report()}")
    train = torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2)  # uint8, N 3 H W
    held = _validation(config, size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Raw values are the latents while training; the normalization is measured afterwards.
    c = config.model.channels
    stage = VAEStage(vae, LatentSpace(c, 2 ** (len(config.model.blocks) - 1), (1.0,) * c, (0.0,) * c)).to(device)

    def losses_of(step: int, generator: torch.Generator) -> loop.Losses:
        chosen = loop.batch_indices(len(train), config.optim.batch_size, config.run.seed, step)
        images = crop(train[chosen], config.crops, generator).to(device)
        warp = halve if torch.rand((), generator=generator).item() < config.loss.equivariance else None
        noise = generator if device.type == "cpu" else loop.generator_for(config.run.seed, step, device.type)
        with loop.fast_forward(config.run, device):
            rebuilt, posterior = stage(images, warp=warp, generator=noise)
        target = warp(images) if warp else images
        weights = config.loss
        return {
            "l1": weights.l1 * losses.l1(target, rebuilt.float()),
            "l2": weights.l2 * losses.l2(target, rebuilt.float()),
            "kl": weights.kl * losses.kl(posterior, images[0].numel()),
        }

    def sample(step: int) -> dict[str, float]:
        if held is None:
            return {}
        rebuilt = reconstruct(stage, held)
        first = [picture for pair in zip(to_pixels(held[:16]), to_pixels(rebuilt[:16]), strict=True) for picture in pair]
        sheet(first, 8).save(config.run.work / f"rebuilt-{step:06d}.png")
        return {"validation_psnr_db": psnr(to_bytes(held), to_bytes(rebuilt)).mean().item()}

    loop.fit(vae, config.optim, config.run, losses_of, sample)
    stage.eval()
    measured = LatentSpace.measure(_posteriors(stage, pictures, size), stage.space.downscale)
    fold_normalization(vae, measured.space)
    return _finish(config, vae, measured, held, pictures)


def crop(pixels: torch.Tensor, crops: Crops, generator: torch.Generator) -> torch.Tensor:
    """A batch of uint8 pictures (B 3 H W) as images of ``crops.size_px``: whole, or cut by one random square."""
    side = pixels.shape[-1]
    if torch.rand((), generator=generator).item() >= crops.whole and side > crops.size_px:
        cut = int(torch.randint(crops.size_px, side + 1, (), generator=generator))
        top, left = (int(torch.randint(0, side - cut + 1, (), generator=generator)) for _ in range(2))
        pixels = pixels[:, :, top : top + cut, left : left + cut]
    if crops.flip:
        mirrored = torch.rand(len(pixels), generator=generator) < 0.5
        pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(3), pixels)
    images = bytes_to_images(pixels)
    if images.shape[-1] != crops.size_px:
        images = functional.interpolate(images, size=crops.size_px, mode="bicubic", antialias=True).clamp(-1, 1)
    return images


def halve(values: torch.Tensor) -> torch.Tensor:
    """Half the size by averaging 2 x 2: the warp of the scale-equivariance term (arXiv:2502.09509, 2502.14831)."""
    return functional.avg_pool2d(values, 2)


@torch.no_grad()
def reconstruct(stage: VAEStage, images: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Images through the mode of their posterior and back, on the CPU."""
    return torch.cat([stage.decode(stage.encode(part)).float().cpu() for part in images.split(batch)])


@torch.no_grad()
def _posteriors(stage: VAEStage, pictures: Pictures, size: int, batch: int = 64) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    pixels = torch.from_numpy(resized(pictures.pixels, size)).permute(0, 3, 1, 2)
    for part in pixels.split(batch):
        mean, std = stage.raw_posterior(bytes_to_images(part))
        yield mean.float().cpu(), std.float().cpu()


@torch.no_grad()
def preview_map(stage: VAEStage, pictures: Pictures, size: int, n: int = 512) -> dict[str, list]:
    """The affine map from latents to RGB in [-1, 1] that is nearest (least squares) to the area-averaged pictures."""
    images = bytes_to_images(torch.from_numpy(resized(pictures.pixels[:n], size)).permute(0, 3, 1, 2))
    latents = stage.float().cpu().encode(images)
    colours = functional.avg_pool2d(images, stage.space.downscale).permute(0, 2, 3, 1).reshape(-1, 3)
    values = latents.permute(0, 2, 3, 1).reshape(-1, stage.space.channels)
    design = torch.cat([values, torch.ones(len(values), 1)], dim=1).double()
    solution = torch.linalg.lstsq(design, colours.double()).solution
    return {"factors": solution[:-1].tolist(), "bias": solution[-1].tolist()}


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """Uint8 pictures N H W 3 at `size` x `size` (Lanczos)."""
    from PIL import Image

    from latentpipe.images import fit_square, stack

    return stack(fit_square(Image.fromarray(array), size) for array in pixels)


def _build(config: TrainVAE):
    from diffusers import AutoencoderKL

    shape: VAEShape = config.model
    if config.run.warm_start:
        vae = load_vae(find_model(config.run.warm_start, "vae")).train()
        wanted = {
            "latent_channels": shape.channels,
            "block_out_channels": shape.blocks,
            "layers_per_block": shape.layers_per_block,
            "norm_num_groups": shape.norm_groups,
            "mid_block_add_attention": shape.attention,
        }
        refuse_other_shape(config.run.warm_start, vae.config, wanted)
        return vae
    levels = len(shape.blocks)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=shape.blocks,
        layers_per_block=shape.layers_per_block,
        latent_channels=shape.channels,
        norm_num_groups=shape.norm_groups,
        mid_block_add_attention=shape.attention,
        sample_size=config.crops.size_px,
        scaling_factor=1.0,
    )


def _check_size(config: TrainVAE) -> None:
    unit = 2 ** (len(config.model.blocks) - 1) * (2 if config.loss.equivariance else 1)
    if config.crops.size_px % unit or config.crops.size_px > config.data.read_size_px:
        raise UserError(
            f"crops.size_px is {config.crops.size_px}; this model needs a multiple of {unit} "
            f"that is at most data.read_size_px ({config.data.read_size_px})."
        )


def _validation(config: TrainVAE, size: int) -> torch.Tensor | None:
    if config.data.validation is None:
        return None
    pictures = read_pictures(config.data.validation, config.data.read_size_px)
    print(f"Validating on {config.data.validation}: {pictures.report()}")
    return bytes_to_images(torch.from_numpy(resized(pictures.pixels, size)).permute(0, 3, 1, 2))


def _finish(config: TrainVAE, vae, measured: Measured, held: torch.Tensor | None, pictures: Pictures) -> Path:
    """Save in fp16, then measure what was saved."""
    card = {
        "data": str(config.data.train),
        "pictures": len(pictures.names),
        "size_px": config.crops.size_px,
        "steps": config.optim.steps,
        "latent_mean_standard_error": [round(value, 5) if math.isfinite(value) else None for value in measured.standard_error],
        "normalization_measured_on": measured.n,
    }
    vae = vae.half().float().eval()  # what will be saved is what is measured
    if held is not None:
        rebuilt = reconstruct(VAEStage(vae), held)
        values = psnr(to_bytes(held), to_bytes(rebuilt))
        card["validation"] = {"set": str(config.data.validation), "n": len(held), "psnr_db": round(values.mean().item(), 3)}
        print(f"Validation PSNR of the mode: {values.mean():.2f} dB, n = {len(held)}, {config.crops.size_px} px")
    save_vae(vae, config.run.out, card, preview_map(VAEStage(vae), pictures, config.crops.size_px))
    (config.run.work / "result.json").write_text(json.dumps(card, indent=2))
    print(f"VAE: {config.run.out}")
    return config.run.out
