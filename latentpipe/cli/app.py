"""The command line: every verb is one call into the public API. Answers --help without torch."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from latentpipe.cli import (
    anomaly,
    argument_parser,
    argument_rules,
    codec,
    data,
    edit,
    evaluate,
    explore,
    fit_adapter,
    generate,
    inspect,
    lora,
    train,
    ui,
    vae,
)
from latentpipe.cli.generate import Generate
from latentpipe.cli.grid import Grid
from latentpipe.utils.errors import LatentpipeWarning, UserError, begin, near
from latentpipe.utils.out_of_memory import is_shortage, sentence
from latentpipe.utils.signals import interruptible, say, status_of

Verb = Callable[[list[str]], None]


def _generate(options: Generate) -> None:
    from latentpipe.cli.generate import run

    run(options)


def _grid(options: Grid) -> None:
    from latentpipe.cli.grid import run

    run(options)


def _verb_of(name: str, target: Any, then: Callable[[Any], None] | None = None) -> Verb:
    """A verb that calls `target` (a function), or makes it (a dataclass) and gives it to `then`."""

    def check(values: dict[str, Any], given: Collection[str], flags: Mapping[str, str]) -> None:
        argument_rules.prepare(name, values, given, flags)
        if name in BEGINNINGS:
            begin(BEGINNINGS[name].format(**values))

    def run(arguments: list[str]) -> None:
        made = argument_parser.run(f"latentpipe {name}", target, arguments, check)
        if then is not None:
            then(made)

    run.__doc__ = target.__doc__
    return run


# What is said before seconds of imports.
BEGINNINGS = {
    "generate": "opening the model {model}",
    "replay": "opening the model of {picture}",
    "grid": "opening the model {model}",
    "encode": "opening the VAE {vae}",
    "lora convert": "reading {source}",
    "lora merge": "reading the LoRA files",
    "lora inspect": "reading {path}",
    "lora extract": "reading {before} and {after}",
    "emoji": "drawing the emoji set",
    "train-embedded": "reading the sets of {hands}",
    "evaluate prompts": "opening the model {model}",
    "evaluate vae": "opening the VAE {vae}",
    "compare": "opening the VAEs",
    "health": "opening the VAE {vae}",
    "sample": "opening the VAE {vae}",
    "traverse": "opening the VAE {vae}",
    "interpolate": "opening what draws between the two",
    "edit": "opening the VAE {vae}",
    "inpaint": "opening the model {model}",
    "anomaly": "opening the VAE {vae}",
    "make-fp16-safe": "opening the VAE {vae}",
    "convert": "reading {source}",
    "swap": "measuring the VAE {vae} beside that of the model {model}",
    "compress": "opening the VAE {vae}",
    "decompress": "reading {file}",
    "fit-codec": "opening the VAE {vae}",
    "fit-adapter": "opening the VAEs {source} and {to}",
    "env": "asking torch for its devices",
}
VERBS: dict[str, Verb] = {
    "generate": _verb_of("generate", Generate, _generate),
    "replay": _verb_of("replay", generate.replay),
    "grid": _verb_of("grid", Grid, _grid),
    "train-vae": train.train_vae,
    "encode": _verb_of("encode", data.encode),
    "train-denoiser": train.train_denoiser,
    "train-lora": train.train_lora,
    "train-embedded": _verb_of("train-embedded", train.train_embedded),
    "lora inspect": _verb_of("lora inspect", lora.lora_inspect),
    "lora convert": _verb_of("lora convert", lora.lora_convert),
    "lora merge": _verb_of("lora merge", lora.lora_merge),
    "lora extract": _verb_of("lora extract", lora.lora_extract),
    "emoji": _verb_of("emoji", data.emoji),
    "evaluate prompts": _verb_of("evaluate prompts", evaluate.evaluate_prompts),
    "evaluate vae": _verb_of("evaluate vae", evaluate.evaluate_vae),
    "compare": _verb_of("compare", evaluate.compare),
    "health": _verb_of("health", evaluate.health),
    "sample": _verb_of("sample", explore.sample),
    "traverse": _verb_of("traverse", explore.traverse),
    "interpolate": _verb_of("interpolate", edit.interpolate),
    "edit": _verb_of("edit", edit.Edit, edit.edit),
    "inpaint": _verb_of("inpaint", edit.inpaint),
    "anomaly": _verb_of("anomaly", anomaly.anomaly),
    "make-fp16-safe": _verb_of("make-fp16-safe", vae.make_fp16_safe),
    "convert": _verb_of("convert", vae.convert),
    "swap": _verb_of("swap", vae.swap),
    "compress": _verb_of("compress", codec.compress),
    "decompress": _verb_of("decompress", codec.decompress),
    "fit-codec": _verb_of("fit-codec", codec.fit_codec),
    "fit-adapter": _verb_of("fit-adapter", fit_adapter.fit_adapter),
    "ls": _verb_of("ls", inspect.ls),
    "inspect": _verb_of("inspect", inspect.inspect),
    "ui": _verb_of("ui", ui.ui),
    "env": _verb_of("env", inspect.env),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 2 for a mistake in the call or its data, 130 for Ctrl-C, 143 for SIGTERM."""
    try:
        with interruptible():
            return _run(arguments)
    except KeyboardInterrupt as error:
        say(error)
        return status_of(error)


