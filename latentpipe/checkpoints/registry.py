"""Where models, VAEs, LoRA files, adapters and configs live, and what a name means. Reads no weights and imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from latentpipe.checkpoints.places.hub_cache import cached, default_cache, id_of, parse_id
from latentpipe.checkpoints.places.tool_folders import caches, pickle_named
from latentpipe.checkpoints.places.tool_folders import foreign as foreign
from latentpipe.utils.errors import UserError, near
from latentpipe.utils.gguf_header import SUFFIX as GGUF
from latentpipe.utils.io import SUFFIXES, folders_once, home, printable

FILES = {"lora": "LoRA", "embeddings": "embedding"}  # kinds that are files, never folders
PUT = {
    "lora": "Put its file into $LATENTPIPE_HOME/lora, or give it with --lora.",
    "embeddings": "Put its file into $LATENTPIPE_HOME/embeddings, or give it with --embedding.",
}


def bundled_weights_dir() -> Path:
    """The folder of the weights that ship with the project: in the wheel, or in a checkout (where it is a link)."""
    return (Path(__file__).parents[1] / "embedded").resolve()


def available(kind: str = "models") -> dict[str, Path]:
    """Names and places of all `kind` ("models", "vae", "lora", "embeddings" or "parts"): the shipped ones, then people's own.

    A model or a VAE is a folder, or a safetensors file (a model: GGUF too) named by its stem (by its whole name where a folder
    has that); LoRA and embeddings are safetensors files. What lies in a subfolder is named with it: "style/flat" (`lookup` also
    finds it as "flat").
    """
    found: dict[str, Path] = {}
    if kind not in FILES and kind != "parts":
        for path in sorted(bundled_weights_dir().glob("[!.]*/model_index.json")):
            found[path.parent.name] = path.parent if kind == "models" else path.parent / "vae"
        for name, path in _entries(home() / "models", "model_index.json").items():
            if kind == "models" or path.suffix != GGUF:  # which holds no VAE
                found[name] = path if kind == "models" else vae_of(path)
    for root in (bundled_weights_dir() / kind, home() / kind):
        found |= _entries(root, "" if kind in (*FILES, "parts") else {"vae": "config.json"}.get(kind, "model_index.json"))
    return found


def _entries(root: Path, index: str) -> dict[str, Path]:
    """Names and places below a folder: folders that hold `index`, and files of weights unless that is a model's.

    Links to folders are followed, each folder once; hidden ones are passed by.
    """
    found: dict[str, Path] = {}
    files: dict[str, Path] = {}
    suffixes = (*SUFFIXES, GGUF) if index == "model_index.json" else SUFFIXES
    for place, folders, names in folders_once(root):
        if index and index in names and place != root:
            found[printable(place.relative_to(root).as_posix())] = place
            folders.clear()  # its parts are no entries
        elif not (index == "model_index.json" and index in names):
            weights = (place / name for name in names if not name.startswith("."))
            files |= {printable(path.relative_to(root).as_posix()): path for path in weights if path.suffix in suffixes}
    found = dict(sorted(found.items()))
    for name, path in sorted(files.items(), key=lambda row: (row[1].suffix == GGUF, row[0])):
        stem = name.removesuffix(path.suffix)
        taken = (index and (root / stem).is_dir()) or (path.suffix == GGUF and stem in found)
        found[name if taken else stem] = path
    return found


def lookup(name: str, known: Mapping[str, Path], kind: str) -> Path | None:
    """The place that a name means: its whole name, or the last parts of one in a subfolder; None where there is none.

    UserError where these occur in several subfolders: it lists them.
    """
    if name in known:
        return known[name]
    same = sorted(whole for whole in known if whole.endswith(f"/{name}"))
    if len(same) > 1:
        raise UserError(f"There are several {kind} files named '{name}': {', '.join(same)}. Give one of these names.")
    return known[same[0]] if same else None


def vae_of(model: Path) -> Path:
    """Where a model's own VAE lies: its folder, or the single file of all its parts."""
    return model if model.is_file() else model / "vae"


def find_model(name: str | Path, kind: str = "models") -> Path:
    """The folder or single file that a name or a path means.

    name  of one that ships, is installed, was pulled (ORG/NAME) or belongs to another tool; or a folder or a file
    kind  "models", "vae", "lora", "adapters" or "configs"

    UserError lists the names there are.
    """
    what = "VAE" if kind == "vae" else kind.removesuffix("s")
    if not str(name).strip():
        raise UserError(f"The {what} has an empty name; give a name ('latentpipe ls'), a folder or a file.")
    known = available(kind)
    if (place := known.get(str(name))) is not None:
        if f"{name}.safetensors" in known:
            raise UserError(f"{kind} '{name}' is both {place} and {known[f'{name}.safetensors']}; rename one of them.")
        return place
    path = Path(name)
    if kind == "vae" and (path / "model_index.json").is_file() and (path / "vae").is_dir():
        return (path / "vae").resolve()  # a whole model stands for its VAE
    if path.is_dir() or path.is_file():
        return path.resolve()
    if (place := lookup(str(name), known, what) or elsewhere(str(name), kind)) is not None:
        return place / "vae" if kind == "vae" and (place / "model_index.json").is_file() else place
    pulled = _pulled(str(name))
    raise UserError(f"No {what} '{name}': neither a folder nor a file nor {one_of(known)}.{near(name, known)}{pulled}")


