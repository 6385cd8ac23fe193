"""make-fp16-safe: a VAE that stays finite in fp16, from one that does not, and the proof that its pictures stay.

What rescaling changes beside rounding is measured, not assumed: GroupNorm's eps weighs more beside a smaller variance,
and fp16 cuts small weights short.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentpipe.checkpoints.fp16_rescale import check_class, rescale
from latentpipe.checkpoints.tensor_source import CARD_FILE
from latentpipe.checkpoints.vae_io import PREVIEW_FILE, load_vae, save_vae, vae_hash
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.io import read_json
from latentpipe.vae.latent_space import LatentSpace
from latentpipe.vae.precision import all_finite, unchecked
from latentpipe.vae.stage import VAEStage

EXACT_DB = 60.0  # fp32 after rescaling against fp32 before, at least
HALF_DB = 40.0  # fp16 after rescaling against fp32 before, at least


@dataclass(frozen=True)
class Change:
    """The rescaled VAE against the one given in fp32, over all images; dB of the range of the values given.

    difference   largest absolute difference in fp32: of raw mean and std (encode), of images in [-1, 1] (decode)
    exact_db     PSNR in fp32;  half_db  PSNR in fp16
    """

    difference: float
    exact_db: float
    half_db: float


@dataclass(frozen=True)
class Fp16Report:
    """What `make_fp16_safe` measured and did.

    n           how many images
    overflowed  whether the VAE that was given is not finite in fp16 on them
    emulated    whether fp16 was weights and module outputs rounded to it (a CPU has none that is fast), or the device's own
    scales      layer -> factor of what it returns; only factors that are not 1
    largest     the eight worst modules -> largest absolute output in fp32 (before, after)
    """

    n: int
    overflowed: bool
    emulated: bool
    scales: dict[str, float]
    largest: dict[str, tuple[float, float]]
    encode: Change
    decode: Change

    def table(self) -> str:
        """For a terminal: the verdict, the worst modules, what changed."""
        verdict = "overflows in fp16" if self.overflowed else "stays finite in fp16 as it is"
        lines = [
            f"{counted(self.n, 'image')}: this VAE {verdict}; {counted(len(self.scales), 'layer')} rescaled",
            "",
            f"{'largest value':46}before       after",
        ]
        lines += [f"  {name:42}{before:9,.0f}   {after:9,.0f}" for name, (before, after) in self.largest.items()]
        lines += ["", f"{'rescaled against given':26}difference   fp32 PSNR   {'emulated ' if self.emulated else ''}fp16 PSNR"]
        for name, change in (("encode (raw)", self.encode), ("decode (images)", self.decode)):
            lines.append(f"  {name:24}{change.difference:10.2g}{change.exact_db:9.1f} dB{change.half_db:9.1f} dB")
        return "\n".join(lines)


@dataclass
class _Seen:
    """What a VAE returned, and the largest absolute output of each module, in the order in which they end."""

    largest: dict[str, float]
    mean: torch.Tensor
    std: torch.Tensor
    images: torch.Tensor


def make_fp16_safe(vae: Any, images: torch.Tensor) -> tuple[Any, Fp16Report]:
    """A copy of an AutoencoderKL or AutoencoderTiny that stays finite in fp16, in the dtype given, and the proof.

    Scales come from the largest activations in fp32 on `images` (B 3 H W, [-1, 1]) and on their latents. UserError:
    another class, something not finite even in fp32, or a proof that fails (below EXACT_DB or HALF_DB, or not finite).
    """
    check_class(vae)
    given = nn.Module.float(copy.deepcopy(vae)).eval()
    before = _observe(given, images)
    if not all_finite((before.mean, before.std, before.images)):
        raise UserError(
            "This VAE is not finite on these images even in fp32; expected one that works in fp32. Fetch or export it again."
        )
    emulated = next(vae.parameters()).device.type == "cpu"
    naive = _observe(_half(given, emulated), images, before.mean, emulated)
    new = copy.deepcopy(given)
    scales = rescale(new, before.largest)
    if "force_upcast" in new.config:
        new.register_to_config(force_upcast=False)  # or diffusers' own pipelines would decode in fp32 all the same
    after = _observe(new, images, before.mean)
    half_model = _half(new, emulated)
    half = _observe(half_model, images, before.mean, emulated)
    report = Fp16Report(
        n=len(images),
        overflowed=not all_finite((naive.mean, naive.std, naive.images)),
        emulated=emulated,
        scales=scales,
        largest={name: (before.largest[name], after.largest[name]) for name in _worst(before.largest)},
        encode=_change((before.mean, before.std), (after.mean, after.std), (half.mean, half.std)),
        decode=_change((before.images,), (after.images,), (half.images,)),
    )
    for direction, change in (("encode", report.encode), ("decode", report.decode)):
        if not (change.exact_db >= EXACT_DB and change.half_db >= HALF_DB):
            raise UserError(_refusal(direction, change, half))
    return nn.Module.to(new, next(vae.parameters()).dtype).train(vae.training), report


def convert_fp16_safe(
    path: Path, images: Callable[[int], torch.Tensor], image_set: str, out: Path | None, device: str = "cpu"
) -> Fp16Report:
    """`make_fp16_safe` for the VAE at `path`, on ``images(side in pixels)``; `out` gets the new one, in fp16.

    Its card.json holds the base's card and hash, and all that was measured. UserError where `out` holds something.
    """
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists; expected a new or empty folder for the rescaled VAE.")
    vae = load_vae(path)
    space = LatentSpace.of(vae)
    stated = vae.config.get("sample_size") or 256  # one side, or a list of both
    side = min(256, *stated) if isinstance(stated, list | tuple) else min(256, stated)
    side = side // space.downscale * space.downscale
    new, report = make_fp16_safe(nn.Module.to(vae, device), images(max(side, space.downscale)))
    if out is not None:
        card, preview = (read_json(path / name) if (path / name).is_file() else None for name in (CARD_FILE, PREVIEW_FILE))
        facts = {"base": vae_hash(path), "images": image_set, **asdict(report)}
        save_vae(nn.Module.to(new, "cpu"), out, {**(card or {}), "fp16_safe": facts}, preview)
    return report


def _half(vae: Any, emulated: bool) -> Any:
    half = nn.Module.half(copy.deepcopy(vae))
    return nn.Module.float(half) if emulated else half


@torch.no_grad()
def _observe(vae: Any, images: torch.Tensor, raw: torch.Tensor | None = None, rounded: bool = False) -> _Seen:
    """Encode `images` and decode `raw` (left out: the means), one by one; `rounded` makes every module return fp16 numbers."""
    largest: dict[str, torch.Tensor] = {}

    def hook_for(name: str) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, torch.Tensor):
                return output
            output = output.half().to(output.dtype) if rounded else output
            size = output.abs().amax().float()
            largest[name] = torch.maximum(size, largest[name]) if name in largest else size
            return output

        return after

    stage = _stage(vae)
    hooks = [module.register_forward_hook(hook_for(name)) for name, module in vae.named_modules()]
    try:
        with unchecked():
            moments = [stage.raw_posterior(image.half() if rounded else image) for image in images.split(1)]
            mean, std = (torch.cat(parts).float() for parts in zip(*moments, strict=True))
            decoded = [stage.decode(each.half() if rounded else each) for each in (mean if raw is None else raw).split(1)]
    finally:
        for hook in hooks:
            hook.remove()
    return _Seen({name: size.item() for name, size in largest.items()}, mean, std, torch.cat(decoded).float())


def _stage(vae: Any) -> VAEStage:
    """A stage whose latents are the VAE's own units."""
    space = LatentSpace.of(vae)
    ones, zeros = (1.0,) * space.channels, (0.0,) * space.channels
    return VAEStage(vae, LatentSpace(space.channels, space.downscale, ones, zeros), tile=None)


