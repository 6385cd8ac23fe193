"""Learn the probabilities of a VAE's rounded latents from a folder of pictures, and write them as integers beside its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from latentpipe.data.image_folder import read_pictures
from latentpipe.explore.codec.static_model import FILE, HIDDEN, OCTAVE, WEIGHT, Weights
from latentpipe.explore.codec.wavefront import NEAR, REACH
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import bytes_to_images, resized
from latentpipe.utils.io import atomic_file
from latentpipe.vae.entropy_model import GROUPS, ContextModel, bits, group_of
from latentpipe.vae.stage import VAEStage

OCTAVES = (-1.25, 1.5)  # step sizes that are learnt, around the usual one, as powers of two
BATCH = 64
StepProgress = Callable[[Iterable[int]], Iterable[int]]


@torch.no_grad()
def latents_of_folder(stage: VAEStage, folder: Path, size: int, max_images: int = 20_000) -> torch.Tensor:
    """Latents (N C h w, fp16) of the folder's pictures at `size` x `size` pixels, at most `most` of them."""
    pictures = read_pictures(folder, size, max_images)
    pixels = torch.from_numpy(resized(pictures.pixels, size)).permute(0, 3, 1, 2)
    return torch.cat([stage.encode(bytes_to_images(part).to(stage.device)).half().cpu() for part in pixels.split(BATCH)])


def learn(sets: list[torch.Tensor], usual: float, steps: int, seed: int = 0, progress: StepProgress = iter) -> ContextModel:
    """A context model of latents (N C h w each; several picture sizes) rounded at random step sizes around `usual`.

    AdamW, a cosine to zero; least bits for the values that the coder will see (Minnen et al., arXiv:1809.02736).
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = ContextModel(sets[0].shape[1])
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    low, high = (math.log2(usual) + octave for octave in OCTAVES)
    for step in progress(range(steps)):
        latents = sets[step % len(sets)]
        chosen = latents[torch.randint(len(latents), (BATCH,), generator=generator)].float()
        octaves = low + (high - low) * torch.rand(BATCH, generator=generator)
        values = (chosen / 2.0 ** octaves[:, None, None, None]).round()
        loss = bits(values, *net(values, octaves)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def integers(net: ContextModel, usual: float) -> Weights:
    """The model with integer weights, and the usual step size."""
    hidden, c = net.gather.weight.shape[:2]
    assert isinstance(net.seen, torch.Tensor)
    assert isinstance(net.known, torch.Tensor)
    gather = (net.gather.weight * net.seen).double().numpy()
    state = (net.state.weight * net.known).double().numpy()[:, :, 0, 0].copy()
    assert net.state.bias is not None
    assert net.gather.bias is not None
    offset, bias, octave = (value.double().numpy().copy() for value in (net.state.bias, net.gather.bias, net.octave))
    state[c:] *= 4 / np.log(2)
    offset[c:] *= 4 / np.log(2)
    before = np.stack([gather[:, :, i + REACH, j + REACH].T for i, j in NEAR])
    return Weights(
        before=_fixed(before, WEIGHT, np.int16),
        here=_fixed(gather[:, :, REACH, REACH].T, WEIGHT, np.int16),
        bias=_fixed(bias, WEIGHT, np.int32),
        octave=_fixed(octave / OCTAVE, WEIGHT, np.int32),
        state=_fixed(state.T, WEIGHT, np.int16),
        offset=_fixed(offset, WEIGHT + HIDDEN, np.int32),
        groups=np.stack([np.bincount(group_of(n, GROUPS), minlength=GROUPS) for n in (c, hidden)]).astype(np.int16),
        usual=np.array([round(OCTAVE * math.log2(usual))], np.int16),
    )


def write_codec(weights: Weights, folder: Path) -> Path:
    """Write the weights into a VAE's folder; returns the file."""
    from safetensors.numpy import save_file

    if not folder.is_dir():
        raise UserError(f"{folder} is a single file; the probabilities lie in a VAE's folder ('latentpipe convert' makes one).")
    with atomic_file(folder / FILE) as part:
        save_file({name: np.ascontiguousarray(value) for name, value in vars(weights).items()}, part)
    return folder / FILE


def _fixed(values: np.ndarray, places: int, kind: type) -> np.ndarray:
    info = np.iinfo(kind)
    return np.rint(values * 2**places).clip(info.min, info.max).astype(kind)