def _pulled(name: str) -> str:
    """What to do where a name is another tool's pickle, or a hub's id of which its cache has nothing."""
    if (pickle := pickle_named(name)) is not None:
        return f" {pickle} is a pickle; 'latentpipe convert {pickle} --out FILE.safetensors' makes a file of it that opens."
    return f" Of the hub? 'latentpipe pull {name}' fetches it." if parse_id(name) and Path(name).suffix not in SUFFIXES else ""


def name_of(folder: Path, kind: str = "models") -> str:
    """The name under which `find_model` finds a folder or file; one elsewhere has its own name."""
    for names in (available, foreign):
        for name, path in names(kind).items():
            if path.resolve() == folder.resolve():
                return printable(name)
    return id_of(folder) or printable(folder.stem if folder.is_file() else folder.name)


def is_installed(name: str, kind: str = "models") -> bool:
    """Whether a name, as a recipe gives it, is one of the installed ones or an id in the hub's cache; a path is none."""
    return name in available(kind) or elsewhere(name, kind) is not None


def elsewhere(name: str, kind: str) -> Path | None:
    """What a name means in the folders of other tools, then in the hub's caches; None where it is in none of them."""
    place = lookup(name, foreign(kind), kind.removesuffix("s"))
    return place or cached(name, [default_cache(), *caches()])


def find_lora(name: str | Path) -> Path:
    """The file that a name ('latentpipe ls lora') or a path means; UserError lists the names there are."""
    return _find_file(name, "lora")


def named_lora(name: str) -> Path:
    """The file of an installed name; a path is none (names in prompts and pictures never open files elsewhere)."""
    return _named_file(name, "lora")


def find_embedding(name: str | Path) -> Path:
    """The file of a textual inversion that a name, in whatever case, or a path means; UserError lists the names there are."""
    return _find_file(name, "embeddings")


def named_embedding(name: str) -> Path:
    """The file of an installed embedding, in whatever case; a path is none."""
    return _named_file(name, "embeddings")


def is_installed_embedding(name: str) -> bool:
    """Whether a name, in whatever case, is that of an installed embedding."""
    return _installed(name, "embeddings", available("embeddings")) is not None


def _find_file(name: str | Path, kind: str) -> Path:
    what = FILES[kind]
    if not str(name).strip():
        raise UserError(f"The {what} has an empty name; give a name ('latentpipe ls {kind}') or a file.")
    known = available(kind)
    if str(name) in known:
        return known[str(name)]
    with suppress(OSError):  # a name too long for a file
        if Path(name).exists():
            return Path(name)
    if (place := _installed(str(name), kind, known)) is not None:
        return place
    raise UserError(f"No {what} '{name}': neither a file nor {one_of(known)}.{near(name, known)}{_pulled(str(name))}")


def _named_file(name: str, kind: str) -> Path:
    known = available(kind)
    place = _installed(name, kind, known)
    if place is None:
        raise UserError(
            f"No {FILES[kind]} '{name}' is installed; there are: {', '.join(known) or 'none'}. {PUT[kind]}{near(name, known)}"
        )
    return place


def _installed(name: str, kind: str, known: Mapping[str, Path]) -> Path | None:
    """What a name means among the installed files of a kind, an embedding's in whatever case; None where there is none."""
    place = lookup(name, known, FILES[kind]) or elsewhere(name, kind)
    if place is None and kind == "embeddings":
        lower = {whole.casefold(): path for whole, path in {**foreign(kind), **known}.items()}
        place = lookup(name.casefold(), lower, FILES[kind])
    return place


def find_part(name: str | Path) -> Path:
    """The file or folder of a part (a VAE, text encoders) that a path or an installed name means; UserError lists the names."""
    if Path(name).exists():
        return Path(name)
    known = {**available("vae"), **available("parts")}
    place = lookup(str(name), known, "part")
    for kind in ("parts", "vae", "models") if place is None else ():
        place = place or elsewhere(str(name), kind)
    if place is None:
        raise UserError(
            f"No part '{name}': neither a file nor a folder nor {one_of(known)}.{near(str(name), known)}{_pulled(str(name))}"
        )
    return place


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
    return (Path(__file__).parents[1] / "configs").resolve()


def one_of(known: Collection[str]) -> str:
    """The names that there are, in words."""
    return f"one of {', '.join(known)}" if known else "an installed one (there are none)"
