"""From the docstrings of this project, which give arguments in two columns, to the fields that Sphinx renders."""

import inspect
import re
from typing import Any

ROW = re.compile(r"^(\w[\w, ]*?) {2,}(\S.*)$")
PART = re.compile(r"^(\w[\w, ]*?)(?: {2,}|: )(\S.*)$")


def arguments_of(thing: Any) -> set[str]:
    """Names that a function or a class takes."""
    try:
        return set(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        return set()


def to_fields(lines: list[str], arguments: set[str], public: set[str]) -> list[str]:
    """Rows of two columns become `:param:` where they name an argument, else an entry of a list; errors become `:raises:`."""
    out: list[str] = []
    rows: list[tuple[list[str], str]] = []

    def flush() -> None:
        if rows:
            out.extend(["", *(f":{field}: {text}" for fields, text in rows for field in fields), ""])
            rows.clear()

    for line in lines:
        row = ROW.match(line)
        if row and (rows or not out or not out[-1].strip() or all(name in arguments for name in row[1].split(", "))):
            for part in (line if ";  " in line else line + ";  ").split(";  "):
                if found := PART.match(part.strip()):
                    rows.append((_fields(found[1], arguments), found[2]))
                elif part.strip() and rows:
                    rows[-1] = (rows[-1][0], f"{rows[-1][1]}; {part.strip()}")
        elif rows and line.startswith("    "):
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {line.strip()}")
        else:
            flush()
            out.append(line)
    flush()
    return [_linked(line, public) for line in _raises(out)]


def _fields(names: str, arguments: set[str]) -> list[str]:
    """One for each argument of "mean, std"; what is no argument stays as it is."""
    parts = names.split(", ")
    return [f"param {part}" for part in parts] if set(parts) <= arguments else [names]


def _raises(lines: list[str]) -> list[str]:
    """A sentence that begins with UserError tells when it is raised; it ends its paragraph."""
    out: list[str] = []
    for line in lines:
        found = re.match(r"^(|.*?[.;:] )(UserError|ValueError)[: ](.+)$", line)
        if found and not line.startswith((":", " ")):
            if found[1].strip():
                out.append(found[1].rstrip())
            out.extend(["", f":raises {found[2]}: {found[3].strip()}"])
        elif out and line.strip() and out[-1].startswith(":raises "):
            out[-1] += " " + line.strip()
        else:
            out.append(line)
    return out


def _linked(line: str, public: set[str]) -> str:
    """`Name` of a public name becomes a link."""

    def link(found: re.Match[str]) -> str:
        return f":py:obj:`~latentpipe.{found[1]}`" if found[1] in public else found[0]

    return re.sub(r"(?<![`:\w])`(\w+)`(?!`)", link, line)
