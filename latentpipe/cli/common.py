"""What several verbs share: opening a VAE, a bar, and what is written and printed at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentpipe.utils.progress import ProgressCallback


def open_stage(vae: str, size: int | None, device: str | None) -> tuple[Any, str, int]:
    """The stage, its name, and the side in pixels that it is explored at."""
    from latentpipe.checkpoints.registry import find_model, name_of
    from latentpipe.checkpoints.vae_io import open_vae
    from latentpipe.data.image_set import side_for
    from latentpipe.utils.system import best_device
    from latentpipe.vae.stage import VAEStage

    path = find_model(vae, "vae")
    file = open_vae(path)
    stage = VAEStage(file.build(), file.space).eval().to(device or best_device())
    return stage, name_of(path, "vae"), side_for(stage.space.downscale, size)


def check_png(path: Path) -> None:
    """Refuse before the work what could not be written after it."""
    from latentpipe.utils.errors import UserError

    if path.suffix.lower() != ".png" or path.is_dir():
        raise UserError(f"--out {path}: expected the name of a file that ends in .png.")


def save_png(page: Any, path: Path) -> None:
    """Write a picture as PNG, whole or not at all."""
    from latentpipe.utils.io import atomic_file

    with atomic_file(path) as part:
        page.save(part, format="PNG")


def print_result(facts: dict[str, Any], table: str, out: Path, json: bool) -> None:
    """The JSON object, or the table and the path of what was written."""
    from json import dumps

    if json:
        print(dumps(facts, indent=2, ensure_ascii=False, allow_nan=False))
        return
    if table:
        print(table)
    print(out)


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """A report function whose bar on stderr appears after a second and begins anew with each kind of work."""
    import sys

    from tqdm import tqdm

    bar = tqdm(disable=None, leave=False, delay=1.0, file=sys.stderr)
    before = ("", 0)

    def report(done: int, total: int, what: str) -> None:
        nonlocal before
        if what != before[0] or done < before[1]:
            bar.reset(total)
            bar.set_description(what, refresh=False)
            before = (what, 0)
        bar.update(done - before[1])
        before = (what, done)

    try:
        yield report
    finally:
        bar.close()


def pictures_of(folder: Path, side: int, max_images: int | None = None) -> Any:
    """Pictures of a folder (the first `most`) as images of `side` pixels; the files that were skipped are told."""
    import warnings

    from latentpipe.data.image_folder import read_pictures
    from latentpipe.utils.errors import LatentpipeWarning
    from latentpipe.utils.images import to_images

    pictures = read_pictures(folder, side, max_images)
    if pictures.skipped:
        warnings.warn(LatentpipeWarning(f"{folder}: {pictures.report()}"), stacklevel=2)
    return to_images(pictures.pixels)


def as_json(value: Any) -> str:
    """The value as indented JSON, its letters as they are."""
    import json

    return json.dumps(value, indent=2, ensure_ascii=False)
