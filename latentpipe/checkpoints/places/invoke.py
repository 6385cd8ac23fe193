"""InvokeAI's models: what its database registers, read without changing it, and the folders of versions before that."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from latentpipe.utils.errors import UserError
from latentpipe.utils.reading import parse_object

TYPES = {
    "main": "models",
    "onnx": None,
    "vae": "vae",
    "lora": "lora",
    "control_lora": None,
    "embedding": "embeddings",
    "spandrel_image_to_image": "upscalers",
    "t5_encoder": "parts",
    "clip_embed": "parts",
    "text_encoder": "parts",
}
MOST = 20_000  # models
SAFE = (".safetensors", ".sft")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def registered(root: Path) -> list[tuple[str, str, Path]]:
    """Kind, name and place of each model that InvokeAI knows and that is there; UserError where its database is damaged."""
    database, models = root / "databases" / "invokeai.db", root / "models"
    rows = _configs(database) if database.is_file() else []
    found: dict[str, tuple[str, str, Path]] = {}
    for text in rows:
        try:
            config = parse_object(text, foreign=True)
        except ValueError:
            continue  # one that a later version writes otherwise
        kind, path = TYPES.get(str(config.get("type"))), models / str(config.get("path") or "")
        name = str(config.get("name") or path.stem).replace("/", "-")
        if kind and path.exists() and path != models:
            while name in found:
                name += "'"
            found[name] = (kind, name, _weights(path))
    known = {place for _, _, place in found.values()}
    for base in sorted(models.glob("*/*")):  # models/sdxl/main, as versions 3 and 4 have them
        kind = TYPES.get(base.name)
        for path in sorted(base.iterdir()) if kind and base.is_dir() else ():
            place, name = _weights(path), f"{base.parent.name}/{path.stem if path.is_file() else path.name}"
            if place not in known and (place.is_dir() or place.suffix in (*SAFE, *PICKLES)):
                found.setdefault(name, (str(kind), name, place))
    return list(found.values())


def _weights(path: Path) -> Path:
    """The only file of a folder that is no model's or part's folder, as newer versions keep single files."""
    if path.is_dir() and not any((path / name).is_file() for name in ("model_index.json", "config.json")):
        files = [file for file in path.iterdir() if file.suffix in (*SAFE, *PICKLES)]
        return files[0] if len(files) == 1 else path
    return path


def _configs(database: Path) -> list[str]:
    """The JSON text of each model. Opened such that SQLite writes no file beside it."""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(database.resolve()))}?mode=ro&immutable=1", uri=True)) as opened:
            return [str(row[0]) for row in opened.execute("SELECT config FROM models LIMIT ?", (MOST,))]
    except sqlite3.Error as error:
        raise UserError(f"{database}: no database of InvokeAI that is read here ({error}).") from None
