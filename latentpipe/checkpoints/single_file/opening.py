"""A single file as a diffusers pipeline: parts built empty and filled strictly, mapped at their own dtype where asked for."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from latentpipe.checkpoints.components import built_within, telling
from latentpipe.checkpoints.config_ranges import check_schedule
from latentpipe.checkpoints.single_file import tokenizers
from latentpipe.checkpoints.single_file.gather import Opened, Stated, open_file
from latentpipe.checkpoints.single_file.gguf_tensors import build_packed, finite_scales, full_shape, is_packed, linear_alone
from latentpipe.checkpoints.single_file.parts import Part
from latentpipe.checkpoints.single_file.tensors import FP8, read_part, tensors_in_folder, usual_dtype
from latentpipe.utils.errors import LatentpipeWarning, UserError
from latentpipe.vae.precision import all_finite

LARGE = 2**30  # bytes of a conversion that are told first
WORDS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def load(path: Path, dtype: torch.dtype | None = torch.float32, stated: Stated | None = None) -> Any:
    """The pipeline of a single file, its networks in eval mode on the CPU.

    dtype  None: as stored (the weights stay mapped to the file; fp8 becomes bf16). Quantized weights (GGUF) always stay as they
           are; `dtype` is what they are computed in

    UserError where the file does not open, where a tensor is missing, extra, misshapen or (when it is converted) not finite.
    """
    return assemble(open_file(path, stated), dtype)


def assemble(opened: Opened, dtype: torch.dtype | None) -> Any:
    """As `load`, of a file whose parts are found."""
    import diffusers

    read = {component: part_tensors(opened, component) for component in opened.sources}
    _tell(opened, read, dtype)
    dtype = dtype or _beside_packed(read)
    cls: Any = getattr(diffusers, opened.configs.pipeline, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise UserError(f"{opened.configs.folder}: _class_name is {opened.configs.pipeline!r}; expected a pipeline of diffusers.")
    wanted = inspect.signature(cls.__init__).parameters
    given: dict[str, Any] = {name: None for name in wanted if name in opened.configs.index and name != "self"}
    given |= {name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if name in wanted}
    for name, value in opened.configs.index.items():
        if name in wanted and not isinstance(value, list):
            given[name] = value
    if "requires_safety_checker" in wanted:
        given["requires_safety_checker"] = False
    for component in list(read):
        given[component] = _network(opened, component, read.pop(component), dtype)
    given["scheduler"] = _scheduler(opened)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        encoder = name.replace("tokenizer", "text_encoder")
        given |= {name: _tokenizer(opened, name) if encoder in opened.sources else None} if name in wanted else {}
    lacking = [name for name, one in wanted.items() if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    if lacking := [name for name in lacking if name not in given and name != "self"]:
        place = f"{opened.configs.folder}/model_index.json"
        raise UserError(
            f"{place} names no {' and no '.join(lacking)}, of which a {opened.configs.pipeline} is made; fetch it again."
        )
    return cls(**{name: value for name, value in given.items() if name in wanted})


def part_tensors(opened: Opened, component: str) -> dict[str, torch.Tensor]:
    """A component's tensors as stored, by the names of diffusers or transformers."""
    source = opened.sources[component]
    if not isinstance(source, Part):
        return tensors_in_folder(source)
    config, projection = opened.config(component), opened.configs.index[component][1].endswith("WithProjection")
    with telling(source.path, component):
        return read_part(source, config, projection)


def _beside_packed(read: Mapping[str, Mapping[str, torch.Tensor]]) -> torch.dtype | None:
    """The dtype that a model with quantized weights is computed in "as stored": that of its largest other part, else bf16.

    None where no weights are quantized.
    """
    if not any(is_packed(value) for tensors in read.values() for value in tensors.values()):
        return None
    plain = {name: {key: value for key, value in tensors.items() if not is_packed(value)} for name, tensors in read.items()}
    largest = max((name for name in read if name.startswith("text_encoder")), default=None, key=lambda name: _size(plain[name]))
    return torch.bfloat16 if largest is None else usual_dtype(plain[largest])


