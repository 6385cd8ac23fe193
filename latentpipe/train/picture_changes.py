"""Which pictures a run began with, so that one which goes on says what has changed since."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from latentpipe.train.config import Run
from latentpipe.utils.errors import LatentpipeWarning
from latentpipe.utils.io import atomic_file, printable, read_json

ROLL_FILE = "pictures.json"


def follow(run: Run, source: Path, names: Iterable[str] | Mapping[str, int], begun: Callable[[], None]) -> Callable[[], None]:
    """`begun`, which then also keeps the names of the training pictures in ``work/pictures.json``.

    source  the folder or file they are from, as a message shows it
    names   one for each picture, several may have the same; or how many pictures have each
    A run that goes on (`run.resume`) with other pictures than those kept is told in a warning how many are new or gone.
    """
    path, now = run.work / ROLL_FILE, Counter[str]()
    for name, count in names.items() if isinstance(names, Mapping) else ((name, 1) for name in names):
        now[printable(name)] += count
    if run.resume and path.is_file():
        before = Counter({str(name): count for name, count in read_json(path).items() if isinstance(count, int)})
        new, gone = (now - before).total(), (before - now).total()
        if new or gone:
            order = "in another order than without the pause" if now.total() != before.total() else "in the order of before"
            warnings.warn(
                f"{source}: {new} picture{' is' if new == 1 else 's are'} new and {gone} gone since this run began; "
                f"the steps that are left see the {now.total()} pictures of now, {order}",
                LatentpipeWarning,
                stacklevel=3,
            )

    def write() -> None:
        begun()
        with atomic_file(path) as part:
            part.write_text(json.dumps(now), encoding="utf-8")

    return write
