"""Networks from a folder: the numbers of config.json checked, and nothing built that the weights beside it could not fill.

A config of one kilobyte can describe a network of any size, and its class builds it before a single weight is compared. So
the numbers are held against limits first, and building stops where it asks for more than the weights file has to give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch.utils._python_dispatch import TorchDispatchMode

from latentpipe.checkpoints.config_ranges import leaves
from latentpipe.utils.deferred_imports import active
from latentpipe.utils.errors import UserError
from latentpipe.utils.out_of_memory import refuse
from latentpipe.utils.reading import validated

WIDEST = 2**16  # channels, hidden units, positions of a picture's side
LARGEST = 2**40  # any other number
SPARE_ELEMENTS, SPARE_TENSORS = 2**20, 512  # of small models: buffers, tied weights, what is drawn and thrown away
FACTOR = 4  # times what the weights file holds: tied weights are built twice

Built = TypeVar("Built")
Width = Annotated[int, Field(ge=1, le=WIDEST)]
Count = Annotated[int, Field(ge=0, le=1024)]
Widths = Annotated[list[Width], Field(min_length=1, max_length=32)]
Counts = Annotated[list[Count | Annotated[list[Count], Field(max_length=64)]], Field(max_length=64)]
Names = Annotated[list[str | None], Field(max_length=64)]
Numbers = Annotated[list[float], Field(min_length=1, max_length=WIDEST)]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


Side = Annotated[Width | Widths | None, BeforeValidator(_listed)]
Levels = Annotated[Widths | None, BeforeValidator(_listed)]
Layers = Annotated[Count | Counts | None, BeforeValidator(_listed)]
Statistics = Annotated[Numbers | None, BeforeValidator(_listed)]
Kinds = Annotated[Names | None, BeforeValidator(_listed)]
One = Width | None


class NetworkConfig(BaseModel):
    """The fields that decide how large a network of diffusers or transformers is; others may stand beside them.

    Whole numbers are whole (4.0 is none, nor is true), factors finite.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    # autoencoders
    latent_channels: One = None
    in_channels: One = None
    out_channels: One = None
    block_out_channels: Levels = None
    encoder_block_out_channels: Levels = None
    decoder_block_out_channels: Levels = None
    down_block_out_channels: Levels = None
    up_block_out_channels: Levels = None
    layers_per_block: Layers = None
    layers_per_down_block: Layers = None
    layers_per_up_block: Layers = None
    encoder_layers_per_block: Layers = None
    decoder_layers_per_block: Layers = None
    num_encoder_blocks: Layers = None
    num_decoder_blocks: Layers = None
    down_block_types: Kinds = None
    up_block_types: Kinds = None
    norm_num_groups: One = None
    sample_size: Side = None
    downscale: One = None
    scaling_factor: float | None = None
    shift_factor: float | None = None
    latents_mean: Statistics = None
    latents_std: Statistics = None
    # denoisers
    cross_attention_dim: Side = None
    attention_head_dim: Side = None
    num_attention_heads: Side = None
    transformer_layers_per_block: Layers = None
    num_layers: Layers = None
    num_single_layers: Count | None = None
    joint_attention_dim: One = None
    pooled_projection_dim: One = None
    caption_channels: One = None
    caption_projection_dim: One = None
    addition_time_embed_dim: One = None
    projection_class_embeddings_input_dim: Annotated[int, Field(ge=1, le=2**20)] | None = None
    num_class_embeds: Annotated[int, Field(ge=0, le=2**20)] | None = None
    norm_eps: float | None = None
    # text encoders
    hidden_size: One = None
    intermediate_size: Annotated[int, Field(ge=1, le=2**20)] | None = None
    d_model: One = None
    d_ff: Annotated[int, Field(ge=1, le=2**20)] | None = None
    d_kv: One = None
    num_heads: One = None
    num_hidden_layers: Count | None = None
    num_decoder_layers: Count | None = None
    num_labels: Annotated[int, Field(ge=0, le=2**16)] | None = None
    projection_dim: Annotated[int, Field(ge=0, le=WIDEST)] | None = None
    vocab_size: Annotated[int, Field(ge=1, le=2**21)] | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**21)] | None = None
    layer_norm_eps: float | None = None


