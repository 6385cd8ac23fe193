"""Swap the VAE of a pipeline: prove that it fits, then rebuild the pipeline around it; nothing lent is changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.vae_io import declared_space, open_vae
from latentpipe.compatibility.latent_adapter import BridgedStage, LatentAdapter, bridged, find_adapter, open_adapter
from latentpipe.compatibility.measure import Verdict, comparable, measure
from latentpipe.compatibility.verdict import decide_by_shapes, decide_verdict
from latentpipe.pipelines import families, hosting
from latentpipe.pipelines.facade import behind, with_factors
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.io import content_hash
from latentpipe.vae.latent_space import LatentSpace
from latentpipe.vae.protocol import Stage
from latentpipe.vae.stage import VAEStage

VAE = str | Path | nn.Module
GIVEN = "(given)"  # the recipe's name for what came as an object: a replay asks for its file


def stage_of(vae: VAE, like: VAEStage | None = None) -> VAEStage:
    """A stage from a name, a path, an autoencoder or a stage; on the device and in the dtype of `like` where it is loaded."""
    if isinstance(vae, VAEStage):
        return vae
    if isinstance(vae, (str, Path)):
        opened = open_vae(find_model(vae, "vae"))
        loaded = VAEStage(opened.build(), digest=content_hash(opened.tensors, opened.space))
        return loaded.to(like.device, like.dtype) if like else loaded
    return behind(vae)


@runtime_checkable
class TakesStage(Protocol):
    """A pipeline that decodes by a stage of its own and leaves its host alone: `LatentPipeline`."""

    host: Any

    def with_stage(self, stage: Stage) -> Any:
        """The same pipeline around another stage."""


def host_of(pipe: Any) -> Any:
    """The diffusers pipeline itself, or that of a LatentPipeline."""
    return pipe.host if isinstance(pipe, TakesStage) else pipe


def host_stage(pipe: Any) -> VAEStage:
    """The stage of the VAE that a diffusers pipeline, or the host of a LatentPipeline, came with."""
    host = host_of(pipe)
    families.family_of(host)
    return families.own_stage(host)


def check_swap(pipe: Any, vae: VAE, images: torch.Tensor | None = None) -> Verdict:
    """Whether `vae` decodes what this pipeline's denoiser draws: measured against the pipeline's own VAE.

    pipe    a diffusers pipeline, or a LatentPipeline
    vae     a name, a folder or file, an autoencoder, a VAEStage
    images  B 3 H W in [-1, 1]; None: bundled probes

    A file whose config or header tells another shape is not read.
    """
    host = host_stage(pipe)
    channels, downscale = families.expected_latents(host_of(pipe))
    if (host.space.channels, host.space.downscale) != (channels, downscale):
        raise UserError(
            f"This pipeline does not fit itself: its VAE makes {host.space.channels}-channel latents at "
            f"1/{host.space.downscale} size, its denoiser takes {counted(channels, 'channel')} at 1/{downscale}. "
            "Put its own VAE back before trying another."
        )
    if isinstance(vae, (str, Path)):
        apart = decide_by_shapes(host.space, declared_space(find_model(vae, "vae")))
        if apart is not None:
            return apart
    return judge_stages(host, stage_of(vae, host), images)


def judge_stages(host: VAEStage, stage: VAEStage, images: torch.Tensor | None = None) -> Verdict:
    """The verdict on a stage beside the host's own; measured where one denoiser can draw for both."""
    return decide_by_shapes(host.space, stage.space) or decide_verdict(host.space, stage.space, measure(host, stage, images))


def swap_vae(
    pipe: Any,
    vae: VAE,
    force: bool = False,
    adapter: LatentAdapter | str | Path | None = None,
    images: torch.Tensor | None = None,
) -> Any:
    """A new pipeline that decodes (and encodes) by `vae`; `pipe` and `vae` are left as they were.

    UserError with the verdict where it does not fit, unless `force`; then shapes alone must agree. Where the decoder alone
    fits, pictures are encoded by the pipeline's own VAE. With an `adapter` (from
    `fit_adapter`, or a file of `latentpipe fit-adapter`) pictures are encoded by the pipeline's own VAE and decoded, through
    the adapter, by `vae`. A VAE whose normalization the host's own code would misread is put in behind a facade of
    scaling_factor 1 (`facade.facade_of`); such a pipeline draws, but cannot be saved as it is.
    """
    host = host_stage(pipe)
    stage = stage_of(vae, host)
    if adapter is not None:
        if not isinstance(adapter, LatentAdapter):
            adapter = open_adapter(find_adapter(adapter), hashes_of(host), hashes_of(stage))
        return _with_stage(pipe, bridged(host, stage, adapter))
    if force:
        refuse_shape(host.space, stage.space)
    else:
        verdict = check_swap(pipe, stage, images)
        if not verdict.fits:
            raise UserError(str(verdict))
        if not verdict.encodes:
            return _with_stage(pipe, BridgedStage(host, None, stage))
    return _with_stage(pipe, stage)


def as_given(stage: Stage, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a LatentPipeline around a stage that came as an object: its names, and `hashes` with those of the stage."""
    decoder = stage.decoding
    found = {**hashes, "vae": decoder.digest or content_hash(decoder.vae.state_dict(), decoder.space)}
    if not isinstance(stage, BridgedStage) or stage.adapter is None:
        return {"vae_name": GIVEN, "hashes": found}
    found["adapter"] = content_hash(stage.adapter.state_dict())
    return {"vae_name": GIVEN, "adapter_name": GIVEN, "hashes": found}


def hashes_of(stage: VAEStage) -> set[str]:
    """The content hashes that a stage may have in a file: a file's dtype may be lower than that of the weights in memory."""
    if stage.digest is not None:
        return {stage.digest}
    state = stage.vae.state_dict()
    found = {content_hash(state, stage.space)}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        if all(torch.equal(cast[name].to(value.dtype), value) for name, value in state.items()):
            found.add(content_hash(cast, stage.space))
    return found


def refuse_shape(host: LatentSpace, vae: LatentSpace) -> None:
    """UserError where the latents of two VAEs have other shapes, which nothing but an adapter can mend."""
    if not comparable((host.channels, host.downscale), (vae.channels, vae.downscale)):
        raise UserError(
            f"Not even force can swap this: {host.difference(vae)} Fit an adapter ('latentpipe fit-adapter'), or choose "
            "another VAE."
        )


def _with_stage(pipe: Any, stage: Stage) -> Any:
    if isinstance(pipe, TakesStage):
        return pipe.with_stage(stage)
    own = families.autoencoder(pipe)
    if not families.unsupported_reason(type(pipe), stage, own):
        return hosting.put_in(pipe, with_factors(stage.decoding.vae, stage.space, families.family_of(pipe)))
    return hosting.put_in(pipe, hosting.normalized(type(pipe), stage, own))
