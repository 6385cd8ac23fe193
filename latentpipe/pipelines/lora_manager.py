"""The adapters of a LatentPipeline: opened by name or file, checked against the base, proved to move something, mixed."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, finalize, ref

import torch
from torch import nn

from latentpipe.checkpoints.registry import find_lora, named_lora
from latentpipe.checkpoints.single_file.gguf_tensors import refuse_packed
from latentpipe.compatibility.measure import Verdict, measure
from latentpipe.compatibility.verdict import decide_verdict
from latentpipe.lora.adapter import Lora
from latentpipe.lora.fusion import LoraFuser
from latentpipe.lora.matching import SHOWN, MatchReport
from latentpipe.lora.merge import Weight
from latentpipe.lora.metadata import trigger_words
from latentpipe.lora.state_dict.io import read_lora, stated_base
from latentpipe.lora.target_modules import DENOISERS, TEXT, leaves
from latentpipe.pipelines.denoise import probe_step, size_unit
from latentpipe.pipelines.embeddings import misfit
from latentpipe.pipelines.families import denoiser as denoiser_of
from latentpipe.utils.errors import LatentpipeWarning, UserError
from latentpipe.utils.io import HASH_LENGTH
from latentpipe.vae.probe_images import probe_images
from latentpipe.vae.protocol import Stage
from latentpipe.vae.stage import VAEStage

PROBE = "a picture"
_in_use: WeakKeyDictionary[nn.Module, ReferenceType[LoraManager]] = (
    WeakKeyDictionary()
)  # networks that adapters are on, and whose


class LoraManager:
    """What is attached to one pipeline: its host's denoiser and text encoders, and the VAE of its stage.

    hashes  content hashes of the host's own parts, where they are known: an adapter that names others is refused
    vae     content hash of the stage's VAE, which may be another one than the host's
    former  the hash that a part of the host has in files of before
    """

    def __init__(self, host: Any, stage: Stage, hashes: Mapping[str, str], vae: str | None = None, former: Any = None) -> None:
        self.host, self.stage, self.hashes, self.vae = host, stage, hashes, vae
        self.former: Callable[[str], str | None] = former or (lambda part: None)
        self._lock = threading.RLock()  # a tag changes the weights for the time of a call
        self._left: dict[str, tuple[str, ...]] = {}  # what was left out of the adapters that were opened by name
        self._files: dict[str, tuple[Path, tuple[float, int]]] = {}  # of the adapters that were opened by name, and their state
        self.fuser = LoraFuser(components(host, stage))
        self._still: tuple[Any, dict[str, torch.Tensor]] = (None, {})
        finalize(self, self.fuser.clear).atexit = False  # a pipeline that is dropped leaves its host as it was

    @property
    def weights(self) -> dict[str, Weight]:
        """Of the adapters that are on."""
        return self.fuser.weights

    @property
    def on(self) -> list[Lora]:
        """The adapters that are on."""
        return [self.fuser.loaded[name] for name in self.weights if name in self.fuser.loaded]

    @property
    def words(self) -> set[str]:
        """The trigger words of the adapters that are on, lower case, one by one."""
        return {word for phrases in map(trigger_words, self.on) for phrase in phrases for word in phrase.lower().split()}

    def attach(
        self, source: Lora | str | Path, weight: Weight, name: str | None = None, partial: bool = False, force: bool = False
    ) -> MatchReport:
        """Open, check and switch on one more adapter; see `LatentPipeline.attach_lora`."""
        lora = source if isinstance(source, Lora) else self.open(source)
        lora = replace(lora, name=name or lora.name)
        if lora.name in self.weights:
            raise UserError(f"A LoRA '{lora.name}' is attached already; set_lora changes its weight, detach_lora takes it off.")
        self.check_free()
        checked = self._check_base(lora, force)
        report = self.load(lora, partial)
        self._files.pop(lora.name, None)
        self._left.pop(lora.name, None)
        try:
            lora = self.fuser.loaded[lora.name]
            verdict = self._verdict(lora)
            if verdict is not None and not verdict.encodes and not force:
                raise UserError(
                    f"LoRA '{lora.name}' changes the VAE's encoder, so its latents are no longer those that this denoiser reads; "
                    f"it was not attached (force attaches it).\n{verdict}"
                )
            moved = self._probe(lora)
            self.set({**self.weights, lora.name: weight}, self.fuser.fused, self.fuser.method)
        except BaseException:
            self.fuser.loaded.pop(lora.name, None)
            raise
        parts = {
            name: replace(part, output_delta=max(moved[probe] for probe in _probes(name))) for name, part in report.parts.items()
        }
        if not any(moved.values()):
            warnings.warn(
                f"LoRA '{lora.name}' changes nothing: a probe step, encode and decode are what they were without it",
                LatentpipeWarning,
                3,
            )
        return replace(report, parts=parts, base_checked=checked, verdict=verdict)

    def set(self, weights: Mapping[str, Weight], fuse: bool = True, method: str = "sum", partial: Collection[str] = ()) -> None:
        """Switch on exactly these; names that are not open yet, or whose files have changed, are opened (installed ones only).

        partial  names whose files may fit in part; what is left out is told in a warning
        """
        self.check_free()
        opened = []
        try:
            for name in weights:
                again = self._is_stale(name) or bool(self._left.get(name) and name not in partial)
                if name not in self.fuser.loaded or (name not in self.weights and again):
                    path = named_lora(name)
                    lora = replace(self.open(path), name=name)
                    self._check_base(lora, force=False)
                    left_out = self.load(lora, name in partial).left_out
                    self._left[name] = left_out if name in partial else ()
                    self._files[name] = path, _state_of(path)
                    opened.append(name)
                if name in partial and (left := self._left.get(name)):
                    shown = "; ".join(left[:SHOWN]) + (f"; and {len(left) - SHOWN} more" if len(left) > SHOWN else "")
                    warnings.warn(LatentpipeWarning(f"LoRA '{name}' was taken in part; left out: {shown}"), stacklevel=3)
            self.fuser.set(weights, fuse, method)
        except BaseException:
            for name in opened:
                self.fuser.loaded.pop(name, None)
            raise
        for model in self.fuser.components.values():
            if self.weights:
                _in_use[model] = ref(self)
            else:
                _in_use.pop(model, None)

    @contextmanager
    def more(self, weights: Mapping[str, Weight], partial: Collection[str] = ()) -> Iterator[None]:
        """These are on as well, inside, one thread at a time; a name that is on already gets the new weight.

        partial  as for `set`
        """
        with self._lock:
            self.check_free()
            before = dict(self.weights)
            if not weights:
                yield
                return
            fused, method = self.fuser.fused, self.fuser.method
            self.set({**before, **weights}, fused, method, partial)
            try:
                yield
            finally:
                self.set(before, fused, method)

    def forget(self, name: str | None = None) -> None:
        """Switch one adapter off (None: all) and drop it."""
        if name is not None and name not in self.fuser.loaded:
            raise UserError(f"No LoRA '{name}' is attached; attached: {', '.join(self.weights) or 'none'}.")
        self.set(
            {other: weight for other, weight in self.weights.items() if name not in (None, other)},
            self.fuser.fused,
            self.fuser.method,
        )
        for each in [name] if name else list(self.fuser.loaded):
            self.fuser.loaded.pop(each, None)

    def open(self, source: str | Path) -> Lora:
        """An adapter from a name or a file."""
        paths = {name: list(leaves(model)) for name, model in self.fuser.components.items()}
        return read_lora(find_lora(source), base=paths)

    def load(self, lora: Lora, partial: bool = False) -> MatchReport:
        """Match an adapter (`LoraFuser.load`); an embedding beside it that does not fit is left out, with a note."""
        if any(weight.is_meta for model in self.fuser.components.values() for weight in model.parameters()):
            raise UserError("LoRA needs the weights in memory, and offload 'sequential' keeps them away; take offload 'model'.")
        for name in lora.parts:
            refuse_packed(self.fuser.components.get(name), f"The {name}", f"LoRA '{lora.name}' needs weights to add to")
        report = self.fuser.load(lora, partial)
        problems = {one.name: misfit(self.host, one) for one in lora.embeddings}
        for name, problem in problems.items():
            if problem:
                told = f"LoRA '{lora.name}' brings the embedding '{name}', which was left out: {problem.rstrip('.')}"
                warnings.warn(LatentpipeWarning(told), stacklevel=4)
        fitting = tuple(one for one in lora.embeddings if not problems[one.name])
        self.fuser.loaded[lora.name] = replace(self.fuser.loaded[lora.name], embeddings=fitting)
        left = tuple(f"the embedding '{name}'" for name, problem in problems.items() if problem)
        return replace(report, left_out=(*report.left_out, *left))

    def _is_stale(self, name: str) -> bool:
        """Whether the file of an adapter that was opened by name is another one by now."""
        path, state = self._files.get(name, (None, None))
        return path is not None and _state_of(path) != state

    def check_free(self) -> None:
        """UserError where another pipeline that shares a network has adapters on it."""
        for component, model in self.fuser.components.items():
            entry = _in_use.get(model)
            owner = entry() if entry else None
            if owner is not None and owner is not self and owner.weights:
                raise UserError(
                    f"The {component} is shared with another pipeline that has LoRA on it ({', '.join(owner.weights)}); "
                    "take them off there first (detach_lora)."
                )

    def _check_base(self, lora: Lora, force: bool) -> bool:
        """Whether the file names its base, and this is it; UserError where it names another one."""
        wanted = stated_base(lora)
        pairs = [(name, self.vae if name == "vae" else self.hashes.get(name)) for name in lora.parts]
        if any(name in DENOISERS for name in lora.parts):
            pairs.append(("vae", self.hashes.get("vae")))  # the one whose latents the denoiser draws, whatever decodes them
        known = [(name, wanted[name], own) for name, own in pairs if name in wanted and own]
        for name, trained, own in known:
            if trained != own and not force and trained != self.former(name):
                raise UserError(
                    f"LoRA '{lora.name}' was trained with {name} {trained[:HASH_LENGTH]}, this model's is {own[:HASH_LENGTH]}; "
                    "choose one for this model (force attaches it anyhow)."
                )
        return bool(known)

    def _verdict(self, lora: Lora) -> Verdict | None:
        """Whether the VAE with the adapter still makes the host's latents; None where its encoder is left alone."""
        if not any(path.startswith(("encoder.", "quant_conv")) for path in lora.parts.get("vae", {})):
            return None
        with self.fuser.adapters_disabled():
            own = VAEStage(self.stage.decoding.vae)
            twin = copy.deepcopy(own.vae)
            mixer = LoraFuser({"vae": twin})
            mixer.load(Lora({"vae": lora.parts["vae"]}, lora.name))
            mixer.set({lora.name: 1.0})
            changed = VAEStage(twin)
            return decide_verdict(own.space, changed.space, measure(own, changed))

    def _probe(self, lora: Lora) -> dict[str, float]:
        """||after - before|| / ||before|| of a denoising step, an encode and a decode, with the adapter alone at weight 1."""
        wanted = {probe for component in lora.parts for probe in _probes(component)}
        with self.fuser.adapters_disabled():
            key = [(one.dtype, one.device) for model in self.fuser.components.values() for one in model.parameters()]
            if self._still[0] != key:  # the first probe, or the model was moved
                self._still = key, self._outputs({"step", "encode", "decode"})
            before = self._still[1]
            twin = LoraFuser(self.fuser.components)
            twin.loaded[lora.name] = lora
            twin.set({lora.name: 1.0})
            try:
                after = self._outputs(wanted)
            finally:
                twin.clear()
        return {
            name: ((after[name] - before[name]).norm() / before[name].norm().clamp_min(1e-12)).item() if name in after else 0.0
            for name in before
        }

    @torch.no_grad()
    def _outputs(self, wanted: Collection[str]) -> dict[str, torch.Tensor]:
        """A step from seeded noise at the smallest size, the latents of a picture, and a decode of seeded latents."""
        found: dict[str, torch.Tensor] = {}
        side = size_unit(self.host, self.stage)
        if "step" in wanted:
            found["step"] = probe_step(self.host, self.stage, PROBE, 0).float().cpu()
        if "encode" in wanted:
            found["encode"] = self.stage.encode(probe_images(1, side)).float().cpu()
        if "decode" in wanted:
            noise = torch.randn(self.stage.space.shape(1, side, side), generator=torch.Generator().manual_seed(0))
            found["decode"] = self.stage.decode(noise.to(self.stage.device, self.stage.dtype)).float().cpu()
        return found


def components(host: Any, stage: Stage) -> dict[str, nn.Module]:
    """The networks of a pipeline that adapters go on, by name."""
    denoiser = denoiser_of(host)
    found: dict[str, nn.Module] = {denoiser: getattr(host, denoiser)}
    found |= {name: getattr(host, name) for name in TEXT if getattr(host, name, None) is not None}
    vae = stage.decoding.vae
    return found | ({"vae": vae} if isinstance(vae, nn.Module) else {})


def _state_of(path: Path) -> tuple[float, int]:
    """Time and size of a file; zeros where it is gone."""
    try:
        found = path.stat()
    except OSError:
        return 0.0, 0
    return found.st_mtime, found.st_size


def _probes(component: str) -> tuple[str, ...]:
    return ("encode", "decode") if component == "vae" else ("step",)
