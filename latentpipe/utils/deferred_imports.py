"""Imports that drawing a picture does not need, put off until something asks for them; in the command line's process alone.

diffusers and transformers import torch's compiler, scipy, peft and every model they know to draw one picture: three quarters of
the time that a first picture takes. After `put_off` such a module comes up empty, under its own name and with its own path, and
is run, in place, as soon as anything asks it for a name. A few names are asked for by other modules only to be compared with, to
annotate, or to decorate; stand-ins answer for these, and hand on to the real ones once somebody calls them.

Whatever asks for more gets what it would have got without: a put-off import costs time later, never a result.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

CLASSES: dict[str, tuple[str, ...]] = {  # modules that are put off, and their classes (and functions) that stand-ins answer for
    "torch._dynamo": (),
    "torch._dynamo._trace_wrapped_higher_order_op": ("TransformGetItemToIndex",),
    "scipy.integrate": (),
    "scipy.stats": (),
    "peft": ("PeftModel",),
    "peft.tuners": (),
    "peft.tuners.tuners_utils": ("BaseTunerLayer",),
    "diffusers.hooks": (),
    "diffusers.models.autoencoders": (),
    "diffusers.models.transformers": (),
    "diffusers.models.unets": (),
    "diffusers.pipelines.stable_diffusion.safety_checker": ("StableDiffusionSafetyChecker",),
    "diffusers.quantizers.auto": ("DiffusersAutoQuantizer",),
    "diffusers.quantizers.pipe_quant_config": ("PipelineQuantizationConfig",),
    "transformers": (
        "AutoImageProcessor",
        "CLIPImageProcessor",
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
        "CLIPTokenizer",
        "CLIPVisionModelWithProjection",
        "PreTrainedModel",
        "PreTrainedTokenizer",
        "SiglipImageProcessor",
        "SiglipVisionModel",
    ),
    "transformers.utils": (),
}
VALUES: dict[str, dict[str, Any]] = {  # names whose values are known beforehand
    "transformers.utils": {"SAFE_WEIGHTS_NAME": "model.safetensors", "WEIGHTS_NAME": "pytorch_model.bin"},
}
_WHOLE = ("peft", "torch._dynamo", "transformers")  # packages whose modules need what their package does first
_OWN = {"__version__", "__all__"}  # of the names with underscores, those that a module itself gives
_running = threading.RLock()
_allowed: list[Any] = []  # what torch's compiler is to be told about as soon as it runs


def put_off() -> None:
    """From now on, imports of these modules cost nothing until they are used; those imported before stay as they are."""
    if not active():
        sys.meta_path.insert(0, _Finder())
        import importlib.metadata as installed

        installed.packages_distributions = functools.partial(_Distributions, installed.packages_distributions)  # type: ignore[assignment]


def active() -> bool:
    """Whether `put_off` was called in this process."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def has_run(name: str) -> bool:
    """Whether a module was imported and is not put off."""
    return name in sys.modules and not isinstance(sys.modules[name], _PutOff)


class _PutOff(ModuleType):
    """A module that is run when it is first asked for a name that no stand-in answers for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in _OWN:
            raise AttributeError(name)
        stand_in = _stand_in(self.__name__, name)
        if stand_in is not None and _waits(self):
            return stand_in
        return getattr(_run(self), name)


def _whole(name: str) -> str:
    """The package that a module must not come up without; empty where there is none."""
    return next((package for package in _WHOLE if name.startswith(f"{package}.")), "")


def _waits(module: Any) -> bool:
    """Whether a module is put off and nobody has asked for it."""
    return isinstance(module, _PutOff) and not vars(module).get("_runs")


def _run(module: ModuleType) -> ModuleType:
    """Run a module that was put off; returns what stands under its name afterwards, which may be another one."""
    with _running:
        whole = _whole(module.__name__)
        if whole and _waits(module) and _waits(sys.modules.get(whole)):
            _run(sys.modules[whole])
        if _waits(module):
            vars(module)["_runs"] = True
            assert isinstance(module.__loader__, _PutOffLoader)
            spec = module.__loader__.spec
            module.__spec__, module.__loader__ = spec, spec.loader
            assert spec.loader is not None
            spec.loader.exec_module(module)
            module.__class__ = ModuleType if sys.modules[spec.name] is module else _Moved
            if spec.name == "torch._dynamo":
                for each in _allowed:
                    module.allow_in_graph(each)
        elif isinstance(module, _PutOff):  # asked while it runs, by a module that imports it in a circle
            raise AttributeError(f"partially initialized module {module.__name__!r} has no such attribute")
    return sys.modules[module.__name__]


class _Moved(ModuleType):
    """A module that has put another one in its place."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.modules[self.__name__], name)