def _run(arguments: list[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and stream.errors != "backslashreplace":
            stream.reconfigure(errors="replace")  # a character that the console lacks must not end the run it comes after
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        name, rest = _verb(arguments)
        if name is None:
            print(_help())
            return 0
        VERBS[name](rest)
        sys.stdout.flush()  # a reader that has left is noticed here, not at exit
        return 0
    except (UserError, ValueError, FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
        if isinstance(error, ValueError) and not isinstance(error, UserError) and os.environ.get("LATENTPIPE_DEBUG"):
            raise
        return _fail(_plain(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(_plain(error))
    except Exception as error:
        # safetensors and torch wrap what the system said
        if "No space left" in str(error) or is_shortage(error):
            return _fail(_plain(error))
        raise


def _plain(error: Exception) -> str:
    if is_shortage(error):
        return sentence(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = error.filename or "while writing"
        return f"the disk is full ({where}); nothing was left under its final name. Free some space and run it again."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}." if error.filename else f"{error.strerror}."
    return str(error)


def _fail(message: str) -> int:
    print("\n".join(f"latentpipe: {line}" for line in message.splitlines()), file=sys.stderr)
    return 2


def _verb(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The verb of a call and what follows it; None for help."""
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return None, []
    if arguments[0] in ("--version", "-V"):
        from latentpipe.version import VERSION

        print(VERSION)
        raise SystemExit(0)
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in VERBS:
            return name, arguments[words:]
    raise UserError(_unknown(arguments))


def _unknown(arguments: list[str]) -> str:
    """What to say of a verb that there is not."""
    group = {name: name.split()[1] for name in VERBS if name.startswith(f"{arguments[0]} ")}
    if group:
        one = " or ".join(f"'{name}'" for name in group)
        if len(arguments) == 1 or arguments[1].startswith("-"):
            return f"'{arguments[0]}' takes a second word: {one}."
        hint = near(" ".join(arguments[:2]), VERBS) or f" There is {one}."
        return f"unknown verb '{' '.join(arguments[:2])}'.{hint}"
    if arguments[0].startswith("-"):
        return f"'{arguments[0]}' stands before a verb; the verb comes first, as in 'latentpipe generate PROMPT {arguments[0]}'."
    hint = near(arguments[0], VERBS) or near(" ".join(arguments[:2]), VERBS) or f" Verbs: {', '.join(VERBS)}."
    return f"unknown verb '{arguments[0][:80]}'.{hint}"


def _help() -> str:
    rows = [f"  {name:18}{(verb.__doc__ or '').strip().splitlines()[0]}" for name, verb in VERBS.items()]
    head = "latentpipe: latent diffusion around a VAE stage that can be trained, measured and swapped.\n"
    head += "\nusage: latentpipe VERB ...\n"
    return "\n".join([head, *rows, "\n'latentpipe VERB --help' explains a verb."])


def _show_warning(message: Any, category: Any, *_: Any) -> None:
    if issubclass(category, LatentpipeWarning):
        print(f"latentpipe: note: {message}", file=sys.stderr)
