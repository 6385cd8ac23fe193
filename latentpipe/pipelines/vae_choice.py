"""A LatentPipeline around another VAE by name or file, which an adapter, a verdict or the person who forces it vouches for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentpipe.checkpoints.model_files import read_preview
from latentpipe.checkpoints.pipeline_io import check_reference
from latentpipe.checkpoints.registry import find_model, name_of
from latentpipe.checkpoints.vae_io import PREVIEW_FILE
from latentpipe.compatibility.latent_adapter import BridgedStage, bridged, find_adapter, open_adapter
from latentpipe.pipelines.swap import judge_stages, stage_of
from latentpipe.pipelines.verdict_cache import judged
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import content_hash
from latentpipe.vae.stage import VAEStage


def fields_with_vae(pipe: Any, vae: str | Path, folder: Path, adapter: str | Path | None, force: bool) -> dict[str, Any]:
    """The fields of a LatentPipeline that change when it decodes by `vae`; UserError with the verdict where that does not fit.

    folder   of its model
    adapter  name or file of an adapter to that VAE
    force    take it whatever the verdict
    """
    own = VAEStage(pipe.host.vae, digest=pipe.hashes["vae"])
    stage = stage_of(vae, own)
    found = {**pipe.hashes, "vae": stage.digest or ""}
    place = find_model(vae, "vae")
    changes: dict[str, Any] = {"vae_name": name_of(place, "vae"), "stage": stage}
    if adapter is not None:
        mapping = open_adapter(path := find_adapter(adapter), [pipe.hashes["vae"]], [found["vae"]])
        found["adapter"] = content_hash(mapping.state_dict())
        changes |= {"stage": bridged(own, stage, mapping), "adapter_name": path.stem}
    elif found["vae"] != pipe.hashes["vae"] and not force:
        check_reference(folder)
        verdict = judge_stages(own, stage) if pipe.loras.weights else judged(own, stage)
        if not verdict.fits:
            raise UserError(f"VAE {vae} was not put in.\n{verdict}")
        changes["stage"] = stage if verdict.encodes else BridgedStage(own, None, stage)
        changes["preview_map"] = read_preview(place / PREVIEW_FILE, stage.space.channels) or pipe.preview_map
    return changes | {"hashes": found}
