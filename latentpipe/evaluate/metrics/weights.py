"""Where the weights of the metrics are: a file that the user gives, else $LATENTPIPE_HOME/metrics/NAME.safetensors.

They are not the project's to redistribute. A file holds the tensors of the published files under their own names:

lpips-alex, -vgg, -squeeze  torchvision's `features.N.*`, and the heads `linK.model.1.weight` of LPIPS v0.1
dists                       torchvision's `features.N.*` of vgg16, and `alpha`, `beta`
inception                   pytorch-fid's `pt_inception-2015-12-05` (`Conv2d_1a_3x3.conv.weight`, ...)
squeezenet10                the decoded SqueezeNet 1.0 (`conv1.weight`, `fire2/conv1x1_1.weight`, ...)

Classifiers (`classifier.*`, `fc.*`) and counters (`*.num_batches_tracked`) may be there and are not read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from latentpipe.utils.errors import UserError
from latentpipe.utils.io import content_hash, load_strictly, own_home, read_header, read_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

SOURCES = {
    "lpips-alex": ("LPIPS (alex)", "alexnet-owt-7be5be79.pth lpips/weights/v0.1/alex.pth"),
    "lpips-vgg": ("LPIPS (vgg)", "vgg16-397923af.pth lpips/weights/v0.1/vgg.pth"),
    "lpips-squeeze": ("LPIPS (squeeze)", "squeezenet1_1-b8a52dc0.pth lpips/weights/v0.1/squeeze.pth"),
    "dists": ("DISTS", "vgg16-397923af.pth DISTS_pytorch/weights.pt"),
    "inception": ("FID", "pt_inception-2015-12-05-6726825d.pth"),
    "squeezenet10": ("squeezenet10", "squeezenet1_0_caffe_decoded.pth"),
}


def metric_file(name: str, given: Path | None = None) -> Path:
    """The safetensors file of a metric's weights: `given`, else the installed one; UserError says how to make it."""
    path = own_home() / "metrics" / f"{name}.safetensors" if given is None else Path(given)
    if not path.is_file():
        title, files = SOURCES[name]
        path = Path(str(path).replace(os.path.expanduser("~"), "~", 1))  # it may stand in a page that is passed on
        raise UserError(
            f"{title} needs its own weights, and {path} is no file. Make it from the published files: "
            f"'latentpipe convert {files} --out {path} --to tensors'."
        )
    return path


def fill(network: nn.Module, path: Path) -> str:
    """Fill a network strictly from a metric's file, freeze it, set it to eval, and return the hash of what was read."""
    names = [name for name in read_header(path).shapes if not _unread(name)]
    tensors: dict[str, torch.Tensor] = read_tensors(path, names)
    load_strictly(network, tensors, path)
    network.requires_grad_(False).eval()
    return content_hash(tensors)


def _unread(name: str) -> bool:
    return name.startswith(("classifier.", "fc.")) or name.endswith(".num_batches_tracked")
