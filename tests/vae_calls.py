"""How every pipeline of diffusers calls its VAE, read from the sources: `python tests/vae_calls.py` writes vae_calls.txt anew."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from pathlib import Path

TABLE = Path(__file__).with_name("vae_calls.txt")
FACTORS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def sources() -> list[Path]:
    """The pipeline files of the installed diffusers."""
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None
    assert spec.origin is not None
    return sorted((Path(spec.origin).parent / "pipelines").rglob("*.py"))


def table() -> dict[str, str]:
    """Pipeline class -> how its own methods use ``self.vae``."""
    found = {}
    for path in sources():
        text = path.read_text()
        if "self.vae" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Pipeline"):
                row = _row(node)
                if row:
                    found[node.name] = row
    return dict(sorted(found.items()))


def _row(cls: ast.ClassDef) -> str:
    nodes = [node for node in cls.body if isinstance(node, ast.FunctionDef)]
    methods = [text for text in map(ast.unparse, nodes) if "self.vae" in text]
    encoding = [text for text in methods if "self.vae.encode(" in text]
    decoding = [text for text in methods if "self.vae.decode(" in text]
    whole = "\n".join(methods)
    parts = {
        "vae": ", ".join(_annotation(cls)),
        "encodes": ", ".join(sorted({_encoding(text) for text in encoding})),
        "decodes": ", ".join(sorted({" ".join(name for name in FACTORS if name in text) or "bare" for text in decoding})),
        "hands": ", ".join(sorted({word for text in decoding for word in _keywords(text)})),
        "asks": ", ".join(sorted(set(re.findall(r"isinstance\(self\.vae, ([^)]*\)?)\)", whole)))),
        "reads": ", ".join(sorted(set(re.findall(r"self\.vae\.(config\.\w+|(?!config\b|encode\b|decode\b)\w+)", whole)))),
    }
    return "; ".join(f"{name} {value}" for name, value in parts.items() if value) if encoding or decoding else ""


def _annotation(cls: ast.ClassDef) -> list[str]:
    for node in cls.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            for argument in node.args.args:
                if argument.arg == "vae" and argument.annotation is not None:
                    return re.findall(r"\w+", ast.unparse(argument.annotation))
    return []


def _encoding(text: str) -> str:
    """Sample or mode, and whether the method that encodes also applies a factor."""
    at = [match.start() for match in re.finditer(r"self\.vae\.encode\(", text)]
    near = [text[text.rfind("\n", 0, place) + 1 :].split("\n")[0] for place in at]
    kinds = set()
    for line in near:
        if "sample_mode=sample_mode" in line or re.search(r"generator, sample_mode\)", line):
            kinds |= {"mode", "sample"}
        elif "argmax" in line or ".mode()" in line:
            kinds.add("mode")
        else:
            kinds.add("sample")
    factor = "with" if _applies(text) else "at times with" if any(name in text for name in FACTORS) else "without"
    return f"{'/'.join(sorted(kinds))} {factor} a factor"


def _applies(text: str) -> bool:
    """Whether a method names a factor outside of what only some settings of the pipeline reach."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).startswith("self.") and "vae" not in ast.unparse(node.test):
            node.body = [ast.Pass()]
    return any(name in ast.unparse(tree) for name in FACTORS)


def _keywords(text: str) -> list[str]:
    """The keyword arguments of ``self.vae.decode`` beside the usual ones."""
    found = set()
    for node in ast.walk(ast.parse(text.strip())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.vae.decode":
            for keyword in node.keywords:
                found.add(keyword.arg or f"**{ast.unparse(keyword.value)}")
    return sorted(found - {"return_dict"})


def stamp(rows: str) -> str:
    """sha256 of the sources, of this script and of the table: where it holds, the table need not be read anew (5 s)."""
    digest = hashlib.sha256(rows.encode())
    for path in [Path(__file__), *sources()]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def stored() -> tuple[str, str]:
    """The stamp and the rows of the table on disk."""
    first, rows = TABLE.read_text().split("\n", 1)
    return first, rows


if __name__ == "__main__":
    written = "".join(f"{name}: {row}\n" for name, row in table().items())
    TABLE.write_text(f"{stamp(written)}\n{written}")
