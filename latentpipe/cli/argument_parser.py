"""The words of a call: what a verb takes, their values, and what is wrong with them, in one sentence.

tyro explains a verb (--help) and overrides keys of configs; it is not asked to read a verb's words, since it answers a mistake
with a box of many lines, and takes half a second to be imported.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from latentpipe.utils.errors import UserError, near

NUMBERS = {int: "a whole number", float: "a number"}
NEGATIVE = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)


Given = TypeVar("Given")
Positional = Annotated[Given, "positional"]  # a word of its own, without a flag; `explain` puts tyro's in its place
arg = dataclasses.make_dataclass("arg", ["name"], frozen=True)  # the name that people call a parameter by; likewise


class Word(str):
    """A value that is read by whoever knows its type."""


@dataclass(frozen=True)
class Option:
    """What a verb takes: an option such as --seed, or a positional word such as PROMPT.

    kind   int, float, str, Path or bool; None where the parser alone can tell
    count  of its words, fewest and most (None: any number)
    """

    name: str
    flag: str
    kind: Any = str
    choices: tuple[str, ...] = ()
    count: tuple[int, int | None] = (1, 1)
    required: bool = False
    positional: bool = False
    default: Any = None
    optional: bool = False
    """Whether it may be None."""


@dataclass
class Call:
    """The words of a call by option; `words` holds those of no flag in order."""

    given: dict[str, list[str]] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)


Check = Callable[[dict[str, Any], Collection[str], Mapping[str, str]], None]


def run(prog: str, target: Any, arguments: Sequence[str], check: Check | None = None) -> Any:
    """Read a call and make it: `target`, a function or a dataclass, of its values.

    check  is called before with the values by parameter name, the names that the call gives itself, and what people call each
    UserError, in one sentence, where the words are not what the target takes.
    """
    if {"-h", "--help"} & set(arguments):
        return explain(prog, target)
    options = options_of(target)
    values, given = read(prog, options, arguments)
    if check is not None:
        check(values, given, {option.name: option.flag for option in options})
    first = [values.pop(option.name) for option in options if option.positional]
    return target(*first, **values)


def explain(prog: str, target: Any, **named: Any) -> None:
    """Print what a target takes, as the parser sets it out, and leave."""
    import tyro

    place = vars(sys.modules[target.__module__])  # annotations are texts, read by what these names mean there
    place.update({name: getattr(tyro.conf, name) for name in ("Positional", "arg") if name in place})
    tyro.cli(target, prog=prog, args=["--help"], **named)


# --- what is taken ------------------------------------------------------------------------------------------


def options_of(target: Any) -> list[Option]:
    """What a function (by its signature) or a dataclass (by its fields) takes from the command line."""
    hints = typing.get_type_hints(target, include_extras=True)
    if dataclasses.is_dataclass(target):
        fields = dataclasses.fields(target)
        missing = dataclasses.MISSING
        return [_option(one.name, hints[one.name], _is_positional(hints[one.name]), one.default, missing) for one in fields]
    empty = inspect.Parameter.empty
    parameters = inspect.signature(target).parameters.values()
    return [_option(one.name, hints[one.name], one.kind is one.POSITIONAL_ONLY, one.default, empty) for one in parameters]


def options_of_config(config: Any, prefix: str = "") -> list[Option]:
    """What a pydantic model takes as overrides of its keys: --optim.steps and the like."""
    from pydantic import BaseModel

    found = []
    for name, one in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            found += options_of_config(value, f"{prefix}{name}.")
        else:
            found.append(_option(f"{prefix}{name}", one.annotation, False, value, None))
    return found


def _is_positional(hint: Any) -> bool:
    return any("ositional" in str(mark) for mark in getattr(hint, "__metadata__", ()))


def _option(name: str, hint: Any, positional: bool, default: Any, missing: Any) -> Option:
    names = [getattr(mark, "name", None) for mark in getattr(hint, "__metadata__", ())]
    shown = next((one for one in names if isinstance(one, str)), None)
    kind, choices, count = _kind(hint)
    required = default is missing and missing is not None
    flag = name.upper() if positional else "--" + (shown or name).replace("_", "-")
    if missing is not None and count == (0, None):
        count = (1, None)  # of a verb: what is named has a value
    optional = type(None) in typing.get_args(hint)
    return Option(name, flag, kind, choices, count, required, positional, None if required else default, optional)


def _kind(hint: Any) -> tuple[Any, tuple[str, ...], tuple[int, int | None]]:
    """Type, allowed words and number of words of an annotation."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _kind(inner[0])
    if origin in (typing.Union, types.UnionType):
        rest = [one for one in inner if one is not type(None)]
        return _kind(rest[0]) if len(rest) == 1 else (None, (), (1, 1))
    if origin is Literal:
        return str, tuple(str(word) for word in inner), (1, 1)
    if origin is tuple:
        kinds = [_kind(one) for one in inner if one is not Ellipsis]
        if kinds[0][0] is bool:
            return None, (), (0, None)
        return kinds[0][0], kinds[0][1], (0, None) if Ellipsis in inner else (len(inner), len(inner))
    if hint is bool:
        return bool, (), (0, 0)
    if hint in (int, float, str, Path):
        return hint, (), (1, 1)
    return None, (), (0, None)


# --- what is given ------------------------------------------------------------------------------------------


