"""Where models, VAEs, LoRA files, adapters and configs live, and what a name means. Reads no weights and imports no torch."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from latentpipe.errors import UserError, near


def home() -> Path:
    """People's own files: $LATENTPIPE_HOME, else latentpipe/ in the user's data folder; holds models/, vae/, lora/."""
    if os.environ.get("LATENTPIPE_HOME"):
        return Path(os.environ["LATENTPIPE_HOME"])
    data = os.environ.get("XDG_DATA_HOME") or os.environ.get("LOCALAPPDATA")
    return Path(data or Path.home() / ".local" / "share") / "latentpipe"


def shipped() -> Path:
    """The folder of the weights that ship with the project: in the wheel, or in a checkout (where it is a link)."""
    return (Path(__file__).parent / "embedded").resolve()


def available(kind: str = "models") -> dict[str, Path]:
    """Names and places of all `kind` ("models", "vae" or "lora"): the shipped ones, then people's own.

    A model is a folder; a VAE is a folder or a safetensors file named by its stem (by its whole name where a folder has that);
    a LoRA is a safetensors file.
    """
    if kind == "lora":
        roots = (shipped() / kind, home() / kind)
        return {path.stem: path for root in roots for path in sorted(root.glob("*.safetensors"))}
    index = "model_index.json" if kind == "models" else "config.json"
    found: dict[str, Path] = {}
    shown = "[!.]*"  # a folder that is being written has a hidden name
    for root in (shipped(), home() / "models"):
        for path in sorted(root.glob(f"{shown}/model_index.json")):
            found[path.parent.name] = path.parent if kind == "models" else path.parent / "vae"
    for root in (shipped() / kind, home() / kind):
        found |= {path.parent.name: path.parent for path in sorted(root.glob(f"{shown}/{index}"))}
        for path in sorted(root.glob("*.safetensors")) if kind == "vae" else ():
            found[path.name if (root / path.stem).is_dir() else path.stem] = path
    return found


def find_model(name: str | Path, kind: str = "models") -> Path:
    """The folder (or a VAE's single file) that a name or a path means; UserError lists the names there are."""
    what = "VAE" if kind == "vae" else kind.removesuffix("s")
    if not str(name).strip():
        raise UserError(f"The {what} has an empty name; give a name ('latentpipe ls'), a folder or a file.")
    known = available(kind)
    if str(name) in known:
        if f"{name}.safetensors" in known:
            raise UserError(f"{kind} '{name}' is both {known[str(name)]} and {known[f'{name}.safetensors']}; rename one of them.")
        return known[str(name)]
    path = Path(name)
    if kind == "vae" and (path / "model_index.json").is_file() and (path / "vae").is_dir():
        return (path / "vae").resolve()  # a whole model stands for its VAE
    if path.is_dir() or (kind == "vae" and path.is_file()):
        return path.resolve()
    kinds = "neither a folder nor a file nor" if kind == "vae" else "neither a folder nor"
    raise UserError(f"No {what} '{name}': {kinds} {one_of(known)}.{near(name, known)}")


def name_of(folder: Path, kind: str = "models") -> str:
    """The name under which `find_model` finds a folder or file; one elsewhere has its own name."""
    known = {path.resolve(): name for name, path in available(kind).items()}
    return known.get(folder.resolve(), folder.stem if folder.is_file() else folder.name)


def find_lora(name: str | Path) -> Path:
    """The file that a name ('latentpipe ls lora') or a path means; UserError lists the names there are."""
    if not str(name).strip():
        raise UserError("The LoRA has an empty name; give a name ('latentpipe ls lora') or a file.")
    known = available("lora")
    if str(name) in known:
        return known[str(name)]
    with suppress(OSError):  # a name too long for a file
        if Path(name).exists():
            return Path(name)
    raise UserError(f"No LoRA '{name}': neither a file nor {one_of(known)}.{near(name, known)}")


def named_lora(name: str) -> Path:
    """The file of an installed name; a path is none (names in prompts and pictures never open files elsewhere)."""
    known = available("lora")
    if name not in known:
        raise UserError(
            f"No LoRA '{name}' is installed; there are: {', '.join(known) or 'none'}. "
            f"Put its file into $LATENTPIPE_HOME/lora, or give it with --lora.{near(name, known)}"
        )
    return known[name]


def own_adapters() -> dict[str, Path]:
    """Names and files of the adapters in ``$LATENTPIPE_HOME/adapters``."""
    return {path.stem: path for path in sorted((home() / "adapters").glob("*.safetensors"))}


def own_adapter(name: str) -> Path:
    """The file of a name in ``$LATENTPIPE_HOME/adapters``; a path is none."""
    if name not in own_adapters():
        raise UserError(f"The recipe names the adapter '{name}', which is not installed; give its file with --adapter.")
    return own_adapters()[name]


def find_adapter(name: str | Path) -> Path:
    """The file that a path, or a name in ``$LATENTPIPE_HOME/adapters``, means."""
    known = own_adapters()
    if str(name) in known:
        return known[str(name)]
    if Path(name).is_file():
        return Path(name)
    raise UserError(f"No adapter '{name}': neither a file nor {one_of(known)}.{near(name, known)}")


def configs_folder() -> Path:
    """The folder of the shipped configs: in the wheel, or in a checkout (where it is a link)."""
    return (Path(__file__).parent / "configs").resolve()


def one_of(known: Collection[str]) -> str:
    """The names that there are, in words."""
    return f"one of {', '.join(known)}" if known else "an installed one (there are none)"
