"""How many parts a step's pictures must be computed in, so that it fits into the free memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from latentpipe.train import loop
from latentpipe.train.config import TrainVAE
from latentpipe.train.distributed import DistributedContext
from latentpipe.train.vae.training_pass import TrainingPass
from latentpipe.utils.errors import UserError
from latentpipe.utils.io import atomic_file
from latentpipe.utils.reading import parse_json, read_text
from latentpipe.vae import memory
from latentpipe.vae.stage import VAEStage

SHARE = 0.6  # of the free memory; the rest is for gradients, the optimizer and what other programs take


def parts_that_fit(config: TrainVAE, stage: VAEStage, team: DistributedContext) -> int:
    """``optim.accumulate``; where it is "auto", the fewest equal parts of a step whose activations fit.

    The bytes that one picture keeps for the backward pass are counted (saved tensors), nothing is tried until it fails.
    """
    if config.optim.accumulate != "auto":
        return config.optim.accumulate
    record = config.run.work / "parts.json"
    if config.run.resume and record.is_file():  # whatever is free now: a resumed run is the same run
        return _recorded(record, config.optim.batch_size)
    own = config.optim.batch_size // team.world
    each = saved_bytes(config, stage, team.device)
    room = int(memory.available(team.device) * SHARE) // (team.world if team.device.type == "cpu" else 1)
    fitting = [parts for parts in range(1, own + 1) if own % parts == 0 and own // parts * each <= room]
    if not fitting:
        raise UserError(
            f"One picture of {config.crops.size_px} px takes {each / 2**20:,.0f} MB in a training step, and "
            f"{room / 2**20:,.0f} MB are free for it. Use smaller crops, or --run.gradient-checkpointing."
        )
    parts = team.largest(fitting[0])
    if team.is_first:
        with atomic_file(record) as part:
            part.write_text(json.dumps(parts))
        if parts > 1:
            print(f"Each step is computed in {parts} parts of {own // parts} pictures, to fit into memory.")
    return parts


def _recorded(record: Path, batch: int) -> int:
    try:
        parts = parse_json(read_text(record))
    except ValueError as error:
        parts = error
    if type(parts) is not int or not 1 <= parts <= batch:
        raise UserError(f"{record}: expected the number of parts of a step, 1 to {batch}; delete it to have it found anew.")
    return parts


def saved_bytes(config: TrainVAE, stage: VAEStage, device: torch.device) -> int:
    """Bytes that the forward pass of one picture keeps for its backward pass (weights not counted)."""
    side = config.crops.size_px
    own = {parameter.data_ptr() for parameter in stage.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = max(kept.get(tensor.data_ptr(), 0), tensor.untyped_storage().nbytes())
        return tensor

    images = torch.zeros(1, 3, side, side, device=device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with loop.fast_forward(config.run, device):
            rebuilt, posterior = TrainingPass(stage)(images)
        total = (rebuilt.float() - images).square().mean()
    del total, posterior
    return sum(kept.values())
