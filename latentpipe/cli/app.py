"""The command line: every verb is one call into the public API. Answers --help without torch."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from latentpipe.cli import (
    anomaly,
    argument_parser,
    argument_rules,
    codec,
    completion,
    data,
    edit,
    evaluate,
    explore,
    fit_adapter,
    generate,
    hub,
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
from latentpipe.utils.signals import say, status_of, terminable


def _generate(options: Generate) -> None:
    from latentpipe.cli.generate import run_generate

    run_generate(options)


def _grid(options: Grid) -> None:
    from latentpipe.cli.grid import run_grid

    run_grid(options)


@dataclass(frozen=True)
class Verb:
    """What a verb calls: a function, or a dataclass of options that `then` gets; what is said before seconds of imports."""

    target: Any
    begins: str = ""
    then: Callable[[Any], None] | None = None
    reads_config: bool = False
    """The target takes the words of the call themselves: a config's path and changes of its keys."""

    @property
    def summary(self) -> str:
        """One line for --help."""
        return (self.target.__doc__ or "").strip().splitlines()[0]

    def __call__(self, name: str, arguments: list[str]) -> None:
        if self.reads_config:
            self.target(arguments)
            return

        def check(values: dict[str, Any], given: Collection[str], flags: Mapping[str, str]) -> None:
            argument_rules.prepare(name, values, given, flags)
            if self.begins:
                begin(self.begins.format(**values))

        made = argument_parser.run(f"latentpipe {name}", self.target, arguments, check)
        if self.then is not None:
            self.then(made)


GROUPS: dict[str, dict[str, Verb]] = {
    "Draw": {
        "generate": Verb(Generate, "opening the model {model}", then=_generate),
        "replay": Verb(generate.replay, "opening the model of {picture}"),
        "grid": Verb(Grid, "opening the model {model}", then=_grid),
        "inpaint": Verb(edit.inpaint, "opening the model {model}"),
        "ui": Verb(ui.ui),
    },
    "Swap": {
        "swap": Verb(vae.swap, "measuring the VAE {vae} beside that of the model {model}"),
        "convert": Verb(vae.convert, "reading {source}"),
        "make-fp16-safe": Verb(vae.make_fp16_safe, "opening the VAE {vae}"),
        "fit-adapter": Verb(fit_adapter.fit_adapter, "opening the VAEs {source} and {to}"),
    },
    "Train": {
        "emoji": Verb(data.emoji, "drawing the emoji set"),
        "encode": Verb(data.encode, "opening the VAE {vae}"),
        "train-vae": Verb(train.train_vae, reads_config=True),
        "train-denoiser": Verb(train.train_denoiser, reads_config=True),
        "train-lora": Verb(train.train_lora, reads_config=True),
        "distil": Verb(train.distil),
        "train-embedded": Verb(train.train_embedded, "reading the sets of {hands}"),
    },
    "Measure": {
        "evaluate vae": Verb(evaluate.evaluate_vae, "opening the VAE {vae}"),
        "evaluate prompts": Verb(evaluate.evaluate_prompts, "opening the model {model}"),
        "compare": Verb(evaluate.compare, "opening the VAEs"),
        "health": Verb(evaluate.health, "opening the VAE {vae}"),
    },
    "LoRA": {
        "lora inspect": Verb(lora.lora_inspect, "reading {path}"),
        "lora convert": Verb(lora.lora_convert, "reading {source}"),
        "lora merge": Verb(lora.lora_merge, "reading the LoRA files"),
        "lora extract": Verb(lora.lora_extract, "reading {before} and {after}"),
    },
    "Explore": {
        "sample": Verb(explore.sample, "opening the VAE {vae}"),
        "traverse": Verb(explore.traverse, "opening the VAE {vae}"),
        "interpolate": Verb(edit.interpolate, "opening what draws between the two"),
        "edit": Verb(edit.Edit, "opening the VAE {vae}", then=edit.edit),
        "anomaly": Verb(anomaly.anomaly, "opening the VAE {vae}"),
    },
    "Files": {
        "pull": Verb(hub.pull, "asking the hub for {repository}"),
        "import": Verb(hub.import_, "looking through {path}"),
        "ls": Verb(inspect.ls),
        "inspect": Verb(inspect.inspect),
        "compress": Verb(codec.compress, "opening the VAE {vae}"),
        "decompress": Verb(codec.decompress, "reading {file}"),
        "fit-codec": Verb(codec.fit_codec, "opening the VAE {vae}"),
        "env": Verb(inspect.env, "asking torch for its devices"),
    },
}
VERBS = {name: verb for verbs in GROUPS.values() for name, verb in verbs.items()}
OTHER_WORDS = {
    "draw": "generate", "txt2img": "generate", "img2img": "generate", "paint": "generate", "xyplot": "grid", "list": "ls",
    "show": "inspect", "info": "inspect", "gui": "ui", "serve": "ui", "web": "ui", "train": "train-vae", "test": "evaluate vae",
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 2 for a mistake in the call or its data, 130 for Ctrl-C, 143 for SIGTERM."""
    try:
        with terminable():
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
        VERBS[name](name, rest)
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
        if "No space left" in str(error) or "I/O error" in str(error) or is_shortage(error):
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
    if arguments[0] in completion.FLAGS:
        print(completion.script(arguments[1] if arguments[1:] else "", {name: verb.target for name, verb in VERBS.items()}))
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
    other = OTHER_WORDS.get(arguments[0].lower())
    hint = f" Did you mean '{other}'?" if other else near(arguments[0], VERBS) or near(" ".join(arguments[:2]), VERBS)
    hint = hint or f" Verbs: {', '.join(VERBS)}."
    return f"unknown verb '{arguments[0][:80]}'.{hint}"


def _help() -> str:
    lines = ["latentpipe: latent diffusion around a VAE stage that can be trained, measured and swapped.\n"]
    lines.append("usage: latentpipe VERB ...")
    for group, verbs in GROUPS.items():
        lines += [f"\n{group}:", *(f"  {name:18}{verb.summary}" for name, verb in verbs.items())]
    return "\n".join([*lines, "\n'latentpipe VERB --help' explains a verb; --print-completion SHELL writes a completion script."])


def _show_warning(message: Any, category: Any, *_: Any) -> None:
    if issubclass(category, LatentpipeWarning):
        print(f"latentpipe: note: {message}", file=sys.stderr)
