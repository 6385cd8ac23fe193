"""The file that a run ends with: where it may be written, what it carries, and its card."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from latentpipe.checkpoints.pipeline_io import hashes
from latentpipe.checkpoints.registry import name_of
from latentpipe.lora.adapter import Lora
from latentpipe.lora.injection import layers_of
from latentpipe.lora.state_dict.io import card, write_lora
from latentpipe.train.config import Run, TrainLora
from latentpipe.train.lora.data import LoraPictures
from latentpipe.train.lora.parameters import NAME, Plan, base_hashes, refuse_changed_base
from latentpipe.train.run_dir import prepare_run_dir, usable
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import HASH_LENGTH, atomic_file, printable, read_header

CHAIN = ("unet", "transformer", "text_encoder", "text_encoder_2", "vae")  # of a base, whose hashes the file carries


def begin_file(config: TrainLora) -> AbstractContextManager[Callable[[], None]]:
    """As `prepare_run_dir`, for a run whose result is a file."""
    return prepare_run_dir(config, usable_file(config))


def usable_file(config: TrainLora) -> Run:
    """As `usable`, for a run whose result is a file; UserError where something else stands in its place."""
    out = config.run.out
    if out.is_dir():
        raise UserError(f"run.out ({out}) is a folder; expected the name of a .safetensors file to write.")
    if out.exists() and not _is_lora(out):
        raise UserError(f"run.out ({out}) is no LoRA, and would be replaced; choose another name.")
    if config.run.work.resolve() == out.resolve():
        raise UserError(f"run.work and run.out are both {out}; one is a folder, the other a file.")
    unused = out.with_name(f".{out.name}.unused")
    run = config.run.model_copy(update={"out": unused})
    usable(run)
    return run


def _is_lora(path: Path) -> bool:
    try:
        names = read_header(path).shapes
    except UserError:
        return False
    return bool(names) and all("lora" in name or "dora" in name or name.endswith(".alpha") for name in names)


def export_lora(
    config: TrainLora, folder: Path, plan: Plan, pictures: LoraPictures, before: Mapping[str, str], steps: int
) -> Path:
    """Prove that the base is what it was, then write the adapter with its card.

    before  the hashes of the touched components' weights before the run
    """
    refuse_changed_base(before, base_hashes(plan))
    lora = Lora({name: layers_of(model, NAME) for name, model in plan.models.items()}, printable(config.run.out.stem))
    base, size_px = hashes(folder), pictures.cache.size_px
    training: dict[str, Any] = {
        "data": str(config.data.source),
        "pictures": len(pictures.rows),
        "held_out_pictures_left_out": pictures.left_out,
        "size_px": size_px,
        "steps": steps,
        "batch_size": config.optim.batch_size,
        "learning_rate": config.optim.learning_rate,
        "seed": config.run.seed,
        "sites": list(config.adapter.sites),
        "kind": config.adapter.kind,
        "loss": config.loss.model_dump(mode="json"),
        "frozen_base": dict(before),
    }
    if config.prior.train is not None:
        training["prior"] = config.prior.model_dump(mode="json")
    sample: dict[str, Any] = {"width": size_px, "height": size_px}
    if config.distillation.guidance is not None:
        training["distillation"] = config.distillation.model_dump(mode="json")
        sample |= {"num_inference_steps": config.distillation.steps, "guidance_scale": 1.0}
    words = (config.data.trigger,) if config.data.trigger else ()
    metadata = card(
        lora,
        title=lora.name,
        base_hashes={name: base[name] for name in CHAIN if name in base},
        trigger_words=words,
        sample_settings=sample,
        training=training,
        base_model=name_of(folder),
    )
    write_lora(lora, config.run.out, to="diffusers", dtype="fp16", metadata=metadata)
    with atomic_file(config.run.work / "result.json") as part:
        part.write_text(json.dumps({**training, "base_hashes": base}, indent=2))
    count = sum(layer.parameters for _, _, layer in lora.layers())
    unchanged = ", ".join(f"{name} {digest[:HASH_LENGTH]}" for name, digest in before.items())
    print(f"LoRA: {config.run.out} ({count:,} parameters)\nThe base is unchanged: {unchanged}")
    return config.run.out
