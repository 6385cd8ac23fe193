"""The verbs that say what there is: models and files by name, what a file holds, this machine."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from latentpipe.checkpoints.registry import (
    available,
    configs_folder,
    foreign,
    is_installed_embedding,
    lookup,
    named_embedding,
    own_adapters,
)
from latentpipe.cli.common import as_json
from latentpipe.utils.errors import begin
from latentpipe.utils.gguf_header import SUFFIX as GGUF
from latentpipe.utils.io import SUFFIXES

Kind = Literal["all", "models", "vae", "lora", "adapters", "configs", "parts", "embeddings", "upscalers"]


def ls(kind: Kind = "all", /, fits: str | None = None) -> None:
    """List the models, VAEs, LoRA files, adapters and configs that names refer to, kind by kind, each by name.

    Those of other tools ('latentpipe import') and of the hub's cache stand behind their kind's own, with family, size and origin;
    so do parts, embeddings and upscalers.

    Args:
        kind: What to list.
        fits: Name or folder of a model: list the VAEs with their verdicts, those that fit it first.
    """
    if fits is not None:
        from latentpipe.pipelines.verdict_cache import fitting

        begin(f"measuring every VAE beside that of the model {fits}")

        for name, path, verdict in sorted(fitting(fits), key=lambda row: not row[2].fits):
            print(f"{name:20}{verdict.outcome:26}{path}")
        return

    from latentpipe.checkpoints.hub.importing import rows_of
    from latentpipe.checkpoints.places.glance import family

    rows = [("model", available("models")), ("vae", available("vae")), ("lora", available("lora")), ("adapter", own_adapters())]
    rows += [("embedding", available("embeddings")), ("part", available("parts"))]
    rows.append(("config", {path.stem: path for path in configs_folder().glob("*.yaml")}))
    others = rows_of(kind)
    for what, found in rows:
        for entry, path in sorted(found.items()) if kind in ("all", what, f"{what}s") else ():
            told = f"  ({family(path)})" if path.suffix == GGUF else ""
            print(f"{what:7} {entry:19} {path}{told}")
        print("".join(f"{line}\n" for line in others.pop(f"{what}s", others.pop(what, []))), end="")
    for problem in others.pop("problems", []):
        print(f"latentpipe: note: left out: {problem}", file=sys.stderr)
    for lines in others.values():
        print("\n".join(lines))


def inspect(
    path: str,
    /,
    family: str | None = None,
    prediction: Literal["epsilon", "v", "v-zsnr"] | None = None,
    config: Path | None = None,
    parts: tuple[Path, ...] = (),
) -> None:
    """Print what a model, a VAE, a LoRA, an adapter or a picture says about itself, as JSON.

    Args:
        path: A name, a model or VAE folder, a .safetensors or .gguf file, an .lpz file, or a picture (also of A1111, ...).
        family: Of a model's single file, as for 'latentpipe generate'.
        prediction: Likewise.
        config: Likewise.
        parts: Likewise.
    """
    from latentpipe.checkpoints.single_file.refusals import refuse_unreadable
    from latentpipe.utils.io import is_gguf, is_safetensors

    file = lookup(path, {**foreign("lora"), **available("lora")}, "LoRA") or own_adapters().get(path) or Path(path)
    if not file.exists() and is_installed_embedding(path):
        file = named_embedding(path)
    if file.is_file() and not (file.suffix in (*SUFFIXES, GGUF) or is_safetensors(file) or is_gguf(file)):
        refuse_unreadable(file)
        print(_of_file(file))
        return
    begin(f"reading {path}")
    from latentpipe.checkpoints.embedding import describe_embedding, is_embedding
    from latentpipe.checkpoints.pipeline_io import describe
    from latentpipe.checkpoints.single_file.describe import describe_file
    from latentpipe.checkpoints.single_file.gather import Stated
    from latentpipe.checkpoints.single_file.refusals import check_kind
    from latentpipe.compatibility.latent_adapter import is_adapter, read_card
    from latentpipe.lora.state_dict.describe import is_lora, lora_facts

    if file.is_file():
        check_kind(file)
    stated = Stated(family, prediction, config, parts)
    if is_gguf(model := available("models").get(path, file)):
        print(as_json(describe_file(model, stated)))
        return
    if is_lora(file):
        print(as_json(lora_facts(file)))
    elif is_embedding(file):
        print(as_json(describe_embedding(file)))
    else:
        card = asdict(read_card(file)) if file.is_file() and is_adapter(file) else None
        print(as_json(card or describe_file(available("models").get(path, Path(path)), stated) or describe(path)))


def _of_file(file: Path) -> str:
    """What an .lpz file, a grid or another picture says, as JSON."""
    from latentpipe.cli.codec import is_lpz, lpz_facts
    from latentpipe.pipelines.metadata.reader import read_info
    from latentpipe.pipelines.metadata.recipe import GRID_CHUNK, text_in

    if is_lpz(file):
        return as_json(lpz_facts(file))
    if text_in(file, GRID_CHUNK) is not None:
        from latentpipe.engine.xy_grid.plot import read_grid

        return read_grid(file).model_dump_json(indent=2)
    info = read_info(file)
    return info.recipe.model_dump_json(indent=2) if info.recipe else as_json(info.shortened())


def env(fits: bool = False, cluster: str | None = None) -> None:
    """Print versions, devices and folders, for a bug report; and what fits into the memory, or what a cluster has.

    Args:
        fits: Say how much memory each family and each installed model takes, of what is free (some seconds).
        cluster: Address of a Ray cluster, or auto: say its nodes, processors, GPUs and memory (some seconds).
    """
    import torch

    from latentpipe.checkpoints.registry import bundled_weights_dir
    from latentpipe.pipelines.metadata.recipe import this_machine
    from latentpipe.utils.cluster import devices, facts_of
    from latentpipe.utils.io import home
    from latentpipe.utils.system import best_device

    machine = this_machine(best_device(), "fp32", torch.get_num_threads()).model_dump()
    machine |= {"workers_on": devices(), "cluster": facts_of(cluster)}
    facts = {**machine, "python": sys.version.split()[0], "shipped": str(bundled_weights_dir()), "home": str(home())}
    print(as_json({**facts, "fits": _that_fit(best_device())} if fits else facts))


def _that_fit(device: str) -> dict[str, list[str]]:
    """What families and installed models take in the precision of `--dtype auto`."""
    import torch

    from latentpipe.pipelines import memory_need
    from latentpipe.utils.errors import UserError
    from latentpipe.utils.system import has_bf16_units

    begin("predicting the memory that models take")
    place, kind = torch.device(device), torch.bfloat16 if has_bf16_units(device) else torch.float32
    models = []
    for name, path in {**foreign("models"), **available("models")}.items():
        try:
            models.append(str(memory_need.need_of(memory_need.layout_of(path), name, kind, place)))
        except UserError as error:
            models.append(f"{name}: {error}")
    return {"families": [str(need) for need in memory_need.families_that_fit(kind, place)], "models": models}
