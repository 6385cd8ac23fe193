"""Open pipelines, so that the next job need not load again: a bounded number of models, and of VAEs put into them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.single_file.gather import Stated
from latentpipe.compatibility.latent_adapter import own_adapter
from latentpipe.compatibility.measure import Verdict
from latentpipe.pipelines.latent_pipeline import LatentPipeline
from latentpipe.pipelines.swap import stage_of
from latentpipe.pipelines.verdict_cache import verdict_on
from latentpipe.utils.system import best_device
from latentpipe.vae.stage import VAEStage


class PipelineCache:
    """Pipelines by the names of their parts; the least recently used one is dropped.

    most    models that are kept, and VAEs beside them
    device, dtype  as for `LatentPipeline.from_pretrained`

    stated  what single files do not say themselves, by their places

    Pipelines of one model share its denoiser. A file that has changed is opened again.
    """

    def __init__(self, most: int = 2, device: str | None = None, dtype: str = "fp32") -> None:
        self.most, self.device, self.dtype = most, device, dtype
        self.stated: dict[Path, Stated] = {}
        self._lock = threading.Lock()
        self._models: OrderedDict[Any, LatentPipeline] = OrderedDict()
        self._swapped: OrderedDict[Any, LatentPipeline] = OrderedDict()
        self._verdicts: OrderedDict[Any, Verdict] = OrderedDict()
        self._stages: OrderedDict[Any, VAEStage] = OrderedDict()

    def open(self, model: str | Path = "emoji", vae: str | Path | None = None, adapter: str | None = None) -> LatentPipeline:
        """The pipeline of a model, drawing through its own or another VAE; UserError where that does not fit.

        adapter  name of an installed adapter to that VAE
        """
        with self._lock:
            base = self._base(model)
            if vae is None:
                return base
            key = (*_state(find_model(model)), *_state(find_model(vae, "vae")), adapter and _state(own_adapter(adapter)))
            return _kept(
                self._swapped, key, self.most * 2, lambda: base.with_vae(vae, find_model(model), adapter and own_adapter(adapter))
            )

    def verdict(self, model: str | Path, vae: str | Path) -> Verdict:
        """Whether a VAE fits a model: measured once; the model itself need not be open."""
        with self._lock:
            key = (*_state(find_model(model)), *_state(find_model(vae, "vae")))
            return _kept(self._verdicts, key, 256, lambda: verdict_on(model, vae, stated=self.stated.get(find_model(model))))

    def stage(self, vae: str | Path) -> VAEStage:
        """The stage of a VAE alone, whether it fits a model or not."""
        with self._lock:
            key = _state(find_model(vae, "vae"))
            return _kept(self._stages, key, self.most * 2, lambda: stage_of(vae).eval().to(self.device or best_device()))

    def is_open(self, model: str | Path) -> bool:
        """Whether a model is loaded."""
        return _state(find_model(model)) in self._models

    def _base(self, model: str | Path) -> LatentPipeline:
        folder = find_model(model)
        key = _state(folder)
        stated = self.stated.get(folder)
        opened = partial(LatentPipeline.from_pretrained, folder, device=self.device, dtype=self.dtype, stated=stated)
        found = _kept(self._models, key, self.most, opened)
        for swapped in [other for other in self._swapped if other[:2] not in self._models]:
            del self._swapped[swapped]  # a dropped model must not live on in these
        return found


def _kept(entries: OrderedDict[Any, Any], key: Any, most: int, make: Callable[[], Any]) -> Any:
    """The entry of a key, made where it is missing; the oldest ones leave first, so that never more than `most` are held."""
    if key not in entries:
        while len(entries) >= most:
            entries.popitem(last=False)
        entries[key] = make()
    entries.move_to_end(key)
    return entries[key]


def _state(place: Path) -> tuple[str, float]:
    """A folder or file, and when something in it last changed."""
    changed = 0.0
    for path in place.rglob("*") if place.is_dir() else [place]:
        with suppress(FileNotFoundError):  # a file that is being replaced
            if path.is_file():
                changed = max(changed, path.stat().st_mtime)
    return str(place), changed