def check_config(config: Mapping[str, Any], source: str | Path) -> None:
    """UserError where a network's config (config.json) holds a number that no network has, or no number where one is meant."""
    validated(dict(config), NetworkConfig, str(source))
    for place, value in leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{source}: {place} is {value}; expected a finite number.")
        if isinstance(value, int | float) and abs(value) > LARGEST:
            raise UserError(f"{source}: {place} is {str(value)[:40]}; no network has a number beyond {LARGEST:,}.")


def built_to_train(build: Callable[[], Built], free: int) -> Built:
    """``build()``, a new network that is to be trained; UserError where its weights, their gradients and the two moments of
    Adam, 16 bytes for each value, do not fit into `free` bytes.
    """
    why = (
        f"The model of this config is too large to train here: its weights, gradients and moments take 16 bytes for each value, "
        f"and {free // 2**20:,} MB are free. Give it narrower or fewer blocks."
    )
    with _Within(free // 16 + SPARE_ELEMENTS, 2**20, why):
        return build()


def built_within(build: Callable[[], Built], elements: int, tensors: int) -> Built:
    """``build()``, a network whose weights file holds so many values in so many tensors.

    UserError where it asks for many times that: its config describes another network. Memory is asked for, but not filled,
    before that is known. Every other error goes through.
    """
    why = "it asks for many times the values that the weights beside it hold."
    with _Within(FACTOR * elements + SPARE_ELEMENTS, FACTOR * tensors + SPARE_TENSORS, why, unfilled=active()):
        return build()


@contextmanager
def telling(path: Path, what: str) -> Iterator[None]:
    """Whatever a class raises on a nonsense config or file becomes a UserError of one line that names `path` and `what`."""
    try:
        yield
    except TooLarge as error:
        raise UserError(f"{path}: its config does not describe this {what}: {error}") from None
    except UserError as error:
        raise (error if str(path) in str(error) else UserError(f"{path}: {error}")) from None
    except Exception as error:
        refuse(error, str(path))
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise UserError(f"{path}: its config does not describe a working {what} ({reason}).") from None


class TooLarge(UserError):
    """A config asks for more than the weights file beside it holds, or than the memory."""


class _Within(TorchDispatchMode):
    """Stops at the tensor by which what is made exceeds the limits; inside, torch makes tensors as usual.

    unfilled  leave out the random numbers of new weights, which the weights file replaces anyway
    """

    def __init__(self, elements: int, tensors: int, why: str, unfilled: bool = False) -> None:
        super().__init__()
        self.elements, self.tensors, self.why = elements, tensors, why
        self.unfilled = unfilled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        count = _made(func._schema.name, args)
        if self.unfilled and func._schema.name in _FILLING:
            return args[0]
        if count is not None:
            self.elements -= count
            self.tensors -= 1
            if self.elements < 0 or self.tensors < 0:
                raise TooLarge(self.why)
        return func(*args, **(kwargs or {}))


_FILLING = {f"aten::{name}" for name in ("uniform_", "normal_")}
_SIZED = {f"aten::{name}" for name in ("empty", "zeros", "ones", "rand", "randn", "full", "empty_strided")}


def _made(name: str, args: Any) -> int | None:
    """How many values a call makes of nothing; None for every other call."""
    if name in _SIZED:
        return math.prod(int(side) for side in args[0])
    if name == "aten::arange":
        first, last = (0, args[0]) if len(args) == 1 else args[:2]
        return int(abs(last - first) / abs(args[2] if len(args) > 2 and args[2] else 1))
    if name == "aten::linspace":
        return int(args[2])
    if name == "aten::eye":
        return int(args[0]) ** 2
    return None
