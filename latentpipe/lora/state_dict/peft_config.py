"""peft's own configs, as adapter folders and diffusers' files carry them: rank and alpha of each module, read and written."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from latentpipe.lora.adapter import COMPONENTS, LoraLayer
from latentpipe.lora.state_dict.keys import TEXT
from latentpipe.lora.state_dict.layers import MOST, LayerMetadata
from latentpipe.utils.errors import UserError
from latentpipe.utils.reading import parse_object

ADAPTER_KEY = "lora_adapter_metadata"  # what diffusers calls it in the metadata of a file


class Config:
    """A peft config by which to look up single modules."""

    def __init__(self, stored: Mapping[str, Any]) -> None:
        self.rank, self.alpha = stored.get("r"), stored.get("lora_alpha", stored.get("alpha"))
        self.rslora = stored.get("use_rslora") is True
        targets = stored.get("target_modules")
        self.targets = {str(each).removeprefix(TEXT) for each in targets} if isinstance(targets, list) else None
        self.ranks, self.alphas = _Patterns(stored.get("rank_pattern")), _Patterns(stored.get("alpha_pattern"))

    def told(self, path: str) -> LayerMetadata:
        """What it says about one module, nothing where it is of other modules; UserError where that is no number."""
        if self.targets is not None and self.targets.isdisjoint(_ends(path)):
            return LayerMetadata()
        rank, alpha = self.ranks.get(path, self.rank), self.alphas.get(path, self.alpha)
        if rank is not None and (type(rank) is not int or not 0 < rank < MOST):
            raise UserError(f"its config gives {path} the rank {rank!r}; expected a whole number from 1.")
        if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e9):
            raise UserError(f"its config gives {path} the alpha {alpha!r}; expected a number.")
        return LayerMetadata(rank, None if alpha is None else float(alpha), self.rslora)


class _Patterns:
    """Values by patterns, of which the first that fits counts; peft's are regular expressions over the end of a path.

    Plain paths, "^" at the start and ".*" are understood: a file from anywhere gets no regular expressions of its own.
    """

    def __init__(self, stored: Any) -> None:
        self._plain: dict[str, tuple[int, Any]] = {}  # "^" and a whole path, or the end of one
        self._wild: list[tuple[int, str, Any]] = []
        for place, (pattern, value) in enumerate(stored.items() if isinstance(stored, dict) else ()):
            plain = str(pattern).removesuffix("$").replace("\\.", ".")
            start = "^" if plain.startswith("^") else ""
            plain = plain.removeprefix("^").removeprefix(TEXT)
            if re.search(r"[\\^$+?{}()|\[\]]|\*.*\*.*\*.*\*", plain.replace(".*", "*")):
                raise UserError(f"its config names modules by the pattern {pattern!r}; expected plain paths, with .* at most.")
            if "*" in plain:
                words = re.escape(plain).replace(r"\.\*", ".*")
                self._wild.append((place, words if start else rf"(.*\.)?{words}", value))
            else:
                self._plain.setdefault(start + plain, (place, value))

    def get(self, path: str, default: Any) -> Any:
        """The value of a path."""
        if not self._plain and not self._wild:
            return default
        found = [self._plain[end] for end in [*_ends(path), f"^{path}"] if end in self._plain]
        found += [(place, value) for place, words, value in self._wild if re.fullmatch(words, path)]
        return min(found, key=lambda each: each[0])[1] if found else default


def _ends(path: str) -> list[str]:
    """The path and every end of it that begins after a dot."""
    words = path.split(".")
    return [".".join(words[at:]) for at in range(len(words))]


def read_configs(metadata: Mapping[str, str]) -> dict[str, Config]:
    """Configs by component out of a file's metadata; "" is that of keys which name none."""
    if ADAPTER_KEY not in metadata:
        return {}
    try:
        stored = parse_object(metadata[ADAPTER_KEY])
    except ValueError as error:
        raise UserError(
            f"its metadata's {ADAPTER_KEY} is no JSON object ({error}), so that alpha is unknown; export the LoRA again."
        ) from None
    configs: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in stored.items():
        head, _, rest = str(name).partition(".")
        configs[head if rest and head in COMPONENTS else ""][rest if rest and head in COMPONENTS else str(name)] = value
    return {component: Config(config) for component, config in configs.items()}


def write_config(component: str, layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """The config of the peft adapter that a component's layers make (of the kind that most of them are)."""
    kind = Counter(layer.kind for layer in layers.values()).most_common(1)[0][0]
    own = {path: layer for path, layer in layers.items() if layer.kind == kind}
    rslora = kind == "lora" and all(layer.rslora for layer in own.values())
    # one flag for all of them: where only some are rank-stabilized, alpha carries the scale
    alphas = {path: layer.alpha if layer.rslora == rslora else layer.scale * layer.rank for path, layer in own.items()}
    alphas = {path: int(alpha) if alpha == int(alpha) else alpha for path, alpha in alphas.items()}
    ranks = {path: layer.rank for path, layer in own.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    mark = "" if component.startswith("text_encoder") else "^"  # "^": a short path also ends longer ones
    config: dict[str, Any] = {
        "peft_type": kind.upper(),
        "r": rank,
        "lora_alpha" if kind == "lora" else "alpha": alpha,
        "rank_pattern": {mark + path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {mark + path: value for path, value in alphas.items() if value != alpha},
        "target_modules": sorted(own),
    }
    if kind == "lora":
        return config | {"use_dora": any(layer.dora for layer in own.values()), "use_rslora": rslora}
    config["use_effective_conv2d"] = any("hada_t1" in each.tensors or "lokr_t2" in each.tensors for each in own.values())
    if kind == "lokr":
        config["decompose_both"] = any("lokr_w1_a" in layer.tensors for layer in own.values())
        config["decompose_factor"] = _factor(own)
    return config


def pack(parts: Mapping[str, Mapping[str, LoraLayer]]) -> str:
    """The value of `ADAPTER_KEY` for an adapter."""
    configs = {component: write_config(component, layers) for component, layers in parts.items()}
    named = {f"{component}.{name}": value for component, config in configs.items() for name, value in config.items()}
    return json.dumps({name: value for name, value in named.items() if not name.endswith(".peft_type")}, sort_keys=True)


def _factor(layers: Mapping[str, LoraLayer]) -> int:
    """The decompose_factor by which peft splits every weight as these LoKr layers do; -1 where there is none."""
    from peft.tuners.lokr.layer import factorization

    splits = []
    for layer in layers.values():
        tensors = layer.tensors
        if "lokr_t2" in tensors:
            out, into = tensors["lokr_w2_a"].shape[1], tensors["lokr_w2_b"].shape[1]
        else:
            out, into = tensors.get("lokr_w2", tensors.get("lokr_w2_a")).shape[0], 0  # type: ignore[union-attr]
            into = tensors["lokr_w2"].shape[1] if "lokr_w2" in tensors else 0  # a kernel may be folded into the columns
        left = tensors.get("lokr_w1", tensors.get("lokr_w1_a")).shape[0]  # type: ignore[union-attr]
        right = tensors["lokr_w1"].shape[1] if "lokr_w1" in tensors else tensors["lokr_w1_b"].shape[1]
        splits += [(left, out)] + ([(right, into)] if into else [])
    for factor in [-1, *sorted({split[0] for split in splits})]:
        if all(factorization(a * b, factor) == (a, b) for a, b in splits):
            return factor
    return -1