def _change(before: tuple[torch.Tensor, ...], after: tuple[torch.Tensor, ...], half: tuple[torch.Tensor, ...]) -> Change:
    difference = max((a - b).abs().max().item() for a, b in zip(after, before, strict=True))
    half_db = _psnr(half[0], before[0]) if all_finite(half) else math.nan
    return Change(difference, _psnr(after[0], before[0]), half_db)


def _psnr(values: torch.Tensor, right: torch.Tensor) -> float:
    """In dB of the range of `right`; at most 200, which equal values have."""
    error = (values.double() - right.double()).square().mean().item()
    peak = (right.max() - right.min()).double().item() or 1.0
    return 200.0 if error == 0 else min(200.0, 10 * math.log10(peak**2 / error))


def _worst(largest: Mapping[str, float]) -> list[str]:
    """The eight modules of the largest outputs, each largest value by its innermost module."""
    order = sorted(largest, key=lambda name: -largest[name])
    inner = [name for name in order if not any(o.startswith(f"{name}.") and largest[o] == largest[name] for o in largest)]
    return inner[:8]


def _refusal(direction: str, change: Change, half: _Seen) -> str:
    broken = next((name for name, size in half.largest.items() if not math.isfinite(size)), None)
    if broken:
        fault = f"{broken} is still not finite in fp16 on {direction}; what it holds cannot be rescaled"
    else:
        fault = (
            f"after rescaling, {direction} has a PSNR of {change.exact_db:.1f} dB in fp32 and {change.half_db:.1f} dB in fp16; "
            f"expected at least {EXACT_DB:.0f} and {HALF_DB:.0f}"
        )
    return f"This VAE cannot be made safe for fp16: {fault}. Nothing was written; run it in bf16 or fp32."
