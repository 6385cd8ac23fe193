"""The verbs for VAE files: each is one call into the public API, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from latentpipe.cli.common import pictures_of


def make_fp16_safe(
    vae: str,
    /,
    out: Path | None = None,
    images: Path | None = None,
    most: int = 32,
    device: str | None = None,
    json: bool = False,
) -> None:
    """Rescale a VAE that overflows in fp16 so that it does not, and prove that its pictures stay the same.

    Args:
        vae: Name or folder of the VAE.
        out: Folder for the new VAE; left out: only measure.
        images: Folder of pictures to measure on; left out: pictures made by code.
        most: Use at most so many pictures of the folder.
        device: cpu, cuda or mps.
        json: Print one JSON object only.
    """
    from dataclasses import asdict
    from json import dumps

    import torch

    from latentpipe.checkpoints.fp16 import convert_fp16_safe
    from latentpipe.checkpoints.registry import find_model
    from latentpipe.utils.system import best_device
    from latentpipe.vae.probe_images import probe_images

    def measured(side: int) -> torch.Tensor:
        return probe_images(16, min(side, 128)) if images is None else pictures_of(images, side, most)

    image_set = "probes" if images is None else images.resolve().name
    report = convert_fp16_safe(find_model(vae, "vae"), measured, image_set, out, device or best_device())
    print(dumps(asdict(report), indent=2) if json else report.table())
    if not json:
        print(out or "nothing was written; --out DIR writes the rescaled VAE")


def convert(
    source: str,
    source2: str | None = None,
    /,
    *,
    out: Path,
    to: Literal["diffusers", "ldm", "tensors"] | None = None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    downscale: int | None = None,
    norm_groups: int | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
) -> None:
    """Turn a VAE into a diffusers folder or one safetensors file; or any weights, pickles too, into safetensors, names unchanged.

    A pickle (.ckpt, .pt, .pth, .bin) of a whole model, a LoRA or an embedding becomes a safetensors file of the same tensors. A
    process of its own reads it, which runs no code of the file and has a bounded memory; what it refuses is named.

    Args:
        source: A VAE: name, folder, .safetensors, .ckpt, .pt, .pth or .bin; or a pickle of anything else.
        source2: The other half of a tiny autoencoder that comes as encoder and decoder; with --to tensors a second file.
        out: What to write: a folder, or a file that ends in .safetensors.
        to: diffusers (a folder), ldm (a file as A1111 and ComfyUI read it) or tensors (plain weights, such as a metric's, of
            both files in one); left out: the first two by the ending of --out.
        scaling_factor: latents = (raw - shift) * factor, where the file does not say it.
        shift_factor: The shift, likewise.
        downscale: Picture side / latent side, where the file does not tell it.
        norm_groups: Groups of the norms, likewise.
        dtype: What to store the weights as; left out: as they are.
    """
    from latentpipe.checkpoints.convert import convert as run
    from latentpipe.checkpoints.convert import merge_tensors
    from latentpipe.checkpoints.pickled import whole
    from latentpipe.checkpoints.registry import find_model
    from latentpipe.checkpoints.vae_file import StatedConfig
    from latentpipe.utils.io import HASH_LENGTH
    from latentpipe.utils.logging import quiet

    if to == "tensors":
        digest = merge_tensors([Path(name) for name in (source, source2) if name is not None], out)
        print(f"{out}  {digest[:HASH_LENGTH]}")
        return
    places = [Path(name) if Path(name).exists() else find_model(name, "vae") for name in (source, source2) if name is not None]
    if to is None and source2 is None and out.suffix == ".safetensors" and (kept := whole(places[0], out, dtype)) is not None:
        print(f"{out}  {kept.digest[:HASH_LENGTH]}  {kept.what}")
        return
    with quiet():
        digest = run(places, out, to, StatedConfig(scaling_factor, shift_factor, downscale, norm_groups), dtype)
    print(f"{out}  {digest[:HASH_LENGTH]}")


def swap(
    *,
    vae: str,
    model: str = "emoji",
    out: Path | None = None,
    images: Path | None = None,
    force: bool = False,
    json: bool = False,
    family: str | None = None,
    prediction: Literal["epsilon", "v", "v-zsnr"] | None = None,
    config: Path | None = None,
    parts: tuple[Path, ...] = (),
) -> None:
    """Does this VAE fit this model? Measure it, print the verdict, and with --out save the swapped pipeline.

    Args:
        vae: Name, folder or file of the VAE.
        model: Name, diffusers folder or single file of a model.
        out: Folder for the pipeline with the VAE swapped in.
        images: Folder of pictures to measure on; left out: pictures made by code.
        force: Save it whatever the verdict, as long as the shapes agree.
        json: Print one JSON object only.
        family: Of a model's single file, as for 'latentpipe generate'.
        prediction: Likewise.
        config: Likewise.
        parts: Likewise.
    """
    from json import dumps

    from latentpipe.checkpoints.registry import find_model
    from latentpipe.checkpoints.single_file.gather import Stated
    from latentpipe.pipelines.save_swapped import save_swapped
    from latentpipe.pipelines.verdict_cache import verdict_on
    from latentpipe.utils.io import refuse_name

    if out is not None:
        refuse_name(out)
    folder, stated = find_model(model), Stated(family, prediction, config, parts)
    verdict = verdict_on(folder, vae, _verdict_images(images, folder, vae) if images else None, stated)
    if out is None or verdict.fits or force:
        print(dumps(verdict.as_dict(), indent=2) if json else verdict)
    if out is not None:
        save_swapped(folder, vae, out, verdict, force, stated)
        if not json:
            print(out)
    elif not verdict.fits:
        raise SystemExit(1)


def _verdict_images(folder: Path, model: Path, vae: str) -> Any:
    """At most 32 pictures of a folder, at the side that the probes would have."""
    from latentpipe.checkpoints.registry import find_model, vae_of
    from latentpipe.checkpoints.vae_io import declared_space
    from latentpipe.compatibility.measure import probe_side

    return pictures_of(
        folder, probe_side(*(declared_space(place).downscale for place in (vae_of(model), find_model(vae, "vae")))), 32
    )
