"""Protocols: everything between a picture file and a figure that makes two papers' figures differ.

Differences of one protocol to the next are larger than those of many VAEs: resize filters alone move a Frechet distance
by 6 (Parmar et al., arXiv:2104.11222), a sampled posterior lowers PSNR, and a truncating cast costs half a grey level.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from latentpipe.utils.errors import UserError

if TYPE_CHECKING:
    import torch

Posterior = Literal["mode", "sample"]
Rounding = Literal["nearest", "truncate"]
Resize = Literal["lanczos", "adm", "tensor"]
ValueKind = Literal["bytes", "floats"]

RESIZES: dict[Resize, str] = {
    "lanczos": "centre square by Pillow's antialiased Lanczos filter, on uint8",
    "adm": "halved by box filters while at least twice the size, then Pillow's bicubic filter, centre crop, on uint8",
    "tensor": "shorter side by antialiased bilinear interpolation of floats, centre crop, not rounded to uint8",
}


@dataclass(frozen=True)
class Protocol:
    """One way to measure.

    posterior  what is decoded: its mode, or one sample (seeded for each picture)
    rounding   reconstructions to uint8, after a clamp to [-1, 1]: nearest ``floor(127.5 x + 128)``,
               or truncate ``floor(127.5 x + 127.5)``, which darkens by half a grey level
    resize     a key of RESIZES
    size_px    side of the pictures; None: chosen from the folder (`preprocessing.plan`)
    enlarge    enlarge smaller pictures, as scripts with a fixed resize do; False: they are skipped and named
    ssim_on    bytes: uint8, range 255; floats: clamped to [-1, 1] and never rounded, range 2
               (not the same figure: SSIM compares means as ratios)
    ssim_mirrored  also count windows over mirrored borders, as torchmetrics does; False: windows inside the picture only
    lpips_net  alex (to measure, says its author) or vgg
    lpips_on   bytes or floats, as above
    open       what of the published figures cannot be repeated, or is not published
    """

    name: str
    posterior: Posterior = "mode"
    rounding: Rounding = "nearest"
    resize: Resize = "lanczos"
    size_px: int | None = None
    enlarge: bool = False
    ssim_on: ValueKind = "bytes"
    ssim_mirrored: bool = False
    lpips_net: Literal["alex", "vgg"] = "alex"
    lpips_on: ValueKind = "bytes"
    open: tuple[str, ...] = ()

    def to_bytes(self, images: torch.Tensor) -> torch.Tensor:
        """Reconstructed images (B 3 H W) to uint8 as the protocol rounds them."""
        return round_images(images, self.rounding)

    def about(self) -> dict[str, Any]:
        """For the output: every choice, in words where a key would not do."""
        return {**dataclasses.asdict(self), "resize": RESIZES[self.resize], "open": list(self.open), "clamp": "[-1, 1]"}


PROTOCOLS: dict[str, Protocol] = {
    "latentpipe": Protocol("latentpipe"),
    # evaluate_tokenizer.py of LightningDiT (arXiv:2501.01423): ToTensor, Resize(256), CenterCrop(256); posterior.sample();
    # PNG by clamp(127.5 x + 128) and a cast; torchmetrics' SSIM with data_range (-1, 1); LPIPS VGG
    "lightningdit": Protocol(
        "lightningdit",
        posterior="sample",
        resize="tensor",
        size_px=256,
        enlarge=True,
        ssim_on="floats",
        ssim_mirrored=True,
        lpips_net="vgg",
        lpips_on="floats",
        open=(
            "the published figures are of the 50,000 validation pictures of ImageNet",
            "a relative of this script (EQ-VAE's eval.py) gives SSIM no range, so that it is taken from each batch; "
            "here the range is always 2",
            "older versions of the script hand unclamped floats to LPIPS; here they are clamped",
            "the random numbers of the samples are not theirs",
        ),
    ),
    # aecore/evaluator.py of DC-AE (arXiv:2410.10733): ADM's crop, clamp(255 x + 0.5) and a cast for both pictures,
    # torchmetrics' SSIM with data_range (0, 255), torchmetrics' default LPIPS (alex) on the bytes
    "dc-ae": Protocol(
        "dc-ae",
        resize="adm",
        size_px=512,
        enlarge=True,
        ssim_mirrored=True,
        open=("the published figures are of the 50,000 validation pictures of ImageNet", "their runs use autocast on a GPU"),
    ),
    # The model cards of stabilityai/sd-vae-ft-mse and sdxl-vae: COCO 2017 validation, 5,000 pictures, 256 x 256, LPIPS ("PSIM")
    "coco-5k": Protocol(
        "coco-5k",
        posterior="sample",
        size_px=256,
        enlarge=True,
        lpips_net="vgg",
        open=(
            "the cards publish neither code nor crop, filter, rounding or range: those here are this project's",
            "posterior: a sample, as the training code that the cards name reconstructs by default",
            "their PSIM is on another scale than LPIPS of today's packages",
        ),
    ),
}


def find_protocol(
    name: str, posterior: Posterior | None = None, rounding: Rounding | None = None, size_px: int | None = None
) -> Protocol:
    """A protocol by its name, with single choices replaced (its name then says so); UserError where there is none."""
    if name not in PROTOCOLS:
        raise UserError(f"No protocol '{name}'; expected one of {', '.join(PROTOCOLS)}.")
    given = {"posterior": posterior, "rounding": rounding, "size_px": size_px}
    base = PROTOCOLS[name]
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None and value != getattr(base, key)}
    if not changes:
        return base
    # the default chooses its size from the folder, so a size is no departure from it
    told = [f"{key} {value}" for key, value in changes.items() if base.size_px is not None or key != "size_px"]
    return dataclasses.replace(base, name=" with ".join([name, *([", ".join(told)] if told else [])]), **changes)


def round_images(images: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Images (B 3 H W) to uint8: clamp to [-1, 1], then `rounding` as `Protocol` says; UserError for another word."""
    import torch

    if rounding not in ("nearest", "truncate"):
        raise UserError(f"rounding is {rounding!r}; expected nearest or truncate.")
    grey = images.detach().float().clamp(-1, 1) * 127.5 + (128.0 if rounding == "nearest" else 127.5)
    return grey.clamp(0, 255).to(torch.uint8)  # a cast drops the fraction
