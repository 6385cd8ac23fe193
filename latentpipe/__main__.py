"""python -m latentpipe, and the command latentpipe"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from latentpipe.utils.signals import leave, say, status_of, terminable

TRAINS = ("train", "distil")  # verbs that use most of what others leave alone
LARGE = (
    "anomaly",
    "compare",
    "compress",
    "decompress",
    "encode",
    "evaluate",
    "fit-codec",
    "health",
)  # whole pictures, many of them


def main() -> NoReturn:
    """Run one verb of the command line; the process ends here as soon as the work is done, or where it is stopped.

    Taking torch and its modules apart would take seconds, and nothing of that is needed.
    """
    try:
        with terminable():
            from latentpipe.cli.app import main as run

            _prepare(sys.argv[1] if sys.argv[1:] else "")
            status = run()
    except KeyboardInterrupt as error:
        say(error)
        status = status_of(error)
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        status = end.code or 0
    leave(status)


def _prepare(verb: str) -> None:
    """What this process alone is set to before torch is imported."""
    from latentpipe.utils.deferred_imports import put_off
    from latentpipe.utils.threads import spin_less_where_busy

    spin_less_where_busy()
    if verb in LARGE:  # huge pages: a quarter less time from 256 px on, more for batches of small pictures (dev/LOG.md)
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not verb.startswith(TRAINS):
        put_off()


if __name__ == "__main__":
    main()
