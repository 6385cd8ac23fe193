"""The process that reads pickles: ``python -m latentpipe.checkpoints.pickles.child``, which `unpickle` starts and asks.

torch's loader for weights alone calls nothing but what rebuilds tensors. Names on a short list, which training programs leave in
their files, stand for an inert class; every other name is refused. The memory is bounded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

WRAPPERS = ("params_ema", "params", "model", "module", "weights")  # what programs keep the tensors under, where none stand beside
INERT = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|lightning\.pytorch)\.[\w.]+"
    r"|omegaconf\.[\w.]+|argparse\.Namespace|typing\.Any|torch\.nn\.modules\.container\.ParameterDict"
    r"|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)|numpy\.(dtype|ndarray|dtypes\.\w+)|_codecs\.encode"
    r"|collections\.defaultdict|(builtins|__builtin__)\.(dict|list|tuple|int|float|str|bool)|pathlib\.(Posix|Windows|Pure\w*)?Path"
)
MOST_NAMES = 64  # stubs of one file
GROWTH = 4  # times a file's size that its tensors may have in all (one storage may stand for several)
ALLOWANCE = 2**26  # bytes beside that
UNKNOWN = re.compile(r"GLOBAL ([\w.]+)")
FACTS = ("name", "global_step", "epoch", "step", "sd_checkpoint", "sd_checkpoint_name")


class Inert:
    """Stands for an object that no tensor needs: it keeps the state that it is given, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        """Any arguments."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Refused(Exception):
    """What is wrong with a file, in words that follow its name."""


def serve() -> None:
    """For each line on stdin, a JSON list of source, target and bytes, one JSON object on stdout: ``names``, ``facts``, ``list``;
    or ``refused``; or ``failed``. Each file is read in a fork, so that torch is imported once and nothing of a file stays.
    """
    import safetensors.torch  # noqa: F401
    import torch

    from latentpipe.utils.reading import parse_json

    torch.set_num_threads(1)
    for line in sys.stdin:
        source, target, room = parse_json(line)
        if not hasattr(os, "fork"):
            answer(source, target, room)
            return
        number = os.fork()
        if number == 0:
            answer(source, target, room)
            os._exit(0)
        status = os.waitpid(number, 0)[1]
        if status != 0:
            print(json.dumps({"failed": f"status {os.waitstatus_to_exitcode(status)}"}), flush=True)


def answer(source: str, target: str, room: int) -> None:
    """Read `source` within `room` bytes, write `target`, and print what was found, or what is wrong."""
    limit(room)
    try:
        found = convert_pickle(Path(source), Path(target))
    except Refused as error:
        found = {"refused": str(error)}
    except MemoryError:
        found = {"refused": "it wants more memory than its size explains"}
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {reason(error)}"}
    print(json.dumps(found), flush=True)


def limit(room: int) -> None:
    """From now on at most `room` bytes more, where the system can say so."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + room, now + room))


def convert_pickle(source: Path, target: Path) -> dict[str, Any]:
    """Write the tensors of a pickle as safetensors; what was found. `Refused` where it holds none, or more than weights."""
    from safetensors.torch import save_file

    value = read(source)
    facts = {key: str(value[key])[:200] for key in FACTS if isinstance(value, dict) and isinstance(value.get(key), str | int)}
    named, listed = tensors_of(value)
    if not named:
        raise Refused("holds no named tensors")
    check(named, source.stat().st_size)
    with open(source, "rb") as file:
        origin = [{"file": source.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}]
    metadata = {"format": "pt", "latentpipe.source": json.dumps(origin), **facts}
    save_file(dict(own(named)), str(target), metadata=metadata)
    return {"names": len(named), "facts": facts, "list": listed}


