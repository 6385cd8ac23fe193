"""How much memory an encoding or decoding will take, how much there is, and what follows: whole, in bands, or not at all.

The prediction runs the very same code on meta tensors, which have shapes but no values, and adds up the storages that
are alive at once. To that come the copies that the CPU's convolutions make (`_scratch`).
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentpipe.utils.errors import UserError
from latentpipe.vae.latent_space import downscale_of
from latentpipe.vae.offload import device_of, unhooked
from latentpipe.vae.precision import Direction as Direction
from latentpipe.vae.tiling import tiled

Shape = tuple[int, int, int, int]

SHARE = 0.8  # of what is free; the rest is for what the prediction does not see
HEIGHTS = (256, 128, 64, 32, 16, 8)  # of a band, in rows
AREA = 2**16  # pixels of a band beyond which a larger one is no faster
MB = 2**20
SPARE = 1.04  # what is too small to be counted

_known: dict[Any, int] = {}


def predict(vae: Any, direction: Direction, shape: Shape, rows: int | None = None, device: str | None = None) -> int:
    """Peak bytes above the weights and the input, for images (encode) or raw latents (decode) of `shape`.

    rows    height of a band; None: the whole picture at once, as diffusers does it, within `utils.system.release_freed_memory`
            (without that, what glibc keeps of maps below 32 MB comes to it, which depends on what ran before: up to 40 % were
            measured)
    device  the kind that it will run on ("cpu", "cuda"); None: where the weights are
    """
    tensors = [*vae.named_parameters(), *vae.named_buffers()]
    weights = tuple((name, tensor.shape, tensor.dtype, str(tensor.device)) for name, tensor in tensors)
    device = device or next(vae.parameters()).device.type
    key = (type(vae), weights, direction, tuple(shape), rows, device, torch.get_num_threads())
    if key not in _known:
        if len(_known) > 1000:
            _known.clear()
        _known[key] = _predict(vae, direction, shape, rows, device)
    return _known[key]


@torch.no_grad()
def _predict(vae: Any, direction: Direction, shape: Shape, rows: int | None, device: str) -> int:
    first = next(vae.parameters())
    tensors = [*vae.parameters(), *vae.buffers()]
    bare = [_on_meta(tensor) for tensor in tensors]
    # deepcopy takes the memo's tensors in place of real ones, so nothing is allocated
    twin = copy.deepcopy(unhooked(vae), {id(tensor): twin for tensor, twin in zip(tensors, bare, strict=True)})
    given = torch.empty(shape, dtype=first.dtype, device="meta")
    call = getattr(twin if rows is None else tiled, direction)
    return peak_of(lambda: call(*((given,) if rows is None else (twin, given, rows))), [*bare, given], device)


def peak_of(call: Callable[[], Any], given: list[torch.Tensor], device: str) -> int:
    """Peak bytes of a call on meta tensors above those in `given`, as a device of that type ("cpu", "cuda") would take them."""
    with torch.no_grad(), _FusedAttention(), _Peak(given, device) as peak:
        result = call()
        del result
    return int(peak.most * SPARE)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    bare = torch.empty_like(tensor, device="meta")
    return nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare


class _FusedAttention(TorchFunctionMode):
    """Attention as torch computes it on real devices: without the matrix of all pairs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else kwargs["query"])
        return func(*args, **(kwargs or {}))


