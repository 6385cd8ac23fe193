"""A worker: a process of its own that opens a job once and then does one task after the other, told in lines of JSON.

    python -m latentpipe.utils.worker_process latentpipe.data.shard_worker:open_shards

It reads ``{"threads", "device", "arguments"}``, then ``{"task": ...}`` and ``{"cancel": true}``; it answers with
``{"ready": version}``, ``{"event": ...}``, ``{"result": ...}`` and ``{"error": sentence}``. It ends with whoever started it: at
the end of its input.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any, TextIO

from latentpipe.utils.errors import Cancelled, UserError
from latentpipe.utils.out_of_memory import is_shortage, sentence
from latentpipe.utils.reading import MOST_HEADER, parse_json
from latentpipe.version import VERSION

Emit = Callable[[Any], None]
Job = Callable[[Any, Emit, threading.Event], Any]


def open_job(opener: str, arguments: Any, device: str, threads: int) -> Job:
    """The job that a function of this package makes of arguments and a device, with so many threads of torch.

    opener  the function as "module:name"
    """
    import torch

    module, _, name = opener.partition(":")
    if not module.startswith("latentpipe."):
        raise ValueError(f"{opener} is no function of this package")
    torch.set_num_threads(threads)
    return getattr(importlib.import_module(module), name)(arguments, device)


def answer(job: Callable[[], Any]) -> dict[str, Any]:
    """What a task comes to: {"result"}, or {"error", "kind"}: "user", "cancelled", "memory", or "crash" with the traceback."""
    try:
        return {"result": job()}
    except Cancelled as error:
        return {"error": str(error), "kind": "cancelled"}
    except UserError as error:
        return {"error": str(error), "kind": "user"}
    except Exception as error:
        if is_shortage(error):
            return {"error": sentence(error), "kind": "memory"}
        if isinstance(error, OSError):
            return {"error": f"{error.filename}: {error.strerror}" if error.filename else str(error), "kind": "user"}
        return {"error": traceback.format_exc(limit=20), "kind": "crash"}


def main(opener: str) -> None:
    """Serve tasks from stdin until it ends; what anything prints goes to stderr, so that answers stay whole lines."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; whoever started this one decides
    warnings.simplefilter("ignore")  # whoever started this one has opened the same parts, and has told
    lines: queue.Queue[Any] = queue.Queue()
    cancel = threading.Event()
    threading.Thread(target=_listen, args=(lines, cancel), name="latentpipe_listen", daemon=True).start()
    begin = lines.get()
    job: Job | None = None

    def opened() -> str:
        nonlocal job
        job = open_job(opener, begin["arguments"], begin["device"], begin["threads"])
        return VERSION

    first = answer(opened)
    _send(replies, {"ready": VERSION} if job is not None else first)
    while job is not None:
        task, work = lines.get(), job
        emit: Emit = lambda event: _send(replies, {"event": event})  # noqa: E731
        _send(replies, answer(lambda task=task, work=work, emit=emit: work(task, emit, cancel)))  # type: ignore[misc]
    os._exit(1)


def _listen(lines: queue.Queue[Any], cancel: threading.Event) -> None:
    """Tasks into the queue, a cancel at once; the end of the input ends the process, whatever it is at."""
    for line in sys.stdin:
        told = parse_json(line, most=MOST_HEADER, infinite=True)
        if "cancel" in told:
            cancel.set()
        elif "task" in told:
            cancel.clear()
            lines.put(told["task"])
        else:
            lines.put(told)
    os._exit(0)


def _send(replies: TextIO, message: Any) -> None:
    try:
        replies.write(json.dumps(message) + "\n")
        replies.flush()
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