def read(source: Path) -> Any:
    """The value of a torch file: tensors, containers, and `Inert` in place of the names on the list."""
    import zipfile

    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    zipped = zipfile.is_zipfile(source)
    names: set[str] = set()
    if zipped:
        try:
            names = set(get_unsafe_globals_in_checkpoint(str(source)))
        except Exception as error:  # a damaged zip, TorchScript, no data.pkl
            raise Refused(f"not a readable file of torch weights alone ({reason(error)})") from None
    while True:
        wrong = sorted(name for name in names if not INERT.fullmatch(name))
        if wrong or len(names) > MOST_NAMES:
            shown = ", ".join((wrong or sorted(names))[:5])
            raise Refused(f"not a readable file of torch weights alone (it names {shown}, which is code)")
        stubs: list[Any] = [(Inert, name) for name in names]
        try:
            with safe_globals(stubs):
                return torch.load(str(source), map_location="cpu", weights_only=True, mmap=zipped)
        except MemoryError:
            raise
        except Exception as error:  # torch raises many kinds for damaged files
            found = UNKNOWN.search(str(error))
            if found and found[1] not in names and not zipped:  # files from before the zip format list nothing ahead
                name = found[1] if "." in found[1] else f"builtins.{found[1]}"
                names.add(name)
                continue
            if "allocate" in str(error):
                raise MemoryError from None
            raise Refused(f"not a readable file of torch weights alone ({reason(error)})") from None


def reason(error: Exception) -> str:
    """An error in one line, without torch's advice to run a file's code."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text.split(" This file can still be loaded")[0].split(" In PyTorch 2.6")[0][:200].rstrip(".")


def tensors_of(value: Any) -> tuple[dict[str, Any], bool]:
    """The tensors by name, out of what programs wrap around them; and whether it was a list."""
    import torch

    if isinstance(value, list):
        named = {str(at): item for at, item in enumerate(value)}
        if not all(isinstance(item, torch.Tensor) for item in value):
            raise Refused(f"holds no named tensors but a list of {len(value):,}")
        return named, True
    while isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if isinstance(value, dict) and "string_to_param" in value:
        return embedding(value["string_to_param"]), False
    for key in WRAPPERS:
        if isinstance(value, dict) and not any(isinstance(item, torch.Tensor) for item in value.values()):
            value = value[key] if isinstance(value.get(key), dict) else value
    if isinstance(value, Inert):
        value = parameters(value)
    items = value.items() if isinstance(value, dict) else ()
    return {str(key): found for key, item in items if (found := _tensor(str(key), item)) is not None}, False


def _tensor(key: str, item: Any) -> Any:
    """A tensor; the number that old LoRA files keep as an alpha is one too."""
    import torch

    if isinstance(item, int | float) and key.endswith("alpha") and not isinstance(item, bool):
        return torch.tensor(float(item))
    return item if isinstance(item, torch.Tensor) else None


def embedding(vectors: Any) -> dict[str, Any]:
    """A textual inversion's vectors: of one word as A1111 names them in safetensors, of several by their words."""
    found = parameters(vectors)
    return {"emb_params": next(iter(found.values()))} if len(found) == 1 else found


def parameters(value: Any) -> dict[str, Any]:
    """The tensors of a ParameterDict, or of a plain one."""
    import torch

    state = value.state if isinstance(value, Inert) else value
    inner = state.get("_parameters") if isinstance(state, dict) else None
    state = inner if isinstance(inner, dict) and inner else state
    items = state.items() if isinstance(state, Mapping) else ()
    return {str(key): item for key, item in items if isinstance(item, torch.Tensor)}


def check(named: Mapping[str, Any], size: int) -> None:
    """`Refused` for what safetensors does not hold, and for tensors larger than their file."""
    total = 0
    for key, item in named.items():
        if item.is_sparse or item.is_quantized or item.is_complex() or item.device.type != "cpu":
            raise Refused(f"holds {key[:80]} as {item.dtype}, {item.layout}; expected plain tensors")
        total += item.numel() * item.element_size()
    if total > GROWTH * size + ALLOWANCE:
        raise Refused(f"has {size:,} bytes, and tensors of {total:,}; no file of weights does that")


def own(named: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each tensor with memory of its own, in order."""
    seen: set[int] = set()
    for key, item in named.items():
        item = item.detach()
        place = item.untyped_storage().data_ptr()
        yield key, item.clone().contiguous() if place in seen or not item.is_contiguous() else item
        seen.add(place)


if __name__ == "__main__":
    serve()
