"""How many import arrows there are between the rooms of latentpipe: `python dev/arrows.py` prints the number and each arrow.

A room is what lies directly in latentpipe/: a folder, or a module of its own. An arrow is an ordered pair of rooms of which one
imports from the other, at its top or inside a function. The package's own `__init__`, `__main__` and the front end are no rooms.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "latentpipe"
OUTSIDE = {"__init__", "__main__", "ui"}


def arrows() -> dict[tuple[str, str], list[str]]:
    """(room, room that it imports from) -> the imports, as "module: name"."""
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} - OUTSIDE
    found = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own in OUTSIDE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                parts = name.split(".")
                if parts[0] == "latentpipe" and len(parts) > 1 and parts[1] in rooms - {own}:
                    found[own, parts[1]].append(f"{path.relative_to(PACKAGE).as_posix()}: {'.'.join(parts[1:])}")
    return found


if __name__ == "__main__":
    every = arrows()
    for (start, end), names in sorted(every.items()):
        print(f"{start} -> {end} ({len(names)})")
    print(len(every))
