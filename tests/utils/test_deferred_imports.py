"""Imports that are put off: nothing runs before it is asked for, and then everything is as it would have been."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from latentpipe.utils import deferred_imports

PACKAGE = {
    "__init__.py": "from putoff_package import told\ntold.append('package')\n__version__ = '3'\nfrom .part import Part\n",
    "part.py": "from putoff_package import told\ntold.append('part')\nclass Part:\n    size = 4\n",
    "other.py": "from .part import Part\nclass Other(Part):\n    pass\n",
    "circle.py": "import putoff_package.circle as me\nfirst = 1\nsecond = me.first + 1\n",
}


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A package `late` whose parts say that they run, put off with its stand-in `Part`."""
    (tmp_path / "late").mkdir()
    for name, text in PACKAGE.items():
        (tmp_path / "late" / name).write_text(text.replace("putoff_package.circle", "late.circle"))
    (tmp_path / "putoff_package.py").write_text("told = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(deferred_imports, "CLASSES", {"late": ("Part",), "late.circle": ()})
    finder = deferred_imports._Finder()
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    yield importlib.import_module("putoff_package").told
    for name in [name for name in sys.modules if name.partition(".")[0] in ("late", "putoff_package")]:
        del sys.modules[name]
    deferred_imports._stand_in.cache_clear()


def test_a_module_runs_when_it_is_asked_for_a_name_and_once(told: list[str]) -> None:
    late = importlib.import_module("late")
    assert told == []
    assert not deferred_imports.has_run("late")
    assert late.__version__ == "3"
    assert told == ["package", "part"]
    assert deferred_imports.has_run("late")
    assert late.Part.size == 4
    assert importlib.import_module("late") is late
    assert told == ["package", "part"]
    assert type(late) is type(sys)
    assert late.__spec__.loader.name == "late"
    with pytest.raises(AttributeError, match="module 'late' has no attribute 'missing'"):
        _ = late.missing


def test_a_part_of_a_package_comes_up_without_it(told: list[str]) -> None:
    part = importlib.import_module("late.part")
    assert told == ["part"]
    assert importlib.import_module("late").Part is not part.Part  # the stand-in


def test_a_part_of_a_whole_package_runs_it_first(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred_imports, "_WHOLE", ("late",))
    part = importlib.import_module("late.part")
    assert told == ["package", "part"]
    assert sys.modules["late"].Part is part.Part
    assert part.__spec__.loader is not None
    assert part.__spec__.origin == part.__file__


def test_a_stand_in_is_compared_without_running_and_called_with(told: list[str]) -> None:
    from late import Part  # type: ignore[import-not-found]

    assert told == []
    assert not isinstance(3, Part)
    assert not issubclass(int, Part)
    assert issubclass(Part, Part)
    assert str(Part | None)
    assert told == []
    made = Part()
    assert told == ["package", "part"]
    assert isinstance(made, Part)
    assert type(made) is sys.modules["late"].Part
    assert issubclass(type(made), Part)
    assert not isinstance(3, Part)
    assert Part.size == 4
    with pytest.raises(AttributeError):
        _ = Part.missing


def test_a_class_that_derives_from_a_stand_in_derives_from_the_real_one(told: list[str]) -> None:
    from late import Part

    class Mine(Part):  # type: ignore[misc]
        """One more."""

    assert Mine.__mro__ == (Mine, sys.modules["late"].Part, object)
    assert Mine.__doc__ == "One more."
    assert type(Mine) is type


def test_a_module_that_imports_itself_runs_once(told: list[str]) -> None:
    assert importlib.import_module("late.circle").second == 2


def test_compiler_marks_are_passed_on_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`disable` and `allow_in_graph` work without torch's compiler, and reach it once it is there."""

    def double(value: int) -> int:
        """Twice."""
        return 2 * value

    monkeypatch.setattr(deferred_imports, "_allowed", [])
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    values = deferred_imports.VALUES["torch._dynamo"]
    assert values["allow_in_graph"](double) is double
    assert deferred_imports._allowed == [double]
    for quiet in (values["disable"](double), values["disable"](recursive=False)(double)):
        assert quiet(3) == 6
        assert quiet.__doc__ == "Twice."
    told: list[object] = []

    def disable(target: Callable[[int], int], recursive: bool) -> Callable[[int], int]:
        told.append((target, recursive))
        return target

    monkeypatch.setitem(sys.modules, "torch._dynamo", type(sys)("torch._dynamo"))
    sys.modules["torch._dynamo"].disable = disable  # type: ignore[attr-defined]
    assert quiet(4) == 8
    assert quiet(5) == 10
    assert told == [(double, False)]


CHECK = r"""
import sys
from latentpipe.utils import deferred_imports as put
put.put_off()
import diffusers
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion as sd
heavy = [name for name in ("torch._dynamo", "sympy", "scipy.stats", "peft", "transformers") if put.has_run(name)]
assert not heavy, heavy
annotated = sd.CLIPTextModel
constants = {name: dict(put.VALUES[name]) for name in ("transformers.utils",)}
import transformers.utils, scipy.stats, peft.tuners.tuners_utils
from transformers import CLIPTextConfig, CLIPTextModel
tiny = CLIPTextConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
assert isinstance(CLIPTextModel(tiny), annotated) and annotated.real() is CLIPTextModel
for name, value in constants["transformers.utils"].items():
    assert getattr(transformers.utils, name) == value, name
assert abs(scipy.stats.norm.cdf(0.0) - 0.5) < 1e-12
from peft.tuners.tuners_utils import BaseTunerLayer
from diffusers.loaders import lora_base
assert lora_base.BaseTunerLayer is BaseTunerLayer or lora_base.BaseTunerLayer.real() is BaseTunerLayer
import torch
step = torch.compile(lambda value: value + 1, backend="eager")
assert step(torch.ones(2)).tolist() == [2, 2] and put.has_run("torch._dynamo")
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.models.unets import UNet2DModel
from diffusers.hooks import HookRegistry
assert all(name in dir(sys.modules[module]) for module, names in put.CLASSES.items() if put.has_run(module) for name in names)
print("as it would have been")
"""


@pytest.mark.slow
def test_libraries_are_what_they_would_have_been() -> None:
    """The real libraries: drawing runs none of the heavy ones, and each is whole when it is used."""
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, timeout=240)
    assert done.stdout == "as it would have been\n", done.stderr[-3000:]


@pytest.mark.parametrize(("verb", "waits"), [("generate", True), ("ui", True), ("train-vae", False), ("distil", False)])
def test_verbs_that_train_alone_import_all_at_once(verb: str, waits: bool) -> None:
    code = f"from latentpipe.__main__ import _prepare; _prepare({verb!r}); from latentpipe.utils.deferred_imports import active"
    done = subprocess.run([sys.executable, "-c", f"{code}; print(active())"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(waits)
