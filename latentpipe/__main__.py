"""python -m latentpipe, and the command latentpipe"""

from __future__ import annotations

from typing import NoReturn

from latentpipe.utils.signals import leave, say, status_of, terminable


def main() -> NoReturn:
    """Run one verb of the command line; the process ends here as soon as the work is done, or where it is stopped.

    Taking torch and its modules apart would take seconds, and nothing of that is needed.
    """
    try:
        with terminable():
            from latentpipe.cli.app import main as run

            status = run()
    except KeyboardInterrupt as error:
        say(error)
        status = status_of(error)
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        status = end.code or 0
    leave(status)


if __name__ == "__main__":
    main()
