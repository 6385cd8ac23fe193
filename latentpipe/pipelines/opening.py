"""A model opened for drawing: what may be asked for, in which precision, and on a GPU perhaps only while it computes."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from latentpipe.checkpoints.pipeline_io import load_pipeline, move_pipeline
from latentpipe.checkpoints.single_file.gather import Stated
from latentpipe.pipelines.memory_need import chosen_dtype
from latentpipe.utils.errors import LatentpipeWarning, UserError, expect
from latentpipe.utils.system import best_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "stored": None, "auto": None}
OFFLOADS = ("none", "model", "sequential")


def check_arguments(model: Any, vae: Any, adapter: Any, device: Any, dtype: Any, offload: Any) -> str:
    """The device that is meant; UserError for an argument of `LatentPipeline.from_pretrained` that cannot be right."""
    expect("model", model, (str, Path), "a name, or the path of a folder or file")
    for name, given in (("vae", vae), ("adapter", adapter)):
        expect(name, given, (str, Path, type(None)), "a name, the path of a folder or file, or None")
    expect("device", device, (str, type(None)), "cpu, mps, cuda or cuda:NUMBER")
    for name, given, known in (("dtype", dtype, DTYPES), ("offload", offload, OFFLOADS)):
        if given not in known:
            raise UserError(f"{name} is {given!r}; expected one of {', '.join(known)}.")
    device = device or best_device()
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise UserError(f"device is {device!r}; expected cpu, mps, cuda or cuda:NUMBER.")
    if adapter is not None and vae is None:
        raise UserError(f"adapter '{adapter}' needs the VAE that it was fitted to; give that one as well (vae).")
    if offload != "none" and not device.startswith("cuda"):
        raise UserError(
            f"offload '{offload}' brings weights to a GPU while they compute; the device is {device}, so leave it out."
        )
    if device == "cpu" and dtype == "fp16":
        told = "CPUs compute fp16 very slowly; bf16 is as small and much faster"
        warnings.warn(told, LatentpipeWarning, stacklevel=3)
    return str(device)


def host_from(folder: Path, device: str, dtype: str, offload: str, stated: Stated | None) -> Any:
    """The diffusers pipeline of a folder or single file on a device, in the precision that was asked for or chosen."""
    kind = chosen_dtype(folder, torch.device(device), stated) if dtype == "auto" else DTYPES[dtype]
    host = load_pipeline(folder, kind, stated, to_draw=offload == "none")
    return move_pipeline(host, device) if offload == "none" else offloaded(host, device, offload)


def offloaded(pipe: Any, device: str, how: str) -> Any:
    """The pipeline with accelerate's hooks, which bring its parts ("model") or layers ("sequential") to a device to compute."""
    place = torch.device(device)
    try:
        enable = pipe.enable_model_cpu_offload if how == "model" else pipe.enable_sequential_cpu_offload
        enable(gpu_id=place.index, device=place.type)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return pipe
