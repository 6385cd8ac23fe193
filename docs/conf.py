"""Sphinx: pages in Markdown (MyST), the API from docstrings; `make docs` builds it strictly."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from pydantic import BaseModel
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))
import docstrings

import latentpipe
from latentpipe.version import VERSION

project = "latentpipe"
author = "The latentpipe authors"
copyright = author
release = version = VERSION

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
default_role = "code"
nitpicky = True
html_theme = "furo"
html_title = f"latentpipe {VERSION}"
html_static_path: list[str] = []
html_show_sourcelink = False
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 88
viewcode_line_numbers = True

COLON = "\ue000"
# types of other packages, whose pages are not linked: the build needs no network
OTHERS = {
    "torch", "nn", "np", "numpy", "PIL", "Image", "pathlib", "Path", "collections", "Iterator", "Sequence", "Mapping", "Callable",
    "Collection", "Iterable", "Any", "typing", "BaseModel", "pydantic", "threading", "Event", "Literal", "Self", "TypeVar",
    "Module", "ConfigDict", "Field", "annotated_types", "type", "Exception", "float", "int", "str", "bool", "dict", "list",
    "tuple", "None",
    "frozenset", "bytes", "optional", "ValueError", "NoneType", "Ge", "Le", "Lt", "Gt", "MaxLen", "MinLen", "FieldInfo",
    "Name", "Unit", "Width", "Widths", "Layers", "Side", "Precision", "Positive", "Weight", "Size",
}  # fmt: skip


def resolve(app: Sphinx, env: Any, node: nodes.Element, content: nodes.Element) -> nodes.Node | None:
    """A name in an annotation that stands there as its module imported it: the documented name that ends so, where one does."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py":
        return None
    domain = env.get_domain("py")
    last = target.rpartition(".")[2]
    found = {
        entry.node_id: entry for name, entry in domain.objects.items() if name.rpartition(".")[2] == last and not entry.aliased
    }
    if len(found) == 1 and re.split(r"[.\[]", target)[0] not in OTHERS:
        [entry] = found.values()
        uri = app.builder.get_relative_uri(node["refdoc"], entry.docname) + "#" + entry.node_id
        return nodes.reference("", "", content, internal=True, refuri=uri, reftitle=target)
    if re.split(r"[.\[]", target)[0] in OTHERS:
        return content
    return None


def columns(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings of this project give arguments in two columns; Sphinx wants fields."""
    lines[:] = docstrings.to_fields(lines, docstrings.arguments_of(thing), public=set(latentpipe.__all__))
    if what == "attribute":
        lines += default_of(name)
    if what in ("attribute", "property"):  # napoleon takes what stands before a colon for a type
        lines[:] = [line.replace(":", COLON) for line in lines]


def default_of(name: str) -> list[str]:
    """What a key of a config is where it is left out."""
    parent, _, key = name.rpartition(".")
    module, _, schema = parent.rpartition(".")
    found = getattr(sys.modules.get(module), schema, None)
    if not (isinstance(found, type) and issubclass(found, BaseModel) and key in found.model_fields):
        return []
    field = found.model_fields[key]
    if field.is_required():
        return ["", "Required."]
    plain = field.default is None or isinstance(field.default, str | int | float | tuple)
    return ["", f"Default: ``{field.default!r}``."] if plain else []


def colons(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """After napoleon: what `columns` hid from it."""
    lines[:] = [line.replace(COLON, ":") for line in lines]


def signature(app: Sphinx, what: str, name: str, thing: Any, options: Any, arguments: str | None, result: str | None) -> Any:
    """A pydantic model's signature repeats its fields, which stand below it; a default from a factory is no Python."""
    if isinstance(thing, type) and issubclass(thing, BaseModel):
        return "", ""
    return (arguments.replace("<factory>", "..."), result) if arguments else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    for name in latentpipe.__all__:
        importlib.import_module(getattr(latentpipe, name).__module__)
    app.connect("autodoc-process-docstring", columns, priority=100)
    app.connect("autodoc-process-docstring", colons, priority=900)
    app.connect("autodoc-process-signature", signature)
    app.connect("missing-reference", resolve)
