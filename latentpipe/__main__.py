"""python -m latentpipe, and the command latentpipe"""

from __future__ import annotations

from latentpipe.ending import interruptible, leave, say, status_of


def main() -> int:
    """Run one verb of the command line; a process that is stopped ends here, also while it still imports."""
    try:
        with interruptible():
            from latentpipe.cli import main as run

            status = run()
    except KeyboardInterrupt as error:
        say(error)
        leave(status_of(error))
    except SystemExit as end:
        if end.code in (0, 130, 143):
            leave(int(end.code))
        raise
    if status in (130, 143):
        leave(status)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
