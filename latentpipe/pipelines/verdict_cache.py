"""Verdicts on VAE files beside model folders: by shape from the headers, else as measured before, else measured now."""

from __future__ import annotations

import hashlib
import json
import warnings
from contextlib import suppress
from pathlib import Path

import torch

from latentpipe.checkpoints.pipeline_io import check_reference, enforce_chain, load_pipeline
from latentpipe.checkpoints.registry import available, find_model, vae_of
from latentpipe.checkpoints.single_file.gather import Stated
from latentpipe.checkpoints.vae_io import declared_space
from latentpipe.compatibility.measure import Verdict
from latentpipe.compatibility.verdict import decide_by_shapes
from latentpipe.pipelines.family_table import FAMILY_BY_CLASS
from latentpipe.pipelines.swap import check_swap, judge_stages, stage_of
from latentpipe.utils.errors import LatentpipeWarning, UserError
from latentpipe.utils.io import atomic_file, home, read_json
from latentpipe.vae.latent_space import LatentSpace
from latentpipe.vae.stage import VAEStage

VERSION = 1  # of what is measured and judged: a verdict of another version is measured again


def verdict_on(model: str | Path, vae: str | Path, images: torch.Tensor | None = None, stated: Stated | None = None) -> Verdict:
    """Whether a VAE file decodes what a model draws, without opening the model's other parts.

    model   name or folder of a model
    vae     name, folder or file of a VAE
    images  B 3 H W in [-1, 1]; None: bundled probes, and what was measured of the same weights before is read again
    stated  what a single file does not say itself; its VAE may be another file's, so that the model is opened

    UserError where the model's own VAE cannot be the reference, or a file cannot be read.
    """
    folder, place = find_model(model), find_model(vae, "vae")
    check_reference(folder)
    if stated not in (None, Stated()) and folder.is_file():
        return check_swap(load_pipeline(folder, stated=stated), place, images)
    own = declared_space(vae_of(folder))
    if not _fits_itself(folder, own):
        return check_swap(load_pipeline(folder), place, images)  # which says what is wrong
    apart = decide_by_shapes(own, declared_space(place))
    if apart is not None:
        return apart
    enforce_chain(folder)
    host = stage_of(vae_of(folder))
    stage = stage_of(place, host)
    return judged(host, stage) if images is None else judge_stages(host, stage, images)


def refuse_other_shape(folder: Path, vae: str | Path) -> None:
    """UserError with the verdict where the headers tell that a VAE cannot serve a model."""
    apart = decide_by_shapes(declared_space(vae_of(folder)), declared_space(find_model(vae, "vae")))
    if apart is not None:
        raise UserError(f"VAE {vae} was not put in.\n{apart}")


def judged(host: VAEStage, stage: VAEStage) -> Verdict:
    """The verdict on a stage beside the host's own, both as their files hold them; kept by the content hashes of both."""
    kept = _place(host, stage)
    if kept is not None and kept.is_file():
        with suppress(OSError, ValueError, TypeError, KeyError):  # a damaged one is measured again
            return Verdict.from_dict(read_json(kept, infinite=True))
    verdict = judge_stages(host, stage)
    if kept is not None:
        with suppress(OSError), atomic_file(kept) as part:  # a folder without rights costs time only
            part.write_text(json.dumps(verdict.as_dict()) + "\n")
    return verdict


def fitting(model: str | Path) -> list[tuple[str, Path, Verdict]]:
    """Every VAE that a name means, with its verdict for a model; a warning says which cannot be opened."""
    folder = find_model(model)
    check_reference(folder)
    found = []
    for name, path in available("vae").items():
        try:
            found.append((name, path, verdict_on(folder, path)))
        except UserError as error:
            warnings.warn(LatentpipeWarning(f"left out: {name}: {error}"), stacklevel=2)
    return found


def _place(host: VAEStage, stage: VAEStage) -> Path | None:
    """Where the verdict on two stages is kept; None where they are not what their files hold in fp32."""
    if host.digest is None or stage.digest is None or {host.dtype, stage.dtype} != {torch.float32}:
        return None
    key = hashlib.sha256(f"{VERSION}|{host.digest}|{stage.digest}".encode()).hexdigest()
    with suppress(OSError, RuntimeError, UserError):  # no home
        return home() / "verdicts" / f"{key}.json"
    return None


def _fits_itself(folder: Path, own: LatentSpace) -> bool:
    """Whether a model's denoiser takes as many channels as its own VAE makes, where its family is known."""
    if folder.is_file():
        return True  # what its parts do not fit is told when it is opened
    index = read_json(folder / "model_index.json")
    if str(index.get("_class_name")) not in FAMILY_BY_CLASS:
        return True
    config = read_json(folder / ("unet" if "unet" in index else "transformer") / "config.json")
    channels = config.get("out_channels") or config.get("in_channels")
    return not isinstance(channels, int) or channels in (own.channels, 4 * own.channels)  # four are packed into a token