class _Peak(TorchDispatchMode):
    """Adds up the storages that are alive; `most` is the peak in bytes, with the scratch memory of each operation."""

    def __init__(self, free: list[torch.Tensor], device: str) -> None:
        super().__init__()
        self.device, self.live, self.most = device, 0, 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in free}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        scratch = 0
        if func is torch.ops.aten.convolution.default:
            if _channels_last(args[0]):  # real devices keep the layout, meta tensors do not
                result = result.contiguous(memory_format=torch.channels_last)
            scratch = _scratch(args[0], args[1], result) if self.device == "cpu" else 0
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        self.most = max(self.most, self.live + scratch)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.live += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def _scratch(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> int:
    """Bytes that a convolution on a CPU takes beside its input and output; measured with torch 2.13 and oneDNN.

    oneDNN works on blocks of 16 channels: it copies weights always, and input and output unless they are channels_last.
    The copy of the input is gone when the output's own memory is first touched. Half precision without hardware support
    unfolds the input to columns instead.
    """
    if x.dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        kernel = weight.shape[2] * weight.shape[3]
        return 0 if kernel == 1 and not _channels_last(x) else x.element_size() * kernel * x.shape[1] * out[:, 0].numel()
    extra = weight.numel() * weight.element_size()
    if _channels_last(x):
        return extra
    inside, outside = (
        math.ceil(t.shape[1] / 16) * 16 * t.shape[0] * t.shape[2] * t.shape[3] * t.element_size() if t.shape[1] > 4 else 0
        for t in (x, out)
    )
    return extra + max(inside + outside - out.numel() * out.element_size(), outside)


def _channels_last(x: torch.Tensor) -> bool:
    return x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last)


def available(device: torch.device, root: Path = Path("/")) -> int:
    """Free bytes: of a CPU the smaller of the machine's and the control groups', of a GPU what its driver says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [free for free in (_machine(root), *_groups(root)) if free is not None]
    return max(0, min(found)) if found else 2**62  # no Linux: nothing is known, and the whole picture is tried


def _machine(root: Path) -> int | None:
    """MemAvailable of /proc/meminfo, which is in kB."""
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _groups(root: Path) -> list[int]:
    """What the control group of this process and each group around it still allow (Linux cgroups, versions 1 and 2)."""
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        # in a container the path may be the host's: what is missing is skipped, the mounted root is always read
        for depth in range(len(parts) + 1):
            folder = base.joinpath(*parts[:depth])
            most, now = _read(folder / limit).strip(), _read(folder / used).strip()
            if most.isdigit() and now.isdigit() and int(most) < 2**60:
                found.append(int(most) - int(now) + _reclaimable(folder))
    return found


def _reclaimable(folder: Path) -> int:
    """Bytes of files that a group holds in its cache and can drop at once."""
    values = dict(line.split() for line in _read(folder / "memory.stat").splitlines() if len(line.split()) == 2)
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def choose(vae: Any, direction: Direction, shape: Shape, free: int | None = None) -> int | None:
    """None where the whole picture fits into 80 % of the `free` bytes, else the height of the largest band that does.

    UserError, with what is needed and what there is, where not even the smallest band fits.
    """
    free = available(device_of(vae)) if free is None else free
    whole = predict(vae, direction, shape)
    if whole <= SHARE * free:
        return None
    reason = tiled.untileable_reason(vae)
    if reason:
        raise UserError(
            f"To {direction} {_of(direction, shape)} takes {whole // MB:,} MB; {free // MB:,} MB are free. {reason} {_LESS}"
        )
    width = shape[3] * (1 if direction == "encode" else _factor(vae))
    heights = [rows for rows in HEIGHTS if rows * width <= AREA] or [HEIGHTS[-1]]
    for rows in heights:
        least = predict(vae, direction, shape, rows)
        if least <= SHARE * free:
            return rows
    raise UserError(
        f"To {direction} {_of(direction, shape)} takes {least // MB:,} MB in the smallest bands and {whole // MB:,} MB without; "
        f"{free // MB:,} MB are free, of which {SHARE:.0%} may be used. {_LESS}"
    )


_LESS = "Take a smaller picture or fewer pictures at once, or close other programs."


def _of(direction: Direction, shape: Shape) -> str:
    n, _, height, width = shape
    what = "picture" if direction == "encode" else "latent map"
    return f"{n} {what}{'s' if n != 1 else ''} of {width} x {height}"


def _factor(vae: Any) -> int:
    return downscale_of(vae.config)
