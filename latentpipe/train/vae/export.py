"""After the last step: measure the latents, write their normalization into the VAE, save it with its card."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from latentpipe.checkpoints.registry import available, find_model
from latentpipe.checkpoints.vae_io import save_vae, vae_hash
from latentpipe.data.streaming import PictureStream
from latentpipe.evaluate.statistics import interval
from latentpipe.train.config import TrainVAE
from latentpipe.train.vae import trainable
from latentpipe.train.vae.distillation import taught_psnr
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import bytes_to_images, psnr, resized, to_bytes
from latentpipe.utils.io import HASH_LENGTH, atomic_file
from latentpipe.vae.latent_space import LatentSpace
from latentpipe.vae.stage import VAEStage, declare_normalization

MEASURED = 20_000  # pictures that the normalization is measured on, where there are more
PREVIEWED = 512


def export_vae(
    config: TrainVAE,
    stage: VAEStage,
    pictures: PictureStream,
    held: torch.Tensor | None,
    steps: int,
    teacher: VAEStage | None = None,
) -> Path:
    """Save in fp16, then measure what was saved; says which denoisers the VAE still fits."""
    size = config.crops.size_px
    vae = stage.vae
    card: dict[str, Any] = {"data": str(config.data.train), "pictures": len(pictures) - len(pictures.skipped), "size_px": size}
    card |= {"steps": steps, "mode": config.mode, "trained": ", ".join(_trained(vae))}
    if config.run.warm_start is not None:
        source = find_model(config.run.warm_start, "vae")
        card["base"] = {"name": str(config.run.warm_start), "content_hash": vae_hash(source)}
    if config.teacher is not None:
        card["teacher"] = {"name": str(config.teacher), "content_hash": vae_hash(find_model(config.teacher, "vae"))}
    moved = config.mode != "distil" and trainable.moves_the_latents(vae)
    if config.loss.rate:
        keep_steps(vae, config.loss.step)
    elif moved:
        measured = LatentSpace.measure(_posteriors(stage, pictures, size), stage.space.downscale)
        declare_normalization(vae, measured.space)
        errors = [round(value, 5) if math.isfinite(value) else None for value in measured.standard_error]
        card |= {"latent_mean_standard_error": errors, "normalization_measured_on": measured.n}
    saved = VAEStage(vae.half().float().eval().cpu())  # what will be saved is what is measured
    if held is not None:
        card["validation"] = validation_card(config, saved, held)
        if teacher is not None:  # what a denoiser of the teacher's latents gets
            card["validation"]["psnr_db_of_teachers_latents"] = round(taught_psnr(saved, teacher.cpu(), held).mean().item(), 3)
    card["loss"] = config.loss.model_dump(mode="json")
    card["config"] = config.model_dump(mode="json")
    save_vae(saved.vae, config.run.out, card, preview_map(saved, first_pictures(pictures, size, PREVIEWED)))
    with atomic_file(config.run.work / "result.json") as part:
        part.write_text(json.dumps(card, indent=2))
    print(f"VAE: {config.run.out}")
    print(fitting(config, moved))
    return config.run.out


@torch.no_grad()
def keep_steps(vae: Any, step: float) -> None:
    """Declare the steps of a codec's quantizer the unit of its latents, in place.

    The log-variance, which a codec does not train, becomes that of uniform noise as wide as a step: ``step^2 / 12``.
    """
    wanted = {"scaling_factor": 1 / step, "shift_factor": None, "latents_mean": None, "latents_std": None}
    vae.register_to_config(**{name: value for name, value in wanted.items() if name in vae.config})
    if getattr(vae, "quant_conv", None) is not None:
        c = vae.config["latent_channels"]
        vae.quant_conv.weight[c:] = 0.0
        vae.quant_conv.bias[c:] = math.log(step**2 / 12)


def validation_card(config: TrainVAE, stage: VAEStage, held: torch.Tensor) -> dict[str, Any]:
    """PSNR of the mode on the validation pictures, with its interval; printed too."""
    parts = (stage.decode(stage.encode(part)).float().cpu() for part in held.split(64))
    with torch.no_grad():
        values = psnr(to_bytes(held), to_bytes(torch.cat(list(parts)))).clamp_max(99.0)
    low, high = interval(values.numpy())
    mean = values.mean().item()
    print(
        f"Validation PSNR of the mode: {mean:.2f} dB ({low:.2f} to {high:.2f}, 95 %), n = {len(held)}, {config.crops.size_px} px"
    )
    figures = {"psnr_db": mean, "low": low, "high": high}
    return {"set": str(config.data.validation), "n": len(held), **{name: round(value, 3) for name, value in figures.items()}}


def fitting(config: TrainVAE, moved: bool) -> str:
    """Which denoisers read the latents of the VAE that was trained."""
    origin = config.teacher if config.mode == "distil" else config.run.warm_start
    if origin is None:
        return "It has a latent space of its own: cache latents with 'latentpipe encode', then train a denoiser for it."
    source = vae_hash(find_model(origin, "vae"))
    models = [name for name, path in available("models").items() if _hash_of(path / "vae") == source]
    named = f"the denoiser of {', '.join(models)}" if models else f"a denoiser that was trained on {origin}"
    if not moved:
        return f"Its latents are those of {origin} ({source[:HASH_LENGTH]}): {named} fits ('latentpipe swap' proves it)."
    return (
        f"Its encoder was trained, so its latents are no longer those of {origin} ({source[:HASH_LENGTH]}): {named} no longer "
        "fits, nor do latents that were cached with it. 'latentpipe encode' and 'train-denoiser' make new ones; "
        "'latentpipe fit-adapter' maps the old latents to the new."
    )


def _hash_of(folder: Path) -> str | None:
    """The hash of an installed model's VAE; None where it cannot be read, which is not this run's fault."""
    try:
        return vae_hash(folder)
    except UserError:
        return None


@torch.no_grad()
def preview_map(stage: VAEStage, images: torch.Tensor) -> dict[str, list]:
    """The affine map from latents to RGB in [-1, 1] that is nearest (least squares) to the area-averaged pictures."""
    latents = torch.cat([stage.encode(part) for part in images.split(64)])
    colours = functional.avg_pool2d(images, stage.space.downscale).permute(0, 2, 3, 1).reshape(-1, 3)
    values = latents.permute(0, 2, 3, 1).reshape(-1, stage.space.channels)
    design = torch.cat([values, torch.ones(len(values), 1)], dim=1).double()
    solution = torch.linalg.lstsq(design, colours.double()).solution
    # rounded, since the last bits of a least-squares solution depend on where in memory the matrix lies
    solution = solution.mul(1e7).round().div(1e7)
    return {"factors": solution[:-1].tolist(), "bias": solution[-1].tolist()}


def first_pictures(pictures: PictureStream, size: int, max_images: int) -> torch.Tensor:
    """At most `most` of the pictures as images (N 3 size size)."""
    pixels = pictures.batch(pictures.sample(max_images))
    return bytes_to_images(torch.from_numpy(resized(pixels.permute(0, 2, 3, 1).numpy(), size)).permute(0, 3, 1, 2))


@torch.no_grad()
def _posteriors(stage: VAEStage, pictures: PictureStream, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    chosen = torch.tensor(pictures.sample(MEASURED))
    for part in chosen.split(64):
        pixels = resized(pictures.batch(part.tolist()).permute(0, 2, 3, 1).numpy(), size)
        mean, std = stage.raw_posterior(bytes_to_images(torch.from_numpy(pixels).permute(0, 3, 1, 2)).to(stage.device))
        yield mean.float().cpu(), std.float().cpu()


def _trained(vae: Any) -> list[str]:
    return sorted({trainable.block_of(name) for name, parameter in vae.named_parameters() if parameter.requires_grad})