def read(prog: str, options: list[Option], arguments: Sequence[str]) -> tuple[dict[str, Any], set[str]]:
    """The values of a call by parameter name, defaults included, and the names that it gives; UserError says what is wrong."""
    call = _sort(prog, options, arguments)
    _take_positional(prog, options, call)
    values: dict[str, Any] = {}
    for option in options:
        if option.name not in call.given:
            if option.required:
                raise UserError(f"{_verb(prog)}: {option.flag} is missing; expected '{usage(prog, options)}'.")
            values[option.name] = option.default
            continue
        words = [_value(prog, option, word) for word in call.given[option.name]]
        if option.kind is bool:
            values[option.name] = words[-1]
        else:
            values[option.name] = words[0] if option.count == (1, 1) else tuple(words)
    return values, set(call.given)


def usage(prog: str, options: list[Option]) -> str:
    """``latentpipe generate PROMPT [options]``"""
    needed = [one for one in options if one.required]
    words = [one.flag if one.positional else f"{one.flag} {one.flag.strip('-').upper()}" for one in needed]
    return " ".join([prog, *words, *(["[options]"] if len(needed) < len(options) else [])])


def _flags(options: list[Option]) -> dict[str, tuple[Option, bool]]:
    """Every spelling of every flag, and the value that it gives a switch."""
    flags = {}
    for option in options:
        if option.positional:
            continue
        flags[option.flag] = (option, True)
        head, _, last = option.flag[2:].rpartition(".")
        if option.kind is bool and not last.startswith("no-"):
            flags[f"--{head + '.' if head else ''}no-{last}"] = (option, False)
    return flags


def _sort(prog: str, options: list[Option], arguments: Sequence[str]) -> Call:
    """The words of a call, those of each flag apart."""
    flags, call = _flags(options), Call()
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word == "--":
            call.words += words
            break
        if not word.startswith("-") or word == "-" or NEGATIVE.match(word):
            call.words.append(word)
            continue
        key, mark, value = word.partition("=")
        found = flags.get(key.replace("_", "-")) or flags.get(f"-{key}" if len(key) == 2 else "")  # -n is --n
        if found is None:
            raise UserError(_unknown(prog, key, flags))
        option, switch = found
        if option.kind is bool:
            if mark:
                raise UserError(f"{_verb(prog)}: {key} is a switch and takes no value; given '{value}'.")
            call.given[option.name] = [str(switch)]
            continue
        least, most = option.count
        taken = [value] if mark else []
        while words and (most is None or len(taken) < most) and not _is_flag(words[0], flags):
            taken.append(words.pop(0))
        if len(taken) < least:
            what = f"{least} values" if least > 1 else "a value"
            raise UserError(f"{_verb(prog)}: {key} needs {what}; given {' '.join(map(repr, taken)) or 'none'}.")
        before = call.given.get(option.name, []) if most is None else []
        call.given[option.name] = before + taken
    return call


def _is_flag(word: str, flags: dict[str, Any]) -> bool:
    if word.partition("=")[0].replace("_", "-") in flags or word == "--":
        return True
    return word.startswith("-") and word != "-" and not NEGATIVE.match(word) and word.lstrip("-")[:1].isalpha()


def _unknown(prog: str, key: str, flags: dict[str, Any]) -> str:
    inner = {flag.rpartition(".")[2]: flag for flag in flags if "." in flag}  # steps means optim.steps
    meant = near("--" + key.lstrip("-").replace("_", "-"), flags)
    if not meant and key.lstrip("-") in inner:
        meant = f" Did you mean '{inner[key.lstrip('-')]}'?"
    if "--size" in flags and key.lstrip("-").partition("=")[0] in ("width", "height", "resolution"):
        meant = " --size WIDTHxHEIGHT says it."
    hint = meant or f" '{prog} --help' lists what there is."
    return f"{_verb(prog)}: there is no option {key}.{hint}"


def _take_positional(prog: str, options: list[Option], call: Call) -> None:
    """Give the words of no flag to the positional parameters."""
    places = [option for option in options if option.positional]
    words = list(call.words)
    for place in places:
        taken = len(words) if place.count[1] is None else 1
        if words[:taken]:
            call.given[place.name], words = words[:taken], words[taken:]
    greedy = [option for option in options if not option.positional and option.count[1] is None]
    for place in places:
        if place.required and place.name not in call.given:
            # a list before it may have taken its words: as the parser does, the last ones go to the place
            for option in greedy:
                if len(call.given.get(option.name, [])) > 1:
                    call.given[place.name] = [call.given[option.name].pop()]
                    break
    if not words:
        return
    given = " ".join(call.words)
    if len(places) == 1 and places[0].kind is str and places[0].name == "prompt":
        raise UserError(f'{_verb(prog)}: {len(call.words)} words were given as the prompt; put it in quotes: "{given[:200]}".')
    raise UserError(f"{_verb(prog)}: '{words[0][:80]}' is one word too many; expected '{usage(prog, options)}'.")


def _value(prog: str, option: Option, word: str) -> Any:
    if option.optional and word == "None" and not option.positional:
        return None
    if option.choices:
        if word not in option.choices:
            expected = ", ".join(option.choices)
            raise UserError(
                f"{_verb(prog)}: {option.flag} is '{word[:80]}'; expected one of {expected}.{near(word, option.choices)}"
            )
        return word
    if option.kind is bool:
        return word == "True"
    if option.kind in NUMBERS:
        try:
            return option.kind(word)
        except ValueError:
            raise UserError(f"{_verb(prog)}: {option.flag} is '{word[:80]}'; expected {NUMBERS[option.kind]}.") from None
    if option.kind is None:
        return Word(word)
    return Path(word) if option.kind is Path else word


def _verb(prog: str) -> str:
    return prog.removeprefix("latentpipe ")
