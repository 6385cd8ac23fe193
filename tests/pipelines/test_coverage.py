"""Every pipeline class of the installed diffusers is in the table of families, or named as out of scope with a reason."""

from __future__ import annotations

import ast

import pytest
import vae_calls

from latentpipe.pipelines.family_table import FAMILIES, FAMILY_BY_CLASS, OUT_OF_SCOPE


def pipeline_classes(sources: list[str]) -> set[str]:
    """The classes that descend from DiffusionPipeline, read from sources and not imported."""
    bases = {
        node.name: {ast.unparse(base) for base in node.bases}
        for text in sources
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef)
    }
    found = {"DiffusionPipeline"}
    while more := {name for name, parents in bases.items() if parents & found} - found:
        found |= more
    return found - {"DiffusionPipeline"}


def unnamed(classes: set[str]) -> str:
    """What to do about classes that the table does not know; "" where it knows all."""
    new = sorted(classes - FAMILY_BY_CLASS.keys() - OUT_OF_SCOPE.keys())
    return new and (
        f"{', '.join(new)} of the installed diffusers: add each to its family in latentpipe/pipelines/family_table.py, "
        "or to OUT_OF_SCOPE with a reason (docs/howto/add-a-family.md)"
    )


@pytest.fixture(scope="module")
def classes() -> set[str]:
    texts = [path.read_text() for path in vae_calls.sources() if "class " in path.read_text()]
    return pipeline_classes(texts)


def test_every_pipeline_class_has_its_place(classes: set[str]) -> None:
    assert len(classes) > 250
    assert not unnamed(classes)


def test_a_new_class_is_told_by_name() -> None:
    sources = [
        "class StableNewPipeline(DiffusionPipeline, Mixin):\n    pass",
        "class NewerPipeline(StableNewPipeline): ...",
        "class X: ...",
    ]
    assert pipeline_classes(sources) == {"StableNewPipeline", "NewerPipeline"}
    assert str(unnamed(pipeline_classes(sources))).startswith("NewerPipeline, StableNewPipeline of the installed diffusers: add")


def test_no_class_has_two_places() -> None:
    assert not FAMILY_BY_CLASS.keys() & OUT_OF_SCOPE.keys()
    listed = [name for family in FAMILIES for name in family.classes]
    assert len(listed) == len(set(listed))
    assert all(reason and not reason.endswith(".") for reason in OUT_OF_SCOPE.values())


def test_no_name_is_of_the_past(classes: set[str]) -> None:
    """With the newest diffusers that is supported, every name of the table stands for a class."""
    import diffusers

    if diffusers.__version__ >= "0.42":
        assert (FAMILY_BY_CLASS.keys() | OUT_OF_SCOPE.keys()) - classes == set()
