"""The command line: every verb is one call into the public API. Answers --help without torch."""

from __future__ import annotations

import difflib
import errno
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentpipe import (
    anomaly_verb,
    codec_verbs,
    compare_verb,
    evaluate_verbs,
    explore_verbs,
    health_verb,
    lora_verbs,
    path_verbs,
    ui_verb,
    vae_verbs,
    verbs,
)
from latentpipe.ending import interruptible, say, status_of
from latentpipe.errors import Note, UserError
from latentpipe.shortage import is_shortage, sentence
from latentpipe.verbs import configs_folder

Verb = Callable[[list[str]], None]


def train_vae(arguments: list[str]) -> None:
    """Train a VAE from a YAML config; any key can be overridden, as in --optim.steps 500."""
    config = _config("train-vae", "TrainVAE", arguments)
    from latentpipe.train.vae import train_vae as run

    run(config)


def train_denoiser(arguments: list[str]) -> None:
    """Train UNet, text encoder and tokenizer on cached latents, from a YAML config."""
    config = _config("train-denoiser", "TrainDenoiser", arguments)
    from latentpipe.train.denoiser import train_denoiser as run

    run(config)


def train_lora(arguments: list[str]) -> None:
    """Train a LoRA on UNet, text encoder or VAE decoder from a folder of captioned pictures and a YAML config."""
    config = _config("train-lora", "TrainLora", arguments)
    from latentpipe.train.lora import train_lora as run

    run(config)


def generate(arguments: list[str]) -> None:
    """Draw pictures of a prompt and print their paths."""
    import tyro

    from latentpipe.generate import Generate, run

    arguments = ["--n" if argument == "-n" else argument for argument in arguments]
    run(tyro.cli(Generate, prog="latentpipe generate", args=arguments))


def grid(arguments: list[str]) -> None:
    """Draw a picture for each pair of values of two axes (seed, guidance, VAE, ...) on one sheet."""
    import tyro

    from latentpipe.grid_verb import Grid, run

    run(tyro.cli(Grid, prog="latentpipe grid", args=arguments))


def edit(arguments: list[str]) -> None:
    """Change a picture in its latents: mix another in, move along a direction, scale, add noise; everywhere or in a mask."""
    import tyro

    path_verbs.edit(tyro.cli(path_verbs.Edit, prog="latentpipe edit", args=arguments))


def fit_adapter(arguments: list[str]) -> None:
    """Fit an adapter from the latents of one VAE to those of another, and score every rung of the ladder."""
    import tyro

    from latentpipe.fit import fit_adapter as run

    tyro.cli(run, prog="latentpipe fit-adapter", args=arguments)


def _function(name: str, function: Callable[..., None]) -> Verb:
    def run(arguments: list[str]) -> None:
        import tyro

        tyro.cli(function, prog=f"latentpipe {name}", args=arguments)

    run.__doc__ = function.__doc__
    return run


VERBS: dict[str, Verb] = {
    "generate": generate,
    "replay": _function("replay", verbs.replay),
    "grid": grid,
    "train-vae": train_vae,
    "encode": _function("encode", verbs.encode),
    "train-denoiser": train_denoiser,
    "train-lora": train_lora,
    "train-embedded": _function("train-embedded", verbs.train_embedded),
    "lora inspect": _function("lora inspect", lora_verbs.lora_inspect),
    "lora convert": _function("lora convert", lora_verbs.lora_convert),
    "lora merge": _function("lora merge", lora_verbs.lora_merge),
    "lora extract": _function("lora extract", lora_verbs.lora_extract),
    "emoji": _function("emoji", verbs.emoji),
    "evaluate prompts": _function("evaluate prompts", verbs.evaluate_prompts),
    "evaluate vae": _function("evaluate vae", evaluate_verbs.evaluate_vae),
    "compare": _function("compare", compare_verb.compare),
    "health": _function("health", health_verb.health),
    "sample": _function("sample", explore_verbs.sample),
    "traverse": _function("traverse", explore_verbs.traverse),
    "interpolate": _function("interpolate", path_verbs.interpolate),
    "edit": edit,
    "inpaint": _function("inpaint", path_verbs.inpaint),
    "anomaly": _function("anomaly", anomaly_verb.anomaly),
    "make-fp16-safe": _function("make-fp16-safe", vae_verbs.make_fp16_safe),
    "convert": _function("convert", vae_verbs.convert),
    "swap": _function("swap", vae_verbs.swap),
    "compress": _function("compress", codec_verbs.compress),
    "decompress": _function("decompress", codec_verbs.decompress),
    "fit-codec": _function("fit-codec", codec_verbs.fit_codec),
    "fit-adapter": fit_adapter,
    "ls": _function("ls", verbs.ls),
    "inspect": _function("inspect", verbs.inspect),
    "ui": _function("ui", ui_verb.ui),
    "env": _function("env", verbs.env),
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
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return None, []
    if arguments[0] == "--version":
        from latentpipe.version import VERSION

        print(VERSION)
        raise SystemExit(0)
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in VERBS:
            return name, arguments[words:]
    near = [name for name in VERBS if name.startswith(f"{arguments[0]} ")] or difflib.get_close_matches(arguments[0], VERBS, n=1)
    meant = " or ".join(f"'{name}'" for name in near)
    hint = f"Did you mean {meant}?" if near else f"Verbs: {', '.join(VERBS)}."
    raise UserError(f"unknown verb '{arguments[0]}'. {hint}")


def _help() -> str:
    rows = [f"  {name:18}{(verb.__doc__ or '').strip().splitlines()[0]}" for name, verb in VERBS.items()]
    head = "latentpipe: latent diffusion around a VAE stage that can be trained, measured and swapped.\n"
    head += "\nusage: latentpipe VERB ...\n"
    return "\n".join([head, *rows, "\n'latentpipe VERB --help' explains a verb."])


def _config(verb: str, schema_name: str, arguments: list[str]) -> Any:
    """The YAML config named first, with the overrides that follow it."""
    import tyro
    from pydantic import ValidationError

    from latentpipe import config as configs

    schema = getattr(configs, schema_name)
    if not arguments or arguments[0] in ("-h", "--help"):
        paths = sorted(configs_folder().glob("*.yaml"))
        known = ", ".join(path.stem for path in paths if path.read_text().startswith(f"# latentpipe {verb} "))
        print(f"usage: latentpipe {verb} CONFIG.yaml [--key.name value ...]\n\nShipped configs: {known}\n")
        print(f"'latentpipe {verb} CONFIG.yaml --help' lists every key with its value and meaning.")
        raise SystemExit(0)
    path = Path(arguments[0])
    shipped = configs_folder() / f"{path.name}.yaml"
    if not path.exists() and path.name == arguments[0] and shipped.is_file():
        path = shipped
    config = configs.load(path, schema)
    try:
        changed = tyro.cli(schema, prog=f"latentpipe {verb} {arguments[0]}", args=arguments[1:], default=config)
    except ValidationError as error:
        raise UserError(f"{' '.join(arguments)}: {error}") from None
    return configs.parse(changed.model_dump(), schema, " ".join(arguments))


def _show_warning(message: Any, category: Any, *_: Any) -> None:
    if issubclass(category, Note):
        print(f"latentpipe: note: {message}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