def _size(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(map(torch.numel, tensors.values()))


def _tell(opened: Opened, read: Mapping[str, Mapping[str, torch.Tensor]], dtype: torch.dtype | None) -> None:
    """A warning on how much memory a conversion of large weights takes."""
    if dtype is None:
        return
    values = [value for tensors in read.values() for value in tensors.values() if value.is_floating_point()]
    need = sum(value.numel() * dtype.itemsize for value in values if value.dtype != dtype)
    if need > LARGE:
        warnings.warn(
            f"{opened.path.name}: its weights become {WORDS.get(dtype, dtype)}, which takes {need / 2**30:.1f} GiB of memory; "
            "with dtype 'auto' they stay as they are stored, mapped to the file",
            LatentpipeWarning,
            stacklevel=4,
        )


def _network(opened: Opened, component: str, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None) -> Any:
    """A component built without memory of its own and filled with its tensors."""
    from accelerate import init_empty_weights

    library, name = opened.configs.index[component]
    config, source = opened.config(component), opened.sources[component]
    place = source.path if isinstance(source, Part) else source
    cls = _class(library, name, place)

    def build() -> Any:
        if hasattr(cls, "config_class") and library == "transformers":
            return cls(cls.config_class.from_dict(dict(config)))
        return cls.from_config(dict(config))

    with telling(place, component), init_empty_weights(include_buffers=False):
        model = (
            build()
            if opened.configs.folder is None
            else built_within(build, sum(map(torch.numel, tensors.values())), len(tensors))
        )
    what = f"{place}: its {component}"
    if any(map(is_packed, tensors.values())):
        assert dtype is not None  # `assemble` settles it
        return build_packed(cls, config, fitted(model, linear_alone(model, tensors), dtype, what), dtype).eval()
    fill(model, tensors, dtype, what)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


def _class(library: str, name: str, place: Path) -> Any:
    import diffusers
    import transformers

    cls = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), name, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise UserError(f"{place}: the class {library}.{name} is no network of this version of diffusers or transformers.")
    return cls


def fill(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None, what: str) -> None:
    """Give an empty network its tensors, as `fitted` has them."""
    model.load_state_dict(fitted(model, tensors, dtype, what), assign=True)
    empty = [name for name, value in itertools.chain(model.named_parameters(), model.named_buffers()) if value.is_meta]
    if empty:
        raise UserError(_listed(what, type(model).__name__, [f"missing {name}" for name in empty]))


def fitted(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None, what: str
) -> dict[str, torch.Tensor]:
    """The tensors of an empty network: as they are where they are quantized or their dtype is the wanted one, else converted.

    UserError names missing, extra, misshapen and non-finite ones (values are looked at where they are converted).
    """
    wanted = model.state_dict()
    if not any(name.startswith("text_model.") for name in wanted):
        tensors = {name.removeprefix("text_model."): value for name, value in tensors.items()}
    tensors = {name: value for name, value in tensors.items() if not name.endswith("position_ids")}
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"extra {name}" for name in tensors if name not in wanted]
    for name, value in tensors.items():
        if name in wanted and full_shape(value) != wanted[name].shape:
            problems.append(f"{name} is {tuple(full_shape(value))}, expected {tuple(wanted[name].shape)}")
        elif name in wanted and wanted[name].is_floating_point() > (value.is_floating_point() or is_packed(value)):
            problems.append(f"{name} is stored as {str(value.dtype).removeprefix('torch.')}, expected a float")
    if problems:
        raise UserError(_listed(what, type(model).__name__, problems))
    dtype = dtype or usual_dtype(dict(tensors))
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    cast: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        to = torch.float32 if any(f".{module}." in f".{name}" for module in kept) else dtype
        cast[name] = value
        if is_packed(value) and not finite_scales(value):
            problems.append(f"{name} holds scales that are not finite")
        if value.is_floating_point() and value.dtype != to:
            cast[name] = value.to(to)
            if not all_finite(cast[name]):
                why = "not finite" if value.dtype in FP8 or not all_finite(value) else f"beyond {WORDS.get(to, to)}"
                problems.append(f"{name} holds values that are {why}")
    if problems:
        raise UserError(_listed(what, type(model).__name__, problems))
    return cast


def _listed(what: str, cls: str, problems: list[str]) -> str:
    shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
    return f"{what} does not fit {cls}: {shown}."


def _scheduler(opened: Opened) -> Any:
    import diffusers

    config, place = opened.configs.scheduler, opened.configs.folder or opened.path
    with telling(place, "scheduler"):
        scheduler = getattr(diffusers, str(config["_class_name"])).from_config(config)
    check_schedule(scheduler, place)
    return scheduler


def _tokenizer(opened: Opened, name: str) -> Any:
    folder = opened.configs.folder
    if folder is None:
        return tokenizers.bundled_tokenizer(opened.configs.tokenizers[name])
    import transformers

    source = opened.configs.index.get(name)
    if not source or not source[0]:
        return None
    if not any((folder / name).glob("*.json")):
        raise UserError(f"--config {folder}: it has no {name}/ with a tokenizer's files.")
    with telling(folder / name, "tokenizer"):
        return getattr(transformers, source[1]).from_pretrained(folder / name, local_files_only=True)