class _PutOffLoader(Loader):
    """Makes the module and leaves it as it is."""

    def __init__(self, spec: ModuleSpec) -> None:
        self.spec = spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _PutOff(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _FoundLoader(Loader):
    """Hands out a module that running its package has imported meanwhile."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


def _found(module: ModuleType) -> ModuleSpec:
    """The spec of a module that is there already; importlib takes it from the module itself, and would run its own one again."""
    spec = ModuleSpec(module.__name__, _FoundLoader(module))
    module.__spec__ = spec
    return spec


class _Finder(MetaPathFinder):
    """Finds the modules that are put off."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        whole = _whole(name)
        if name not in CLASSES and whole and _waits(sys.modules.get(whole)):
            _run(sys.modules[whole])
            return _found(sys.modules[name]) if name in sys.modules else None
        real = PathFinder.find_spec(name, path, target) if name in CLASSES else None
        if real is None or real.loader is None:
            return None
        spec = ModuleSpec(name, _PutOffLoader(real), origin=real.origin, is_package=real.submodule_search_locations is not None)
        if real.submodule_search_locations is not None:
            spec.submodule_search_locations = real.submodule_search_locations
        spec.has_location = real.has_location
        return spec


class _StandIn(type):
    """A class (or function) of a module that was put off: nothing is an instance of it before that module has run."""

    def __new__(cls, name: str, bases: tuple[type, ...], names: dict[str, Any]) -> Any:
        if any(isinstance(base, _StandIn) for base in bases):  # somebody derives from it
            real = tuple(base.real() if isinstance(base, _StandIn) else base for base in bases)
            return type(real[0])(name, real, names)
        return super().__new__(cls, name, bases, names)

    def real(cls) -> Any:
        """What it stands for."""
        found = vars(_run(sys.modules[cls.__module__])).get(cls.__name__)
        return found if found is not None else getattr(sys.modules[cls.__module__], cls.__name__)

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        return cls.real()(*arguments, **options)

    def __instancecheck__(cls, instance: Any) -> bool:
        return has_run(cls.__module__) and isinstance(instance, cls.real())

    def __subclasscheck__(cls, subclass: type) -> bool:
        return subclass is cls or (has_run(cls.__module__) and issubclass(subclass, cls.real()))

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls.real(), name)


@functools.cache
def _stand_in(module: str, name: str) -> Any:
    """What answers for a name of a module that was put off; None where nothing does."""
    if name in VALUES.get(module, ()):
        return VALUES[module][name]
    return _StandIn(name, (), {"__module__": module}) if name in CLASSES[module] else None


def _allow_in_graph(target: Any) -> Any:
    _allowed.append(target)
    return target


def _disable(target: Any = None, recursive: bool = True, **options: Any) -> Any:
    """A function that torch's compiler leaves alone, once there is a compiler that could trace it."""
    if target is None:
        return functools.partial(_disable, recursive=recursive, **options)
    made: list[Callable[..., Any]] = []

    @functools.wraps(target)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if not made and not has_run("torch._dynamo"):
            return target(*arguments, **keywords)
        if not made:
            made.append(sys.modules["torch._dynamo"].disable(target, recursive, **options))
        return made[0](*arguments, **keywords)

    return call


def _constant(target: Any) -> Any:
    """As torch's own decorator, which marks what it is given and no more."""
    target._dynamo_marked_constant = True
    return target


VALUES["torch._dynamo"] = {
    "allow_in_graph": _allow_in_graph,
    "assume_constant_result": _constant,
    "disable": _disable,
    "eval_frame": SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {})),  # before it runs nothing was compiled
}


class _Distributions(Mapping[str, list[str]]):
    """`importlib.metadata.packages_distributions`, which reads every installed package's list of files, once it is looked at."""

    def __init__(self, read: Callable[[], Mapping[str, list[str]]]) -> None:
        self._read = functools.cache(read)

    def __getitem__(self, name: str) -> list[str]:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())
